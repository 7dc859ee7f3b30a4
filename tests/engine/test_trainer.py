"""A run ends in the same place however often it is interrupted, and refuses to go on as another one."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prlhf.engine import trainer
from prlhf.engine.run_dir import RunDir
from prlhf.engine.trainer import StopFlag, train
from prlhf.errors import CheckpointError, DataError, Preempted, RunDirError
from prlhf.evaluation.report import load_final
from tests.engine.two_ranks import read, resumable, still
from tests.tiny_run import (
    Crash,
    Tiny,
    at_step,
    checkpoints,
    crash,
    read_metrics,
    read_status,
    snapshot,
    stop_signal,
    write_data,
)

NUM_STEPS = 8  # 17 rows in batches of 4: an epoch is 5 steps, the last of one row
RESUME_STEPS = {"mid_epoch_1": 2, "epoch_boundary": 5, "epoch_2": 7}
RESUMED: dict[str, dict[str, Any]] = {
    "lora_with_dropout": {"model__lora__dropout": 0.2, "model__lora__final_scale": 0.5},
    "full": {"model__lora": None},
}


def final_tensors(run_dir: Path) -> dict[str, bytes]:
    newest = run_dir / "checkpoints" / checkpoints(run_dir)[-1]
    return {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}


def without_time(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def whole_runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uninterrupted runs of `RESUMED`."""
    folder = tmp_path_factory.mktemp("whole")
    for name, settings in RESUMED.items():
        train(tiny.config(train__max_steps=NUM_STEPS, **settings), folder / name)
    return folder


@pytest.mark.parametrize("point", RESUME_STEPS)
@pytest.mark.parametrize("variant", RESUMED)
def test_a_crash_and_a_resume_end_bitwise_where_one_run_ends(
    tiny: Tiny, whole_runs: Path, tmp_path: Path, variant: str, point: str
) -> None:
    """Evaluations in between, which the whole run did not make, change nothing either."""
    step = RESUME_STEPS[point]
    config = tiny.config(
        train__max_steps=NUM_STEPS, checkpoint__every_steps=step, eval__every_steps=4, **RESUMED[variant]
    )
    with pytest.raises(Crash), at_step(min(step + 1, NUM_STEPS - 1), crash):
        train(config, tmp_path / "run")
    assert checkpoints(tmp_path / "run")[-1] == f"step-{step:08d}"
    train(config, tmp_path / "run")
    assert final_tensors(tmp_path / "run") == final_tensors(whole_runs / variant)
    assert without_time(read_metrics(tmp_path / "run")) == without_time(read_metrics(whole_runs / variant))


def test_a_signal_saves_the_step_it_falls_in_and_the_resume_is_bitwise(
    tiny: Tiny, whole_runs: Path, tmp_path: Path
) -> None:
    config = tiny.config(train__max_steps=NUM_STEPS, checkpoint__every_steps=0, **RESUMED["lora_with_dropout"])
    with pytest.raises(Preempted) as caught, at_step(2, stop_signal):
        train(config, tmp_path / "run")
    assert caught.value.exit_code == 75
    assert checkpoints(tmp_path / "run") == ["step-00000003"]
    assert read_status(tmp_path / "run")["status"] == "preempted"
    assert not (tmp_path / "run" / "eval" / "final.json").exists()
    train(config, tmp_path / "run")
    assert read_status(tmp_path / "run")["status"] == "finished"
    assert final_tensors(tmp_path / "run") == final_tensors(whole_runs / "lora_with_dropout")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_twice_is_a_signal_once_and_handlers_come_back(number: int) -> None:
    before = signal.getsignal(number)
    with StopFlag() as stop:
        stop.check()
        for _ in range(2):
            os.kill(os.getpid(), number)
        with pytest.raises(Preempted):
            stop.check()
    assert signal.getsignal(number) is before


