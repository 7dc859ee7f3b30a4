"""A policy made from values, started, and read back from a checkpoint directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from prlhf.engine.checkpoint import Progress, RunIdentity, save_checkpoint
from prlhf.errors import CheckpointError, ConfigError, DataError
from prlhf.files import seal_directory
from prlhf.models import PersonalizedPolicy, PolicySpec, load_policy, make_policy
from prlhf.models.assemble import (
    TRAINABLE,
    USERS,
    init_user_encoder_,
    load_trained_,
    spec_from_dict,
    spec_to_dict,
)
from prlhf.models.backbone import input_embedding, load_backbone
from prlhf.models.policy import Reference
from prlhf.models.soft_prompt import NUM_CANDIDATES, draw_vocabulary_prompts
from tests.policies import give_longrope_, make_batch, make_row, randomize_, save_folder

USER_IDS = ["ann", "Ā/../bob"]
PROBES = [(0, 9, 40, 5, 17, 31, 8), (0, 66, 12)]
KINDS = ["none", "uniform", "individual", "cluster"]


def _spec(backbone: str, **settings: Any) -> PolicySpec:
    return PolicySpec(
        **{
            "backbone": backbone,
            "lora_rank": 2,
            "user_kind": "individual",
            "num_user_tokens": 3,
            "num_clusters": 2,
            **settings,
        }
    )


def _trained(spec: PolicySpec) -> PersonalizedPolicy:
    """A policy all of whose trained tensors have moved."""
    policy = make_policy(spec, USER_IDS)
    if spec.lora_rank is None:
        policy.reference = Reference(policy, frozen_copy=True)
    if policy.user_encoder is not None:
        init_user_encoder_(policy, spec, PROBES)
    randomize_(policy, scale=0.1)
    return policy.eval()


def _save(policy: PersonalizedPolicy, spec: PolicySpec, run_dir: Path) -> Path:
    optimizer = torch.optim.AdamW(policy.trainable().values())
    save_checkpoint(
        run_dir,
        policy,
        optimizer,
        Progress(step=7),
        RunIdentity(spec, method="pdpo", config_text="", data_sha256=""),
        keep_last=1,
    )
    return run_dir / "checkpoints" / "step-00000007"


@pytest.fixture
def saved(tmp_path: Path) -> tuple[PersonalizedPolicy, PolicySpec, Path]:
    """A trained LoRA policy, its spec, and its checkpoint directory."""
    spec = _spec(save_folder(tmp_path / "base"))
    policy = _trained(spec)
    return policy, spec, _save(policy, spec, tmp_path / "run")


def _change(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change a tensor file and seal its directory again, as if it had been written so."""
    state = load_file(path)
    change(state)
    save_file(state, path)
    seal_directory(path.parent)


def _messages(directory: Path) -> list[str]:
    with pytest.raises(CheckpointError) as error:
        load_policy(directory)
    return error.value.messages


@pytest.mark.parametrize("lora_rank", [2, None])
@pytest.mark.parametrize("kind", KINDS)
def test_before_the_first_step_the_policy_is_the_backbone(kind, lora_rank, tmp_path):
    spec = _spec(save_folder(tmp_path), user_kind=kind, lora_rank=lora_rank)
    policy = make_policy(spec, USER_IDS)
    backbone, _ = load_backbone(spec.backbone)
    batch = make_batch(policy)
    bare = PersonalizedPolicy(backbone, policy.tokenizer)
    policy.packing = policy.head = None  # read as the bare one is, so that it is the same to a bit on any processor
    assert torch.equal(policy.sequence_logps(batch, None)[0], bare.sequence_logps(batch, None)[0])
    assert policy.users.user_ids == (() if kind == "none" else tuple(USER_IDS))
    assert (policy.user_encoder is None) == (kind == "none")


