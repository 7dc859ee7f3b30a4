"""Baselines without training: the frozen reference told what the user likes, and rules that look at form alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prlhf.data.records import PreferenceRow
from prlhf.data.splits import prompt_group
from prlhf.data.tokenize import TokenizedPair, encode_prompt
from prlhf.evaluation.accuracy import summarize_accuracy, user_accuracies
from prlhf.evaluation.scoring import score_pair_responses
from prlhf.models.policy import PersonalizedPolicy

FEW_SHOT_ROWS = 300  # few-shot prompts are long: so many rows in all, the same number of each user
MIN_FORMAT_ROWS = 20  # a user with fewer training rows gets the format rule of all users
RIDGE = 1.0
NUM_NEWTON_STEPS = 20
Front = Callable[[PreferenceRow, TokenizedPair], PreferenceRow | None]


def prompted_baseline(
    policy: PersonalizedPolicy,
    rows: Sequence[PreferenceRow],
    tokenized: Sequence[TokenizedPair],
    preferences: Mapping[str, str],
    *,
    max_tokens: int,
    seed: int,
    **scoring: Any,
) -> dict[str, Any] | None:
    """Reward accuracy of the reference with the user's preference sentence in front of the prompt.

    A row is right when the sentence raises the chosen response's log-prob by more than the rejected one's:
    log pi_ref(y1 | s, x) / pi_ref(y1 | x) > log pi_ref(y2 | s, x) / pi_ref(y2 | x).

    Args:
        rows: the records, whose user texts stand in both prompts; `tokenized[i].row` indexes them.
        preferences: user id -> sentence.
        max_tokens: for prompt and response together; a row that does not fit is left out.
        **scoring: of `score_sequences`.
    Returns: the accuracy block with `per_user`; None where no row's user has a sentence.
    """

    def front(row: PreferenceRow, _: TokenizedPair) -> PreferenceRow | None:
        """The row behind its user's sentence."""
        sentence = preferences.get(row.user_id)
        return put_in_front(row, sentence, separator=" ") if sentence else None

    return _baseline(policy, rows, tokenized, front, max_tokens=max_tokens, seed=seed, **scoring)


def few_shot_baseline(
    policy: PersonalizedPolicy,
    rows: Sequence[PreferenceRow],
    tokenized: Sequence[TokenizedPair],
    train: Iterable[PreferenceRow],
    *,
    num_pairs: int,
    max_tokens: int,
    seed: int,
    **scoring: Any,
) -> dict[str, Any] | None:
    """`prompted_baseline` with pairs that the user judged in training in place of a sentence.

    Of up to `num_pairs` pairs, drawn once a user, as many stand in front of a prompt as leave room for both responses;
    none of them has the row's prompt. Rows for which not even one fits are left out.

    Returns: with `pairs`, the mean number in front of a prompt, besides.
    """
    if not num_pairs:
        return None
    examples = _draw_examples(train, num_pairs, seed)
    used: list[int] = []

    def front(row: PreferenceRow, ids: TokenizedPair) -> PreferenceRow | None:
        """The row behind as many examples as fit."""
        others = [pair for pair in examples.get(row.user_id, ()) if prompt_group(pair) != prompt_group(row)]
        for count in range(len(others), 0, -1):
            shown = put_in_front(row, show_pairs(others[:count]), separator="\n")
            if _prompt_room(policy, shown, ids, max_tokens) is not None:
                used.append(count)
                return shown
        return None

    chosen = _rows_of_each_user(rows, tokenized, FEW_SHOT_ROWS)
    block = _baseline(policy, rows, chosen, front, max_tokens=max_tokens, seed=seed, **scoring)
    return None if block is None else {**block, "pairs": float(np.mean(used))}


def put_in_front(row: PreferenceRow, text: str, *, separator: str) -> PreferenceRow:
    """The row with a text before its prompt; before a conversation it joins the user text, a system message."""
    if isinstance(row.prompt, str):
        return replace(row, prompt=f"{text}{separator}{row.prompt}")
    return replace(row, user_text=f"{row.user_text}\n{text}".strip())


def show_pairs(pairs: Sequence[PreferenceRow]) -> str:
    """Judged pairs as text."""
    blocks = [
        f"Prompt: {_last_message(pair)}\nAn answer that I like: {pair.chosen}\nAn answer that I do not like: "
        f"{pair.rejected}\n"
        for pair in pairs
    ]
    return "\n".join(["How I judged other answers:", *blocks, "Answer this prompt as I like it:"])


def _last_message(row: PreferenceRow) -> str:
    return row.prompt if isinstance(row.prompt, str) else row.prompt[-1].content


def _draw_examples(train: Iterable[PreferenceRow], count: int, seed: int) -> dict[str, list[PreferenceRow]]:
    by_user: dict[str, list[PreferenceRow]] = {}
    for row in train:
        by_user.setdefault(row.user_id, []).append(row)
    generator = np.random.default_rng(seed)
    return {user: [own[i] for i in generator.permutation(len(own))[:count]] for user, own in by_user.items()}


