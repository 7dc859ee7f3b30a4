"""Configuration to objects: the only place that turns one into the other."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch

from prlhf.config import Config
from prlhf.data.context import UserContexts, collect_facts
from prlhf.data.load import load_preference_data, load_response_rows
from prlhf.data.records import PreferenceData, ResponseRow
from prlhf.data.sampler import num_steps_per_epoch
from prlhf.data.tokenize import TokenizedPair, TokenizedResponse, tokenize_pairs, tokenize_responses
from prlhf.distributed import rank, world_size
from prlhf.engine.objective import Objective
from prlhf.engine.optim import make_optimizer
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
from prlhf.models.backbone import pad_token_id, position_limit
from prlhf.models.personalized import PersonalizedModel
from prlhf.models.policy import PersonalizedPolicy, Reference

logger = logging.getLogger(__name__)

NUM_PROBES = 4
PREFERENCE_METHODS = ("dpo", "pdpo")  # those that compare with a reference
Autocast = Callable[[], AbstractContextManager[object]]


@dataclass
class Job:
    """Everything a training run works with, on one rank."""

    config: Config
    spec: PolicySpec
    model: Model
    optimizer: torch.optim.Optimizer
    objective: Objective
    rows: Sequence[TokenizedPair] | Sequence[TokenizedResponse]
    dropped: dict[str, int]
    preferences: PreferenceData | None
    dev_responses: list[ResponseRow]
    data_sha256: str
    max_steps: int
    autocast: Autocast
    pad_id: int
    contexts: UserContexts | None  # of the training rows, for an encoder

    @property
    def reference(self) -> Reference | None:
        """The frozen policy that the objective compares with; None for sft and reward models."""
        compares = isinstance(self.model, PersonalizedPolicy) and self.config.method in PREFERENCE_METHODS
        return cast(PersonalizedPolicy, self.model).reference if compares else None


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


def load_job_data(config: Config) -> tuple[PreferenceData | None, list[ResponseRow], list[ResponseRow]]:
    """Preference data, or training and dev responses for sft."""
    data = config.data
    options: dict[str, Any] = {"seed": data.seed, "eval_prompts": data.eval_prompts, "on_bad_row": data.on_bad_row}
    if config.method == "sft":
        return None, *load_response_rows(data.source, **options)
    return load_preference_data(data.source, unseen_users=data.unseen_users, **options), [], []


def build_job(config: Config) -> Job:
    """Load data and model, tokenize, and make the objects of a run at step 0.

    Raises: ConfigError, DataError, ModelError: whatever the configuration asks for and cannot be had.
    """
    if config.train.batch_rows % world_size():
        raise ConfigError(
            f"train.batch_rows: got {config.train.batch_rows}, which {world_size()} ranks do not divide; "
            f"use a multiple of {world_size()}"
        )
    if config.train.num_threads:
        torch.set_num_threads(config.train.num_threads)
    torch.manual_seed(config.seed + rank())
    device = pick_device(config.train.device)
    preferences, train_responses, dev_responses = load_job_data(config)
    spec = make_spec(config)
    make = make_reward_model if config.method in REWARD_METHODS else make_policy
    model: Model = make(spec, preferences.user_ids() if preferences else [])
    check_positions(model, config.data.max_tokens)
    limits = tokenize_limits(config, model)
    if preferences is not None:
        users = model.users if spec.user_kind != "none" else None
        tokenized: Any = tokenize_pairs(preferences.train, model.tokenizer, users, **limits)
    else:
        tokenized = tokenize_responses(train_responses, model.tokenizer, **limits)
    if not tokenized.rows:
        raise DataError(
            f"data.source {config.data.source!r}: no training row is left after tokenizing "
            f"({tokenized.dropped}); raise data.max_tokens or mend the data"
        )
    contexts = None if preferences is None else learn_users_(model, preferences, seed=config.seed)
    model.to(device)
    if model.user_encoder is not None:
        init_user_encoder_(model, spec, [row.prompt_ids + row.chosen_ids for row in tokenized.rows[:NUM_PROBES]])
    _prepare_for_training_(model, config, spec)
    train = config.train
    max_steps = train.max_steps or train.epochs * num_steps_per_epoch(len(tokenized.rows), train.batch_rows)
    return Job(
        config=config,
        spec=spec,
        model=model,
        optimizer=_optimizer_of(model, config),
        rows=tokenized.rows,
        dropped=tokenized.dropped,
        objective=make_objective(config, tokenized.rows, num_users=len(model.users or ()), device=device),
        preferences=preferences,
        dev_responses=dev_responses,
        data_sha256=hash_rows(tokenized.rows if contexts is None else [*tokenized.rows, contexts.facts]),
        max_steps=max_steps,
        autocast=make_autocast(train.precision, device),
        pad_id=pad_token_id(model.tokenizer),
        contexts=contexts,
    )


def _optimizer_of(model: PersonalizedModel, config: Config) -> torch.optim.Optimizer:
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
    config: Config, rows: Sequence[TokenizedPair | TokenizedResponse], *, num_users: int, device: torch.device
) -> Objective:
    """The loss of a row that the configuration asks for, with the prior's share where there is one."""
    loss = config.loss
    settings: dict[str, Any] = {
        "kind": loss.kind,
        "beta": loss.beta,
        "alpha": loss.alpha,
        "label_smoothing": loss.label_smoothing,
        "sft_weight": loss.sft_weight,
    }
    if config.user.prior == 0:
        return Objective(config.method, **settings)
    counts = torch.bincount(torch.tensor([row.user_id for row in rows]), minlength=num_users + 1).to(device)
    return ShrunkObjective(config.method, **settings, precision=config.user.prior, rows_of_user=counts)


