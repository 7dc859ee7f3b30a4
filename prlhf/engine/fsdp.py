"""`train.parallel: fsdp`: weights, gradients and moments in parts, one a rank, by torch's fully_shard."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from prlhf.data.collate import collate_responses
from prlhf.data.tokenize import TokenizedResponse
from prlhf.data.user_index import GENERIC_USER_ID
from prlhf.distributed import all_reduce_any, world_size
from prlhf.engine.step import Model
from prlhf.errors import ConfigError
from prlhf.models.blocks import decoder_blocks
from prlhf.models.packing import Term
from prlhf.models.personalized import PersonalizedModel
from prlhf.models.policy import PersonalizedPolicy

logger = logging.getLogger(__name__)


def shard_(model: Model, *, precision: str, max_tokens: int) -> None:
    """Split the backbone over the ranks, and so the reference's copy of it; alone there is nothing to split.

    Each decoder block is gathered when it computes and freed afterwards; embeddings and output layer are gathered for
    a whole pass. Users and a reward model's head stay whole on every rank: they are small, and users' rows are lazy.

    Args:
        precision: "bf16" gathers weights in bfloat16 and sums gradients in float32; the parts stay as they are.
        max_tokens: of the longest row. If some rows fit a pack and some do not, all are padded: ranks that gather
            together must read the same way.
    Raises: ConfigError: a device that fully_shard does not serve. ModelError: no decoder blocks.
    """
    if world_size() == 1:
        logger.info("train.parallel fsdp on one rank: there is nothing to shard")
        return
    if model.device.type not in ("cpu", "cuda"):
        raise ConfigError(f"train.parallel: got fsdp on {model.device.type}, expected cuda or cpu; use ddp")
    for part in _policies_of(model):
        _shard_one_(part, precision)
        _pass_once(part)
        if all_reduce_any(part.packing is None):  # each rank has tried for itself whether its backbone reads packs
            part.packing = None
        if part.packing is not None and part.packing.window is not None and part.packing.window < max_tokens:
            logger.info("train.parallel fsdp: rows are padded, since some may exceed the backbone's sliding window")
            part.packing = None


def _shard_one_(model: PersonalizedModel, precision: str) -> None:
    mesh = init_device_mesh(model.device.type, (world_size(),))
    # Inputs keep their type: what enters a block is in the embeddings', which are gathered in the same type.
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if precision == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in decoder_blocks(model.backbone):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    others = {parameter for name, parameter in model.named_parameters() if not name.startswith("backbone.")}
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=others)
    register_fsdp_forward_method(model, "term_values")
    for module in _sharded_modules(model):
        # The loss is divided by the rows of the global step, so gradients are summed; the default is their mean.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum


@torch.no_grad()
def _pass_once(model: PersonalizedModel) -> None:
    """torch prepares parts in the first pass of all, which must be the root's; generation reads the backbone alone."""
    batch = collate_responses([TokenizedResponse(0, GENERIC_USER_ID, (0,), (0,))], pad_id=0).to(model.device)
    model.term_values(batch, [Term(None, None, shared=True)])
    for module in _sharded_modules(model):
        module.reshard()


@contextmanager
def whole_weights(model: Model) -> Iterator[None]:
    """Inside, every rank holds all weights and reads the model by itself: for passes without gradient.

    Evaluation, generation and the reference pass give ranks unequal work, and sharded weights are gathered by all
    ranks together. All ranks enter; nothing is exchanged until they leave, which each may do when it likes.
    """
    roots = list(_policies_of(model))
    modules = [module for root in roots for module in _sharded_modules(root)]
    blocks = [module for module in modules if module not in roots]
    for block in blocks:
        block.set_reshard_after_forward(False, recurse=False)
    for module in modules:
        module.unshard()
    try:
        yield
    finally:
        for block in blocks:
            block.set_reshard_after_forward(True, recurse=False)
        for module in modules:
            module.reshard()


def _policies_of(model: Model) -> Iterator[PersonalizedModel]:
    """The model, and the frozen copy that its reference may be."""
    yield model
    if isinstance(model, PersonalizedPolicy) and model.reference.frozen_copy:
        yield model.reference.policy


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
