"""Exports are the trained policy: PEFT and transformers compute from them what prlhf computes, for every user."""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from prlhf.cli import main
from prlhf.data.context import collate_contexts
from prlhf.data.tokenize import encode_prompt
from prlhf.files import seal_directory
from prlhf.generation import SamplingOptions, generate
from prlhf.models import PersonalizedPolicy
from prlhf.models.backbone import builtin_model_dir, hash_state
from prlhf.models.lora import lora_state_dict
from prlhf.serving import answer
from prlhf.serving.export import export_checkpoint
from tests.evaluation.test_report import final_of
from tests.families import FAMILIES
from tests.saved_policies import STEP, USER_IDS, checkpoint_of, save_policy
from tests.tokenizers import VARIANTS, tiny_tokenizer

IDS = [0, 9, 40, 7, 33, 34]  # BOS first
# Two programs, one formula in float32: a merged product and the order of a few operations differ.
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


@torch.no_grad()
def _ours(policy: PersonalizedPolicy, ids: list[int], user: int) -> Tensor:
    """Logits (L, V) with the user's soft prompt where prlhf puts it."""
    context = None
    if policy.contexts is not None and user:
        context = collate_contexts([policy.contexts.of_user(USER_IDS[user - 1], "")], 0)
    embeds = policy.input_embeds(torch.tensor([ids]), torch.tensor([user]), context)
    return policy.backbone(inputs_embeds=embeds, use_cache=False).logits[0]


@torch.no_grad()
def _theirs(model: Any, folder: Path, ids: list[int], user: str | None, *, num_bos: int = 1) -> Tensor:
    """The same from the folder's files alone."""
    embeds = answer.make_prompt_embeds(model, ids, answer.load_soft_prompt(folder, user), num_bos=num_bos)
    return model(inputs_embeds=embeds[None], use_cache=False).logits[0]