def test_a_signal_before_the_first_step_leaves_no_directory(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes while the model is loaded and ends the reference pass."""
    build_job = trainer.build_job
    monkeypatch.setattr(trainer, "build_job", lambda config: (stop_signal(), build_job(config))[1])
    with pytest.raises(Preempted):
        train(tiny.config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_signal_during_the_final_evaluation_repeats_only_that(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate_run = trainer.evaluate_run
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        patch.setattr(trainer, "evaluate_run", lambda *args, **rest: (stop_signal(), evaluate_run(*args, **rest))[1])
        train(tiny.config(), tmp_path / "run")
    assert read_status(tmp_path / "run")["status"] == "preempted"
    tensors = final_tensors(tmp_path / "run")
    with at_step(3, crash):
        train(tiny.config(), tmp_path / "run")
    assert read_status(tmp_path / "run")["status"] == "finished"
    assert final_tensors(tmp_path / "run") == tensors


def test_a_signal_to_one_rank_stops_both_and_one_process_goes_on(
    tiny: Tiny, two_ranks: Path, tmp_path: Path
) -> None:
    """The same global batches, so the same weights but for the rounding that Adam's first steps blow up."""
    assert all("stopped by a signal at step 3" in message for message in read(two_ranks, "stopped"))
    run_dir = two_ranks / "two_then_one"
    assert read_status(run_dir)["status"] == "preempted"
    assert checkpoints(run_dir) == ["step-00000002", "step-00000003"]
    train(resumable(tiny), run_dir)
    train(resumable(tiny), tmp_path / "one")
    assert_alike(run_dir, tmp_path / "one")


def test_two_ranks_go_on_from_one(tiny: Tiny, two_ranks: Path, tmp_path: Path) -> None:
    train(resumable(tiny), tmp_path / "one")
    assert_alike(two_ranks / "one_then_two", tmp_path / "one")


def assert_alike(actual: Path, expected: Path) -> None:
    pairs = zip(read_metrics(actual), read_metrics(expected), strict=True)
    for line, expected_line in pairs:
        assert line["loss"] == pytest.approx(expected_line["loss"], abs=1e-5)
        assert line["rewards/chosen"] == pytest.approx(expected_line["rewards/chosen"], abs=1e-4)
        assert (line["step"], line["rows"]) == (expected_line["step"], expected_line["rows"])


def test_first_loss_of_dpo_is_ln_2_at_world_size_1_and_2(tiny: Tiny, two_ranks: Path, tmp_path: Path) -> None:
    train(tiny.config(method="dpo", train__max_steps=1), tmp_path / "one")
    for run_dir in (tmp_path / "one", two_ranks / "dpo_first"):
        (line,) = read_metrics(run_dir)
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert line[name] == pytest.approx(0, abs=1e-6), "the reference was scored in batches of its own"
        assert line["grad_norm"] > 0


def test_training_separates_two_opposed_users(tiny: Tiny, tmp_path: Path) -> None:
    """No policy without users is right about both: 1/2 is its ceiling."""
    config = tiny.config(train__max_steps=30, train__batch_rows=8, train__user_lr=0.05, checkpoint__every_steps=0)
    final = train(config, tmp_path / "run")
    assert [final["per_user"][user]["accuracy"] for user in ("ann", "bob")] == [1.0, 1.0]
    vanilla = train(tiny.config(method="dpo", train__max_steps=30, checkpoint__every_steps=0), tmp_path / "vanilla")
    assert vanilla["accuracy"]["seen"]["mean"] <= 0.5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_loss_falls_in_either_precision(tiny: Tiny, tmp_path: Path, precision: str) -> None:
    config = tiny.config(train__precision=precision, train__max_steps=6, train__batch_rows=17, train__lr=0.02)
    train(config, tmp_path / "run")
    losses = [line["loss"] for line in read_metrics(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.05


def test_only_the_last_step_scales_the_adapters(tiny: Tiny, tmp_path: Path) -> None:
    for name, scale in (("whole", 1.0), ("scaled", 0.5)):
        train(tiny.config(model__lora__final_scale=scale, checkpoint__every_steps=2), tmp_path / name)
    for step, factor in ((2, 1.0), (4, 0.5)):
        whole, scaled = (
            load_file(tmp_path / name / "checkpoints" / f"step-{step:08d}" / "trainable.safetensors")
            for name in ("whole", "scaled")
        )
        for key, tensor in whole.items():
            assert torch.equal(scaled[key], tensor * (factor if "lora_B" in key else 1.0)), key


def test_a_run_that_is_made_longer_goes_on_from_adapters_as_they_were(tiny: Tiny, tmp_path: Path) -> None:
    """Scaling by a half and back is exact, and at a rate of 0 from there on nothing else moves."""
    for name, scale in (("whole", 1.0), ("scaled", 0.5)):
        for steps in (4, 5):
            train(tiny.config(train__max_steps=steps, model__lora__final_scale=scale), tmp_path / name)
    whole, scaled = (load_file(tmp_path / name / "checkpoints" / "step-00000005" / "trainable.safetensors")
                     for name in ("whole", "scaled"))
    for key, tensor in whole.items():
        assert torch.equal(scaled[key], tensor * (0.5 if "lora_B" in key else 1.0)), key


def test_a_run_does_not_end_at_a_step_whose_adapters_were_not_scaled(tiny: Tiny, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"model__lora__final_scale": 0.5, "checkpoint__every_steps": 2}
    with pytest.raises(Preempted), at_step(3, stop_signal):
        train(tiny.config(train__max_steps=6, **settings), tmp_path / "run")
    before = snapshot(tmp_path)
    with pytest.raises(RunDirError, match="train.max_steps: the run is at step 4, .* set it above 4"):
        train(tiny.config(train__max_steps=4, **settings), tmp_path / "run")
    with pytest.raises(RunDirError, match="train.max_steps: .* 3 steps and is at step 4; set it to 4 or more"):
        train(tiny.config(train__max_steps=3, **settings), tmp_path / "run")
    assert snapshot(tmp_path) == before
    assert train(tiny.config(train__max_steps=5, **settings), tmp_path / "run")["step"] == 5


def test_samples_are_those_of_the_last_evaluation(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny.config(train__max_steps=1, eval__generate=1), tmp_path / "run")
    assert (tmp_path / "run" / "samples" / "policy.jsonl").exists()
    train(tiny.config(train__max_steps=2, eval__generate=0), tmp_path / "run")
    assert list((tmp_path / "run" / "samples").iterdir()) == []


def test_a_finished_run_without_its_evaluation_is_evaluated_again(tiny: Tiny, tmp_path: Path) -> None:
    first = train(tiny.config(), tmp_path / "run")
    (tmp_path / "run" / "eval" / "final.json").unlink()
    again = train(tiny.config(), tmp_path / "run")
    assert again["accuracy"] == first["accuracy"] and again["step"] == first["step"]


def test_resuming_a_finished_run_changes_nothing(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    final = train(tiny.config(), tmp_path / "run")
    before = snapshot(tmp_path)
    with caplog.at_level(logging.INFO, "prlhf"):
        assert train(tiny.config(), tmp_path / "run") == final
    assert snapshot(tmp_path) == before
    assert "is finished; nothing to do" in caplog.text


def test_a_changed_evaluation_is_made_once(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny.config(), tmp_path / "run")
    changed = tiny.config(eval__generate=1)
    with at_step(3, crash):
        train(changed, tmp_path / "run")
    assert (tmp_path / "run" / "samples" / "policy.jsonl").is_file()
    before = snapshot(tmp_path)
    train(changed, tmp_path / "run")
    assert snapshot(tmp_path) == before


def test_never_refuses_a_directory_that_holds_a_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny.config(), tmp_path / "run", resume="never")
    before = snapshot(tmp_path)
    with pytest.raises(RunDirError, match="--resume is never"):
        train(tiny.config(), tmp_path / "run", resume="never")
    assert snapshot(tmp_path) == before


def test_resume_from_another_run_goes_on_from_its_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny.config(train__max_steps=6), tmp_path / "a")
    path = tmp_path / "a" / "checkpoints" / "step-00000004"
    before = snapshot(tmp_path / "a")
    with at_step(3, crash):
        train(tiny.config(train__max_steps=6, name="b"), tmp_path / "b", resume=str(path))
    assert final_tensors(tmp_path / "b") == final_tensors(tmp_path / "a")
    assert snapshot(tmp_path / "a") == before


def test_resume_from_another_run_is_refused_where_it_would_undo_what_was_saved(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny.config(), tmp_path / "a")
    config = tiny.config(name="b", train__max_steps=6)
    with pytest.raises(Preempted, match="the same command without --resume goes on"), at_step(5, stop_signal):
        train(config, tmp_path / "b", resume=str(tmp_path / "a"))
    before = snapshot(tmp_path)
    with pytest.raises(RunDirError, match="holds checkpoints of its own; leave --resume out"):
        train(config, tmp_path / "b", resume=str(tmp_path / "a"))
    assert snapshot(tmp_path) == before
    train(config, tmp_path / "b")
    assert checkpoints(tmp_path / "b")[-1] == "step-00000006"


def test_resume_from_nothing_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="holds no checkpoint"):
        train(tiny.config(), tmp_path / "run", resume=str(tmp_path))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({"train__lr": 0.5}, ["train.lr"]),
        ({"seed": 2, "loss__beta": 0.2}, ["seed", "loss.beta"]),
        ({"model__lora__rank": 3}, ["model.lora.rank"]),
        ({"model__lora": None}, ["model.lora"]),
        ({"train__batch_rows": 8, "train__log_every": 2}, ["train.batch_rows"]),
        ({"user__kind": "cluster"}, ["user.kind"]),
        ({"train__precision": "bf16"}, ["train.precision"]),
    ],
)
def test_changed_settings_are_refused_by_name(
    tiny: Tiny, whole_run: Path, settings: dict[str, Any], keys: list[str]
) -> None:
    before = snapshot(whole_run)
    with pytest.raises(RunDirError) as caught:
        train(tiny.config(**settings), whole_run)
    assert [message.split(":")[0] for message in caught.value.messages] == keys
    assert snapshot(whole_run) == before


