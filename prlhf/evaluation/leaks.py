"""The shuffled-user control: what an accuracy is worth when the users of the rows are drawn anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prlhf.data.context import Context, UserContexts
from prlhf.data.records import PreferenceRow, pair_content
from prlhf.data.tokenize import TokenizedPair
from prlhf.evaluation.accuracy import score_pairs
from prlhf.models.personalized import PersonalizedModel

NUM_DRAWS = 20
MAX_SCORED_ROWS = 1200  # times a user each: about so many are scored, the others left out
MAX_USERS = 1000  # whose agreement with each other is looked at: a table of them all grows with its square
CLEAR_TASTE = 0.9  # share of a user's training pairs won by one side of length, from which it is a taste,
MIN_TASTE_ROWS = 20  # and how many pairs it takes


def shuffled_users(
    model: PersonalizedModel,
    rows: Sequence[PreferenceRow],
    tokenized: Sequence[TokenizedPair],
    contexts: UserContexts | None = None,
    *,
    seed: int,
    **options: Any,
) -> dict[str, Any] | None:
    """Accuracy when each row's user is drawn anew from the users' frequencies, mean of 20 draws.

    An encoder reads of a row what is known of the drawn user: their text, or pairs without the row's prompt and
    responses. Prompts stay as they are, with what they hold of the row's own user.

    Args:
        rows: the records; `tokenized[i].row` indexes them.
        contexts: of the rows' users, for an encoder.
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
    pairs = [(ids, tokenized[source]) for draw in drawn for ids, source in zip(kept, draw, strict=True)]
    shuffled = [replace(ids, user_id=source.user_id) for ids, source in pairs]
    read = None
    if contexts is not None:
        read = [_drawn_context(contexts, rows[ids.row], rows[source.row], (seed, ids.row)) for ids, source in pairs]
    margins = score_pairs(model, rows, shuffled, contexts=read, **options).individual
    return {"mean": float((margins > 0).mean()), "num_rows": len(kept), "num_draws": NUM_DRAWS}


def _drawn_context(
    contexts: UserContexts, row: PreferenceRow, source: PreferenceRow, key: Sequence[int]
) -> Context:
    """What an encoder reads of the user of another row when it is asked about this one."""
    return contexts.of_row(replace(row, user_id=source.user_id, user_text=source.user_text), key)


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


def expected_when_shuffled(
    train: Sequence[PreferenceRow], rows: Sequence[PreferenceRow], *, seed: int = 0
) -> dict[str, float] | None:
    """What a model that serves every user perfectly scores with shuffled users, from the labels.

    The sum over users u, v of their shares times how often v agrees with u: 1 for u = v; measured on the pairs that
    both judged; else, where both clearly prefer longer or shorter responses in training, by those tastes; else one
    half. For two opposed tastes of share p it is p^2 + (1 - p)^2.

    Args:
        seed: of the MAX_USERS users whose agreement with each other stands for all of more users.
    Returns: {"mean", "known": the share of the sum that is not such a one half}; None without rows.
    """
    counts = Counter(row.user_id for row in rows)
    if not counts:
        return None
    users = list(counts)
    shares = np.array([counts[user] for user in users]) / len(rows)
    with_oneself = float((shares**2).sum())
    if len(users) > MAX_USERS:
        drawn = np.random.default_rng(seed).permutation(len(users))[:MAX_USERS]
        users, shares = [users[i] for i in drawn], shares[drawn]
    agreement = _agreement(users, [*train, *rows], train)
    known = ~np.isnan(agreement)
    weights = np.outer(shares, shares)
    np.fill_diagonal(weights, 0)
    weights *= (1 - with_oneself) / max(float(weights.sum()), 1e-300)
    mean = with_oneself + float((weights * np.where(known, agreement, 0.5)).sum())
    return {"mean": mean, "known": with_oneself + float(weights[known].sum())}


def _agreement(
    users: Sequence[str], rows: Sequence[PreferenceRow], train: Sequence[PreferenceRow]
) -> NDArray[np.float64]:
    """(U, U) how often two users agree; NaN where nothing tells, and whatever on the diagonal."""
    place = {user: i for i, user in enumerate(users)}
    verdicts: dict[object, dict[int, list[str]]] = {}
    for row in rows:
        if row.user_id in place:
            verdicts.setdefault(pair_content(row), {}).setdefault(place[row.user_id], []).append(row.chosen)
    agree, both = np.zeros((len(users), len(users))), np.zeros((len(users), len(users)))
    for judged in verdicts.values():
        if len(judged) > 1:
            who = np.array(list(judged))
            one = next(iter(judged.values()))[0]
            # Of u's and v's judgments of a pair, how many there are and by how many more one response was chosen.
            number = np.array([len(own) for own in judged.values()])
            lead = np.array([2 * own.count(one) - len(own) for own in judged.values()])
            pairs = np.ix_(who, who)
            both[pairs] += np.outer(number, number)
            agree[pairs] += (np.outer(number, number) + np.outer(lead, lead)) / 2
    longer = _longer_shares(users, train)
    by_length = np.outer(longer, longer) + np.outer(1 - longer, 1 - longer)
    return np.where(both > 0, agree / np.maximum(both, 1), by_length)


def _longer_shares(users: Sequence[str], train: Sequence[PreferenceRow]) -> NDArray[np.float64]:
    """How often each user preferred the longer response; NaN where that is no clear taste."""
    outcomes: dict[str, list[bool]] = {user: [] for user in users}
    for row in train:
        if row.user_id in outcomes and len(row.chosen) != len(row.rejected):
            outcomes[row.user_id].append(len(row.chosen) > len(row.rejected))
    shares = [float(np.mean(own)) if len(own) >= MIN_TASTE_ROWS else np.nan for own in outcomes.values()]
    return np.array([share if max(share, 1 - share) >= CLEAR_TASTE else np.nan for share in shares])
