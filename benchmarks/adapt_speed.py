"""How long fits of new users take: many at once, and one with a pool of pairs (`benchmarks.adapt` runs them)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from prlhf.adapt import fit_judgments
from prlhf.adapt.feedback import make_judgments
from prlhf.adapt.new_users import judgment_limits, likelihood
from prlhf.config import Config
from prlhf.data.records import PreferenceData, PreferenceRow
from prlhf.models.personalized import PersonalizedModel


def measure_batch(
    model: PersonalizedModel, config: Config, data: PreferenceData, users: Sequence[str], num_users: int, seed: int
) -> dict[str, tuple[int, float]]:
    """Number of users, and users a second, of many who each judged 8 pairs: 64 that all of a taste share, or their own.

    Of users with pairs of their own there are as many as the data have pairs for.
    """
    rng = np.random.default_rng(seed)
    pool = [
        make_judgments(model, [rows[i] for i in rng.permutation(len(rows))[: 8 * num_users]], **judgment_limits(config))
        for rows in ([row for row in (*data.train, *data.eval_seen, *data.eval_unseen) if row.user_id == user]
                     for user in users)
    ]
    distinct = [own[8 * i : 8 * i + 8] for i in range(num_users) for own in pool if len(own) >= 8 * i + 8]
    ways = {
        "shared": [[own[i] for i in rng.permutation(len(own[:64]))[:8]]
                   for own in (pool[i % len(pool)] for i in range(num_users))],
        "own": distinct[:num_users],
    }
    rates = {}
    for way, given in ways.items():
        began = time.perf_counter()
        fit_judgments(model, given, **likelihood(config))
        rates[way] = len(given), len(given) / (time.perf_counter() - began)
    return rates


def measure_pool(
    model: PersonalizedModel, config: Config, judged: Sequence[PreferenceRow], pool: Sequence[PreferenceRow], seed: int
) -> float:
    """Seconds for one user with a pool, who judges 8 of a known user's pairs the other way and so wants an opposite."""
    order = np.random.default_rng(seed).permutation(len(judged))[:8]
    limits = judgment_limits(config)
    own = make_judgments(model, [judged[i] for i in order], **limits)
    turned = [dataclasses.replace(one, responses=one.responses[::-1]) for one in own]
    unjudged = make_judgments(model, pool, **limits)
    began = time.perf_counter()
    fit_judgments(model, [turned], pool=unjudged, **likelihood(config))
    return time.perf_counter() - began
