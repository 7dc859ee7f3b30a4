"""A step whose loss is no number, or far above the usual one, is skipped and counted; too many stop the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prlhf.engine import spikes, trainer
from prlhf.engine.objective import ReferenceLogps
from prlhf.engine.step import Batch
from prlhf.engine.trainer import train
from prlhf.errors import PrlhfError
from tests.engine.two_ranks import read
from tests.tiny_run import (
    Crash,
    Tiny,
    at_step,
    crash,
    read_metrics,
    read_status,
)


def break_reference(monkeypatch: pytest.MonkeyPatch, is_broken: Callable[[int], bool]) -> None:
    """NaN reference log-probs in the calls (1, 2, ...) that `is_broken` picks."""
    make_reference = trainer._make_reference
    calls = []

    def broken(job: Any, *args: Any) -> Callable[[Batch], ReferenceLogps]:
        reference = make_reference(job, *args)

        def look_up(batch: Batch) -> ReferenceLogps:
            calls.append(batch)
            factor = float("nan") if is_broken(len(calls)) else 1.0
            return ReferenceLogps(*(logps * factor for logps in reference(batch)))

        return look_up

    monkeypatch.setattr(trainer, "_make_reference", broken)


def test_skipped_steps_are_counted_and_the_run_goes_on(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two skips, but never two in a row: the limit of two is not reached."""
    break_reference(monkeypatch, lambda call: call in (2, 4))
    final = train(tiny.config(train__max_skipped_steps=2, train__max_steps=5), tmp_path / "run")
    assert final["skipped_steps"] == 2
    lines = read_metrics(tmp_path / "run")
    assert [line["skipped"] for line in lines] == [False, True, False, True, False]
    assert [line["loss"] is None for line in lines] == [False, True, False, True, False]
    assert "step 2: loss or gradient not finite" in caplog.text


def spoil_loss(monkeypatch: pytest.MonkeyPatch, is_spoiled: Callable[[int], bool]) -> None:
    """Losses a hundred times as large in the steps (1, 2, ...) that `is_spoiled` picks."""
    steps: list[int] = []
    train_step_ = trainer.train_step_

    def spoiled(model: Any, optimizer: Any, objective: Any, *rest: Any, **options: Any) -> Any:
        steps.append(len(steps) + 1)

        def call(*args: Any) -> Any:
            made = objective(*args)
            factor = 100.0 if is_spoiled(steps[-1]) else 1.0
            sums = {**made.sums, "loss": made.sums["loss"] * factor}
            return made._replace(losses=made.losses * factor, sums=sums)

        call.is_unpaired, call.passes = False, lambda: [call]  # type: ignore[attr-defined]
        return train_step_(model, optimizer, call, *rest, **options)

    monkeypatch.setattr(trainer, "train_step_", spoiled)


def test_a_loss_far_above_the_usual_one_is_skipped_where_asked_for(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of step 3 is spoiled; the mean says something after 2 steps here."""
    monkeypatch.setattr(spikes, "NUM_FIRST_STEPS", 2)
    for factor, skipped in ((None, []), (5.0, [3])):
        with monkeypatch.context() as patch:
            spoil_loss(patch, lambda step: step == 3)
            train(tiny.config(train__skip_loss_above=factor, checkpoint__every_steps=1), tmp_path / f"{factor}")
        lines = read_metrics(tmp_path / f"{factor}")
        assert [line["step"] for line in lines if line["skipped"]] == skipped
    before, after = (
        load_file(tmp_path / "5.0" / "checkpoints" / f"step-0000000{step}" / "trainable.safetensors")
        for step in (3, 4)
    )
    assert not all(torch.equal(before[name], after[name]) for name in before), "the next step is made again"


def test_what_is_usual_survives_a_resume(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spikes, "NUM_FIRST_STEPS", 2)
    config = tiny.config(train__skip_loss_above=5.0)
    with pytest.raises(Crash), at_step(2, crash):
        train(config, tmp_path / "run")
    spoil_loss(monkeypatch, lambda step: step == 1)
    train(config, tmp_path / "run")
    assert [line["step"] for line in read_metrics(tmp_path / "run") if line["skipped"]] == [3]


@pytest.mark.parametrize("rate", [1e30, 1e200])
def test_an_absurd_rate_is_one_clear_error(tiny: Tiny, tmp_path: Path, rate: float) -> None:
    """Weights that float32 can hold make losses that are no numbers; others are not saved at all."""
    with pytest.raises(PrlhfError, match=r"lower train\.lr or train\.user_lr") as caught:
        train(tiny.config(train__lr=rate, train__user_lr=rate), tmp_path / "run")
    assert (len(caught.value.messages), caught.value.exit_code) == (1, 2)
    for path in (tmp_path / "run").rglob("trainable.safetensors"):
        assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(path).values())


def test_too_many_skips_in_a_row_stop_the_run(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_reference(monkeypatch, lambda call: call >= 3)
    with pytest.raises(PrlhfError, match="3 steps in a row.*up to step 5") as caught:
        train(tiny.config(train__max_skipped_steps=3, train__max_steps=9), tmp_path / "run")
    assert caught.value.exit_code == 2
    assert read_status(tmp_path / "run")["status"] == "failed"


def test_where_no_checkpoint_can_be_made_both_ranks_say_so(two_ranks: Path) -> None:
    for messages in read(two_ranks, "no_folder"):
        assert len(messages) == 1 and "checkpoints" in messages[0]


def test_a_broken_rank_stops_both(two_ranks: Path) -> None:
    for messages in read(two_ranks, "always_nan"):
        assert len(messages) == 1
        assert "2 steps in a row" in messages[0]
