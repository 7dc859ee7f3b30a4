"""Checkpoints of tiny policies all of whose trained tensors have moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from prlhf.data.context import UserFacts
from prlhf.data.records import PreferenceRow
from prlhf.engine.checkpoint import Progress, RunIdentity, save_checkpoint
from prlhf.engine.optim import make_optimizer
from prlhf.models import PersonalizedPolicy, PolicySpec, make_policy
from prlhf.models.policy import Reference
from tests.policies import randomize_, save_folder

USER_IDS = ["ann", "Ā/../bob", "cat"]
STEP = 7


def save_policy(
    run_dir: Path, *, family: str = "llama", variant: str = "plain", user_ids: list[str] = USER_IDS, **settings: Any
) -> PersonalizedPolicy:
    """A policy, written as the checkpoint of step 7 of a run, with the optimizer's state; the base is beside the run.

    Args:
        settings: fields of `PolicySpec`.
    """
    backbone = save_folder(run_dir.parent / f"{run_dir.name}_base", family=family, variant=variant)
    values = {"backbone": backbone, "lora_rank": 2, "lora_alpha": 4.0, "user_kind": "individual"}
    spec = PolicySpec(**{**values, "num_user_tokens": 3, "num_clusters": 2, "user_rank": 2, **settings})  # type: ignore[arg-type]
    policy = make_policy(spec, user_ids)
    if spec.lora_rank is None:
        policy.reference = Reference(policy, frozen_copy=True)
    if policy.contexts is not None:
        policy.contexts.facts = {user_id: _facts(user_id) for user_id in user_ids}
    randomize_(policy, scale=0.1)
    if policy.user_encoder is not None:
        randomize_(policy.user_encoder, scale=1.0)
    optimizer = make_optimizer(
        policy.trainable(), lr=1e-4, user_lr=1e-4, cluster_lr=1e-4, encoder_lr=1e-4, weight_decay=0.0
    )
    generator = torch.Generator().manual_seed(3)
    for parameter in policy.trainable().values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    optimizer.zero_grad()
    save_checkpoint(
        run_dir,
        policy,
        optimizer,
        Progress(step=STEP),
        RunIdentity(spec, method="pdpo", config_text="name: tiny\n", data_sha256="0" * 64),
        keep_last=1,
    )
    return policy.eval()


def _facts(user_id: str) -> UserFacts:
    pairs = tuple(
        PreferenceRow(f"{user_id}-{i}", user_id, f"{user_id} asks {i}", f"{user_id} likes {i}", f"not {i}")
        for i in range(3)
    )
    return UserFacts(f"I am {user_id}.", pairs)


def checkpoint_of(run_dir: Path, step: int = STEP) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"