def tokenize_limits(config: Config, model: PersonalizedModel) -> dict[str, int]:
    """Lengths for the tokenizer; the soft prompt's positions are inside the budget."""
    return {
        "max_tokens": config.data.max_tokens,
        "max_prompt_tokens": config.data.max_prompt_tokens,
        "num_user_tokens": model.soft_prompt.num_user_tokens,
    }


def check_positions(model: PersonalizedModel, max_tokens: int) -> None:
    """Refuse sequences longer than the model's positions: they would wrap or fail mid-run."""
    limit = position_limit(model.backbone)
    if limit is not None and max_tokens > limit:
        raise ConfigError(
            f"data.max_tokens: got {max_tokens}, but the backbone has {limit} positions; use at most {limit}"
        )


def learn_users_(model: PersonalizedModel, preferences: PreferenceData, *, seed: int) -> UserContexts | None:
    """Contexts of the training rows for an encoder; the model learns what a checkpoint keeps of the users.

    Returns: None for other user models.
    Raises: DataError: there is nothing to read.
    """
    if model.contexts is None:
        return None
    contexts = model.contexts.with_facts(collect_facts(preferences.train))
    if model.contexts.kind == "text" and not any(facts.text for facts in contexts.facts.values()):
        raise DataError(f"{preferences.source}: user.kind text reads user_text, and no training row has one; "
                        "add it to the rows or to users.json, or choose another user.kind")
    if model.contexts.kind == "history" and all(len(facts.pairs) < 2 for facts in contexts.facts.values()):
        raise DataError(f"{preferences.source}: user.kind history reads a user's other pairs, and no user has two "
                        "training rows; choose another user.kind")
    model.contexts.facts = contexts.to_keep(seed)
    return contexts


def hash_rows(rows: Sequence[Any]) -> str:
    """sha256 of the tokenized training rows and of all else that is read, so that a resume has the same data."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode())
    return digest.hexdigest()


def _prepare_for_training_(model: Model, config: Config, spec: PolicySpec) -> None:
    if isinstance(model, PersonalizedPolicy) and spec.lora_rank is None and config.method in PREFERENCE_METHODS:
        model.reference = Reference(model, frozen_copy=True)
    if config.model.gradient_checkpointing:
        model.backbone.gradient_checkpointing_enable(  # type: ignore[operator]
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    model.train()