def _assert_same(policy: PersonalizedPolicy, model: Any, folder: Path) -> None:
    for user, user_id in enumerate([None, *USER_IDS]):
        torch.testing.assert_close(_theirs(model, folder, IDS, user_id), _ours(policy, IDS, user), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_export_gives_every_users_logits_and_not_the_bases(family: str, tmp_path: Path) -> None:
    policy = save_policy(tmp_path / "run", family=family)
    export_checkpoint(tmp_path / "run", "merged", tmp_path / "out")
    model = answer.load_model(tmp_path / "out")
    _assert_same(policy, model, tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "run_base")
    assert not torch.allclose(_theirs(base, tmp_path / "out", IDS, "ann"), _ours(policy, IDS, 1), atol=1e-2)


@pytest.mark.peer("peft")
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_an_adapter_export_and_gives_every_users_logits(family: str, tmp_path: Path) -> None:
    policy = save_policy(tmp_path / "run", family=family)
    export_checkpoint(tmp_path / "run", "peft", tmp_path / "out")
    model = answer.load_model(tmp_path / "out")
    _assert_same(policy, model, tmp_path / "out")
    with model.disable_adapter():
        assert not torch.allclose(_theirs(model, tmp_path / "out", IDS, "ann"), _ours(policy, IDS, 1), atol=1e-2)


@pytest.mark.peer("peft")
@pytest.mark.parametrize("targets", [("q_proj", "layers.0.mlp.down_proj"), ("v_proj",)])
def test_peft_finds_the_layers_of_named_targets(targets: tuple[str, ...], tmp_path: Path) -> None:
    policy = save_policy(tmp_path / "run", lora_targets=targets)
    export_checkpoint(tmp_path / "run", "peft", tmp_path / "out")
    model = answer.load_model(tmp_path / "out")
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == len(lora_state_dict(policy.backbone)) / 2
    _assert_same(policy, model, tmp_path / "out")


@pytest.fixture(scope="module")
def builtin_export(tmp_path_factory: pytest.TempPathFactory) -> tuple[PersonalizedPolicy, Path]:
    """An adapter of the built-in model, in a folder that is no longer where it was written."""
    root = tmp_path_factory.mktemp("builtin")
    policy = save_policy(root / "run", backbone="builtin:tiny")
    export_checkpoint(root / "run", "peft", root / "out")
    (root / "elsewhere").mkdir()
    return policy, (root / "out").rename(root / "elsewhere" / "out")


def test_an_adapter_of_the_built_in_model_brings_its_base_and_names_no_folder_of_this_machine(
    builtin_export: tuple[PersonalizedPolicy, Path],
) -> None:
    policy, out = builtin_export
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    assert hash_state(answer.load_model(out, adapter=False)) == policy.base_sha256
    files = [path for path in out.rglob("*") if path.is_file()]
    places = [str(builtin_model_dir()).encode(), str(out.parents[1]).encode()]
    assert [path.name for path in files if any(place in path.read_bytes() for place in places)] == []
    assert '"THIS FOLDER/base"' in (out / "README.md").read_text().replace("'", '"')


@pytest.mark.peer("peft")
def test_peft_finds_the_base_that_came_along(
    builtin_export: tuple[PersonalizedPolicy, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import AutoPeftModelForCausalLM

    policy, out = builtin_export
    _assert_same(policy, answer.load_model(out), out)
    monkeypatch.chdir(out)
    model = AutoPeftModelForCausalLM.from_pretrained(".", dtype=torch.float32).eval()
    _assert_same(policy, model, out)
    base = answer.load_model(out, adapter=False)
    assert not torch.allclose(_theirs(base, out, IDS, "ann"), _theirs(model, out, IDS, "ann"), atol=1e-2)


def test_an_adapter_export_has_pefts_keys_and_names_and_no_others(tmp_path: Path) -> None:
    policy = save_policy(tmp_path / "run")
    export_checkpoint(tmp_path / "run", "peft", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(tmp_path / "run_base"),
        "r": 2,
        "lora_alpha": 4.0,
        "lora_dropout": 0.0,
        "target_modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        "bias": "none",
        "inference_mode": True,
    }
    state = load_file(tmp_path / "out" / "adapter_model.safetensors")
    query = "base_model.model.model.layers.0.self_attn.q_proj"
    assert state[f"{query}.lora_A.weight"].shape == state[f"{query}.lora_B.weight"].T.shape == (2, 32)
    expected = lora_state_dict(policy.backbone)
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.parametrize("kind", ["uniform", "cluster", "low_rank", "text", "history"])
def test_every_user_model_is_exported_as_soft_prompts(kind: str, tmp_path: Path) -> None:
    policy = save_policy(tmp_path / "run", user_kind=kind)
    export_checkpoint(tmp_path / "run", "merged", tmp_path / "out")
    about = json.loads((tmp_path / "out" / "export.json").read_text())
    assert (about["user_ids"], about["layout"]) == (USER_IDS, ["BOS", "soft prompt", "text"])
    _assert_same(policy, answer.load_model(tmp_path / "out"), tmp_path / "out")


def test_a_model_without_users_or_bos_is_exported_too(tmp_path: Path) -> None:
    policy = save_policy(tmp_path / "run", user_kind="none", variant="no_bos")
    export_checkpoint(tmp_path / "run", "merged", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "export.json").read_text())["layout"] == ["soft prompt", "text"]
    theirs = _theirs(answer.load_model(tmp_path / "out"), tmp_path / "out", IDS, None, num_bos=0)
    with torch.no_grad():
        ours = policy.backbone(inputs_embeds=policy.input_embeds(torch.tensor([IDS]), None)).logits[0]
    torch.testing.assert_close(theirs, ours, **CLOSE)


def test_a_full_fine_tune_is_exported_whole_and_has_no_adapter(tmp_path: Path, capsys: Any) -> None:
    policy = save_policy(tmp_path / "run", lora_rank=None)
    for kind in ("peft", "vllm"):
        assert main(["export", str(tmp_path / "run"), "--format", kind, "--out", str(tmp_path / kind)]) == 2
        assert capsys.readouterr().err.endswith(
            f"error: {checkpoint_of(tmp_path / 'run')}: all weights were trained, so there is no adapter; "
            "use --format merged\n"
        )
        assert not (tmp_path / kind).exists()
    assert main(["export", str(tmp_path / "run"), "--format", "merged", "--out", str(tmp_path / "out")]) == 0
    _assert_same(policy, answer.load_model(tmp_path / "out"), tmp_path / "out")


def test_an_export_is_never_written_over(tmp_path: Path, capsys: Any) -> None:
    save_policy(tmp_path / "run")
    (tmp_path / "out").mkdir()
    assert main(["export", str(tmp_path / "run"), "--format", "peft", "--out", str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("user_text", ["", "I sail."])
def test_the_script_encodes_prompts_as_training_does(variant: str, user_text: str) -> None:
    tokenizer = tiny_tokenizer(variant)
    for prompt in ("Tell me about tea.", " Bees?\n", "é"):
        expected = encode_prompt(tokenizer, prompt, user_text, max_prompt_tokens=100)
        assert answer.encode(tokenizer, prompt, user_text) == expected


@pytest.mark.parametrize("template", [
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ m.content + '\n' }}{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ m.content + '\n' }}{% endfor %}",
], ids=["refuses", "drops"])
def test_the_script_keeps_the_users_text_where_a_template_takes_no_system_message(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    expected = encode_prompt(tokenizer, "Tea?", "I sail.", max_prompt_tokens=100)
    assert answer.encode(tokenizer, "Tea?", "I sail.") == expected
    assert "I sail.\nTea?" in tokenizer.decode(expected)


def test_the_script_answers_a_known_user_behind_the_text_that_the_checkpoint_keeps(tmp_path: Path, capsys: Any) -> None:
    policy = save_policy(tmp_path / "run")
    (checkpoint_of(tmp_path / "run") / "user_texts.json").write_text('{"cat": "I sail."}')
    seal_directory(checkpoint_of(tmp_path / "run"))
    export_checkpoint(tmp_path / "run", "merged", tmp_path / "out")
    options = SamplingOptions(max_new_tokens=6, temperature=0)
    settings = ["--folder", str(tmp_path / "out"), "--prompt", "Tea?", "--temperature", "0", "--max-new-tokens", "6"]
    given: tuple[tuple[str, list[str]], ...] = (("I sail.", []), ("I knit.", ["--user-text", "I knit."]))
    for text, arguments in given:
        answer.main([*settings, "--user", "cat", *arguments])
        expected = generate(policy, ["Tea?"], [3], user_texts=[text], options=options)[0]
        assert capsys.readouterr().out.strip() == expected.strip()
    assert [answer.load_user_text(tmp_path / "out", user) for user in (None, "ann", "cat")] == ["", "", "I sail."]
    assert "what they say of themselves" in (tmp_path / "out" / "README.md").read_text()


def test_the_script_refuses_special_tokens_and_unknown_users(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(SystemExit, match="the user's text holds what is no character"):
        answer.encode(tokenizer, "Tea?", "caf\udce9")
    with pytest.raises(SystemExit, match="special token"):
        answer.encode(tokenizer, f"tea {tokenizer.eos_token}")
    save_policy(tmp_path / "run")
    export_checkpoint(tmp_path / "run", "merged", tmp_path / "out")
    with pytest.raises(SystemExit, match="'dan' is none of the 3 known users"):
        answer.load_soft_prompt(tmp_path / "out", "dan")


def test_the_script_sends_a_server_the_embeddings_that_prlhf_reads(tmp_path: Path, monkeypatch: Any) -> None:
    policy = save_policy(tmp_path / "run")
    export_checkpoint(tmp_path / "run", "vllm", tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    sent: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(answer, "ask_server", lambda server, body: sent.append((server, body)) or "yes")
    server = ["--server", "http://here", "--model", "mine"]
    answer.main(["--folder", str(tmp_path / "out"), "--prompt", "Tea?", "--user", USER_IDS[1], *server])
    [(url, body)] = sent
    assert (url, body["model"], body["prompt"]) == ("http://here", "mine", "")
    embeds = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
    ids = encode_prompt(policy.tokenizer, "Tea?", max_prompt_tokens=100)
    assert torch.equal(embeds, policy.input_embeds(torch.tensor([ids]), torch.tensor([2]))[0])


def test_the_script_answers_as_prlhf_does_and_imports_nothing_of_it(tmp_path: Path, capsys: Any) -> None:
    policy = save_policy(tmp_path / "run")
    export_checkpoint(tmp_path / "run", "merged", tmp_path / "out")
    script = (tmp_path / "out" / "answer.py").read_text()
    assert "import prlhf" not in script and "from prlhf" not in script
    settings = ["--user", "cat", "--temperature", "0", "--max-new-tokens", "6"]
    answer.main(["--folder", str(tmp_path / "out"), "--prompt", "Tea?", *settings])
    options = SamplingOptions(max_new_tokens=6, temperature=0)
    assert capsys.readouterr().out.strip() == generate(policy, ["Tea?"], [3], options=options)[0].strip()


def test_the_card_says_what_a_stranger_must_know(tmp_path: Path) -> None:
    save_policy(tmp_path / "run")
    accuracy = {"mean": 0.75, "ci95": [0.5, 1.0], "worst_user": 0.25, "num_rows": 8, "num_users": 3}
    data = {"source": "data/mine", "train_rows": 12}
    final = final_of(step=STEP, data=data, accuracy={"seen": accuracy})
    final["accuracy"]["reference_logps"] = {**accuracy, "mean": 0.5}
    (tmp_path / "run" / "eval").mkdir()
    (tmp_path / "run" / "eval" / "final.json").write_text(json.dumps(final))
    for kind in ("peft", "merged", "vllm"):
        export_checkpoint(tmp_path / "run", kind, tmp_path / kind)
        card = (tmp_path / kind / "README.md").read_text()
        assert "| seen | 0.750 | 0.500 to 1.000 | 0.250 | 8 | 3 |" in card
        assert "`data/mine`, 12 training rows" in card and "LoRA of rank 2; user model individual" in card
        assert "| the base alone, by its log-probs | 0.500 |" in card and "reference_logps" not in card
        assert ("needs peft (`pip install peft`)" in card.replace("Needs", "needs")) == (kind != "merged")
        assert "right after BOS" in card and "personal data" in card and "## Licence" in card
        assert USER_IDS[1] not in card
        assert ("a folder of the machine that wrote this one" in card) == (kind != "merged")
        assert AutoTokenizer.from_pretrained(tmp_path / kind).eos_token_id == 1
    assert "--max-lora-rank 8" in card and "--enable-prompt-embeds" in card


def test_the_script_says_in_a_line_that_an_adapter_needs_peft(tmp_path: Path, monkeypatch: Any) -> None:
    save_policy(tmp_path / "run")
    export_checkpoint(tmp_path / "run", "peft", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit, match="peft is not installed.*pip install peft") as refusal:
        answer.main(["--folder", str(tmp_path / "out"), "--prompt", "Tea?"])
    assert "\n" not in str(refusal.value) and refusal.value.__suppress_context__


def test_figures_of_another_step_are_not_the_exports(tmp_path: Path) -> None:
    save_policy(tmp_path / "run")
    (tmp_path / "run" / "eval").mkdir()
    (tmp_path / "run" / "eval" / "final.json").write_text(json.dumps(final_of(step=STEP + 1)))
    export_checkpoint(tmp_path / "run", "peft", tmp_path / "out")
    assert "No evaluation of this step" in (tmp_path / "out" / "README.md").read_text()
