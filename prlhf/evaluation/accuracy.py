"""Reward accuracy on preference rows, of a policy or a reward model: as each row's user, and as the generic one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prlhf.data.context import Context
from prlhf.data.records import PreferenceRow
from prlhf.data.tokenize import TokenizedPair
from prlhf.data.user_index import GENERIC_USER_ID
from prlhf.errors import ModelError
from prlhf.evaluation.scoring import score_pair_responses
from prlhf.models.personalized import PersonalizedModel
from prlhf.models.policy import PersonalizedPolicy

NUM_RESAMPLES = 1000
LENGTH_GAP = 0.2


@dataclass(frozen=True)
class PairMargins:
    """One entry a row; a row is answered right when its margin is above 0.

    Args:
        rows: N records.
        individual: (N,) margin as the row's user: of a policy's log-ratios to its reference, nats; of its mean
            log-probs per token where it was trained without reference; of reward scores.
        generic: the same as the generic user; equal to `individual` for models without users.
        reference: (N,) the reference's own log-prob margin; None for reward models and where it was not asked for.
    """

    rows: list[PreferenceRow]
    individual: NDArray[np.float64]
    generic: NDArray[np.float64]
    reference: NDArray[np.float64] | None

    def part(self, members: Sequence[int]) -> PairMargins:
        """The rows at these positions."""
        index = np.array(members, dtype=np.int64)
        reference = None if self.reference is None else self.reference[index]
        return PairMargins([self.rows[i] for i in members], self.individual[index], self.generic[index], reference)


def draw_rows(rows: Sequence[PreferenceRow], count: int | None, *, seed: int) -> list[PreferenceRow]:
    """At most `count` rows, in their order, of as many users as can be: a draw by the seed alone; None: all rows."""
    if count is None or count >= len(rows):
        return list(rows)
    turns: Counter[str] = Counter()
    drawn: list[tuple[int, int, int]] = []
    for place in np.random.default_rng(seed).permutation(len(rows)).tolist():
        drawn.append((turns[rows[place].user_id], len(drawn), place))  # a user's first row before anybody's second
        turns[rows[place].user_id] += 1
    return [rows[place] for place in sorted(place for _, _, place in sorted(drawn)[:count])]


def score_pairs(
    model: PersonalizedModel,
    rows: Sequence[PreferenceRow],
    tokenized: Sequence[TokenizedPair],
    contexts: Sequence[Context] | None = None,
    *,
    pad_id: int,
    microbatch_tokens: int,
    reference_free: bool = False,
    with_reference: bool = True,
    on_batch: Callable[[], None] = lambda: None,
) -> PairMargins:
    """Margins of every tokenized row, shared between ranks, each distinct sequence scored once.

    Args:
        rows: the records; `tokenized[i].row` indexes them (over-long or empty ones were dropped).
        reference_free: a policy's margins are of mean log-probs per token; the log odds of ORPO have the same sign.
        with_reference: also score the reference; needed unless `reference_free`.
        contexts: of each tokenized row, for an encoder.
        on_batch: called between batches; may raise to stop.
    Raises: ModelError: a margin is not finite.
    """
    options: dict[str, Any] = {"pad_id": pad_id, "microbatch_tokens": microbatch_tokens, "on_batch": on_batch}
    reference = None
    if isinstance(model, PersonalizedPolicy) and with_reference:
        with model.reference.active() as frozen:
            reference = _margins(frozen, tokenized, None, **options)
    own_ids = [row.user_id for row in tokenized]
    options["per_token"] = reference_free
    generic_ids = None if model.user_encoder is None else [GENERIC_USER_ID] * len(tokenized)
    generic = _margins(model, tokenized, generic_ids, **options)
    unseen = contexts is None and generic_ids in (None, own_ids)
    individual = generic if unseen else _margins(model, tokenized, own_ids, contexts, **options)
    offset = 0.0 if reference is None or reference_free else reference
    individual, generic = individual - offset, generic - offset
    if not np.isfinite(individual).all() or not np.isfinite(generic).all():
        raise ModelError("evaluation: margins are not finite; lower train.lr or train.user_lr and train anew")
    return PairMargins([rows[row.row] for row in tokenized], individual, generic, reference)


def _margins(
    model: PersonalizedModel,
    rows: Sequence[TokenizedPair],
    user_ids: Sequence[int] | None,
    contexts: Sequence[Context] | None = None,
    *,
    per_token: bool = False,
    **options: Any,
) -> NDArray[np.float64]:
    """Value of the chosen response minus that of the rejected one, (N,), the same on every rank."""
    values = score_pair_responses(model, rows, user_ids, contexts, **options).double().numpy()
    if per_token:
        values = values / np.array([[len(ids) for ids in row.responses] for row in rows]).reshape(values.shape)
    return values[:, 0] - values[:, 1]


def summarize_accuracy(
    margins: NDArray[np.float64], rows: Sequence[PreferenceRow], *, seed: int
) -> dict[str, Any] | None:
    """The accuracy block of `eval/final.json`; None without rows.

    The interval resamples pairs, not rows: rows of several users over one pair are not independent.
    """
    if not rows:
        return None
    correct = (margins > 0).astype(np.float64)
    by_user = user_accuracies(margins, rows)
    return {
        "mean": float(correct.mean()),
        "ci95": bootstrap_interval(correct, [row.pair_id for row in rows], seed=seed),
        "user_mean": float(np.mean(list(by_user.values()))),
        "worst_user": min(by_user.values()),
        "num_rows": len(rows),
        "num_users": len(by_user),
    }


def user_accuracies(margins: NDArray[np.float64], rows: Sequence[PreferenceRow]) -> dict[str, float]:
    """Share of each user's rows with a margin above 0, in order of first appearance."""
    counts: dict[str, list[float]] = {}
    for margin, row in zip(margins, rows, strict=True):
        counts.setdefault(row.user_id, []).append(float(margin > 0))
    return {user: float(np.mean(values)) for user, values in counts.items()}


def bootstrap_interval(values: NDArray[np.float64], groups: Sequence[str], *, seed: int) -> list[float]:
    """95% percentile interval of the mean of `values`, resampling whole groups."""
    index = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    members = np.array([index[group] for group in groups])
    sums = np.bincount(members, weights=values)
    sizes = np.bincount(members)
    generator = np.random.default_rng(seed)
    # One resample at a time: all of them at once would take gigabytes for a hundred thousand pairs.
    draws = (generator.integers(len(index), size=len(index)) for _ in range(NUM_RESAMPLES))
    means = [sums[draw].sum() / sizes[draw].sum() for draw in draws]
    return [float(bound) for bound in np.percentile(means, [2.5, 97.5])]


def has_length_gap(row: PreferenceRow) -> bool:
    """Whether the two responses' lengths differ by at least 20% of the longer one, in characters."""
    lengths = sorted((len(row.chosen), len(row.rejected)))
    return lengths[1] - lengths[0] >= LENGTH_GAP * lengths[1]
