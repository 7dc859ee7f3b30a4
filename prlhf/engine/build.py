"""Configuration to objects: the only place that turns one into the other."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch

from prlhf.config import Config
from prlhf.config_checks import REFERENCE_FREE_KINDS
from prlhf.data.context import UserContexts, collect_facts
from prlhf.data.labelled import labelled_from_pairs, preferences_from_labelled, tokenize_labelled
from prlhf.data.load import load_judged_data, load_neutral_texts, load_preference_data, load_response_rows
from prlhf.data.records import JudgedRow, LabelledData, LabelledRow, PreferenceData, ResponseRow
from prlhf.data.sampler import Sampler
from prlhf.data.tokenize import (
    Tokenized,
    TokenizedLabelled,
    TokenizedPair,
    TokenizedResponse,
    tokenize_pairs,
    tokenize_responses,
)
from prlhf.distributed import broadcast_, rank, world_size
from prlhf.engine.fsdp import shard_
from prlhf.engine.objective import Objective
from prlhf.engine.optim import RowLazyAdamW, check_room_of_rows, make_optimizer
from prlhf.engine.shrinkage import ShrunkObjective
from prlhf.engine.step import Model
from prlhf.errors import ConfigError, DataError
from prlhf.models.assemble import (
    REWARD_METHODS,
    PolicySpec,
    init_user_encoder_,
    make_policy,
    make_reward_model,
)
from prlhf.models.backbone import describe_positions, pad_token_id, position_limit
from prlhf.models.blocks import checkpoint_blocks_, compile_blocks_
from prlhf.models.personalized import PersonalizedModel
from prlhf.models.policy import PersonalizedPolicy, Reference
from prlhf.usermodel.row_table import RowTable

logger = logging.getLogger(__name__)

NUM_PROBES = 4
PREFERENCE_METHODS = ("dpo", "pdpo")
TokenizedRows = Sequence[TokenizedPair] | Sequence[TokenizedLabelled] | Sequence[TokenizedResponse]
Autocast = Callable[[], AbstractContextManager[object]]


@dataclass
class Job:
    """Everything a training run works with, on one rank."""

    config: Config
    spec: PolicySpec
    model: Model
    optimizer: RowLazyAdamW
    objective: Objective
    rows: TokenizedRows
    dropped: dict[str, int]
    preferences: PreferenceData | None
    judged: Sequence[JudgedRow]  # what `rows` was tokenized from; empty for sft
    dev_responses: list[ResponseRow]
    neutral: list[ResponseRow]
    data_sha256: str
    sampler: Sampler
    max_steps: int
    autocast: Autocast
    pad_id: int
    contexts: UserContexts | None  # of the training rows, for an encoder

    @property
    def reference(self) -> Reference | None:
        """The frozen policy that the objective compares with; None for sft, reward models and losses without one."""
        return cast(PersonalizedPolicy, self.model).reference if compares_with_reference(self.config) else None


class JobData(NamedTuple):
    """The rows of a configuration: one of the three kinds to train on, and pairs to evaluate on.

    Args:
        preferences: pairs, to train on unless there are labelled rows; None for sft.
        labelled: unpaired training rows, for kto.
        responses: training rows of sft; dev_responses those to evaluate on.
    """

    preferences: PreferenceData | None
    labelled: list[LabelledRow] | None
    responses: list[ResponseRow]
    dev_responses: list[ResponseRow]

    @property
    def judged(self) -> Sequence[JudgedRow]:
        """The judgments to train on; none for sft."""
        if self.labelled is not None:
            return self.labelled
        return [] if self.preferences is None else self.preferences.train


def compares_with_reference(config: Config) -> bool:
    """Whether the loss needs the reference's log-probs."""
    return config.method in PREFERENCE_METHODS and config.loss.kind not in REFERENCE_FREE_KINDS


