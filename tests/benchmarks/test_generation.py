"""The two ways of answering differ in time alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

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


@pytest.mark.slow
def test_figures_go_to_the_terminal_a_json_file_and_a_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generation, "NUM_NEW_TOKENS", 4)
    out, document = tmp_path / "generation.json", tmp_path / "benchmarks.md"
    options = ["--repeats", "1", "--prompts", "2", "--authors-rows", "1"]
    monkeypatch.setattr(sys, "argv", ["generation", *options, "--out", str(out), "--document", str(document)])
    generation.main()
    [result] = json.loads(out.read_text())["results"]
    assert result["answers_equal"] == result["answers_compared"] == 1 and len(result["ratios"]) == 1
    table = capsys.readouterr().out.strip()
    assert f"{result['ratios'][0]:.1f}" in table and table in document.read_text()