@pytest.fixture(scope="module")
def whole_run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    train(tiny.config(), run_dir)
    return run_dir


def test_what_may_change_on_resume_does(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tiny.config(), tmp_path / "run")
    changed = tiny.config(
        name="other", train__max_steps=6, train__microbatch_tokens=150, train__log_every=3, train__num_threads=1,
        train__max_skipped_steps=3, eval__every_steps=2, checkpoint__keep_last=1,
    )
    assert train(changed, tmp_path / "run")["step"] == 6
    assert "train.max_steps changed on resume: the learning-rate schedule changes" in caplog.text
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_changed_data_is_refused_and_nothing_is_touched(tiny: Tiny, tmp_path: Path) -> None:
    data = Tiny(tiny.model, write_data(tmp_path / "data"))
    with pytest.raises(Crash), at_step(3, crash):
        train(data.config(), tmp_path / "run")
    train_file = data.data / "train.jsonl"
    train_file.write_text(train_file.read_text().replace("It is tea.", "It is coffee."))
    before = snapshot(tmp_path / "run")
    with pytest.raises(CheckpointError, match="training data changed"):
        train(data.config(), tmp_path / "run")
    assert snapshot(tmp_path / "run") == before


def test_a_run_directory_in_use_is_refused_and_nothing_is_touched(tiny: Tiny, tmp_path: Path) -> None:
    with RunDir(tmp_path / "run", writes=True) as holder:
        holder.start("", step=0)
        before = snapshot(tmp_path)
        with pytest.raises(RunDirError, match="in use by process"):
            train(tiny.config(), tmp_path / "run")
        assert snapshot(tmp_path) == before