def _rows_of_each_user(
    rows: Sequence[PreferenceRow], tokenized: Sequence[TokenizedPair], limit: int
) -> list[TokenizedPair]:
    """The first rows of each user, the same number of each, `limit` in all or one of each user."""
    num_users = len({rows[ids.row].user_id for ids in tokenized})
    counts: dict[str, int] = {}
    kept = []
    for ids in tokenized:
        user_id = rows[ids.row].user_id
        counts[user_id] = counts.get(user_id, 0) + 1
        if counts[user_id] <= max(1, limit // num_users):
            kept.append(ids)
    return kept


def _prompt_room(
    policy: PersonalizedPolicy, row: PreferenceRow, ids: TokenizedPair, max_tokens: int
) -> tuple[int, ...] | None:
    """Ids of the row's prompt, uncut; None where prompt and responses exceed `max_tokens`."""
    prompt_ids = encode_prompt(policy.tokenizer, row.prompt, row.user_text, max_prompt_tokens=10**9)
    return None if len(prompt_ids) + max(map(len, ids.responses)) > max_tokens else tuple(prompt_ids)


def _baseline(
    policy: PersonalizedPolicy,
    rows: Sequence[PreferenceRow],
    tokenized: Sequence[TokenizedPair],
    front: Front,
    *,
    max_tokens: int,
    seed: int,
    **scoring: Any,
) -> dict[str, Any] | None:
    """Accuracy of the reference's log-ratios of the prompt that `front` makes to the bare one."""
    plain, prompted = [], []
    for ids in tokenized:
        shown = front(rows[ids.row], ids)
        prompt_ids = None if shown is None else _prompt_room(policy, shown, ids, max_tokens)
        if prompt_ids is not None:
            plain.append(ids)
            prompted.append(replace(ids, prompt_ids=prompt_ids))
    if not plain:
        return None
    with policy.reference.active() as frozen:
        before, after = (score_pair_responses(frozen, part, None, **scoring).double().numpy()
                         for part in (plain, prompted))
    margins = (after - before)[:, 0] - (after - before)[:, 1]
    kept = [rows[ids.row] for ids in plain]
    block = summarize_accuracy(margins, kept, seed=seed)
    return None if block is None else {**block, "per_user": user_accuracies(margins, kept)}


def format_only_accuracy(train: Sequence[PreferenceRow], rows: Sequence[PreferenceRow]) -> float | None:
    """Accuracy of a logistic rule on the form of the two responses: length, sentences, lists, punctuation, case.

    Each user's own rule, of all users for those with few training rows; ties count one half.

    Returns: share of right choices among `rows`; None without rows of either kind.
    """
    if not train or not rows:
        return None
    features = np.array([_format(row.chosen) - _format(row.rejected) for row in train])
    # About zero, where the rule has no threshold: a difference that all rows share tells as much as any.
    scale = np.maximum(np.sqrt((features**2).mean(axis=0)), 1e-9)
    members: dict[str, list[int]] = {}
    for i, row in enumerate(train):
        members.setdefault(row.user_id, []).append(i)
    overall = _fit_logistic(features / scale)
    rules = {
        user: _fit_logistic(features[own] / scale) for user, own in members.items() if len(own) >= MIN_FORMAT_ROWS
    }
    margins = [
        float((_format(row.chosen) - _format(row.rejected)) / scale @ rules.get(row.user_id, overall)) for row in rows
    ]
    return float(np.mean([0.5 if margin == 0 else float(margin > 0) for margin in margins]))


def _format(text: str) -> NDArray[np.float64]:
    words = text.split()
    counts = [
        len(text), len(words), len(re.findall(r"[.!?]+(?:\s|$)", text)), text.count("\n"),
        len(re.findall(r"^\s*(?:[-*\u2022]|\d+[.)])\s", text, re.MULTILINE)), len(re.findall(r"[*_`#]", text)),
        text.count("!"), text.count("?"), text.count(","), sum(character.isdigit() for character in text),
        sum(character.isupper() for character in text), sum(not character.isascii() for character in text),
    ]
    # Logarithms, so that a difference is a ratio: what counts in a short text must not drown in a long one.
    return np.log1p(np.array(counts, dtype=np.float64))


def _fit_logistic(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights that maximise the mean log sigmoid of the differences with a ridge, by Newton's method."""
    weights = np.zeros(differences.shape[1])
    for _ in range(NUM_NEWTON_STEPS):
        wrong = 1 / (1 + np.exp(np.clip(differences @ weights, -30, 30)))
        gradient = differences.T @ wrong - RIDGE * weights
        curvature = (differences * (wrong * (1 - wrong))[:, None]).T @ differences + RIDGE * np.eye(len(weights))
        weights = weights + np.linalg.solve(curvature, gradient)
    return weights
