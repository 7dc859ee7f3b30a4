"""A policy put together from plain values, and read back from a checkpoint directory."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from prlhf.data.context import UserContexts, facts_from_record
from prlhf.data.user_index import UserIndex
from prlhf.errors import CheckpointError, ConfigError
from prlhf.files import find_damage, read_json
from prlhf.models.backbone import (
    changed_architecture,
    describe_architecture,
    embedding_dim,
    input_embedding,
    load_backbone,
    load_tokenizer,
    position_limit,
)
from prlhf.models.head import find_head
from prlhf.models.lora import PEFT_PREFIX, add_lora_, lora_state_dict
from prlhf.models.misfits import find_misfits
from prlhf.models.packing import Packing, set_up_packing_
from prlhf.models.personalized import PersonalizedModel
from prlhf.models.policy import PersonalizedPolicy, Reference
from prlhf.models.reward import PersonalizedRewardModel
from prlhf.models.run_folder import STATE, resolve_checkpoint
from prlhf.models.soft_prompt import NUM_CANDIDATES, draw_vocabulary_prompts, embed_texts, first_of_equal
from prlhf.models.tensor_files import StoredTensors
from prlhf.models.user_rows import SHARDS, STORE, read_on_demand_, read_rows_, table_of_store
from prlhf.models.weights_hash import hash_weights, state_of_files
from prlhf.sharding import local_part, own_rows
from prlhf.usermodel import (
    ClusterUserModel,
    EncoderUserModel,
    HistoryUserModel,
    IndividualUserModel,
    LowRankUserModel,
    TextUserModel,
    UniformUserModel,
    UserModel,
)
from prlhf.usermodel.row_table import zero_

TRAINABLE = "trainable.safetensors"
USERS = "users.safetensors"
USER_IDS = "users.json"
CONTEXTS = "contexts.json"
USER_TEXTS = "user_texts.json"

REWARD_METHODS = ("rm", "prm")
WHITENING_BATCHES = 16  # of known users, 64 each
HEAD_KEY = "score.weight"  # as in transformers' sequence classifiers
logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=PersonalizedModel)
UserKind: TypeAlias = Literal["none", "uniform", "individual", "cluster", "low_rank", "text", "history"]


@dataclass(frozen=True)
class PolicySpec:
    """Everything that decides a policy's shape and starting values; stored in every checkpoint.

    Args:
        lora_rank: None for full fine-tuning.
        user_init: "vocabulary" (embeddings of tokens), "uniform" (in [-user_init_range, user_init_range]) or "texts"
            (embeddings of `user_init_texts`).
    """

    backbone: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    lora_rank: int | None = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    lora_targets: Literal["auto"] | tuple[str, ...] = "auto"
    user_kind: UserKind = "none"
    num_user_tokens: int = 10
    num_clusters: int = 6
    user_rank: int = 4
    encoder_dim: int = 64
    context_tokens: int = 256
    history_pairs: int = 8
    user_init: Literal["vocabulary", "uniform", "texts"] = "vocabulary"
    user_init_range: float = 0.5
    user_init_texts: tuple[str, ...] = ()


def make_policy(spec: PolicySpec, user_ids: Sequence[str], *, tokenizer: Any = None) -> PersonalizedPolicy:
    """The policy before its first step: its log-probs without soft prompt are the backbone's own.

    The user encoder holds zeros until `init_user_encoder_` or `load_trained_` fills it.

    Args:
        user_ids: known users in the order of their rows; ignored for user_kind "none".
        tokenizer: stands in for the backbone's own.
    Raises: ModelError: the backbone or a LoRA target cannot be used.
    """
    return _make_model(PersonalizedPolicy, spec, user_ids, tokenizer)


def make_reward_model(spec: PolicySpec, user_ids: Sequence[str], *, tokenizer: Any = None) -> PersonalizedRewardModel:
    """The reward model before its first step, whose scores are all 0; otherwise as `make_policy`."""
    return _make_model(PersonalizedRewardModel, spec, user_ids, tokenizer)


def _make_model(kind: type[Model], spec: PolicySpec, user_ids: Sequence[str], tokenizer: Any) -> Model:
    files = state_of_files(spec.backbone)
    backbone, own_tokenizer = load_backbone(spec.backbone, dtype=spec.dtype, seed=spec.seed)
    users = UserIndex([] if spec.user_kind == "none" else user_ids)
    user_encoder = _make_user_encoder(spec, num_users=len(users), dim=embedding_dim(backbone))
    tokenizer = own_tokenizer if tokenizer is None else tokenizer
    contexts = None
    if spec.user_kind in ("text", "history"):
        contexts = UserContexts(
            spec.user_kind, tokenizer, max_tokens=spec.context_tokens, max_pairs=spec.history_pairs
        )
    model = kind(backbone, tokenizer, user_encoder=user_encoder, users=users, contexts=contexts)
    model.base_sha256 = hash_weights(backbone, spec.backbone, dtype=spec.dtype, files=files)
    model.base_config = describe_architecture(backbone)
    model.head, model.max_positions = find_head(backbone), position_limit(backbone)
    packing = set_up_packing_(backbone)
    if isinstance(packing, Packing):
        model.packing = packing
    else:
        logger.info("%s cannot read packed rows (%s); they are padded", type(backbone).__name__, packing)
    if spec.lora_rank is not None:
        add_lora_(
            backbone,
            rank=spec.lora_rank,
            alpha=spec.lora_alpha,
            dropout=spec.lora_dropout,
            targets=spec.lora_targets,
            seed=spec.seed,
        )
    return model


def _make_user_encoder(spec: PolicySpec, *, num_users: int, dim: int) -> UserModel | None:
    sizes = {"num_users": num_users, "num_user_tokens": spec.num_user_tokens, "dim": dim}
    if spec.user_kind == "none":
        return None
    if spec.user_kind == "cluster":
        return ClusterUserModel(num_clusters=spec.num_clusters, **sizes)
    if spec.user_kind == "low_rank":
        return LowRankUserModel(rank=spec.user_rank, **sizes)
    if spec.user_kind in ("text", "history"):
        encoder = TextUserModel if spec.user_kind == "text" else HistoryUserModel
        num_clusters = len(spec.user_init_texts) if spec.user_init == "texts" else None
        return encoder(hidden_dim=spec.encoder_dim, num_clusters=num_clusters, seed=spec.seed, **sizes)
    return {"uniform": UniformUserModel, "individual": IndividualUserModel}[spec.user_kind](**sizes)


@torch.no_grad()
def init_user_encoder_(policy: PersonalizedModel, spec: PolicySpec, probes: Sequence[Sequence[int]]) -> None:
    """Starting soft prompts, and an encoder's first layer from known users' contexts.

    Texts are taken as they are: each shared soft prompt starts as one of them, a single one as their mean. Of random
    draws the mildest are taken: a soft prompt moves the policy at step 0, by nats a response in a bad draw, and
    preference losses never repair that.

    Args:
        probes: token ids of a few texts of the job, at least one; they measure the disturbance. BOS first where there
            is one, and two tokens or more.
    Raises: ConfigError: texts that the soft prompts cannot start as, or more soft prompts than there are to draw.
    """
    assert policy.user_encoder is not None and min(map(len, probes)) > 1
    count = policy.user_encoder.num_initial
    initial = _start_as_texts(policy, spec, count) if spec.user_init == "texts" else _draw_mild(policy, spec, probes)
    policy.user_encoder.init_(initial if count > 1 else initial[0])
    if isinstance(policy.user_encoder, EncoderUserModel):
        known = itertools.islice(policy.known_contexts(), WHITENING_BATCHES)
        policy.user_encoder.whiten_(policy.embed_context(context) for _, context in known if context is not None)


def _start_as_texts(policy: PersonalizedModel, spec: PolicySpec, count: int) -> Tensor:
    """(count, T, D): the texts, with their mean in front where a generic soft prompt stands beside shared ones."""
    texts = embed_texts(
        input_embedding(policy.backbone),
        policy.tokenizer,
        spec.user_init_texts,
        num_user_tokens=spec.num_user_tokens,
    ).float()
    if count > 1 and len(first_of_equal(texts)) < len(texts):
        raise ConfigError(f"user.init_texts: some of {list(spec.user_init_texts)} fill user.num_user_tokens "
                          f"({spec.num_user_tokens}) with the same tokens, and each starts a soft prompt; change them")
    return texts if len(texts) == count else torch.cat([texts.mean(dim=0, keepdim=True), texts])[:count]


def _draw_mild(policy: PersonalizedModel, spec: PolicySpec, probes: Sequence[Sequence[int]]) -> Tensor:
    """(count, T, D): of several draws those that disturb the model least."""
    assert policy.user_encoder is not None
    generator = torch.Generator().manual_seed(spec.seed)
    count = policy.user_encoder.num_initial
    shape = (NUM_CANDIDATES * count, spec.num_user_tokens, policy.user_encoder.dim)
    if spec.user_init == "uniform":
        candidates = ((torch.rand(shape, generator=generator) * 2 - 1) * spec.user_init_range).to(policy.device)
    else:
        candidates = draw_vocabulary_prompts(
            input_embedding(policy.backbone),
            count=shape[0],
            num_user_tokens=spec.num_user_tokens,
            vocab_size=len(policy.tokenizer),
            forbidden=set(policy.tokenizer.all_special_ids),
            generator=generator,
        ).float()
    candidates = candidates[first_of_equal(candidates)]  # equal ones would get equal gradients and never part
    if len(candidates) < count:
        raise ConfigError(f"user.num_user_tokens: got {spec.num_user_tokens}, for which {len(candidates)} different "
                          f"starts were drawn, expected {count}, one for each soft prompt; use more tokens, or fewer "
                          "soft prompts (user.num_clusters, user.rank)")
    with policy.evaluating():
        disturbance = torch.stack([_disturbance(policy, candidates, probe) for probe in probes]).mean(dim=0)
    return candidates[disturbance.argsort(stable=True)[:count].sort().values]


def _disturbance(policy: PersonalizedModel, candidates: Tensor, probe: Sequence[int]) -> Tensor:
    """How far each candidate prompt moves the next-token distributions of a text: mean KL in nats, (count,)."""
    text = policy.input_embeds(torch.tensor([list(probe)], device=policy.device), None)
    plain = _next_token_logps(policy, text)[1:]
    # One candidate at a time: the logits of all of them could be more than the model itself.
    moved = (
        _next_token_logps(policy, policy.soft_prompt(text, candidate[None]))[len(candidate) + 1 :]
        for candidate in candidates
    )
    return torch.stack([(plain.exp() * (plain - other)).sum(-1).mean() for other in moved])


def _next_token_logps(policy: PersonalizedModel, embeds: Tensor) -> Tensor:
    """(L, V) of embeddings (1, L, D)."""
    return policy.backbone(inputs_embeds=embeds, use_cache=False).logits[0].float().log_softmax(-1)


def trained_tensors(model: PersonalizedModel, *, lora: bool) -> dict[str, Tensor]:
    """Trained tensors but the users': adapters under PEFT's names, or all weights under the model's own; and the head.

    They share the parameters' storage.
    """
    if lora:
        tensors = lora_state_dict(model.backbone)
    else:
        tensors = {name: parameter.detach() for name, parameter in model.backbone.named_parameters()}
    if isinstance(model, PersonalizedRewardModel):
        tensors[PEFT_PREFIX + HEAD_KEY if lora else HEAD_KEY] = model.score.weight.detach()
    return tensors


@torch.no_grad()
def load_trained_(policy: PersonalizedModel, directory: Path, *, lora: bool, rows_on_demand: bool = False) -> None:
    """Fill a policy made from the same spec with a checkpoint's tensors; all of them or none.

    Where its tensors are sharded, every rank calls this and reads the rows that it holds.

    Args:
        rows_on_demand: leave users' rows in their store, if they have one, until they are asked for.
    Raises: CheckpointError: missing, unexpected, misshapen or non-finite tensors, by name.
    """
    files = {directory / TRAINABLE: trained_tensors(policy, lora=lora)}
    if policy.user_encoder is not None:
        files[directory / USERS] = {name: value.detach() for name, value in policy.user_encoder.named_parameters()}
    states = {path: StoredTensors(path) for path in files}
    stored = table_of_store(directory, policy.user_encoder)
    if stored is not None:
        del files[directory / USERS][stored[0]]
    wrong = [f"{path}: {line}" for path in files for line in find_misfits(files[path], states[path].kinds)]
    if wrong:
        raise CheckpointError(*wrong)
    rows = {path: {name: own_rows(tensor) for name, tensor in tensors.items()} for path, tensors in files.items()}
    for path, state in states.items():
        state.check_finite(rows[path])
    for path, tensors in files.items():
        for name, tensor in tensors.items():
            local_part(tensor).copy_(states[path].read(name, rows[path][name]))
    if stored is not None and policy.users is not None:
        zero_(stored[1])
        if rows_on_demand:
            read_on_demand_(directory / STORE, stored[1], policy.users)
        else:
            read_rows_(directory / STORE, stored[1].detach(), policy.users)


def load_policy(
    checkpoint_dir: str | Path, *, device: str = "cpu", rows_on_demand: bool = False
) -> PersonalizedPolicy:
    """The trained policy of a checkpoint directory (or of a run), ready to score and answer.

    The tokenizer is the checkpoint's own, so that a change of the backbone's leaves the policy as it was trained.

    Args:
        rows_on_demand: see `load_model`.
    Raises: CheckpointError: damaged, trained on another base model, or a reward model. ModelError: the backbone cannot
        be loaded.
    """
    model = load_model(checkpoint_dir, device=device, rows_on_demand=rows_on_demand)
    if isinstance(model, PersonalizedPolicy):
        return model
    raise CheckpointError(f"{checkpoint_dir}: holds a reward model, which scores and cannot answer; give a policy")


def load_reward_model(
    checkpoint_dir: str | Path, *, device: str = "cpu", rows_on_demand: bool = False
) -> PersonalizedRewardModel:
    """The trained reward model of a checkpoint or run directory; see `load_policy`.

    Raises: CheckpointError: damaged, trained on another base model, or a policy. ModelError: the backbone cannot be
        loaded.
    """
    model = load_model(checkpoint_dir, device=device, rows_on_demand=rows_on_demand)
    if isinstance(model, PersonalizedRewardModel):
        return model
    raise CheckpointError(f"{checkpoint_dir}: holds a policy; give a run of method rm or prm")


def load_model(
    checkpoint_dir: str | Path, *, device: str = "cpu", packing: bool = True, rows_on_demand: bool = False
) -> PersonalizedPolicy | PersonalizedRewardModel:
    """The policy or reward model of a checkpoint or run directory, by its method; see `load_policy`.

    Args:
        packing: False pads rows even where the backbone can read packed ones.
        rows_on_demand: users' rows that are in a store stay there until a user is asked for, and are checked then; the
            user model's parameter is not to be read directly.
    Raises: CheckpointError: damaged, or trained on another base model. ModelError: the backbone cannot be loaded.
    """
    directory = resolve_checkpoint(Path(checkpoint_dir))
    damage = find_damage(directory, by_size=SHARDS if rows_on_demand else None)
    if damage:
        raise CheckpointError(*(f"{line}; use another checkpoint" for line in damage))
    state = read_json(directory / STATE)
    spec = spec_from_dict(state["policy"])
    make = make_reward_model if state["method"] in REWARD_METHODS else make_policy
    tokenizer = load_tokenizer(directory, str(directory))
    model = make(spec, read_json(directory / USER_IDS)["user_ids"], tokenizer=tokenizer)
    changed = changed_base(model, state)
    if changed:
        raise CheckpointError(
            f"{directory}: trained on another base model than {spec.backbone!r} is now ({changed}); restore it"
        )
    model.to(device)
    if not packing:
        model.packing = None
    if isinstance(model, PersonalizedPolicy) and spec.lora_rank is None:
        model.reference = Reference(model, frozen_copy=True)
    load_trained_(model, directory, lora=spec.lora_rank is not None, rows_on_demand=rows_on_demand)
    if (directory / USER_TEXTS).is_file():
        model.user_texts = read_json(directory / USER_TEXTS)
    if model.contexts is not None:
        model.contexts.facts = facts_from_record(read_json(directory / CONTEXTS), str(directory / CONTEXTS))
    return model.eval()


def changed_base(model: PersonalizedModel, state: Mapping[str, Any]) -> str:
    """How the base model differs from the one that a checkpoint's state.json knows, "" where it does not."""
    if state["base_sha256"] != model.base_sha256:
        return "its weights differ"
    return "; ".join(changed_architecture(state.get("base_config", {}), model.base_config))


def spec_to_dict(spec: PolicySpec) -> dict[str, Any]:
    """The spec as JSON values."""
    return dataclasses.asdict(spec)


def spec_from_dict(values: dict[str, Any]) -> PolicySpec:
    """The spec of `spec_to_dict`.

    Raises: CheckpointError: keys this version does not know.
    """
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    try:
        return PolicySpec(**values)
    except TypeError as error:
        raise CheckpointError(f"{STATE}: policy: {error}; written by another version of prlhf") from None