def test_evaluation_of_two_ranks_is_that_of_one(tiny: Tiny, two_ranks: Path, tmp_path: Path) -> None:
    alone, together = train(still(tiny), tmp_path / "still"), load_final(two_ranks / "still")
    for name in ("accuracy", "per_user", "per_unseen_user", "slices"):
        assert together[name] == alone[name], name
    alone_tokens, tokens = (final["throughput"]["tokens_per_s"] * final["seconds"] for final in (alone, together))
    assert tokens == pytest.approx(alone_tokens, rel=0.25), "of all ranks; each pads its own micro-batches"


@pytest.mark.parametrize("name", RESUMED)
def test_evaluations_during_training_change_nothing_that_is_trained(
    tiny: Tiny, whole_runs: Path, tmp_path: Path, name: str
) -> None:
    """Dropout draws on, and the final evaluation is of the last step, whichever checkpoint is the best."""
    run, whole = tmp_path / "run", whole_runs / name
    final = train(tiny.config(train__max_steps=NUM_STEPS, eval__every_steps=2, **RESUMED[name]), run)
    assert len(list((run / "eval").glob("step-*.json"))) == NUM_STEPS // 2 - 1
    assert final_tensors(run) == final_tensors(whole)
    assert without_time(read_metrics(run)) == without_time(read_metrics(whole))
    kept = ("step", "accuracy", "per_user", "baselines", "leaks")
    assert {key: final[key] for key in kept} == {key: load_final(whole)[key] for key in kept}
    assert checkpoints(run)[-2:] == checkpoints(whole)
    assert len(checkpoints(run)) <= 3, "at most the best one besides the last two"


