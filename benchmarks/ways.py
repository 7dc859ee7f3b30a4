"""The ways to compute a training step that `benchmarks/cpu.py` compares, and the model and rows that it gives them."""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.trl_way import TrlSteps
from prlhf.data.collate import PairBatch, collate_pairs
from prlhf.data.tokenize import TokenizedPair
from prlhf.data.user_index import UserIndex
from prlhf.engine.build import make_autocast
from prlhf.engine.objective import Objective, ReferenceLogps
from prlhf.engine.reference import LiveReference
from prlhf.losses import pdpo_loss, response_logps
from prlhf.models.blocks import compile_blocks_
from prlhf.models.head import find_head
from prlhf.models.lora import add_lora_
from prlhf.models.packing import Packing, set_up_packing_
from prlhf.models.policy import PersonalizedPolicy, Reference
from prlhf.usermodel import IndividualUserModel

# Mean tokens of prompt, chosen and rejected response; lengths are log-normal.
SHAPES = {"tldr": (348, 35, 35), "psoups": (61, 198, 198), "prism": (245, 142, 143)}
SPREAD = 0.35
BATCH_ROWS = 4
NUM_USERS = 16
NUM_USER_TOKENS = 10
BETA, ALPHA = 0.1, 0.5


@dataclass
class Bench:
    """A policy in training, and the same one in TRL's hands."""

    policy: PersonalizedPolicy
    packing: Packing
    trl: TrlSteps | None
    optimizers: list[torch.optim.Optimizer]
    autocast: Callable[[], AbstractContextManager[object]]

    def update(self) -> None:
        """One step with whatever gradients there are."""
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def small_llama() -> LlamaConfig:
    """A Llama of 26.4 M parameters."""
    return LlamaConfig(
        hidden_size=384, num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=6, intermediate_size=1024,
        vocab_size=32000, tie_word_embeddings=True, max_position_embeddings=2048,
    )


def make_policy(
    config: LlamaConfig, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> PersonalizedPolicy:
    """Random weights, made on the device, and users; every tensor is trained."""
    torch.manual_seed(0)
    with torch.device(device):
        backbone = AutoModelForCausalLM.from_config(config, dtype=dtype)
    packing = set_up_packing_(backbone)
    assert isinstance(packing, Packing), packing
    dim = config.hidden_size
    encoder = IndividualUserModel(num_users=NUM_USERS, num_user_tokens=NUM_USER_TOKENS, dim=dim)
    encoder.init_(0.02 * torch.randn(NUM_USER_TOKENS, dim))
    users = UserIndex([f"u{i}" for i in range(NUM_USERS)])
    policy = PersonalizedPolicy(backbone, SimpleNamespace(bos_token_id=1), user_encoder=encoder, users=users)
    policy.packing, policy.head = packing, find_head(backbone)
    return policy.to(device)


def make_bench(
    *, lora: bool, precision: str = "fp32", with_trl: bool = False, with_compiled: bool = False
) -> Bench:
    """The small model, trained in full or with LoRA; weights are float32, matmuls of the precision."""
    policy = make_policy(small_llama())
    assert policy.packing is not None
    trl = TrlSteps(policy.backbone, lora=lora, beta=BETA, num_user_tokens=NUM_USER_TOKENS) if with_trl else None
    if lora:
        add_lora_(policy.backbone, rank=8, alpha=16.0, dropout=0.0, targets="auto")
    policy.reference = Reference(policy, frozen_copy=not lora)
    if with_compiled:
        for backbone in (policy.backbone, *([trl.trainer.model] if trl else [])):
            compile_blocks_(backbone)
    trained = [list(policy.trainable().values()), *([trl.parameters()] if trl else [])]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(each, lr=1e-5, fused=True) for each in trained]
    return Bench(policy, policy.packing, trl, optimizers, make_autocast(precision, torch.device("cpu")))


def draw_rows(
    shape: str, rng: np.random.Generator, *, count: int = BATCH_ROWS, vocab_size: int = 32000, scale: float = 1.0
) -> list[TokenizedPair]:
    """Rows of random tokens.

    Args:
        scale: of the shape's lengths.
    """

    def tokens(mean: int) -> tuple[int, ...]:
        length = max(2, round(scale * rng.lognormal(np.log(mean) - SPREAD**2 / 2, SPREAD)))
        return tuple(rng.integers(3, vocab_size, length).tolist())

    prompt, chosen, rejected = SHAPES[shape]
    return [
        TokenizedPair(row, int(rng.integers(1, NUM_USERS + 1)), (1, *tokens(prompt)), tokens(chosen), tokens(rejected))
        for row in range(count)
    ]


