"""The configuration is read strictly: every mistake is named, all at once; whole files are in tests/corpus."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prlhf.config import (
    Config,
    changed_keys,
    config_from_dict,
    config_to_dict,
    dump_config,
    load_config,
)
from prlhf.errors import ConfigError
from prlhf.schema import dotted_keys
from prlhf.yaml_strict import load_yaml

DPO = {"method": "dpo", "user": {"kind": "none"}}


def messages_of(data: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(data, "a.yaml")
    return caught.value.messages


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_yaml(text: str) -> Path:
        path = tmp_path / "a.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_yaml


def test_an_empty_mapping_is_the_default_run() -> None:
    config = config_from_dict({}, "a.yaml")
    assert config == Config()
    assert (config.method, config.seed, config.data.source) == ("pdpo", 123, "builtin:psoups")


def test_values_reach_their_fields_with_their_types(write: Any) -> None:
    text = "method: pdpo\ntrain: {lr: 5e-5, max_steps: 3}\nmodel:\n  lora: {alpha: 16, targets: [q_proj, v_proj]}\n"
    config = load_config(write(text))
    assert config.train.lr == 0.00005
    assert config.train.max_steps == 3
    assert config.model.lora is not None
    assert type(config.model.lora.alpha) is float
    assert config.model.lora.targets == ("q_proj", "v_proj")


def test_lora_null_is_full_fine_tuning(write: Any) -> None:
    assert load_config(write("model: {lora: null}")).model.lora is None


def test_all_errors_come_at_once_with_key_value_expectation_and_suggestion() -> None:
    data = {
        "method": "pdop",
        "lr": 1e-3,
        "train": {"epoch": 2, "batch_rows": 0, "device": 3, "max_steps": 1.5},
        "loss": {"alpha": 1.5, "beta": "x"},
        "checkpoint": None,
        "model": {"gradient_checkpointing": 1},
    }
    assert messages_of(data) == [
        "a.yaml: method: got 'pdop', expected sft | dpo | pdpo | rm | prm; did you mean pdpo?",
        "a.yaml: lr: unknown key; did you mean train.lr?",
        "a.yaml: train.epoch: unknown key; did you mean train.epochs?",
        "a.yaml: train.device: got 3, expected auto | cpu | cuda | mps",
        "a.yaml: train.max_steps: got 1.5, expected a whole number or null",
        "a.yaml: loss.beta: got 'x', expected a finite number",
        "a.yaml: checkpoint: got null, expected a mapping with keys from every_steps, keep_last, keep_best",
        "a.yaml: model.gradient_checkpointing: got 1, expected true or false",
        "a.yaml: loss.alpha: got 1.5, expected a number from 0 to 1",
        "a.yaml: train.batch_rows: got 0, expected 1 or more",
    ]


@pytest.mark.parametrize("value", [True, "3", 3.0, [3], None])
def test_a_whole_number_is_nothing_else(value: object) -> None:
    assert len(messages_of({"train": {"batch_rows": value}})) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, True, "0.1"])
def test_a_number_is_finite(value: object) -> None:
    assert len(messages_of({"loss": {"beta": value}})) == 1


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ({"user": {"kind": "none"}}, "user.kind"),
        ({"method": "dpo"}, "user.kind"),
        ({"method": "sft"}, "user.kind"),
        ({"method": "rm"}, "user.kind"),
        ({"method": "prm", "user": {"kind": "none"}}, "user.kind"),
        ({"method": "prm", "loss": {"kind": "ipo"}}, "loss.kind"),
        ({"method": "prm", "loss": {"sft_weight": 1.0}}, "loss.sft_weight"),
        ({"method": "prm", "loss": {"label_smoothing": 0.1}}, "loss.label_smoothing"),
        ({"method": "prm", "model": {"reference": "live"}}, "model.reference"),
        ({"method": "prm", "eval": {"generate": 5}}, "eval.generate"),
        ({**DPO, "loss": {"alpha": 0.9}}, "loss.alpha"),
        ({"method": "sft", "user": {"kind": "none"}, "loss": {"sft_weight": 2.0}}, "loss.sft_weight"),
        ({"method": "rm", "user": {"kind": "none"}, "loss": {"beta": 0.3}}, "loss.beta"),
        ({"loss": {"kind": "ipo", "label_smoothing": 0.1}}, "loss.label_smoothing"),
        ({"loss": {"kind": "simpo", "label_smoothing": 0.1}}, "loss.label_smoothing"),
        ({"loss": {"kind": "orpo", "sft_weight": 1.0}}, "loss.sft_weight"),
        ({"loss": {"kind": "kto", "gamma": 0.5}}, "loss.gamma"),
        ({"loss": {"gamma": 0.5}}, "loss.gamma"),
        ({"loss": {"desirable_weight": 2.0}}, "loss.desirable_weight"),
        ({"loss": {"kind": "simpo"}, "model": {"reference": "live"}}, "model.reference"),
        ({"method": "sft", "user": {"kind": "none"}, "loss": {"kind": "kto"}}, "loss.kind"),
        ({"user": {"kind": "cluster", "prior": 0.1}}, "user.prior"),
        ({"user": {"init": "texts"}}, "user.init"),
        ({"user": {"init_texts": ["Be brief."]}}, "user.init"),
        ({"user": {"kind": "text", "init": "texts", "init_texts": ["Be brief."]}}, "user.init_texts"),
        ({"user": {"kind": "low_rank", "init": "texts", "init_texts": ["a"]}}, "user.init_texts"),
        ({"user": {"kind": "low_rank", "rank": 1, "init": "texts", "init_texts": ["a"]}}, "user.init_texts"),
        ({"user": {"kind": "cluster", "init": "texts", "init_texts": ["a"]}}, "user.init_texts"),
        *[
            ({"user": {"kind": kind, "init": "texts", "init_texts": ["a", "b", "a"], "num_clusters": 3, "rank": 3}},
             "user.init_texts")
            for kind in ("cluster", "low_rank", "text", "history")
        ],
        ({"user": {"kind": "cluster", "init": "texts", "init_texts": ["a", "b"]}}, "user.num_clusters"),
        ({"user": {"kind": "low_rank", "init": "texts", "init_texts": ["a", "b"]}}, "user.rank"),
        ({"method": "sft", "user": {"kind": "none"}, "train": {"group_pairs": True}}, "train.group_pairs"),
        ({"loss": {"kind": "kto"}, "train": {"group_pairs": True}}, "train.group_pairs"),
        ({"eval": {"temperature": 0.0, "top_p": 0.9}}, "eval.top_p"),
        ({"eval": {"select": "dev"}}, "eval.every_steps"),
        ({"loss": {"kind": "robust"}, "train": {"skip_loss_above": 4.0}}, "train.skip_loss_above"),
        ({"eval": {"select": "dev", "every_steps": 100}, "checkpoint": {"keep_best": False}}, "checkpoint.keep_best"),
        ({"eval": {"select": "dev", "every_steps": 100}, "model": {"lora": {"final_scale": 0.5}}},
         "model.lora.final_scale"),
        ({"method": "sft", "user": {"kind": "none"}, "eval": {"select": "dev", "every_steps": 100}}, "eval.select"),
        ({"data": {"max_tokens": 522}}, "data.max_prompt_tokens"),
        ({"model": {"lora": {"targets": []}}}, "model.lora.targets"),
        ({"name": "../escape"}, "name"),
        ({"name": ""}, "name"),
        ({"seed": -1}, "seed"),
        ({"eval": {"top_p": 0.0}}, "eval.top_p"),
    ],
)
def test_settings_that_cannot_work_are_refused(data: dict[str, Any], key: str) -> None:
    messages = messages_of(data)
    assert len(messages) == 1
    assert messages[0].startswith(f"a.yaml: {key}: got ")


@pytest.mark.parametrize(
    "data",
    [
        DPO,
        {**DPO, "model": {"lora": None, "reference": "live"}},
        {"data": {"max_tokens": 523}},
        {**DPO, "data": {"max_tokens": 513}},
        {"loss": {"label_smoothing": 0.1, "alpha": 1}},
        {"loss": {"kind": "simpo", "gamma": 0.5, "beta": 2, "sft_weight": 1}},
        {**DPO, "loss": {"kind": "kto", "undesirable_weight": 0.5}, "model": {"reference": "live"}},
        {"user": {"kind": "low_rank", "prior": 0.1}},
        {"user": {"kind": "low_rank", "rank": 2, "init": "texts", "init_texts": ["a", "b"]}},
        {"user": {"init": "texts", "init_texts": ["a", "b"]}},
        {"user": {"init": "texts", "init_texts": ["a", "b", "a"]}},
        {"user": {"kind": "history", "history_pairs": 1}},
    ],
)
def test_settings_at_the_edge_are_accepted(data: dict[str, Any]) -> None:
    read = config_to_dict(config_from_dict(data, "a.yaml"))
    for section, settings in data.items():
        given = settings if isinstance(settings, dict) else {section: settings}
        assert given.items() <= (read[section] if isinstance(settings, dict) else read).items()


def test_a_broken_setting_is_not_blamed_a_second_time() -> None:
    assert len(messages_of({"method": "dop", "user": {"kind": "none"}})) == 1


def test_every_number_has_a_limit() -> None:
    defaults = config_to_dict(Config())
    for key in dotted_keys(Config):
        section, _, name = key.rpartition(".")
        holder = defaults
        for part in section.split(".") if section else []:
            holder = holder[part]
        if isinstance(holder[name], bool) or not isinstance(holder[name], (int, float)):
            continue
        data: Any = {name: -1}
        for part in reversed(section.split(".") if section else []):
            data = {part: data}
        assert any(message.startswith(f"a.yaml: {key}: got -1") for message in messages_of(data)), key


def test_a_file_that_no_configuration_needs_is_not_read(write: Any) -> None:
    with pytest.raises(ConfigError, match=r"a\.yaml: larger than 262144 bytes"):
        load_config(write("x" * 300_000))


def test_quotes_make_text(write: Any) -> None:
    assert load_config(write("name: '010'")).name == "010"
    assert load_config(write("name: no")).name == "no"


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent.yaml: no such file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 6"):
        load_config(tmp_path / "latin.yaml")


def test_overrides_win_over_the_file(write: Any) -> None:
    path = write("name: a\nmodel: {lora: null}\ntrain: {lr: 1.0}")
    overrides = ["train.lr=1e-4", "model.lora.rank=4", "user={kind: cluster, num_clusters: 3}", "data.source=/a b: c"]
    config = load_config(path, overrides)
    assert (config.name, config.train.lr, config.data.source) == ("a", 1e-4, "/a b: c")
    assert config.model.lora is not None
    assert config.model.lora.rank == 4
    assert (config.user.kind, config.user.num_clusters) == ("cluster", 3)
    assert load_config(path, ["train.max_steps=5", "model.lora=null"]).model.lora is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr", "override 'train.lr': expected key=value, such as train.lr=1e-4"),
        ("=3", "override '=3': expected key=value, such as train.lr=1e-4"),
        ("train.lr=", "override 'train.lr=': train.lr: no value given; write null if none is meant"),
        ("train.lrr=1", "override 'train.lrr=1': train.lrr: unknown key; did you mean train.lr?"),
        ("train.lr=-1", "override 'train.lr=-1': train.lr: got -1.0, expected 0 or more"),
        ("seed.x=1", "a.yaml: seed: got {'x': 1}, expected a whole number"),
        ("name=[a", "override 'name=[a': name: 1: not valid YAML"),
    ],
)
def test_a_wrong_override_is_named_as_one(write: Any, override: str, message: str) -> None:
    path = write("name: a")
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    assert caught.value.messages[0].replace(str(path), "a.yaml").startswith(message)


def test_an_override_given_twice_is_refused(write: Any) -> None:
    with pytest.raises(ConfigError, match="given twice"):
        load_config(write("name: a"), ["seed=1", "seed=2"])


@pytest.mark.parametrize("name", ["1e5", "09", "010", "no", "null", "true", "1", "2024-01-01", "0x10", "1.5", "1_000"])
def test_a_dumped_configuration_is_read_back_equal(tmp_path: Path, name: str) -> None:
    data = {"name": name, "data": {"source": "päth: #1"}, "model": {"lora": {"targets": ["c_attn", "1"]}}}
    config = config_from_dict(data, "a.yaml")
    (tmp_path / "a.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "a.yaml") == config
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config))), "a.yaml") == config


@given(source=st.text(min_size=1), beta=st.floats(min_value=1e-300, allow_infinity=False, allow_nan=False))
def test_any_text_and_number_survives_the_dump(source: str, beta: float) -> None:
    config = config_from_dict({"data": {"source": source}, "loss": {"beta": beta}}, "a.yaml")
    assert config_from_dict(load_yaml(dump_config(config), "a.yaml"), "a.yaml") == config


@given(text=st.text() | st.text(alphabet="a:-[]{}&*!#'\"\n 0.e|>%@?,<"))
def test_any_text_is_read_or_refused_with_a_config_error(text: str) -> None:
    try:
        config_from_dict(load_yaml(text, "a.yaml"), "a.yaml")
    except ConfigError as error:
        assert all(message.startswith("a.yaml") for message in error.messages)


def test_changed_keys_names_exactly_what_differs() -> None:
    old = Config()
    assert changed_keys(old, Config()) == []
    new = dataclasses.replace(
        old,
        seed=1,
        train=dataclasses.replace(old.train, lr=1.0, epochs=7),
        model=dataclasses.replace(old.model, lora=None),
    )
    assert changed_keys(old, new) == ["seed", "model.lora", "train.epochs", "train.lr"]
    assert changed_keys(new, old) == changed_keys(old, new)


def test_a_configuration_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1  # type: ignore[misc]
