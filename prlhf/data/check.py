"""The report of `prlhf data check`: what the model will see, and what evaluation on this data can prove."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from prlhf.data.collate import IGNORE_INDEX, collate_pairs
from prlhf.data.prepared import SPLITS
from prlhf.data.quoting import quote
from prlhf.data.records import PreferenceData, PreferenceRow, pair_content
from prlhf.data.splits import prompt_group
from prlhf.data.tokenize import TokenizedPair, tokenize_pairs
from prlhf.data.user_index import UserIndex

SHOWN_ROWS = 3
SHOWN_USERS = 20


def make_report(
    data: PreferenceData,
    tokenizer: Any = None,
    *,
    max_tokens: int = 1024,
    max_prompt_tokens: int = 512,
    num_user_tokens: int = 0,
    with_user_text: bool = True,
) -> str:
    """Text report on preference data.

    Rendered rows with their masks, rows dropped and lengths (with a tokenizer), users, duplicates, leaks, and what a
    rule that looks at length alone scores.

    Args:
        tokenizer: None leaves out what needs tokens; lengths are in characters then.
    """
    sections = [f"data: {data.source}", _splits(data)]
    if tokenizer is not None:
        limits = {
            "max_tokens": max_tokens,
            "max_prompt_tokens": max_prompt_tokens,
            "num_user_tokens": num_user_tokens,
            "with_user_text": with_user_text,
        }
        sections += [_rendered(data, tokenizer, limits), _token_lengths(data, tokenizer, limits)]
    sections += [_character_lengths(data), _users(data), _duplicates(data), _leaks(data), _length_only(data)]
    return "\n\n".join(sections) + "\n"


def length_only_accuracy(train: Iterable[PreferenceRow], rows: Iterable[PreferenceRow]) -> float | None:
    """Accuracy of the best rule on length alone: each user's shorter or longer response, whichever won in training.

    Lengths are in characters; equal lengths count one half. Users without training rows get the rule that is best over
    all of them. A tie in training goes to longer.

    Returns: share of right choices among `rows`; None without rows.
    """
    votes: dict[str, float] = defaultdict(float)
    for row in train:
        votes[row.user_id] += _longer_won(row) - 0.5
    overall = sum(votes.values())
    scores = []
    for row in rows:
        prefers_longer = votes.get(row.user_id, overall) >= 0
        scores.append(_longer_won(row) if prefers_longer else 1 - _longer_won(row))
    return sum(scores) / len(scores) if scores else None


def majority_share(rows: Sequence[PreferenceRow]) -> float | None:
    """Accuracy of the better of two rules that know no user: always the longer response, or always the shorter one.

    What a model without users can reach where users look at length alone. Equal lengths count one half.

    Returns: a share from 0.5 to 1; None without rows.
    """
    if not rows:
        return None
    longer = sum(map(_longer_won, rows)) / len(rows)
    return max(longer, 1 - longer)


def count_overlap(train: Iterable[PreferenceRow], rows: Sequence[PreferenceRow]) -> dict[str, int]:
    """How many rows share their prompt, their pair or a response with a training row."""
    training = list(train)
    prompts = {prompt_group(row) for row in training}
    pairs = {pair_content(row) for row in training}
    responses = {response for row in training for response in row.responses}
    return {
        "prompt": sum(prompt_group(row) in prompts for row in rows),
        "pair": sum(pair_content(row) in pairs for row in rows),
        "response": sum(not responses.isdisjoint(row.responses) for row in rows),
    }


def _longer_won(row: PreferenceRow) -> float:
    difference = len(row.chosen) - len(row.rejected)
    return 0.5 if difference == 0 else float(difference > 0)


def _splits(data: PreferenceData) -> str:
    lines = [
        f"  {name:<12} rows {len(rows):>7}  pairs {len({pair_content(row) for row in rows}):>7}"
        f"  prompts {len({row.prompt for row in rows}):>7}  users {len({row.user_id for row in rows}):>6}"
        for name, rows in _parts(data)
    ]
    return "\n".join(["splits", *lines])


def _rendered(data: PreferenceData, tokenizer: Any, limits: dict[str, Any]) -> str:
    """The first rows as their token ids read, taken from the batch that training would build."""
    rows = tokenize_pairs(data.train[:SHOWN_ROWS], tokenizer, UserIndex(data.user_ids()), **limits).rows
    lines = ["rendered rows (the scored part, where labels are not masked, stands between << and >>)"]
    if not rows:
        return "\n".join([*lines, "  none of the first rows can be used"])
    batch = collate_pairs(rows, pad_id=tokenizer.eos_token_id)
    for position, row in enumerate(rows):
        source = data.train[row.row]
        lines.append(f"  pair {quote(source.pair_id)}, user {quote(source.user_id)} = {row.user_id}")
        for name, index in (("chosen", position), ("rejected", position + len(rows))):
            length = len(row.prompt_ids) + len(row.chosen_ids if name == "chosen" else row.rejected_ids)
            ids, labels = batch.input_ids[index, :length].tolist(), batch.labels[index, :length].tolist()
            lines.append(f"    {name}: {show_masked(tokenizer, ids, labels)}")
    return "\n".join(lines)


def show_masked(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> str:
    """A sequence as text, the part that labels score between << and >>."""
    masked = [token for token, label in zip(ids, labels, strict=True) if label == IGNORE_INDEX]
    scored = [label for label in labels if label != IGNORE_INDEX]
    return f"{ascii(tokenizer.decode(masked))} <<{ascii(tokenizer.decode(scored))}>>"


def _token_lengths(data: PreferenceData, tokenizer: Any, limits: dict[str, Any]) -> str:
    lines = [f"tokens (limits: {', '.join(f'{name} {value}' for name, value in limits.items())})"]
    for name, rows in _parts(data):
        tokenized = tokenize_pairs(rows, tokenizer, None, **limits)
        dropped = ", ".join(f"{reason} {count}" for reason, count in sorted(tokenized.dropped.items())) or "none"
        truncated = sum(_is_truncated(row, tokenizer.eos_token_id) for row in tokenized.rows)
        lines.append(f"  {name}: dropped {dropped}; truncated responses in {truncated} rows")
        lines.append(f"    prompt   {quantiles([len(row.prompt_ids) for row in tokenized.rows])}")
        lines.append(f"    chosen   {quantiles([len(row.chosen_ids) for row in tokenized.rows])}")
        lines.append(f"    rejected {quantiles([len(row.rejected_ids) for row in tokenized.rows])}")
    return "\n".join(lines)


def _is_truncated(row: TokenizedPair, eos: int) -> bool:
    return row.chosen_ids[-1] != eos or row.rejected_ids[-1] != eos


def _character_lengths(data: PreferenceData) -> str:
    lines = ["characters"]
    for name, rows in _parts(data):
        lines.append(f"  {name}: chosen {quantiles([len(row.chosen) for row in rows])}")
        lines.append(f"  {' ' * len(name)}  rejected {quantiles([len(row.rejected) for row in rows])}")
    return "\n".join(lines)


def quantiles(values: Sequence[int]) -> str:
    """The spread of some lengths in one line."""
    if not values:
        return "-"
    ordered = sorted(values)
    shown = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}
    return "  ".join(f"{name} {ordered[round(share * (len(ordered) - 1))]}" for name, share in shown.items())


def _users(data: PreferenceData) -> str:
    user_ids = data.user_ids()
    counts = {name: Counter(row.user_id for row in rows) for name, rows in _parts(data)}
    lines = [f"users: {len(user_ids)} seen, {len(counts.get('eval_unseen', ()))} unseen"]
    for user_id in user_ids[:SHOWN_USERS]:
        lines.append(f"  {quote(user_id)}: " + ", ".join(f"{name} {count[user_id]}" for name, count in counts.items()))
    if len(user_ids) > SHOWN_USERS:
        lines.append(f"  and {len(user_ids) - SHOWN_USERS} more")
    return "\n".join(lines)


def _duplicates(data: PreferenceData) -> str:
    """Repeated rows, pairs that one user judged both ways, and pairs that users judge differently."""
    lines = ["duplicates"]
    for name, rows in _parts(data):
        judgments = Counter((row.user_id, row.prompt, row.chosen, row.rejected) for row in rows)
        repeated = sum(count - 1 for count in judgments.values())
        swapped = ((user, prompt, rejected, chosen) for user, prompt, chosen, rejected in judgments)
        both_ways = sum(judgment in judgments for judgment in swapped) // 2
        winners = defaultdict(set)
        for row in rows:
            winners[pair_content(row)].add(row.chosen)
        disputed = sum(len(chosen) > 1 for chosen in winners.values())
        lines.append(f"  {name}: repeated rows {repeated}; pairs judged both ways by one user {both_ways}; "
                     f"pairs with both verdicts {disputed} of {len(winners)}")
    return "\n".join(lines)


def _leaks(data: PreferenceData) -> str:
    """What evaluation rows share with the training rows; a shared pair is an error, the rest is for the reader."""
    lines = ["overlap with train (rows)"]
    for name, rows in _parts(data):
        if name == "train":
            continue
        shared = count_overlap(data.train, rows)
        overlap = ", ".join(f"{what} {count} ({count / len(rows):.1%})" for what, count in shared.items())
        lines.append(f"  {name} of {len(rows)}: {overlap}{'  LEAK: the same pair' if shared['pair'] else ''}")
    return "\n".join(lines)


def _length_only(data: PreferenceData) -> str:
    lines = ["length alone (each user's better of shorter and longer on train; unseen users: the better one over all)"]
    for name, rows in _parts(data):
        lines.append(f"  {name}: {length_only_accuracy(data.train, rows):.3f}")
    return "\n".join(lines)


def _parts(data: PreferenceData) -> list[tuple[str, list[PreferenceRow]]]:
    """The splits that have rows."""
    return [(name, getattr(data, name)) for name in SPLITS if getattr(data, name)]
