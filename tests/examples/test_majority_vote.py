"""The demonstration of the majority lemma prints what the lemma says."""

from __future__ import annotations

import pytest

from examples.majority_vote import main, vote


@pytest.mark.parametrize("num_first", [3, 6])
def test_vanilla_is_the_share_and_wrong_for_the_minority_and_prm_right_for_all(num_first: int) -> None:
    out = vote(num_first)
    assert out.reward_model == pytest.approx(num_first / 10, abs=1e-4)
    assert out.dpo == pytest.approx(num_first / 10, abs=1e-4)
    assert (out.vanilla_majority, out.vanilla_minority, out.personal) == (1.0, 0.0, 1.0)
    # The users' own terms have not quite vanished after finitely many steps.
    assert out.generic == pytest.approx(num_first / 10, abs=0.02)


def test_the_table_has_a_line_for_each_share(capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["0.10", "0.30", "0.40", "0.60", "0.90"]
    assert all(line.split("|")[5].strip() == "0.0000" for line in lines[2:]), "the minority is always wrong"
