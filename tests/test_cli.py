"""The commands from end to end."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prlhf import recipes
from prlhf.cli import main, parse_arguments
from prlhf.engine.child import SignalRelay
from prlhf.generation import SamplingOptions, generate
from prlhf.models import load_policy
from tests.cli_run import Run, train_here
from tests.evaluation.runs import finished_run
from tests.evaluation.test_report import cells, judged
from tests.tiny_run import (
    EVAL_THINGS,
    Tiny,
    at_step,
    checkpoints,
    opposed_records,
    preference_record,
    read_status,
    snapshot,
    stop_signal,
    write_data,
    write_jsonl,
)


@pytest.fixture
def run(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(tiny, tmp_path, capsys)


@pytest.mark.parametrize("command", ["adapt", "forget", "chat"])
def test_an_id_may_begin_with_a_dash(command: str) -> None:
    assert parse_arguments([command, "runs/mine", "--user=-x"]).user == "-x"


def test_train_prints_the_table_and_leaves_the_documented_files(run: Run) -> None:
    code, out, _ = run.train("train.max_steps=2", "eval.generate=1")
    assert code == 0
    assert "seen users, own embedding" in out
    assert "> Tell me about snow" in out, "a prompt answered for every user"
    run_dir = run.runs / "tiny"
    present = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()}
    assert present >= {
        "config.yaml", "env.json", "metrics.jsonl", "STATUS.json", "eval/final.json", "samples/policy.jsonl",
        "samples/reference.jsonl", "checkpoints/step-00000002/manifest.json",
    }
    assert read_status(run_dir)["status"] == "finished"


def test_options_and_overrides_may_stand_anywhere(run: Run) -> None:
    config = run.config()
    assert run("train", "--runs", run.runs, config, "train.max_steps=1", "--resume", "never", "name=x")[0] == 0
    assert checkpoints(run.runs / "x") == ["step-00000001"]


def test_training_twice_says_that_nothing_is_left_to_do(run: Run) -> None:
    _, first, _ = run.train("train.max_steps=1")
    before = snapshot(run.runs)
    code, second, _ = run.train("train.max_steps=1")
    assert (code, second) == (0, first)
    assert snapshot(run.runs) == before


def test_a_signal_exits_with_75_and_the_same_command_goes_on(run: Run) -> None:
    with at_step(1, stop_signal):
        code, _, err = run.train()
    assert code == 75
    assert "stopped by a signal at step 2; saved" in err
    assert read_status(run.runs / "tiny")["status"] == "preempted"
    assert run.train()[0] == 0


def test_a_dry_run_writes_nothing(run: Run, tmp_path: Path) -> None:
    config = run.config()
    before = snapshot(tmp_path)
    code, out, _ = run("train", config, "--dry-run", "train.batch_rows=8", "--runs", run.runs)
    assert code == 0
    assert "batch_rows: 8" in out and "nothing was written" in out
    assert snapshot(tmp_path) == before
    assert not run.runs.exists()


def test_eval_repeats_the_final_figures(run: Run, trained: Path, tmp_path: Path) -> None:
    code, out, _ = run("eval", trained / "tiny", "--out", tmp_path / "figures.json")
    assert code == 0 and "seen users, own embedding" in out
    figures = json.loads((tmp_path / "figures.json").read_text())
    final = json.loads((trained / "tiny" / "eval" / "final.json").read_text())
    for name in ("accuracy", "per_user", "per_unseen_user", "slices"):
        assert figures[name] == final[name], name


def test_eval_on_other_data_reports_unknown_users_as_unseen(run: Run, trained: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "other")
    for path in data.iterdir():
        path.write_text(path.read_text().replace('"bob"', '"zoe"'))
    checkpoint = trained / "tiny" / "checkpoints" / "step-00000002"
    arguments = ("eval", checkpoint, "eval.generate=1", "--data", data, "--out", tmp_path / "figures.json")
    assert run(*arguments)[0] == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures["per_user"]) == {"ann"}
    assert set(figures["per_unseen_user"]) == {"cat", "zoe"}


def test_generate_answers_every_prompt_for_every_user(run: Run, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Why?\n\nHow, then?\n")
    out = tmp_path / "answers.jsonl"
    arguments = ("generate", trained / "tiny", "--prompts", tmp_path / "prompts.txt", "--out", out)
    assert run(*arguments, "--max-new-tokens", "4")[0] == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["user_id"], row["prompt"]) for row in rows] == [
        (user, prompt) for user in ("ann", "bob") for prompt in ("Why?", "How, then?")
    ]
    assert all(isinstance(row["response"], str) for row in rows)
    assert run(*arguments, "--max-new-tokens", "4", "--users", "bob,generic")[0] == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["user_id"] for row in rows] == ["bob", "bob", "generic", "generic"]


def test_generate_reads_jsonl_and_a_policy_without_users_answers_generically(
    run: Run, trained: Path, tmp_path: Path
) -> None:
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Why?"}])
    out = tmp_path / "answers.jsonl"
    assert run("generate", trained / "vanilla", "--prompts", prompts, "--out", out, "--max-new-tokens", "2")[0] == 0
    assert [json.loads(line)["user_id"] for line in out.read_text().splitlines()] == ["generic"]


def test_a_text_about_the_user_stands_in_front_of_the_prompt(run: Run, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Why?\n")
    out = tmp_path / "answers.jsonl"
    arguments = ("--prompts", tmp_path / "prompts.txt", "--users", "bob", "--temperature", "0", "--out", out)
    assert run("generate", trained / "tiny", *arguments, "--user-text", "I am Bob.", "--max-new-tokens", "8")[0] == 0
    policy = load_policy(trained / "tiny")
    assert policy.users is not None
    users, options = [policy.users.index("bob")], SamplingOptions(max_new_tokens=8, temperature=0.0)
    expected = generate(policy, ["Why?"], users, user_texts=["I am Bob."], options=options)
    assert [json.loads(line)["response"] for line in out.read_text().splitlines()] == expected
    assert expected != generate(policy, ["Why?"], users, options=options)


def test_a_line_of_prompts_says_of_its_user_what_the_command_does_not(
    run: Run, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "Why?", "user_text": "I am Bob.", "mood": "good"}, {"prompt": "Why?"}]
    prompts, out = tmp_path / "prompts.json", tmp_path / "answers.jsonl"
    prompts.write_text(json.dumps(rows, indent=1))
    arguments = ("generate", trained / "tiny", "--prompts", prompts, "--users", "bob,generic", "--temperature", "0",
                 "--out", out, "--max-new-tokens", "8")
    policy, options = load_policy(trained / "tiny"), SamplingOptions(max_new_tokens=8, temperature=0.0)
    assert policy.users is not None
    for given, texts in (((), ["I am Bob.", ""]), (("--user-text", "I am Ann."), ["I am Ann."] * 2)):
        assert run(*arguments, *given)[0] == 0
        users = [policy.users.index("bob")] * 2 + [0, 0]
        expected = generate(policy, ["Why?"] * 4, users, user_texts=texts * 2, options=options)
        assert [json.loads(line)["response"] for line in out.read_text().splitlines()] == expected
        assert expected[0] != generate(policy, ["Why?"], users[:1], options=options)[0]
    assert f"{prompts}: columns that are not used: ['mood']" in caplog.text


def test_score_writes_a_score_for_every_response_and_user(run: Run, trained: Path, tmp_path: Path) -> None:
    rows = [
        {"pair_id": "p", "prompt": "Why?", "chosen": "It is tea.", "rejected": "Rain."},
        {"prompt": "How, then?", "response": "Chess."},
    ]
    data, out = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "scores.jsonl"
    assert run("score", trained / "reward", "--data", data, "--users", "bob,generic", "--out", out)[0] == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    keys = [(record["line"], record.get("pair_id"), record["user_id"], sorted(record)[0]) for record in records]
    assert keys == [(1, "p", "bob", "chosen"), (1, "p", "generic", "chosen"),
                    (2, None, "bob", "line"), (2, None, "generic", "line")]
    assert records[0]["chosen"] != records[1]["chosen"], "each user has a score of its own"
    assert run("score", trained / "reward", "--data", data, "--users", "bob,bob", "--out", out)[0] == 0
    assert len(out.read_text().splitlines()) == 2, "each user once"
    code, printed, _ = run("score", trained / "reward", "--data", data)
    assert code == 0
    assert [json.loads(line)["user_id"] for line in printed.splitlines()] == ["ann", "bob"] * 2
    again = json.loads(printed.splitlines()[1])
    for response in ("chosen", "rejected"):  # whoever else is scored; beside other rows the last bits differ
        assert again[response] == pytest.approx(records[0][response], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "users", "row", "part"),
    [
        ("tiny", "all", {"prompt": "Why?", "response": "Tea."}, "holds a policy"),
        ("reward", "dan", {"prompt": "Why?", "response": "Tea."}, "'dan' is not one of the 2 known users"),
        ("reward", "all", {"prompt": "Why?"}, "rows.jsonl:1: expected"),
        ("reward", "all", {"prompt": "Why?", "response": " "}, "rows.jsonl:1: response is empty"),
        ("reward", "all", {"prompt": "Why?", "chosen": "a", "rejected": "b " * 999}, "rows.jsonl:1: rejected is"),
        ("plain", "dan", {"prompt": "Why?", "response": "Tea."}, "'dan' is not one of the 0 known users"),
    ],
)
def test_score_refuses_in_one_line(
    run: Run, trained: Path, tmp_path: Path, name: str, users: str, row: dict[str, str], part: str
) -> None:
    data, out = write_jsonl(tmp_path / "rows.jsonl", [row]), tmp_path / "scores.jsonl"
    (line,) = run.refused("score", trained / name, "--data", data, "--users", users, "--out", out)
    assert part in line
    assert not out.exists()


def test_a_reward_model_is_evaluated_and_cannot_answer(run: Run, trained: Path, tmp_path: Path) -> None:
    code, out, _ = run("eval", trained / "reward")
    assert code == 0 and "seen users, own embedding" in out
    (tmp_path / "prompts.txt").write_text("Why?\n")
    arguments = ("--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out.jsonl")
    (line,) = run.refused("generate", trained / "reward", *arguments)
    assert "holds a reward model" in line


def test_chat_answers_until_the_input_ends(run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello?\n\nAnd you?\n"))
    code, out, _ = run("chat", trained / "tiny", "--user", "bob", "--max-new-tokens", "3")
    assert code == 0
    assert out.count("bob> ") == 4, "two questions, an empty line, and the end"
    monkeypatch.setattr(sys, "stdin", io.StringIO("Why?\n" * 4))
    _, out, _ = run("chat", trained / "tiny", "--user", "bob", "--max-new-tokens", "8", "--temperature", "2")
    assert len(set(out.split("bob> "))) == 6, "each answer is drawn anew"


def test_a_line_of_a_chat_that_is_not_utf8_is_refused_and_the_next_one_answered(
    run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = io.BytesIO(b"\xff\xfe bad bytes\nHello?\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(lines, encoding="utf-8"))
    code, out, err = run("chat", trained / "tiny", "--user", "bob", "--max-new-tokens", "3")
    assert code == 0 and out.count("bob> ") == 3
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "bad bytes" in line and "not UTF-8" in line


def test_compare_tabulates_runs(run: Run, trained: Path) -> None:
    code, out, _ = run("compare", trained / "tiny", trained / "vanilla")
    assert code == 0
    runs, checks = (
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()] for table in out.split("\n\n")
    )
    assert [row[0] for row in runs[2:]] == ["reference (by log-probs)", "tiny", "vanilla"]
    assert checks[0] == ["baselines and checks", "tiny", "vanilla"]
    assert ["seen rows with a training prompt/pair/response", "0/0/0 of 6", "0/0/0 of 6"] in checks
    assert ["length alone, seen users", "1.000", "1.000"] in checks


def test_compare_holds_answers_against_those_of_the_other_runs(run: Run, tmp_path: Path) -> None:
    for name, score in (("mine", 1.0), ("other", 0.5)):
        folder = finished_run(tmp_path / name, **judged())
        rows = [{"user_id": user, "prompt": "Q", "response": "so", "score": score} for user in ("ann", "bob")]
        write_jsonl(folder / "samples" / "policy.jsonl", rows)
    code, out, _ = run("compare", tmp_path / "mine", tmp_path / "other")
    assert code == 0
    assert ["mine", "other", "2", "0", "0", "1.000"] in cells(out)


def test_compare_needs_no_answers_and_refuses_half_of_them(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folders = [finished_run(tmp_path / name, **judged()) for name in ("mine", "other", "third")]
    rows = [{"user_id": user, "prompt": "Q", "response": "so", "score": 1.0} for user in ("ann", "bob")]
    answers = [write_jsonl(folder / "samples" / "policy.jsonl", rows) for folder in folders]
    for path in answers[:2]:
        path.unlink()
    code, out, _ = run("compare", *folders)
    assert code == 0
    assert [line[:2] for line in cells(out)[-3:]] == [[name, "reference"] for name in ("mine", "other", "third")]
    assert f"{answers[0]}: no such file" in caplog.text
    answers[2].write_text(answers[2].read_text()[:-5])
    (line,) = run.refused("compare", *folders)
    assert line.startswith(f"{answers[2]}:2: not valid JSON")


def test_compare_keeps_runs_of_one_name_apart(run: Run, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "tiny", tmp_path / "elsewhere" / "tiny")
    code, out, _ = run("compare", trained / "tiny", tmp_path / "elsewhere" / "tiny")
    assert code == 0
    assert f"| {trained / 'tiny'} " in out and f"| {tmp_path / 'elsewhere' / 'tiny'} " in out


def test_compare_trains_what_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SignalRelay, "run", train_here)
    code, out, _ = run("compare", run.config(), "train.max_steps=1", "--runs", run.runs)
    assert code == 0
    assert "| tiny " in out
    assert checkpoints(run.runs / "tiny") == ["step-00000001"]


def test_env_prints_versions_as_json(run: Run) -> None:
    code, out, _ = run("env")
    assert code == 0
    assert json.loads(out)["torch"] == torch.__version__


def test_data_check_describes_a_prepared_directory(run: Run, tiny: Tiny) -> None:
    code, out, _ = run("data", "check", tiny.data)
    assert code == 0
    assert "ann" in out and "bob" in out


@pytest.mark.slow
def test_two_ranks_under_torchrun_end_like_the_command(run: Run) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "prlhf.engine.launch", run.config(), "train.max_steps=2", "--runs", str(run.runs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run directory: ") == 1, "rank 0 alone prints"
    assert (run.runs / "tiny" / "checkpoints" / "step-00000002" / "rng-1.safetensors").is_file()
    assert run("eval", run.runs / "tiny")[0] == 0


@pytest.mark.slow
def test_the_module_ends_with_the_code_of_the_mistake_and_no_traceback(run: Run) -> None:
    command = [sys.executable, "-m", "prlhf", "train", run.config(), "train.lrr=1", "--runs", str(run.runs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "train.lrr" in line and "did you mean" in line


def test_a_file_is_evaluated_as_a_whole_beside_the_runs_own_training_rows(
    run: Run, trained: Path, tmp_path: Path
) -> None:
    rows = opposed_records(EVAL_THINGS) + [preference_record("tea", "zoe", prefers_short=True)]
    data, out = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "new" / "figures.json"
    assert run("eval", trained / "tiny", "eval.generate=0", "--data", data, "--out", out)[0] == 0
    figures = json.loads(out.read_text())
    assert figures["accuracy"]["seen"]["num_rows"] == len(rows) - 1
    assert set(figures["per_unseen_user"]) == {"zoe"}
    assert figures["leaks"]["overlap"]["eval_seen"]["prompt"] == 0
    assert figures["leaks"]["overlap"]["eval_unseen"]["prompt"] == 1, "tea is a thing of training"


def test_rows_that_cannot_be_scored_are_counted_and_no_baseline_has_them(
    run: Run, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = opposed_records(EVAL_THINGS)
    alike = {"prompt": "Alike", "chosen": "and " * 999 + "so", "rejected": "and " * 999 + "no"}  # where they are cut
    rows += [{**row, **alike} for row in rows[:2]]
    data, out = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "figures.json"
    assert run("eval", trained / "tiny", "eval.generate=0", "--data", data, "--out", out)[0] == 0
    figures = json.loads(out.read_text())
    assert figures["dropped"] == {"eval_seen": {"equal_response_ids": 2}}
    assert "eval_seen: 2 of 8 rows cannot be scored" in caplog.text
    assert figures["leaks"]["overlap"]["eval_seen"]["rows"] == figures["accuracy"]["seen"]["num_rows"] == 6


def test_texts_may_hold_what_python_takes_for_an_end_of_line(run: Run, tmp_path: Path) -> None:
    rows = [
        {"user_id": f"{user}\u2028", "prompt": f"One\u2029{i}?", "chosen": f"yes\x85{i}", "rejected": f"no no {i}"}
        for user in ("ann", "bob") for i in range(12)
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    code, out, _ = run.train(f"data.source={data}", "data.eval_prompts=0.3", "train.max_steps=1", eval__generate=2)
    assert code == 0 and "One\\u2029" in out
    assert run("compare", run.runs / "tiny")[0] == 0
    assert run("report", run.runs / "tiny")[0] == 0
    (tmp_path / "prompts.txt").write_text("\ufeffOne\u2028Two\n", encoding="utf-8")
    answers = tmp_path / "answers.jsonl"
    arguments = ("--prompts", tmp_path / "prompts.txt", "--out", answers, "--max-new-tokens", 1, "--users", "generic")
    assert run("generate", run.runs / "tiny", *arguments)[0] == 0
    assert [json.loads(line)["prompt"] for line in answers.read_text().split("\n") if line] == ["One\u2028Two"]


def test_answers_read_as_much_of_a_prompt_as_the_run_did(
    run: Run, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Prompts that differ in their first words alone; the tiny run reads 64 tokens."""
    (tmp_path / "prompts.txt").write_text(f"{'tea ' * 99}\nrain {'tea ' * 99}\n")
    out = tmp_path / "answers.jsonl"
    arguments = ("--prompts", tmp_path / "prompts.txt", "--out", out, "--users", "generic", "--max-new-tokens", 4)
    assert run("generate", trained / "tiny", *arguments)[0] == 0
    assert "2 of 2 prompts are longer than 64 tokens" in caplog.text


def test_an_interrupt_ends_a_command_in_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> dict[str, str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipes, "list_recipes", interrupted)
    assert run("recipes", "ls") == (130, "", "interrupted\n")


def test_output_that_nobody_reads_ends_a_command_quietly(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for buffering in (-1, 1):
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w", buffering) as stdout:
            monkeypatch.setattr(sys, "stdout", stdout)
            assert main(["recipes", "ls"]) == 141
            monkeypatch.undo()


def test_what_a_terminal_cannot_show_is_printed_by_its_code(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "caf\xe9 \u2603 \U0001f600"
    monkeypatch.setattr(recipes, "list_recipes", lambda: {"x": words})
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main(["recipes", "ls"]) == 0
    printed = stdout.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert json.loads(f'"{printed.strip()}"') == f"x  {words}", "JSON that is printed stays JSON"


def test_an_interrupt_ends_a_chat(run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.stdin, "readline", interrupted)
    assert run("chat", trained / "tiny", "--user", "bob")[0] == 0
