"""The two ways of answering differ in time alone."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import generation


@pytest.mark.slow
def test_both_ways_give_the_same_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "NUM_NEW_TOKENS", 4)
    policy = generation.make_policy(3)
    rows = generation.draw_rows(policy, 3, np.random.default_rng(0))
    answers = generation.prlhf_answers(policy, rows, batch_rows=3)
    assert answers == generation.authors_answers(policy, rows)
    # A token that is not the best by far is no tie.
    other = [answers[0][0], answers[0][1] + 1, *answers[0][2:]]
    assert not generation.is_near_tie(policy, rows[0], answers[0], other)