@dataclass(frozen=True)
class Step:
    """One step's rows, collated, and what is known of them beforehand."""

    rows: list[TokenizedPair]
    batch: PairBatch
    reference: ReferenceLogps


def make_step(bench: Bench, rows: list[TokenizedPair]) -> Step:
    """The step of these rows."""
    batch = collate_pairs(rows, pad_id=0)
    with bench.autocast():
        return Step(rows, batch, LiveReference(bench.policy.reference)(batch))


def prlhf_losses(bench: Bench, step: Step, *, packed: bool) -> Tensor:
    """P-DPO as prlhf computes it."""
    bench.policy.packing = bench.packing if packed else None
    return Objective("pdpo", beta=BETA, alpha=ALPHA)(bench.policy, step.batch, step.reference).losses


def authors_losses(bench: Bench, step: Step) -> Tensor:
    """P-DPO as the authors' code computes it."""
    policy, batch = bench.policy, step.batch
    user_ids = torch.cat([batch.user_ids, torch.zeros_like(batch.user_ids)])
    chosen, rejected = batch.input_ids.chunk(2)
    chosen_labels, rejected_labels = batch.labels.chunk(2)
    ids = torch.cat([chosen, chosen, rejected, rejected])
    labels = torch.cat([chosen_labels, chosen_labels, rejected_labels, rejected_labels])

    def logps(model: torch.nn.Module, users: Tensor | None) -> Tensor:
        embeds = policy.input_embeds(ids, users, None, None if users is None else torch.arange(len(users)).repeat(2))
        num_soft = embeds.shape[1] - ids.shape[1]
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64)
        logits = model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits
        return response_logps(logits, F.pad(labels, (num_soft, 0), value=-100))

    with policy.reference.active() as frozen:
        reference = logps(frozen.backbone, None).chunk(4)
    individual_chosen, generic_chosen, individual_rejected, generic_rejected = logps(
        policy.backbone, user_ids
    ).chunk(4)
    return pdpo_loss(
        individual_chosen,
        individual_rejected,
        generic_chosen,
        generic_rejected,
        reference[0],
        reference[2],
        alpha=ALPHA,
        beta=BETA,
    ).losses


def trl_losses(bench: Bench, step: Step, *, precomputed: bool) -> Tensor:
    """The mean that TRL trains."""
    assert bench.trl is not None
    return bench.trl.loss(step.rows, step.reference if precomputed else None)


WAYS: dict[str, Callable[[Bench, Step], Tensor]] = {
    "packed": partial(prlhf_losses, packed=True),
    "padded": partial(prlhf_losses, packed=False),
    "authors": authors_losses,
    "trl": partial(trl_losses, precomputed=False),
    "trl_pre": partial(trl_losses, precomputed=True),
    "compiled": partial(prlhf_losses, packed=True),
    "trl_compiled": partial(trl_losses, precomputed=False),
}
TRL_WAYS = ("trl", "trl_pre", "trl_compiled")
COMPILED_WAYS = ("compiled", "trl_compiled")


def has_trl() -> bool:
    """Whether TRL's ways can be run."""
    return all(importlib.util.find_spec(name) for name in ("trl", "peft"))


def ways_here() -> list[str]:
    """Those that can be run: TRL's where it is installed, compiled ones where there is a compiler."""
    left_out = (() if has_trl() else TRL_WAYS) + (() if shutil.which("g++") else COMPILED_WAYS)
    return [way for way in WAYS if way not in left_out]


def compiled_or_not(way: str) -> AbstractContextManager[object]:
    """Inside, blocks that were compiled are only used so by the ways that are named for it."""
    return torch.compiler.set_stance("default" if way in COMPILED_WAYS else "force_eager")


def time_step(bench: Bench, way: str, step: Step) -> float:
    """Seconds of one optimizer step."""
    with compiled_or_not(way):
        began = time.perf_counter()
        with bench.autocast():
            loss = WAYS[way](bench, step).mean()
        loss.backward()
        bench.update()
        return time.perf_counter() - began
