"""`prlhf adapt` from judgments to a checkpoint that serves the new user."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prlhf.adapt.feedback import read_feedback
from prlhf.errors import DataError
from prlhf.models import load_policy
from tests.cli_run import Run
from tests.tiny_run import EVAL_THINGS, Tiny, long_answer, preference_record, short_answer, snapshot, write_jsonl


@pytest.fixture
def run(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(tiny, tmp_path, capsys)


def _trained(run: Run, **settings: object) -> Path:
    assert run.train(eval__generate=0, eval__few_shot=0, **settings)[0] == 0
    return run.runs / "tiny" / "checkpoints" / "step-00000004"


def _pair(thing: str, user: str | None = None) -> dict[str, object]:
    record = preference_record(thing, "x", prefers_short=True)
    return {**record, "user_id": user} if user else {k: v for k, v in record.items() if k != "user_id"}


def test_a_user_is_added_and_nobody_else_moves_by_a_bit(run: Run) -> None:
    checkpoint = _trained(run)
    before = snapshot(checkpoint)
    thing = EVAL_THINGS[0]
    feedback = write_jsonl(run.folder / "dora.jsonl", [
        _pair(EVAL_THINGS[1]),
        {"prompt": "Say it", "response": long_answer(thing), "edited": short_answer(thing)},
        {"prompt": "Tell me", "response": long_answer(thing), "label": False},
    ])
    out = run.folder / "with_dora"
    code, printed, _ = run("adapt", checkpoint, "--user", "dora", "--feedback", feedback, "--out", out)
    assert code == 0
    report = json.loads(printed)
    assert (report["user_id"], report["judgments"]) == ("dora", 3)
    assert snapshot(checkpoint) == before
    old, new = (load_file(folder / "users.safetensors") for folder in (checkpoint, out))
    assert torch.equal(new["generic"], old["generic"])
    assert torch.equal(new["offsets"][:2], old["offsets"])
    assert load_policy(out).users.user_ids == ("ann", "bob", "dora")  # type: ignore[union-attr]
    kept = json.loads((out / "figures.json").read_text())
    assert kept["added"] == [{name: report[name] for name in report if name not in ("like", "opposite")}]
    assert set(kept["base"]["per_user"]) == {"ann", "bob"} and kept["base"]["run"] == "tiny"
    assert (out / "trainable.safetensors").samefile(checkpoint / "trainable.safetensors")
    assert run("adapt", out, "--user", "eve", "--out", run.folder / "with_eve")[0] == 0
    assert torch.equal(load_file(run.folder / "with_eve" / "users.safetensors")["offsets"][3], torch.zeros(3, 32))


@pytest.mark.parametrize("kind", ["individual", "text"])
@pytest.mark.parametrize("setting", ["prompt", "none"])
def test_a_new_users_text_is_kept_where_prompts_hold_texts(run: Run, kind: str, setting: str) -> None:
    data = run.folder / "texts"
    shutil.copytree(run.tiny.data, data)
    split = {"ann": "seen", "bob": "seen", "cat": "unseen"}
    users = {user: {"user_text": f"I am {user}.", "split": side} for user, side in split.items()}
    (data / "users.json").write_text(json.dumps(users))
    checkpoint = _trained(run, user__kind=kind, data__source=str(data), data__user_text=setting)
    pairs = [_pair(thing) for thing in EVAL_THINGS[:2]]
    rows = [{**pair, "user_text": text} for pair, text in zip(pairs, ("I sang.", "I sail."), strict=True)]
    feedback = write_jsonl(run.folder / "dora.jsonl", rows)
    out, again = run.folder / "with_dora", run.folder / "with_eve"
    assert run("adapt", checkpoint, "--user", "dora", "--feedback", feedback, "--out", out)[0] == 0
    texts = {"ann": "I am ann.", "bob": "I am bob.", "dora": "I sail."}
    assert load_policy(out).user_texts == (texts if setting == "prompt" else {})
    assert run("adapt", out, "--user", "eve", "--feedback", feedback, "--out", again)[0] == 0
    assert load_policy(again).user_texts == ({**texts, "eve": "I sail."} if setting == "prompt" else {})


def test_many_users_come_from_one_file(run: Run) -> None:
    checkpoint = _trained(run, user__kind="cluster")
    rows = [_pair(thing, user) for thing in EVAL_THINGS for user in ("u1", "u2")]
    feedback = write_jsonl(run.folder / "many.jsonl", rows)
    out = run.folder / "out"
    code, printed, _ = run("adapt", checkpoint, "--feedback", feedback, "--held-out", feedback, "--out", out)
    assert code == 0
    first, second = map(json.loads, printed.splitlines())
    assert (first["user_id"], second["user_id"]) == ("u1", "u2")
    assert {**first, "user_id": ""} == pytest.approx({**second, "user_id": ""}, abs=1e-6)
    assert first["held_out"] is not None
    weights = load_file(out / "users.safetensors")["weights"]
    assert weights.shape == (5, 2)
    torch.testing.assert_close(weights[3], weights[4])


def test_a_judgment_said_again_counts_once_aloud(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = _trained(run)
    pairs = [_pair(thing) for thing in EVAL_THINGS]
    opposite = {**pairs[0], "chosen": pairs[0]["rejected"], "rejected": pairs[0]["chosen"]}
    thumbs = [{"prompt": pairs[1]["prompt"], "response": pairs[1][key], "label": key == "chosen"}
              for key in ("chosen", "rejected")]
    once = write_jsonl(run.folder / "once.jsonl", [*pairs, opposite])
    again = write_jsonl(run.folder / "again.jsonl", [*pairs * 3, opposite, *thumbs * 2, *pairs])
    reports = [run("adapt", checkpoint, "--user", "dora", "--feedback", path, "--out", run.folder / path.stem)
               for path in (once, again)]
    assert [code for code, _, _ in reports] == [0, 0]
    assert reports[0][1] == reports[1][1] and json.loads(reports[0][1])["judgments"] == len(pairs) + 1
    assert [record.getMessage() for record in caplog.records if "say again" in record.getMessage()] == [
        f"{again}: left out of {4 * len(pairs) + 5} rows: {3 * len(pairs) + 2} that say again what an earlier one says"
    ]
    arguments = ("--user", "eve", "--feedback", once, "--held-out", again, "--out", run.folder / "eve")
    assert run("adapt", checkpoint, *arguments)[0] == 0
    assert f"{again}: {len(pairs) + 1} rows say what rows of {once} say" in caplog.text


def test_the_last_text_of_a_user_counts_also_with_a_judgment_said_again(run: Run) -> None:
    pairs = [_pair(thing) for thing in EVAL_THINGS[:2]]
    rows = [{**pair, "user_text": text} for pair, text in zip([*pairs, pairs[0]], ("I sing.", "I sang.", "I sail."),
                                                              strict=True)]
    path = write_jsonl(run.folder / "dora.jsonl", [*rows, pairs[1]])
    assert [row.user_text for _, row in read_feedback(path, "dora")["dora"]] == ["I sang.", "I sail."]


def test_a_row_is_refused_in_the_words_of_its_own_columns(run: Run) -> None:
    path = write_jsonl(run.folder / "f.jsonl", [{"prompt": "p", "responses": ["x", 3], "choice": 1},
                                                {"prompt": "p", "response": "x", "edited": 3}])
    with pytest.raises(DataError) as refused:
        read_feedback(path, "dora")
    first, second = refused.value.messages
    assert first == f"{path}:1: responses is ['x', 3], expected two texts; write each in quotes"
    assert second.startswith(f"{path}:2: edited is 3, expected a string") and "chosen" not in first + second


def test_an_encoder_reads_a_new_users_pairs_from_the_new_checkpoint(run: Run) -> None:
    checkpoint = _trained(run, user__kind="history")
    feedback = write_jsonl(run.folder / "dora.jsonl", [_pair(thing) for thing in EVAL_THINGS])
    out = run.folder / "out"
    assert run("adapt", checkpoint, "--user", "dora", "--feedback", feedback, "--out", out)[0] == 0
    policy = load_policy(out)
    assert len(policy.contexts.facts["dora"].pairs) == 3  # type: ignore[union-attr]
    assert policy.users.index("dora") == 3  # type: ignore[union-attr]


def _asked(printed: str) -> list[tuple[str, frozenset[str]]]:
    """What is asked, by content, the best question first; nothing else is said, and nothing answered."""
    questions = [json.loads(line) for line in printed.splitlines()]
    assert all(list(question) == ["prompt", "responses", "choice"] for question in questions)
    assert all(question["choice"] is None for question in questions)
    return [(question["prompt"], frozenset(question["responses"])) for question in questions]


def _content(pair: dict[str, object]) -> tuple[object, frozenset[object]]:
    return pair["prompt"], frozenset((pair["chosen"], pair["rejected"]))


def test_questions_come_from_the_pool_and_write_nothing(run: Run) -> None:
    checkpoint = _trained(run)
    pool = [_pair(thing, "ann") for thing in EVAL_THINGS]
    path = write_jsonl(run.folder / "pool.jsonl", pool)
    code, printed, _ = run("adapt", checkpoint, "--user", "dora", "--ask", 2, "--pool", path)
    asked = _asked(printed)
    assert code == 0
    assert len(asked) == len(set(asked)) == 2
    assert set(asked) <= {_content(pair) for pair in pool}


def test_questions_do_not_say_who_judged_them_nor_how_and_become_feedback_by_their_choice(run: Run) -> None:
    checkpoint, things = _trained(run), [f"thing {i}" for i in range(40)]
    records = [{**_pair(thing, "ann"), "pair_id": thing, "user_text": "I am ann."} for thing in things]
    turned = [{**r, "chosen": r["rejected"], "rejected": r["chosen"], "user_id": "bob"} for r in records]
    printed = []
    for name, pool in (("one", records), ("other", turned)):
        path = write_jsonl(run.folder / f"{name}.jsonl", pool)
        printed.append(run("adapt", checkpoint, "--user", "dora", "--ask", 40, "--pool", path)[1])
    orders = [{q["prompt"]: q["responses"] for q in map(json.loads, text.splitlines())} for text in printed]
    assert orders[0] == orders[1], "the order is the same whoever preferred what"
    first = [orders[0][record["prompt"]][0] == record["chosen"] for record in records]
    assert 10 <= sum(first) <= 30, "and says nothing of it"
    answered = [{**json.loads(line), "choice": int("It is" in json.loads(line)["responses"][1])}
                for line in printed[0].splitlines()]
    answers = write_jsonl(run.folder / "answers.jsonl", answered)
    pairs = [{"prompt": a["prompt"], "chosen": a["responses"][a["choice"]],
              "rejected": a["responses"][1 - a["choice"]]} for a in answered]
    same = write_jsonl(run.folder / "pairs.jsonl", pairs)
    reports = [run("adapt", checkpoint, "--user", "dora", "--feedback", path, "--out", run.folder / f"{path.stem}_out")
               for path in (answers, same)]
    assert [code for code, _, _ in reports] == [0, 0]
    assert reports[0][1] == reports[1][1] and json.loads(reports[0][1])["judgments"] == 40
    waiting = [answered[0], {**answered[1], "choice": None}, {**answered[2], "choice": True},
               {**answered[3], "responses": ["a"]}, {**answered[4], "choice": 2}]
    path = write_jsonl(run.folder / "waiting.jsonl", waiting)
    lines = run.refused("adapt", checkpoint, "--user", "dora", "--feedback", path, "--out", run.folder / "out")
    assert [line.split(": ")[0] for line in lines] == [f"{path}:{number}" for number in (2, 3, 4, 5)]
    assert "0 for the first, 1 for the second" in lines[0]


def test_a_pool_goes_with_the_fit_and_is_no_use_to_an_encoder(run: Run) -> None:
    checkpoint = _trained(run)
    pairs = write_jsonl(run.folder / "pairs.jsonl", [_pair(thing) for thing in EVAL_THINGS])
    arguments = ("--user", "dora", "--feedback", pairs, "--pool", pairs, "--out", run.folder / "out")
    code, printed, _ = run("adapt", checkpoint, *arguments)
    assert code == 0
    assert json.loads(printed)["opposite"] in (True, False)
    assert run.train(eval__generate=0, eval__few_shot=0, user__kind="history", name="reader")[0] == 0
    [line] = run.refused("adapt", run.runs / "reader", *arguments[:-1], run.folder / "other")
    assert "--pool" in line and "history" in line


def test_a_pair_is_asked_once_in_either_order_and_never_when_it_was_judged(run: Run) -> None:
    checkpoint = _trained(run)
    first, second, third = (_pair(thing) for thing in EVAL_THINGS)
    turned = {**first, "chosen": first["rejected"], "rejected": first["chosen"]}
    pool = write_jsonl(run.folder / "pool.jsonl", [first, turned, second, third])
    judged = write_jsonl(run.folder / "judged.jsonl", [second])
    code, printed, _ = run("adapt", checkpoint, "--user", "eve", "--feedback", judged, "--ask", 4, "--pool", pool)
    assert code == 0
    assert len(_asked(printed)) == 2
    assert set(_asked(printed)) == {_content(first), _content(third)}
    judged = write_jsonl(run.folder / "judged.jsonl", [first, second, third])
    [line] = run.refused("adapt", checkpoint, "--user", "eve", "--feedback", judged, "--ask", 4, "--pool", pool)
    assert "no pair that the user has not judged" in line


def test_every_bad_line_of_feedback_is_told_by_its_number(run: Run) -> None:
    checkpoint, pair = _trained(run), _pair("tea")
    good = [pair, {"prompt": "p", "response": "r", "label": True}]
    broken = write_jsonl(run.folder / "broken.jsonl", [pair, {"prompt": "p"}, _pair("rain", "fay")])
    broken.write_text(broken.read_text() + "3\n{\n" + json.dumps(pair) + "\n")
    unusable = write_jsonl(run.folder / "unusable.jsonl", [
        *good,
        {**pair, "chosen": " "},
        {"prompt": "p", "response": "", "label": False},
        {**pair, "rejected": pair["chosen"]},
        {**pair, "prompt": ""},
    ])
    numbers = {broken: [2, 3, 4, 5], unusable: [3, 4, 5, 6]}
    more = write_jsonl(run.folder / "good.jsonl", good)
    for path, expected in numbers.items():
        for files in (("--feedback", path), ("--feedback", more, "--held-out", path)):
            lines = run.refused("adapt", checkpoint, "--user", "dora", *files, "--out", run.folder / "out")
            assert [line.split(": ")[0] for line in lines] == [f"{path}:{number}" for number in expected]
    assert "dora" not in "".join(lines)
    assert run.train(eval__generate=0, eval__few_shot=0, user__kind="history", name="reader")[0] == 0
    arguments = ("--user", "dora", "--feedback", unusable, "--out", run.folder / "out")
    lines = run.refused("adapt", run.runs / "reader", *arguments)
    assert [line.split(": ")[0] for line in lines] == [f"{unusable}:{number}" for number in numbers[unusable]]
    assert run.train(eval__generate=0, eval__few_shot=0, method="prm", name="reward")[0] == 0
    [line] = run.refused("adapt", run.runs / "reward", *arguments[:3], more, *arguments[4:])
    assert line.startswith(f"{more}:2: ") and "a thumb alone" in line


def test_bad_input_is_one_line_each_and_nothing_is_written(run: Run) -> None:
    checkpoint = _trained(run)
    out = run.folder / "out"
    bad = write_jsonl(run.folder / "bad.jsonl", [{"prompt": "p", "response": "r", "label": "yes"}, {"prompt": "p"}])
    good = write_jsonl(run.folder / "good.jsonl", [_pair("tea", "dora")])
    assert len(run.refused("adapt", checkpoint, "--user", "dora", "--feedback", bad, "--out", out)) == 2
    [known] = run.refused("adapt", checkpoint, "--user", "ann", "--out", out)
    assert "knows them already" in known
    [other] = run.refused("adapt", checkpoint, "--user", "eve", "--feedback", good, "--out", out)
    assert "'dora'" in other
    [without_pool] = run.refused("adapt", checkpoint, "--user", "eve", "--ask", 3)
    assert "--pool" in without_pool
    alike = {"chosen": "and " * 5000 + "so", "rejected": "and " * 5000 + "no"}  # where they are cut
    unusable = write_jsonl(run.folder / "unusable.jsonl", [{**_pair("tea"), **alike}])
    for rest in (("--ask", 3), ("--feedback", write_jsonl(run.folder / "eve.jsonl", [_pair("tea")]), "--out", out)):
        [line] = run.refused("adapt", checkpoint, "--user", "eve", "--pool", unusable, *rest)
        assert line.startswith(f"{unusable}:1: cannot be used, as both responses are the same up to where")
    empty = write_jsonl(run.folder / "empty.jsonl", [])
    for ids in ((), ("--user", "eve")):
        assert run.refused("adapt", checkpoint, *ids, "--feedback", empty, "--out", out) == [
            f"{empty}: holds no judgment; write pairs, thumbs or edits, one a line"
        ]
    nameless = write_jsonl(run.folder / "nameless.jsonl", [_pair("tea")] * 30)
    lines = run.refused("adapt", checkpoint, "--feedback", nameless, "--out", out)
    assert lines[0] == f"{nameless}:1: no user_id; give --user ID, or name the user in every line"
    assert len(lines) == 21 and lines[-1] == "10 more such lines"
    other_user = write_jsonl(run.folder / "fay.jsonl", [_pair("tea", "fay")])
    [stranger] = run.refused("adapt", checkpoint, "--user", "dora", "--held-out", other_user, "--out", out)
    assert "'fay'" in stranger
    for word, meaning in (("generic", "the generic user"), ("all", "all users")):
        [reserved] = run.refused("adapt", checkpoint, "--user", word, "--out", out)
        assert meaning in reserved and "choose another id" in reserved
    assert not out.exists()
    out.mkdir()
    (out / "mine").touch()
    [exists] = run.refused("adapt", checkpoint, "--user", "eve", "--out", out)
    assert "new directory" in exists