def make_spec(config: Config) -> PolicySpec:
    """The part of the configuration that decides the model."""
    lora, user = config.model.lora, config.user
    return PolicySpec(
        backbone=config.model.backbone,
        dtype=config.model.dtype,
        seed=config.seed,
        lora_rank=lora.rank if lora else None,
        lora_alpha=lora.alpha if lora else 16.0,
        lora_dropout=lora.dropout if lora else 0.0,
        lora_targets=lora.targets if lora else "auto",
        user_kind=user.kind,
        num_user_tokens=user.num_user_tokens,
        num_clusters=user.num_clusters,
        user_rank=user.rank,
        encoder_dim=user.encoder_dim,
        context_tokens=user.context_tokens,
        history_pairs=user.history_pairs,
        user_init=user.init,
        user_init_range=user.init_range,
        user_init_texts=user.init_texts,
    )


def pick_device(name: str) -> torch.device:
    """The device of this rank; "auto" takes CUDA, then MPS, then the CPU.

    Raises: ConfigError: asked for a device that is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise ConfigError(f"train.device: got {name}, but torch finds none; use auto or cpu")
    return torch.device("cuda", rank() % torch.cuda.device_count()) if name == "cuda" else torch.device(name)


def make_autocast(precision: str, device: torch.device) -> Autocast:
    """A factory of autocast contexts: bf16 matmuls over fp32 weights, or nothing."""
    if precision == "fp32":
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)


def source_options(config: Config) -> dict[str, Any]:
    """How a preference source is read."""
    data = config.data
    shares = {"eval_prompts": data.eval_prompts, "unseen_users": data.unseen_users}
    return {"seed": data.seed, "on_bad_row": data.on_bad_row, **shares}


def load_job_data(config: Config) -> JobData:
    """The rows that a configuration asks for.

    Raises: DataError: no such source, bad data, or unpaired rows for a method that needs pairs.
    """
    source, options = config.data.source, source_options(config)
    if config.method == "sft":
        del options["unseen_users"]  # demonstrations are everybody's
        return JobData(None, None, *load_response_rows(source, **options))
    if config.loss.kind != "kto":
        return JobData(load_preference_data(source, **options), None, [], [])
    judged = load_judged_data(source, **options)
    if isinstance(judged, LabelledData):
        return JobData(preferences_from_labelled(judged), judged.train, [], [])
    return JobData(judged, labelled_from_pairs(judged.train), [], [])


def load_job_neutral(config: Config, preferences: PreferenceData | None) -> list[ResponseRow]:
    """Texts for the personalization tax, which policies alone pay."""
    if preferences is None or config.method in REWARD_METHODS:
        return []
    return load_neutral_texts(config.eval.neutral, preferences)


def build_job(config: Config) -> Job:
    """Load data and model, tokenize, and make the objects of a run at step 0.

    Raises: ConfigError, DataError, ModelError: whatever the configuration asks for and cannot be had.
    """
    if config.train.batch_rows % world_size():
        raise ConfigError(
            f"train.batch_rows: got {config.train.batch_rows}, which {world_size()} ranks do not divide; "
            f"use a multiple of {world_size()}"
        )
    _set_up_torch(config)
    device = pick_device(config.train.device)
    _warn_of_bfloat16(config, device)
    data = load_job_data(config)
    neutral = load_job_neutral(config, data.preferences)
    spec = make_spec(config)
    make = make_reward_model if config.method in REWARD_METHODS else make_policy
    model: Model = make(spec, data.preferences.user_ids() if data.preferences else [])
    if not config.train.packing:
        model.packing = None
    check_positions(model, config.data.max_tokens)
    tokenized = _tokenize(config, model, data)
    if not tokenized.rows:
        raise DataError(
            f"data.source {config.data.source!r}: no training row is left after tokenizing "
            f"({tokenized.dropped}); raise data.max_tokens or mend the data"
        )
    contexts = learn_users_(model, config, data)
    model.to(device)
    check_room_of_rows(model.parameters(), len({row.user_id for row in tokenized.rows}))
    if model.user_encoder is not None:
        init_user_encoder_(model, spec, [row.prompt_ids + row.responses[0] for row in tokenized.rows[:NUM_PROBES]])
        # Measured, not drawn: what two ranks round differently would stay different.
        broadcast_(p for p in model.user_encoder.parameters() if not isinstance(p, RowTable))
    _prepare_for_training_(model, config, spec)
    train = config.train
    if train.parallel == "fsdp":
        shard_(model, precision=train.precision, max_tokens=config.data.max_tokens)
    sampler = make_sampler(config, tokenized.rows)
    return Job(
        config=config,
        spec=spec,
        model=model,
        optimizer=_optimizer_of(model, config),
        rows=tokenized.rows,
        dropped=tokenized.dropped,
        objective=make_objective(config, tokenized.rows, num_users=len(model.users or ()), device=device),
        preferences=data.preferences,
        judged=data.judged,
        dev_responses=data.dev_responses,
        neutral=neutral,
        data_sha256=hash_rows(tokenized.rows if contexts is None else [*tokenized.rows, contexts.facts]),
        sampler=sampler,
        max_steps=train.max_steps or train.epochs * sampler.steps_per_epoch,
        autocast=make_autocast(train.precision, device),
        pad_id=pad_token_id(model.tokenizer),
        contexts=contexts,
    )


def _set_up_torch(config: Config) -> None:
    """Threads, and this rank's random numbers."""
    if config.train.num_threads:
        torch.set_num_threads(config.train.num_threads)
    torch.manual_seed(config.seed + rank())