@pytest.mark.parametrize("lora_rank", [2, None], ids=["lora", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_brings_policy_users_and_reference_back_bitwise(kind, lora_rank, tmp_path):
    spec = _spec(save_folder(tmp_path / "base"), user_kind=kind, lora_rank=lora_rank)
    policy = _trained(spec)
    loaded = load_policy(_save(policy, spec, tmp_path / "run"))
    batch = make_batch(policy)
    user_ids = None if kind == "none" else batch.user_ids
    logps, _ = policy.sequence_logps(batch, user_ids)
    reference, _ = policy.reference.sequence_logps(batch)
    assert torch.equal(loaded.sequence_logps(batch, user_ids)[0], logps)
    assert torch.equal(loaded.reference.sequence_logps(batch)[0], reference)
    assert not torch.allclose(logps, reference, atol=1e-2)
    assert loaded.users.user_ids == policy.users.user_ids and not loaded.training


def test_another_base_model_is_refused(saved):
    _, spec, directory = saved
    save_folder(Path(spec.backbone), seed=1)
    (message,) = _messages(directory)
    assert "trained on another base model" in message and spec.backbone in message


def test_another_tokenizer_in_the_base_folder_changes_nothing(saved):
    policy, spec, directory = saved
    policy.tokenizer.chat_template = "{{ messages }}"
    policy.tokenizer.bos_token = None
    policy.tokenizer.save_pretrained(spec.backbone)
    loaded = load_policy(directory)
    assert loaded.tokenizer.bos_token_id == 0 and not loaded.tokenizer.chat_template
    batch = make_batch(loaded)
    expected, _ = policy.sequence_logps(batch, batch.user_ids)
    assert torch.equal(loaded.sequence_logps(batch, batch.user_ids)[0], expected)


@pytest.mark.parametrize("name", [TRAINABLE, USERS, "users.json", "state.json", "tokenizer.json"])
def test_a_flipped_bit_is_refused_naming_the_file(saved, name):
    *_, directory = saved
    content = bytearray((directory / name).read_bytes())
    content[len(content) // 2] ^= 1
    (directory / name).write_bytes(content)
    (message,) = _messages(directory)
    assert message.startswith(f"{directory / name}: content changed")


def test_missing_and_unexpected_and_misshapen_tensors_are_refused_together_by_name(saved):
    *_, directory = saved
    lora_a = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    _change(directory / TRAINABLE, lambda state: state.update(stray=state.pop(lora_a)))
    _change(directory / USERS, lambda state: state.update(generic=torch.zeros(1), offsets=state["offsets"].double()))
    assert [message.split(";")[0] for message in _messages(directory)] == [
        f"{directory / TRAINABLE}: {lora_a}: missing",
        f"{directory / TRAINABLE}: stray: unexpected",
        f"{directory / USERS}: generic: got (1,) float32, expected (3, 32) float32",
        f"{directory / USERS}: offsets: got (2, 3, 32) float64, expected (2, 3, 32) float32",
    ]


def test_tensors_that_are_not_finite_are_refused_by_name(saved):
    *_, directory = saved
    _change(directory / USERS, lambda state: state["offsets"][1, 0].fill_(float("nan")))
    (message,) = _messages(directory)
    assert message == f"{directory / USERS}: not finite: offsets; use another checkpoint"


def test_a_state_that_does_not_fit_leaves_the_policy_as_it_was(saved):
    _, spec, directory = saved
    fresh = make_policy(spec, USER_IDS)
    before = {name: parameter.clone() for name, parameter in fresh.named_parameters()}
    _change(directory / USERS, lambda state: state.pop("generic"))
    with pytest.raises(CheckpointError):
        load_trained_(fresh, directory, lora=True)
    assert all(torch.equal(parameter, before[name]) for name, parameter in fresh.named_parameters())


def test_a_spec_survives_json_and_refuses_keys_of_another_version():
    spec = _spec("x", lora_targets=("q_proj", "v_proj"), lora_rank=None)
    values = {**spec_to_dict(spec), "lora_targets": ["q_proj", "v_proj"]}
    assert spec_from_dict(values) == spec
    with pytest.raises(CheckpointError, match="color.*another version of prlhf"):
        spec_from_dict({**values, "color": "red"})


def _divergence(backbone: torch.nn.Module, prompt: torch.Tensor, probe: tuple[int, ...]) -> float:
    """Mean KL over the probe's positions after BOS, of the plain model to the one with the prompt after BOS."""
    tokens = torch.tensor([probe])
    embeds = input_embedding(backbone)(tokens)
    with torch.no_grad():
        plain = backbone(input_ids=tokens).logits[0, 1:].log_softmax(-1)
        joined = torch.cat([embeds[:, :1], prompt[None], embeds[:, 1:]], dim=1)
        moved = backbone(inputs_embeds=joined).logits[0, 1 + len(prompt) :].log_softmax(-1)
    return F.kl_div(moved, plain, log_target=True, reduction="batchmean").item()


@pytest.mark.parametrize(("kind", "count"), [("individual", 1), ("cluster", 2)])
def test_users_start_as_the_mildest_of_several_draws(kind, count, tmp_path):
    spec = _spec(save_folder(tmp_path, family="gemma2"), user_kind=kind, seed=3)
    policy = make_policy(spec, USER_IDS)
    init_user_encoder_(policy, spec, PROBES)
    candidates = draw_vocabulary_prompts(
        input_embedding(policy.backbone),
        count=NUM_CANDIDATES * count,
        num_user_tokens=3,
        forbidden={0, 1, 2},
        vocab_size=len(policy.tokenizer),
        generator=torch.Generator().manual_seed(3),
    )
    scores = torch.tensor([sum(_divergence(policy.backbone, c, probe) for probe in PROBES) for c in candidates])
    mildest = candidates[sorted(scores.argsort()[:count].tolist())]
    started = policy.user_encoder.basis if kind == "cluster" else policy.user_encoder.generic[None]
    assert torch.equal(started, mildest)
    assert scores.max() > 1.05 * scores.min()


def test_draws_that_repeat_are_passed_over_and_others_stay_as_they_were(tmp_path):
    """With one user token and 60 clusters of the 480 draws many are of one token; the mildest of each is taken once."""
    spec = _spec(save_folder(tmp_path), user_kind="cluster", num_clusters=60, num_user_tokens=1, seed=3)
    policy = make_policy(spec, USER_IDS)
    init_user_encoder_(policy, spec, PROBES)
    draws = draw_vocabulary_prompts(
        input_embedding(policy.backbone),
        count=NUM_CANDIDATES * 60,
        num_user_tokens=1,
        forbidden={0, 1, 2},
        vocab_size=len(policy.tokenizer),
        generator=torch.Generator().manual_seed(3),
    )
    distinct = [draw for i, draw in enumerate(draws) if not any(torch.equal(draw, other) for other in draws[:i])]
    assert 60 < len(distinct) < len(draws)
    scores = torch.tensor([sum(_divergence(policy.backbone, c, probe) for probe in PROBES) for c in distinct])
    started = policy.user_encoder.basis
    assert torch.equal(started, torch.stack([distinct[i] for i in sorted(scores.argsort()[:60].tolist())]))


def test_more_clusters_than_there_are_different_starts_are_refused(tmp_path):
    spec = _spec(save_folder(tmp_path), user_kind="cluster", num_clusters=2000, num_user_tokens=1)
    policy = make_policy(spec, USER_IDS)
    with pytest.raises(ConfigError, match=r"user.num_user_tokens: got 1, for which \d+ different starts .* 2000"):
        init_user_encoder_(policy, spec, PROBES)


def test_texts_that_start_soft_prompts_as_the_same_tokens_are_refused(tmp_path):
    """A short text is repeated until the soft prompt is full."""
    spec = _spec(save_folder(tmp_path), user_kind="cluster", user_init="texts", user_init_texts=("!", "!!"))
    policy = make_policy(spec, USER_IDS)
    with pytest.raises(ConfigError, match=r"user.init_texts: some of \['!', '!!'\] fill user.num_user_tokens \(3\)"):
        init_user_encoder_(policy, spec, PROBES)


@pytest.mark.parametrize("kind", ["uniform", "individual", "cluster", "low_rank", "text", "history"])
def test_users_start_as_texts_in_words(kind, tmp_path):
    """Each shared soft prompt as one of them, a single one as their mean."""
    texts = ("Be short and kind.", "Say more.")
    spec = _spec(save_folder(tmp_path), user_kind=kind, user_rank=2, user_init="texts", user_init_texts=texts,
                 num_user_tokens=40)
    policy = make_policy(spec, USER_IDS)
    encoder, tokenizer = policy.user_encoder, policy.tokenizer
    init_user_encoder_(policy, spec, PROBES)
    token_ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    expected = input_embedding(policy.backbone)(torch.tensor([(ids * 40)[:40] for ids in token_ids]))
    users = torch.tensor([0, 1, 2])
    if kind == "cluster":
        assert torch.equal(encoder.basis, expected)
    elif kind == "low_rank":
        torch.testing.assert_close(encoder.generic + encoder.basis, expected)
    torch.testing.assert_close(encoder(users), expected.mean(0).expand(3, -1, -1))
    assert spec_from_dict(json.loads(json.dumps(spec_to_dict(spec)))) == spec


def test_uniform_users_start_inside_the_range_and_by_the_seed_alone(tmp_path):
    folder = save_folder(tmp_path)

    def start(seed: int) -> torch.Tensor:
        spec = _spec(folder, user_init="uniform", user_init_range=0.25, seed=seed)
        policy = make_policy(spec, USER_IDS)
        init_user_encoder_(policy, spec, PROBES)
        return policy.user_encoder.generic.detach()

    before = torch.random.get_rng_state()
    assert torch.equal(start(1), start(1)) and not torch.equal(start(1), start(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    # 96 draws from [-0.25, 0.25]: all within, and the largest close to the end.
    assert 0.2 < start(1).abs().max() <= 0.25


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("family", ["phi3", "llama"])
def test_a_row_that_would_change_the_frequencies_of_those_beside_it_is_refused(family, packed, tmp_path):
    save_folder(tmp_path, family=family)
    policy = make_policy(_spec(give_longrope_(tmp_path, 32), user_kind="none"), []).eval()
    assert policy.packing is not None
    policy.packing = policy.packing if packed else None
    short = make_row(policy, 0, user_id=0, lengths=(4, 6, 3))
    # With BOS 32 positions, and 33.
    fitting, long = (make_row(policy, 1, user_id=0, lengths=(11, 5, response)) for response in (20, 21))
    with torch.no_grad():
        alone = policy.logps(make_batch(policy, [short]), None)
        beside = policy.logps(make_batch(policy, [short, fitting]), None)
        torch.testing.assert_close(beside.chosen[:1], alone.chosen, rtol=1e-6, atol=0)
        both = make_batch(policy, [short, long])
        with pytest.raises(DataError, match="a row of 33 tokens.*has 32 positions up to its original_max_position_emb"):
            policy.logps(both, None)
        policy.max_positions = None
        assert (policy.logps(both, None).chosen[0] - alone.chosen[0]).abs() > 1e-2
