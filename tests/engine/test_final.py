"""eval/final.json: its documented keys, and figures that can be counted by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prlhf.data import load
from prlhf.data.prepared import write_prepared
from prlhf.data.records import PreferenceRow
from prlhf.data.world import psoups
from prlhf.engine import final as final_module
from prlhf.engine.final import Evaluator
from prlhf.engine.trainer import train
from prlhf.errors import DataError
from prlhf.evaluation.accuracy import PairMargins
from prlhf.evaluation.judges import judge_of
from prlhf.evaluation.report import format_run, load_final
from tests.tiny_run import Tiny, perturbed_job, write_model
from tests.tokenizers import tiny_tokenizer

BLOCK = {"mean", "ci95", "user_mean", "worst_user", "num_rows", "num_users"}
THROUGHPUT = {"rows_per_s", "tokens_per_s", "peak_memory_bytes", "peak_device_bytes"}
DOCUMENTED = {
    "experiment", "method", "step", "seed", "accuracy", "per_user", "win_rate", "on_side", "slices", "throughput",
    "seconds", "seconds_setup", "seconds_eval", "per_unseen_user",
}
FURTHER = {
    "user_model", "margin", "data", "baselines", "leaks", "majority", "ceiling", "text", "words", "skipped_steps",
    "last_step",
    "tax", "dropped",
}


@pytest.fixture(scope="module")
def world_run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on a few pairs of the built-in world, whose judge knows its users."""
    run_dir = tmp_path_factory.mktemp("world") / "run"
    config = tiny.config(
        data__source="builtin:psoups", data__max_tokens=400, eval__generate=2, train__max_steps=2, eval__temperature=1.0
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, pairs in (("TRAIN_PAIRS", 2), ("DEV_PAIRS", 1), ("EVAL_PAIRS", 2)):
            patch.setattr(psoups, name, pairs)
        patch.setattr(load, "MAX_NEUTRAL_TEXTS", 8)
        train(config, run_dir)
    return run_dir


def test_the_keys_are_the_documented_ones(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny.config(train__max_steps=1), tmp_path / "run")
    final = load_final(tmp_path / "run")
    assert set(final) == DOCUMENTED | FURTHER
    assert set(final["accuracy"]) == {"seen", "unseen", "unseen_generic", "generic", "reference_logps"}
    assert final["accuracy"]["unseen_generic"] == final["accuracy"]["unseen"], "a table knows nothing of the unseen"
    for name in ("seen", "unseen", "generic"):
        assert set(final["accuracy"][name]) == BLOCK, name
    assert set(final["throughput"]) == THROUGHPUT
    assert final["win_rate"] is final["on_side"] is final["text"] is final["words"] is final["tax"] is None
    assert {user: set(figures) for user, figures in final["per_user"].items()} == {
        user: {"accuracy", "generic_accuracy", "num_rows"} for user in ("ann", "bob")
    }
    assert final["baselines"]["prompted"] is None, "the data have no wishes"
    assert set(final["baselines"]["few_shot"]) == BLOCK | {"per_user", "pairs"}
    assert final["leaks"]["shuffled_users"]["expected"]["mean"] == pytest.approx(0.5)
    assert set(final["slices"]["length_gap_20"]) == {*final["accuracy"], "per_user", "per_unseen_user", "majority"}
    assert (final["experiment"], final["method"], final["step"], final["seed"]) == ("tiny", "pdpo", 1, 1)


def test_a_run_of_the_built_in_world_is_judged(world_run: Path) -> None:
    final = load_final(world_run)
    users = ["P1A", "P1B", "P2A", "P2B", "P3A", "P3B"]
    assert set(final) == DOCUMENTED | FURTHER
    assert set(final["win_rate"]) == {"judge", "opponent", "rule", "wins", "ties", "losses", "mean", "per_user"}
    assert (final["win_rate"]["judge"], final["win_rate"]["opponent"]) == ("rule", "reference")
    assert sum(final["win_rate"][outcome] for outcome in ("wins", "ties", "losses")) == 2 * len(users)
    assert list(final["win_rate"]["per_user"]) == users
    assert {user: set(shares) for user, shares in final["on_side"].items()} == {
        user: {"policy", "reference"} for user in users
    }
    assert final["accuracy"]["seen"]["num_rows"] == 2 * len(users)
    assert final["accuracy"]["unseen"] is None
    baselines, shuffled = final["baselines"], final["leaks"]["shuffled_users"]
    assert list(baselines["prompted"]["per_user"]) == users
    assert set(baselines["few_shot"]["per_user"]) <= set(users), "most pairs do not fit: this tokenizer knows few words"
    assert baselines["few_shot"]["pairs"] >= 1
    assert shuffled["expected"] == {"mean": pytest.approx(1 / 2, abs=0.02), "known": pytest.approx(5 / 9)}, (
        "of 36 pairs of users 12 are of one axis, 8 of register and length: expert sentences are the longer ones"
    )
    assert final["leaks"]["overlap"]["eval_seen"] == {"rows": 12, "prompt": 0, "pair": 0, "response": 0}
    assert final["text"]["policy"]["num_samples"] == 2 * len(users)
    assert (final["tax"]["source"], final["tax"]["num_texts"]) == ("builtin:text", 8)
    assert final["tax"]["num_users"] == len(users)
    assert list(final["words"]["per_user"]) == users
    assert min(final["words"]["generic"], final["words"]["reference"]) >= 0


def test_a_run_on_prepared_rows_of_the_built_in_world_is_judged_like_one_on_the_world(
    tiny: Tiny, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, pairs in (("TRAIN_PAIRS", 2), ("DEV_PAIRS", 1), ("EVAL_PAIRS", 2)):
            patch.setattr(psoups, name, pairs)
        patch.setattr(load, "MAX_NEUTRAL_TEXTS", 8)
        built = load.load_preference_data("builtin:psoups", seed=1, eval_prompts=0.0, unseen_users=0.0)
        write_prepared(tmp_path / "data", dataclasses.replace(built, ceiling=0.75))
        settings = {"data__max_tokens": 400, "eval__generate": 1, "train__max_steps": 1, "eval__few_shot": 0}
        final = train(tiny.config(data__source=str(tmp_path / "data"), **settings), tmp_path / "run")
    assert (final["win_rate"]["judge"], final["ceiling"], final["tax"]["source"]) == ("rule", 0.75, "builtin:text")
    assert list(final["on_side"]) == built.user_ids() and final["data"]["source"] == str(tmp_path / "data")


@pytest.mark.parametrize("world", ["builtin:psoups", "builtin:prism"])
def test_the_judge_keeps_silent_on_users_that_the_world_does_not_have(world: str) -> None:
    built = load.load_preference_data(world, seed=1, eval_prompts=0.0, unseen_users=0.0)
    prepared = dataclasses.replace(built, source="data/mine", origin=world)
    assert judge_of(built) is not None and judge_of(prepared) is not None
    assert judge_of(dataclasses.replace(prepared, declared_users=(*built.user_ids(), "zoe"))) is None
    assert judge_of(dataclasses.replace(prepared, origin=None)) is None


def test_samples_are_kept_beside_the_figures(world_run: Path) -> None:
    for name, num_users in (("policy", 6), ("reference", 6), ("generic", 1)):
        lines = (world_run / "samples" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        assert len(records) == 2 * num_users
        scores = set() if name == "generic" else {"score"}
        assert set(records[0]) == {"user_id", "prompt", "response", "nll_per_token", "num_tokens", *scores}


WORLDS = {
    "tldr": ({"TRAIN_POSTS": 20, "EVAL_POSTS": 2}, "length", 10),
    "prism": ({"SEEN_USERS": 8, "UNSEEN_USERS": 8, "TRAIN_DIALOGUES": 2, "DEV_DIALOGUES": 2}, "rule", 8),
}


@pytest.mark.parametrize("world", WORLDS)
def test_answers_are_judged_where_the_users_tastes_are_known(tiny: Tiny, tmp_path: Path, world: str) -> None:
    sizes, judge, num_users = WORLDS[world]
    neutral = tmp_path / "neutral.txt"
    neutral.write_text("Two and two are four.\n")
    model = write_model(tmp_path / "model", tokenizer=tiny_tokenizer("chat"))
    config = Tiny(model, tiny.data).config(
        data__source=f"builtin:{world}", data__max_tokens=500, data__user_text="none", eval__generate=2,
        eval__few_shot=0, eval__neutral=str(neutral), train__max_steps=1,
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, size in sizes.items():
            patch.setattr(f"prlhf.data.world.{world}.{name}", size)
        final = train(config, tmp_path / "run")
    win_rate = final["win_rate"]
    assert (win_rate["judge"], len(win_rate["per_user"])) == (judge, num_users)
    assert sum(win_rate[outcome] for outcome in ("wins", "ties", "losses")) == 2 * num_users
    assert final["text"]["policy"]["num_samples"] == 2 * num_users
    if judge == "length":
        assert final["on_side"] is None and final["text"]["policy"]["well_formed"] is None
    else:
        assert all(value * 6 == pytest.approx(round(value * 6)) for value in final["on_side"]["user000"].values())
    assert "wins/ties/losses" in format_run(final, tmp_path / "run")


def test_neutral_text_of_ones_own_is_read_before_the_first_step(tiny: Tiny, tmp_path: Path) -> None:
    texts = tmp_path / "neutral.txt"
    config = tiny.config(train__max_steps=1, eval__neutral=str(texts))
    with pytest.raises(DataError, match="neutral.txt: cannot be read"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    texts.write_text("Two and two are four.\nThe sea is wide.\n")
    tax = train(config, tmp_path / "run")["tax"]
    assert (tax["source"], tax["num_texts"], tax["num_users"]) == (str(texts), 2, 2)
    assert train(tiny.config(method="rm", train__max_steps=1), tmp_path / "rm")["tax"] is None


def row(user: str, pair: str, rejected: str = "aaaa") -> PreferenceRow:
    return PreferenceRow(pair_id=pair, user_id=user, prompt="p", chosen="aaaaa", rejected=rejected)


@pytest.fixture
def figures(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Figures of margins made by hand; of the pairs 1 and 2 the lengths differ by 4 of 5 characters."""
    seen = [row("ann", "1", "a"), row("bob", "1", "a"), row("ann", "2", "a"), row("ann", "3"), row("bob", "4")]
    unseen = [row("cat", "5"), row("dan", "5"), row("dan", "6")]
    margins = {
        # a margin of exactly 0 is wrong: the policy has not decided
        len(seen): PairMargins(
            seen, np.array([1.0, 2, -1, 3, -2]), np.array([1.0, -1, 1, 0, -1]), np.array([-1.0, 1, -1, -1, -1])
        ),
        len(unseen): PairMargins(unseen, np.full(3, np.nan), np.array([1.0, -1, 1]), np.zeros(3)),
    }
    monkeypatch.setattr(final_module, "score_pairs", lambda policy, rows, *_, **__: margins[len(rows)])
    job = perturbed_job(tiny.config())
    evaluator = Evaluator(job.config, job.model, pad_id=0, autocast=job.autocast, on_batch=lambda: None)
    # the rows reach the tokenizer all the same, which knows ann and bob
    return evaluator.accuracy(seen, unseen)


def test_shares_are_counted_over_rows_and_users(figures: dict[str, Any]) -> None:
    """ann 2 of 3 and bob 1 of 2 as themselves; ann 2 of 3 and bob 0 of 2 as the generic user."""
    seen, generic, unseen = (figures["accuracy"][name] for name in ("seen", "generic", "unseen"))
    assert (seen["mean"], seen["num_rows"], seen["num_users"]) == (pytest.approx(3 / 5), 5, 2)
    assert seen["user_mean"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert seen["worst_user"] == 0.5
    assert (generic["mean"], generic["worst_user"]) == (pytest.approx(2 / 5), 0.0)
    assert (unseen["mean"], unseen["num_users"]) == (pytest.approx(2 / 3), 2), "unseen users are generic ones"
    assert figures["accuracy"]["reference_logps"]["mean"] == pytest.approx(1 / 5)
    assert figures["per_user"] == {
        "ann": {"accuracy": pytest.approx(2 / 3), "generic_accuracy": pytest.approx(2 / 3), "num_rows": 3},
        "bob": {"accuracy": 0.5, "generic_accuracy": 0.0, "num_rows": 2},
    }
    assert figures["per_unseen_user"] == {"cat": 1.0, "dan": 0.5}
    low, high = seen["ci95"]
    assert 0 <= low < 0.6 < high <= 1


def test_the_share_of_one_preference_for_all_stands_beside_the_accuracies(figures: dict[str, Any]) -> None:
    """The chosen response is the longer one in every row."""
    assert figures["majority"] == figures["slices"]["length_gap_20"]["majority"] == {"seen": 1.0, "unseen": 1.0}


def test_the_slice_holds_the_rows_with_a_length_gap(figures: dict[str, Any]) -> None:
    part = figures["slices"]["length_gap_20"]
    # by hand: 1/5 of the longer one is a gap, so pairs 3 to 6 (5 and 4 characters) belong to it too
    assert (part["seen"]["num_rows"], part["unseen"]["num_rows"]) == (5, 3)
    assert part["per_unseen_user"] == {"cat": 1.0, "dan": 0.5}


def test_a_gap_below_a_fifth_is_left_out(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    near = PreferenceRow(pair_id="1", user_id="ann", prompt="p", chosen="a" * 10, rejected="a" * 9)
    rows = [near, row("bob", "2", "a")]
    unseen = [PreferenceRow(pair_id="3", user_id="cat", prompt="p", chosen="a" * 9, rejected="a" * 10)]
    margins = {
        2: PairMargins(rows, np.array([1.0, -1.0]), np.array([1.0, 1.0]), np.zeros(2)),
        1: PairMargins(unseen, np.zeros(1), np.array([1.0]), np.zeros(1)),
    }
    monkeypatch.setattr(final_module, "score_pairs", lambda policy, rows, *_, **__: margins[len(rows)])
    job = perturbed_job(tiny.config())
    evaluator = Evaluator(job.config, job.model, pad_id=0, autocast=job.autocast, on_batch=lambda: None)
    part = evaluator.accuracy(rows, unseen)["slices"]["length_gap_20"]
    assert (part["seen"]["num_rows"], part["seen"]["mean"], part["generic"]["mean"]) == (1, 0.0, 1.0)
    assert set(part["per_user"]) == {"bob"}
    assert part["unseen"] is None and part["majority"]["unseen"] is None


def test_sft_without_a_usable_dev_row_still_ends(tiny: Tiny, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text((tiny.data / "train.jsonl").read_text())
    (data / "dev.jsonl").write_text(json.dumps({"prompt": "p", "response": ""}) + "\n")
    final = train(tiny.config(method="sft", data__source=str(data), train__max_steps=1), tmp_path / "run")
    assert final["dev"] is None
