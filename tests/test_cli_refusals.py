"""One plain line for each mistake, the right exit code, and nothing left behind."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import CLIPTextConfig, CLIPTextModel

from prlhf.adapt import add_users, checkpoint_rows
from prlhf.engine import launch
from prlhf.engine import trainer as trainer_module
from prlhf.engine.run_dir import RunDir
from prlhf.serving import export
from tests.cli_run import Run
from tests.tiny_run import Tiny, read_status, snapshot, write_data, write_jsonl


@pytest.fixture
def run(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(tiny, tmp_path, capsys)


def malformed_data(tmp_path: Path) -> str:
    data = write_data(tmp_path / "data")
    lines = (data / "train.jsonl").read_text().splitlines()
    lines[4] = lines[4][:20]
    (data / "train.jsonl").write_text("\n".join(lines) + "\n")
    return f"data.source={data}"


def not_a_language_model(tmp_path: Path) -> str:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    CLIPTextModel(CLIPTextConfig(vocab_size=16, **sizes)).save_pretrained(tmp_path / "clip")
    return f"model.backbone={tmp_path / 'clip'}"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.batch_row=8", ["train.batch_row", "did you mean", "batch_rows"]),
        ("train.lr=fast", ["train.lr", "fast"]),
        ("train.epochs=1.5", ["train.epochs", "1.5"]),
        ("loss.alpha=1.5", ["loss.alpha", "1.5", "0 to 1"]),
        ("user.kind=none", ["user.kind", "pdpo"]),
        ("method=dppo", ["method", "dppo", "dpo"]),
        ("data.source=/nowhere", ["data.source", "/nowhere"]),
        ("data.max_tokens=4096", ["data.max_tokens", "4096", "512"]),
        ("model.backbone=/nowhere", ["model.backbone", "/nowhere"]),
        (malformed_data, ["train.jsonl:5"]),
        (not_a_language_model, ["model.backbone", "clip", "AutoModelForCausalLM"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it_and_leaves_nothing(
    run: Run, tmp_path: Path, override: str | Callable[[Path], str], parts: list[str]
) -> None:
    setting = override if isinstance(override, str) else override(tmp_path)
    (line,) = run.refused("train", run.config(), setting, "--runs", run.runs)
    assert all(part in line for part in parts), line
    assert not (run.runs / "tiny").exists()


def test_every_mistake_of_a_configuration_has_its_line(run: Run) -> None:
    lines = run.refused("train", run.config(), "train.lrr=1", "loss.beta=-1", "seed=x", "--runs", run.runs)
    assert len(lines) == 3
    for part in ("train.lrr", "loss.beta", "seed"):
        assert sum(part in line for line in lines) == 1, part


def test_a_missing_configuration_is_named(run: Run) -> None:
    (line,) = run.refused("train", run.folder / "nothing.yaml")
    assert "nothing.yaml: no such file" in line


@pytest.mark.parametrize("content", ["{}", "[1]"])
def test_a_final_evaluation_that_is_none_is_named_and_made_again_as_the_line_says(run: Run, content: str) -> None:
    run.train("train.max_steps=1")
    final = run.runs / "tiny" / "eval" / "final.json"
    figures = json.loads(final.read_text())
    final.write_text(content)
    for command in ("compare", "report"):
        (line,) = run.refused(command, run.runs / "tiny")
        assert line.startswith(f"{final}: is no final evaluation") and "remove" in line
    final.unlink()
    assert run.train("train.max_steps=1")[0] == 0
    assert json.loads(final.read_text())["accuracy"] == figures["accuracy"]


def test_a_directory_in_use_is_refused(run: Run) -> None:
    with RunDir(run.runs / "tiny", writes=True) as holder:
        holder.start("", step=0)
        before = snapshot(run.runs)
        (line,) = run.refused("train", run.config(), "--runs", run.runs)
        assert "in use by process" in line
        assert snapshot(run.runs) == before


def test_never_on_a_directory_with_a_checkpoint_is_refused(run: Run, trained: Path) -> None:
    before = snapshot(trained)
    (line,) = run.refused("train", trained / "tiny.yaml", "--resume", "never", "--runs", trained)
    assert "--resume is never" in line
    assert snapshot(trained) == before


def test_no_sound_checkpoint_exits_with_3(run: Run) -> None:
    run.train("train.max_steps=1")
    (run.runs / "tiny" / "checkpoints" / "step-00000001" / "state.json").write_text("{}")
    (line,) = run.refused("train", run.config(), "train.max_steps=2", "--runs", run.runs, code=3)
    assert "none of 1 checkpoint" in line


def test_a_model_that_only_makes_nan_stops_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Callable[[Any], Any]:
        nan = torch.full((4,), float("nan"))
        return lambda batch: (nan[: batch.num_rows], nan[: batch.num_rows])

    monkeypatch.setattr(trainer_module, "_make_reference", broken)
    (line,) = run.refused("train", run.config(), "train.max_skipped_steps=2", "--runs", run.runs)
    assert "2 steps in a row without a finite loss" in line
    assert read_status(run.runs / "tiny")["status"] == "failed"


def test_a_full_disk_is_one_line_with_what_is_free(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: RunDir, lines: list[Any]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(self.path / "metrics.jsonl"))

    monkeypatch.setattr(RunDir, "append_metrics", full)
    (line,) = run.refused("train", run.config(), "--runs", run.runs)
    assert "metrics.jsonl: No space left on device" in line and "MiB free" in line


def test_a_bug_is_not_taken_for_a_mistake(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise OSError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(launch, "load_config", broken)
    with pytest.raises(BrokenPipeError):
        run("train", run.config())


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        (("generate", "tiny", "--users", "bobb"), ["'bobb'" , "did you mean", "bob"]),
        (("generate", "vanilla", "--users", "bob"), ["bob", "0 known users"]),
        (("generate", "tiny", "--temperature", "-1"), ["temperature", "-1"]),
        (("generate", "tiny", "--temperature", "0", "--top-k", "5"), ["temperature", "top_k 5"]),
        (("generate", "tiny", "--stop", ""), ["stop_strings"]),
        (("generate", "tiny", "--stop", "caf\udce9"), ["stop_strings", "UTF-8"]),
        (("generate", "tiny", "--user-text", "caf\udce9"), ["caf\\udce9", "not UTF-8", "clean the text"]),
        (("generate", "tiny", "--max-new-tokens", "5000"), ["max_new_tokens", "5000"]),
    ],
)
def test_generate_refuses_in_one_line(
    run: Run, trained: Path, tmp_path: Path, command: tuple[str, ...], parts: list[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("Why?\n")
    name, *options = command[1:]
    arguments = ("--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out.jsonl")
    (line,) = run.refused(command[0], trained / name, *options, *arguments)
    assert all(part.strip("'") in line for part in parts), line
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"prompt": "ok"}\n{"prompt": ""}\n', "prompts.jsonl:2"),
        ('{"prompt": "ok"}\n{"prompt": [{"role": "user"}]}\n', "prompts.jsonl:2"),
        ('{"prompt": 5}\n', "prompts.jsonl:1"),
        ('{"question": "ok"}\n', "prompts.jsonl:1"),
        ("", "holds no prompt"),
    ],
)
def test_bad_prompts_are_named_by_line(run: Run, trained: Path, tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / "prompts.jsonl").write_text(text)
    arguments = ("--prompts", tmp_path / "prompts.jsonl", "--out", tmp_path / "out.jsonl")
    (line,) = run.refused("generate", trained / "tiny", *arguments)
    assert part in line


def test_missing_prompts_are_named(run: Run, trained: Path, tmp_path: Path) -> None:
    for name in ("none.txt", "none.jsonl"):
        (line,) = run.refused("generate", trained / "tiny", "--prompts", tmp_path / name, "--out", tmp_path / "out")
        assert name in line


@pytest.mark.parametrize(("name", "function"), [("x.csv", "read_csv"), ("x.TSV", "read_table"),
                                                ("x.csv.gz", "read_csv"), ("x.parquet", "read_parquet")])
def test_a_table_is_refused_with_how_to_convert_it(
    run: Run, trained: Path, tmp_path: Path, name: str, function: str
) -> None:
    table, out = tmp_path / name, tmp_path / "out"
    table.write_text("prompt,chosen,rejected\np,a,b\n")
    for command in (
        ("data", "prepare", "jsonl", "--raw", table, "--out", out, "--map", "user_id=@me"),
        ("train", run.config(), f"data.source={table}", "--runs", run.runs),
        ("generate", trained / "tiny", "--prompts", table, "--out", out),
    ):
        (line,) = run.refused(*command)
        assert line.startswith(f"{table}: ") and "is not read; make JSON Lines of it" in line
        assert f"pandas.{function}('{name}')" in line
    assert not out.exists() and not (run.runs / "tiny").exists()


def test_chat_takes_one_known_user(run: Run, trained: Path) -> None:
    for user in ("nobody", "all"):
        (line,) = run.refused("chat", trained / "tiny", "--user", user)
        assert user in line


@pytest.mark.parametrize("command", ["eval", "chat"])
def test_a_folder_that_is_no_run_is_refused(run: Run, tmp_path: Path, command: str) -> None:
    (line,) = run.refused(command, tmp_path)
    assert "neither a checkpoint nor a run directory" in line


def test_eval_refuses_to_change_what_was_trained(run: Run, trained: Path) -> None:
    (line,) = run.refused("eval", trained / "tiny", "loss.beta=0.5")
    assert line.startswith("loss.beta")


def test_a_damaged_checkpoint_is_not_loaded(run: Run, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "tiny", tmp_path / "copy")
    path = tmp_path / "copy" / "checkpoints" / "step-00000002" / "users.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    (line,) = run.refused("eval", tmp_path / "copy")
    assert "users.safetensors" in line


def test_compare_names_a_run_that_is_not_finished(run: Run, tmp_path: Path) -> None:
    (line,) = run.refused("compare", tmp_path / "nothing")
    assert "nothing" in line and "no such file" in line


def test_compare_refuses_runs_without_preferences(run: Run) -> None:
    assert run.train(method="sft", train__max_steps=1)[0] == 0
    (line,) = run.refused("compare", run.runs / "tiny")
    assert "no preference accuracy" in line


def test_where_nothing_can_be_written_is_said_before_any_work(run: Run, trained: Path, tmp_path: Path) -> None:
    file, rows = tmp_path / "file", write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "p", "response": "r"}])
    file.write_text("mine")
    (tmp_path / "prompts.txt").write_text("Why?\n")
    tiny = trained / "tiny"
    for command in (
        ("score", trained / "reward", "--data", rows, "--out", file / "x"),
        ("generate", tiny, "--prompts", tmp_path / "prompts.txt", "--out", file / "x"),
        ("generate", tiny, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path),
        ("eval", tiny, "--out", file / "x"),
        ("users", tiny, "--map", file / "x.png"),
        ("users", tiny, "--colour", "accuracy"),
        ("export", tiny, "--format", "merged", "--out", file / "x"),
        ("export", tiny, "--format", "merged", "--out", tmp_path / ("x" * 300)),
        ("adapt", tiny, "--user", "eve", "--out", file / "x"),
        ("adapt", tiny, "--user", "", "--out", tmp_path / "x"),
        ("adapt", tiny, "--user", "\udcff", "--out", tmp_path / "x"),
        ("report", tiny, "--out", file / "x"),
        ("report", tiny, "--out", tmp_path / "page.html", "--figures", file / "x"),
        ("compare", "seed=1"),
    ):
        assert len(run.refused(*command)) == 1, command
    assert file.read_text() == "mine" and not (tmp_path / "page.html").exists()


def test_no_command_writes_over_what_it_reads(run: Run, trained: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "p", "response": "r"}])
    (tmp_path / "link").symlink_to(rows)
    tiny = trained / "tiny"
    before = snapshot(tmp_path), snapshot(tiny)
    for command in (
        ("generate", tiny, "--prompts", rows, "--out", rows),
        ("generate", tiny, "--prompts", rows, "--out", tmp_path / "link"),
        ("score", trained / "reward", "--data", rows, "--out", rows),
        ("eval", tiny, "--data", rows, "--out", rows),
        ("report", tiny, "--out", tiny / "config.yaml"),
        ("report", tiny, trained / "vanilla", "--out", tiny / "eval" / "final.json"),
        ("report", trained / "vanilla", tiny, "--out", tiny / "metrics.jsonl"),
    ):
        (line,) = run.refused(*command)
        assert "; write to another one" in line or "; give a name that ends in .html" in line
    assert (snapshot(tmp_path), snapshot(tiny)) == before


@pytest.mark.parametrize("command", ["adapt", "forget", "export"])
def test_a_full_disk_ends_a_command_in_one_line(
    command: str, run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors has an error of its own for it."""
    run_dir = run.folder / "run"
    shutil.copytree(trained / "tiny", run_dir)

    def save_file(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    for module in (add_users, checkpoint_rows, export):
        monkeypatch.setattr(module, "save_file", save_file)
    arguments = {
        "adapt": (run_dir, "--user", "eve", "--out", run.folder / "out"),
        "forget": (run_dir, "--user", "ann"),
        "export": (run_dir, "--format", "peft", "--out", run.folder / "out"),
    }[command]
    if command == "adapt":
        arguments += ("--feedback", write_jsonl(run.folder / "f.jsonl", [
            {"prompt": "p", "chosen": "yes", "rejected": "no"}
        ]))
    before = snapshot(run_dir / "checkpoints" / "step-00000002")
    [line] = run.refused(command, *arguments)
    assert "No space left on device" in line and "make room" in line
    assert snapshot(run_dir / "checkpoints" / "step-00000002") == before
    assert {path.name for path in run.folder.iterdir()} <= {"run", "f.jsonl"}
