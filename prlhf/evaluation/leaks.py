"""The shuffled-user control: what an accuracy is worth when the users of the rows are drawn anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prlhf.data.records import PreferenceRow, pair_content
from prlhf.data.tokenize import TokenizedPair
from prlhf.evaluation.accuracy import score_pairs
from prlhf.models.personalized import PersonalizedModel

NUM_DRAWS = 20
MAX_SCORED_ROWS = 1200  # times a user each: about so many are scored, the others left out
CLEAR_TASTE = 0.9  # share of a user's training pairs won by one side of length, from which it is a taste,
MIN_TASTE_ROWS = 20  # and how many pairs it takes


def shuffled_users(
    model: PersonalizedModel,
    rows: Sequence[PreferenceRow],
    tokenized: Sequence[TokenizedPair],
    *,
    seed: int,
    **options: Any,
) -> dict[str, Any] | None:
    """Accuracy when each row's user is drawn anew from the users' frequencies, mean of 20 draws.

    Args:
        rows: the records; `tokenized[i].row` indexes them.
        **options: of `score_pairs`.
    Returns: {"mean", "num_rows", "num_draws"}; None without rows. A random part of the pairs is scored, each with the
        rows of all who judged it: what opposed users of a pair owe to chance cancels out.
    """
    if not tokenized:
        return None
    generator = np.random.default_rng(seed)
    num_users = len({ids.user_id for ids in tokenized})
    kept = _draw_pairs(rows, tokenized, MAX_SCORED_ROWS // min(num_users, NUM_DRAWS), generator)
    drawn = generator.integers(len(tokenized), size=(NUM_DRAWS, len(kept)))
    shuffled = [
        replace(ids, user_id=tokenized[source].user_id)
        for draw in drawn
        for ids, source in zip(kept, draw, strict=True)
    ]
    margins = score_pairs(model, rows, shuffled, **options).individual
    return {"mean": float((margins > 0).mean()), "num_rows": len(kept), "num_draws": NUM_DRAWS}


def _draw_pairs(
    rows: Sequence[PreferenceRow], tokenized: Sequence[TokenizedPair], num_rows: int, generator: np.random.Generator
) -> list[TokenizedPair]:
    """All rows of randomly drawn pairs, until there are at least `num_rows` or no more."""
    pairs: dict[str, list[TokenizedPair]] = {}
    for ids in tokenized:
        pairs.setdefault(rows[ids.row].pair_id, []).append(ids)
    members = list(pairs.values())
    kept: list[TokenizedPair] = []
    for place in generator.permutation(len(members)):
        if len(kept) >= num_rows:
            break
        kept += members[place]
    return kept


def expected_when_shuffled(train: Sequence[PreferenceRow], rows: Sequence[PreferenceRow]) -> dict[str, float] | None:
    """What a model that serves every user perfectly scores with shuffled users, from the labels.

    The sum over users u, v of their shares times how often v agrees with u: 1 for u = v; measured on the pairs that
    both judged; else, where both clearly prefer longer or shorter responses in training, by those tastes; else one
    half. For two opposed tastes of share p it is p^2 + (1 - p)^2.

    Returns: {"mean", "known": the share of the sum that is not such a one half}; None without rows.
    """
    counts = Counter(row.user_id for row in rows)
    if not counts:
        return None
    users = list(counts)
    shares = np.array([counts[user] for user in users]) / len(rows)
    agreement = _agreement(users, [*train, *rows], train)
    known = ~np.isnan(agreement)
    weights = np.outer(shares, shares)
    mean = float((weights * np.where(known, agreement, 0.5)).sum())
    return {"mean": mean, "known": float(weights[known].sum())}


def _agreement(
    users: Sequence[str], rows: Sequence[PreferenceRow], train: Sequence[PreferenceRow]
) -> NDArray[np.float64]:
    """(U, U) how often two users agree; NaN where nothing tells."""
    place = {user: i for i, user in enumerate(users)}
    verdicts: dict[object, list[tuple[int, str]]] = {}
    for row in rows:
        if row.user_id in place:
            verdicts.setdefault(pair_content(row), []).append((place[row.user_id], row.chosen))
    agree, both = np.zeros((len(users), len(users))), np.zeros((len(users), len(users)))
    for judged in verdicts.values():
        for u, chosen in judged:
            for v, other in judged:
                both[u, v] += 1
                agree[u, v] += chosen == other
    longer = _longer_shares(users, train)
    by_length = np.outer(longer, longer) + np.outer(1 - longer, 1 - longer)
    agreement = np.where(both > 0, agree / np.maximum(both, 1), by_length)
    np.fill_diagonal(agreement, 1.0)
    return agreement


def _longer_shares(users: Sequence[str], train: Sequence[PreferenceRow]) -> NDArray[np.float64]:
    """How often each user preferred the longer response; NaN where that is no clear taste."""
    outcomes: dict[str, list[bool]] = {user: [] for user in users}
    for row in train:
        if row.user_id in outcomes and len(row.chosen) != len(row.rejected):
            outcomes[row.user_id].append(len(row.chosen) > len(row.rejected))
    shares = [float(np.mean(own)) if len(own) >= MIN_TASTE_ROWS else np.nan for own in outcomes.values()]
    return np.array([share if max(share, 1 - share) >= CLEAR_TASTE else np.nan for share in shares])
