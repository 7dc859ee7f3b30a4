"""The report of `prlhf data check` on unpaired rows."""

from __future__ import annotations

from collections import Counter
from typing import Any

from prlhf.data.check import SHOWN_ROWS, SHOWN_USERS, quantiles, show_masked
from prlhf.data.collate import collate_responses
from prlhf.data.labelled import pairs_from_labelled
from prlhf.data.prepared import SPLITS
from prlhf.data.quoting import quote
from prlhf.data.records import LabelledData, LabelledRow
from prlhf.data.splits import prompt_group
from prlhf.data.tokenize import tokenize_responses


def make_labelled_report(data: LabelledData, tokenizer: Any, **limits: int) -> str:
    """Text report on unpaired rows: splits, rendered rows with their masks, lengths, users, contradictions, leaks.

    Args:
        **limits: max_tokens, max_prompt_tokens, num_user_tokens, with_user_text.
    """
    parts = [(name, getattr(data, name)) for name in SPLITS if getattr(data, name)]
    sections = [
        f"data: {data.source} (unpaired rows)",
        _splits(parts),
        _rendered(data, tokenizer, limits),
        _lengths(parts, tokenizer, limits),
        _users(data, parts),
        _contradictions(parts),
        _leaks(data, parts),
    ]
    return "\n\n".join(sections) + "\n"


def _splits(parts: list[tuple[str, list[LabelledRow]]]) -> str:
    lines = ["splits (pairs: liked and disliked responses of one user to one prompt; only they are evaluated)"]
    for name, rows in parts:
        lines.append(
            f"  {name:<12} rows {len(rows):>7}  liked {_liked(rows):>7}  prompts {len({row.prompt for row in rows}):>7}"
            f"  users {len({row.user_id for row in rows}):>6}  pairs {len(pairs_from_labelled(rows)):>7}"
        )
    return "\n".join(lines)


def _liked(rows: list[LabelledRow]) -> int:
    return sum(row.label for row in rows)


def _rendered(data: LabelledData, tokenizer: Any, limits: dict[str, Any]) -> str:
    lines = ["rendered rows (the scored part, where labels are not masked, stands between << and >>)"]
    rows = tokenize_responses(data.train[:SHOWN_ROWS], tokenizer, **limits).rows
    if not rows:
        return "\n".join([*lines, "  none of the first rows can be used"])
    batch = collate_responses(rows, pad_id=tokenizer.eos_token_id)
    for position, row in enumerate(rows):
        source = data.train[row.row]
        ids, labels = (tensor[position, : row.num_tokens].tolist() for tensor in (batch.input_ids, batch.labels))
        verdict = "liked" if source.label else "disliked"
        lines.append(f"  user {quote(source.user_id)}, {verdict}: {show_masked(tokenizer, ids, labels)}")
    return "\n".join(lines)


def _lengths(parts: list[tuple[str, list[LabelledRow]]], tokenizer: Any, limits: dict[str, Any]) -> str:
    lines = [f"tokens (limits: {', '.join(f'{name} {value}' for name, value in limits.items())})"]
    for name, rows in parts:
        tokenized = tokenize_responses(rows, tokenizer, **limits)
        dropped = ", ".join(f"{reason} {count}" for reason, count in sorted(tokenized.dropped.items())) or "none"
        lines.append(f"  {name}: dropped {dropped}")
        lines.append(f"    prompt   {quantiles([len(row.prompt_ids) for row in tokenized.rows])}")
        for verdict, label in (("liked   ", True), ("disliked", False)):
            lengths = [len(row.response_ids) for row in tokenized.rows if rows[row.row].label == label]
            lines.append(f"    {verdict} {quantiles(lengths)}")
    return "\n".join(lines)


def _users(data: LabelledData, parts: list[tuple[str, list[LabelledRow]]]) -> str:
    user_ids = data.user_ids()
    by_user = [(name, Counter(row.user_id for row in rows)) for name, rows in parts]
    liked = Counter(row.user_id for row in data.train if row.label)
    lines = [f"users: {len(user_ids)} seen, {len({row.user_id for row in data.eval_unseen})} unseen"]
    for user_id in user_ids[:SHOWN_USERS]:
        counts = ", ".join(f"{name} {count[user_id]}" for name, count in by_user)
        lines.append(f"  {quote(user_id)}: {counts}; liked in train {liked[user_id]}")
    if len(user_ids) > SHOWN_USERS:
        lines.append(f"  and {len(user_ids) - SHOWN_USERS} more")
    return "\n".join(lines)


def _contradictions(parts: list[tuple[str, list[LabelledRow]]]) -> str:
    lines = ["contradictions"]
    for name, rows in parts:
        labels: dict[object, set[bool]] = {}
        for row in rows:
            labels.setdefault((row.user_id, row.prompt, row.response), set()).add(row.label)
        both = sum(len(given) > 1 for given in labels.values())
        lines.append(f"  {name}: responses liked and disliked by one user {both}")
    return "\n".join(lines)


def _leaks(data: LabelledData, parts: list[tuple[str, list[LabelledRow]]]) -> str:
    lines = ["overlap with train (rows); a response to the same prompt in both is an error"]
    prompts, responses = {prompt_group(row) for row in data.train}, {row.response for row in data.train}
    for name, rows in parts[1:]:
        shared = {
            "prompt": sum(prompt_group(row) in prompts for row in rows),
            "response": sum(row.response in responses for row in rows),
        }
        overlap = ", ".join(f"{what} {count} ({count / len(rows):.1%})" for what, count in shared.items())
        lines.append(f"  {name} of {len(rows)}: {overlap}")
    return "\n".join(lines)