def _warn_of_bfloat16(config: Config, device: torch.device) -> None:
    """Say where it loses steps or time."""
    if config.model.dtype == "bfloat16" and config.model.lora is None:
        logger.warning("model.dtype bfloat16 with lora: null: most of AdamW's steps are too small for bfloat16 weights "
                       "and round away; use float32 with train.precision bf16")
    is_used = config.train.precision == "bf16" or config.model.dtype == "bfloat16"
    if is_used and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        logger.warning("bfloat16 on a processor without instructions for it: matmuls take 5 to 20 times as long as in "
                       "float32; use train.precision fp32 and model.dtype float32")


def _tokenize(config: Config, model: Model, data: JobData) -> Tokenized[Any]:
    """The training rows as ids."""
    limits: dict[str, Any] = tokenize_limits(config, model)
    users = model.users if model.user_encoder is not None else None
    if data.labelled is not None:
        return tokenize_labelled(data.labelled, model.tokenizer, users, **limits, seed=config.seed)
    if data.preferences is not None:
        return tokenize_pairs(data.preferences.train, model.tokenizer, users, **limits)
    return tokenize_responses(data.responses, model.tokenizer, **limits)


def make_sampler(config: Config, rows: TokenizedRows) -> Sampler:
    """The order of the training rows; with `train.group_pairs` judgments of one pair come one after the other."""
    groups: list[Hashable] = list(range(len(rows)))
    if config.train.group_pairs:
        pairs = cast(Sequence[TokenizedPair], rows)
        groups = [(row.prompt_ids, frozenset(row.responses)) for row in pairs]
    return Sampler(groups, batch_rows=config.train.batch_rows, seed=config.seed)


def restore_reference_(job: Job) -> None:
    """Load the starting weights once more where full fine-tuning kept no copy and evaluation compares with them."""
    if isinstance(job.model, PersonalizedPolicy) and job.spec.lora_rank is None and job.reference is None:
        start = make_policy(replace(job.spec, user_kind="none"), []).to(job.model.device)
        job.model.reference = Reference(start.eval())


def _optimizer_of(model: PersonalizedModel, config: Config) -> RowLazyAdamW:
    train = config.train
    return make_optimizer(
        model.trainable(),
        lr=train.lr,
        user_lr=train.user_lr,
        cluster_lr=train.cluster_lr,
        encoder_lr=train.encoder_lr,
        weight_decay=train.weight_decay,
    )