def test_evaluations_during_training_are_of_dev_rows(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny.config(eval__every_steps=2, eval__rows=1), tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run" / "eval").iterdir())
    assert names == ["final.json", "step-00000002.json"], "the last step has the final evaluation"
    figures = json.loads((tmp_path / "run" / "eval" / "step-00000002.json").read_text())
    assert figures["step"] == 2
    assert figures["accuracy"]["seen"]["num_rows"] == 1
    assert figures["accuracy"]["unseen"] is None


EVALUATED: dict[str, Any] = {
    "train__max_steps": 8, "eval__every_steps": 3, "checkpoint__every_steps": 0, "checkpoint__keep_last": 1,
}


def test_a_signal_during_an_evaluation_loses_no_step_and_the_evaluation_is_made_up_for(tiny, tmp_path, monkeypatch):
    whole, run, evaluate = tmp_path / "whole", tmp_path / "run", trainer.evaluate_step
    train(tiny.config(**EVALUATED), whole)

    def interrupted(job: Any, progress: Any, *args: Any, **options: Any) -> None:
        if progress.step == 6:
            stop_signal()
        evaluate(job, progress, *args, **options)

    monkeypatch.setattr(trainer, "evaluate_step", interrupted)
    with pytest.raises(Preempted):
        train(tiny.config(**EVALUATED), run)
    assert checkpoints(run)[-1] == "step-00000006"
    assert not (run / "eval" / "step-00000006.json").exists()
    monkeypatch.undo()
    train(tiny.config(**EVALUATED), run)
    assert checkpoints(run) == checkpoints(whole)
    for step in (3, 6):
        name = f"eval/step-{step:08d}.json"
        assert (run / name).read_text() == (whole / name).read_text()
    assert final_tensors(run) == final_tensors(whole)


def test_a_signal_in_a_step_that_is_evaluated_leaves_no_hole(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(Preempted), at_step(3, stop_signal):
        train(tiny.config(**EVALUATED), tmp_path / "run")
    train(tiny.config(**EVALUATED), tmp_path / "run")
    names = [path.name for path in sorted((tmp_path / "run" / "eval").glob("step-*.json"))]
    assert names == ["step-00000003.json", "step-00000006.json"]


def test_a_course_that_is_left_leaves_no_evaluations(tiny: Tiny, tmp_path: Path) -> None:
    run, settings = tmp_path / "run", {"eval__every_steps": 2, "checkpoint__keep_last": 9}
    train(tiny.config(train__max_steps=8, **settings), run)
    before = (run / "eval" / "step-00000002.json").read_text()
    back = str(run / "checkpoints" / "step-00000002")
    train(tiny.config(train__max_steps=5, eval__every_steps=5, checkpoint__keep_last=9), run, resume=back)
    assert sorted(path.name for path in (run / "eval").iterdir()) == ["final.json", "step-00000002.json"]
    assert (run / "eval" / "step-00000002.json").read_text() == before


def test_a_run_that_is_being_made_longer_has_no_final_evaluation(tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny.config(eval__generate=1), run)
    assert load_final(run)["step"] == 4
    assert list((run / "samples").iterdir())
    with pytest.raises(Preempted), at_step(5, stop_signal):
        train(tiny.config(train__max_steps=8, eval__generate=1), run)
    with pytest.raises(DataError, match="no such file; finish the run"):
        load_final(run)
    assert not list((run / "samples").iterdir())
    assert train(tiny.config(train__max_steps=8, eval__generate=1), run)["step"] == 8


def test_other_data_is_refused_before_the_reference_is_computed(tiny: Tiny, tmp_path: Path, monkeypatch) -> None:
    data = write_data(tmp_path / "data")
    train(tiny.config(data__source=str(data)), tmp_path / "run")
    rows = (data / "train.jsonl").read_text().splitlines(keepends=True)
    (data / "train.jsonl").write_text("".join(rows[:-1]))

    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr(trainer, "compute_reference_table", never)
    with pytest.raises(CheckpointError, match="training data changed"):
        train(tiny.config(data__source=str(data), train__max_steps=8), tmp_path / "run")
