"""The fault matrix: a tiny job under every fault ends as it must, and goes on as if nothing had been."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prlhf.engine import selftest
from prlhf.engine.fault_bench import Bench, Outcome
from prlhf.engine.fault_matrix import Row, fault_rows
from prlhf.errors import ConfigError, RankError


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    yield Bench(tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=f"{row.fault}, {row.point}", marks=[] if row.is_quick else pytest.mark.slow)
        for row in fault_rows()
    ],
)
def test_fault(bench: Bench, row: Row) -> None:
    assert row.problems(bench) == []


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_kill_at_a_random_moment_loses_nothing(bench: Bench, num_ranks: int) -> None:
    assert selftest.kill_at_random(bench, 5, num_ranks=num_ranks, seed=1) == 0


@pytest.mark.slow
def test_chaos_loses_nothing(bench: Bench) -> None:
    assert selftest.make_chaos(bench, 30, seed=1) == 0


class Forgetful:
    """A bench on which no resumed run ends as the undisturbed one."""

    def whole_seconds(self, num_ranks: int = 1) -> float:
        return 1.0

    def train(self, name: str, **options: Any) -> Outcome:
        return Outcome(1, "", 0.1, killed=True)

    def differences(self, name: str, num_ranks: int) -> list[str]:
        return ["resume: other weights"]

    def checkpoints(self, name: str) -> list[Path]:
        return [Path("step-00000002")]

    def remove(self, name: str) -> None:
        pass


class Quick(Forgetful):
    """A bench whose runs take a second, where they were thought to take ten, and end as the undisturbed one."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def whole_seconds(self, num_ranks: int = 1) -> float:
        return 10.0

    def train(self, name: str, **options: Any) -> Outcome:
        self.moments.append(options["kill"][1])
        return Outcome(int(options["kill"][1] < 1.0), "", 1.0, killed=options["kill"][1] < 1.0)

    def differences(self, name: str, num_ranks: int) -> list[str]:
        return []


def test_a_kill_that_came_too_late_is_tried_again_within_the_time_that_a_run_takes(
    capsys: pytest.CaptureFixture[str]
) -> None:
    bench: Any = Quick()
    assert selftest.kill_at_random(bench, 20, num_ranks=2, seed=0) == 0
    assert "20 of 20 kills landed before the end (checkpoints by then: 20 with 1), 20 of 20" in capsys.readouterr().out
    assert 20 < len(bench.moments) < 25 and max(bench.moments[2:]) < 1.0


def test_a_kill_that_never_lands_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    bench: Any = Quick()
    bench.train = lambda name, **options: Outcome(0, "", 1.0, killed=False)
    assert selftest.kill_at_random(bench, 2, num_ranks=1, seed=0) == 1
    assert "0 of 2 kills landed before the end (checkpoints by then: none), 2 of 2 ended" in capsys.readouterr().out


def test_a_run_that_fails_by_itself_does_not_count_as_killed() -> None:
    bench: Any = Quick()
    bench.train = lambda name, **options: Outcome(1, "error: a bug", 1.0, killed=False)
    with pytest.raises(RankError, match="nothing killed ended with exit code 1: error: a bug"):
        selftest.kill_at_random(bench, 1, num_ranks=1, seed=0)


def test_other_weights_are_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    bench: Any = Forgetful()
    row = Row("a fault", "a point", "the same weights", lambda bench: bench.differences("x", 1))
    assert selftest.report_rows(bench, [row]) == 1
    assert selftest.report_rows(bench, [row._replace(problems=lambda bench: [])]) == 0
    assert selftest.kill_at_random(bench, 2, num_ranks=1, seed=0) == 1
    assert selftest.make_chaos(bench, 0.001, seed=0) == 1
    out = capsys.readouterr().out
    assert "FAILED: resume: other weights" in out
    assert "2 of 2 kills landed before the end (checkpoints by then: 2 with 1), 0 of 2 ended" in out


def test_options_that_do_not_go_together_are_refused() -> None:
    for options in ({"faults": False, "quick": True}, {"nproc": 2}, {"nproc": 0, "kills": 3}):
        given = SimpleNamespace(**{"faults": True, "quick": False, "kills": None, "nproc": 1, **options})
        with pytest.raises(ConfigError, match="selftest"):
            selftest.run_selftest(given)  # type: ignore[arg-type]


def test_weights_that_differ_by_one_bit_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prlhf.engine.fault_bench.write_tiny_job", lambda folder: folder)
    bench = Bench(tmp_path)
    directory = bench.runs / "x" / "checkpoints" / "step-00000002"
    directory.mkdir(parents=True)
    seen = []
    for byte in (b"\x00", b"\x01"):
        (directory / "users.safetensors").write_bytes(byte)
        seen.append(bench.weights("x"))
    assert seen[0] != seen[1]