def make_objective(
    config: Config, rows: TokenizedRows, *, num_users: int, device: torch.device
) -> Objective:
    """The loss of a row that the configuration asks for, with the prior's share where there is one."""
    loss = config.loss
    settings: dict[str, Any] = {
        "kind": loss.kind,
        "beta": loss.beta,
        "alpha": loss.alpha,
        "label_smoothing": loss.label_smoothing,
        "sft_weight": loss.sft_weight,
        "gamma": loss.gamma,
        "desirable_weight": loss.desirable_weight,
        "undesirable_weight": loss.undesirable_weight,
        "separate_terms": config.train.separate_terms,
    }
    if config.user.prior == 0:
        return Objective(config.method, **settings)
    counts = torch.bincount(torch.tensor([row.user_id for row in rows]), minlength=num_users + 1).to(device)
    return ShrunkObjective(config.method, **settings, precision=config.user.prior, rows_of_user=counts)


def tokenize_limits(config: Config, model: PersonalizedModel) -> dict[str, Any]:
    """How rows are tokenized; the soft prompt's positions are inside the budget."""
    return {
        "max_tokens": config.data.max_tokens,
        "max_prompt_tokens": config.data.max_prompt_tokens,
        "num_user_tokens": model.soft_prompt.num_user_tokens,
        "with_user_text": config.data.user_text == "prompt",
    }


def check_positions(model: PersonalizedModel, max_tokens: int) -> None:
    """Refuse sequences longer than the model's positions: they would wrap, fail mid-run or change their neighbours."""
    limit = position_limit(model.backbone)
    if limit is not None and max_tokens > limit:
        raise ConfigError(
            f"data.max_tokens: got {max_tokens}, but the backbone has {describe_positions(model.backbone)}; "
            f"use at most {limit}"
        )


def learn_users_(model: PersonalizedModel, config: Config, data: JobData) -> UserContexts | None:
    """Contexts of the training rows for an encoder; the model learns what a checkpoint keeps of the users.

    Of users whose texts stand in front of their prompts it keeps those, too; the last one of a user counts.

    Returns: None for other user models.
    Raises: DataError: there is nothing to read.
    """
    preferences = data.preferences
    if preferences is None:
        return None
    if config.data.user_text == "prompt" and model.user_encoder is not None:
        model.user_texts = {row.user_id: row.user_text for row in data.judged if row.user_text}
    if model.contexts is None:
        return None
    contexts = model.contexts.with_facts(collect_facts([*preferences.train, *(data.labelled or [])]))
    if model.contexts.kind == "text" and not any(facts.text for facts in contexts.facts.values()):
        raise DataError(f"{preferences.source}: user.kind text reads user_text, and no training row has one; "
                        "add it to the rows or to users.json, or choose another user.kind")
    if model.contexts.kind == "history" and all(len(facts.pairs) < 2 for facts in contexts.facts.values()):
        raise DataError(f"{preferences.source}: user.kind history reads a user's other pairs, and no user has two "
                        "training rows; choose another user.kind")
    model.contexts.facts = contexts.to_keep(config.seed)
    return contexts


def evaluation_contexts(model: Model, data: PreferenceData) -> UserContexts | None:
    """What an encoder reads in an evaluation on `data`; None for other user models.

    Of a user's pairs it reads training rows if there are any, else the user's other evaluation rows, else what the
    checkpoint keeps.
    """
    if model.contexts is None:
        return None
    facts = {**model.contexts.facts, **collect_facts(data.eval_unseen), **collect_facts(data.train)}
    return model.contexts.with_facts(facts)


def hash_rows(rows: Sequence[Any]) -> str:
    """sha256 of the tokenized training rows and of all else that is read, so that a resume has the same data."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode())
    return digest.hexdigest()


def _prepare_for_training_(model: Model, config: Config, spec: PolicySpec) -> None:
    if isinstance(model, PersonalizedPolicy) and spec.lora_rank is None and compares_with_reference(config):
        model.reference = Reference(model, frozen_copy=True)
    if config.model.gradient_checkpointing:
        checkpoint_blocks_(model.backbone, every=config.model.gradient_checkpointing_every)
    if config.train.compile:
        compile_blocks_(model.backbone)
    model.train()
