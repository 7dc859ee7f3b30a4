"""The decoder's blocks: which modules they are, which of them are computed again in backward, and compiling them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from prlhf.errors import ConfigError, ModelError
from prlhf.models.shared_prefix import keep_attention_uncompiled


def decoder_blocks(backbone: nn.Module) -> list[nn.Module]:
    """The members of every list of modules that is in no other list: the decoder's layers, in every family.

    Raises: ModelError: there is none.
    """
    blocks: list[nn.Module] = []
    inside: tuple[str, ...] = ()
    for path, module in backbone.named_modules():
        if isinstance(module, nn.ModuleList) and not path.startswith(inside):
            blocks += module
            inside = (*inside, f"{path}.")
    if not blocks:
        raise ModelError(
            "model.backbone: no list of decoder blocks, without which there is no fsdp, compile or "
            "gradient_checkpointing_every above 1; leave these out"
        )
    return blocks


def checkpoint_blocks_(backbone: nn.Module, *, every: int = 1) -> None:
    """Keep no activations inside of the first block of every `every`, and compute them again in backward.

    Raises: ModelError: the family has no switch for each block (transformers' GradientCheckpointingLayer).
    """
    cast(Any, backbone).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if every == 1:
        return
    blocks = decoder_blocks(backbone)
    if not all(getattr(block, "gradient_checkpointing", False) for block in blocks):
        raise ModelError("model.gradient_checkpointing_every: this backbone knows only all blocks or none; use 1")
    for index, block in enumerate(blocks):
        cast(Any, block).gradient_checkpointing = index % every == 0


def compile_blocks_(backbone: nn.Module) -> None:
    """Let torch.compile fuse what each block does between its attention and its matrices, for lengths of any kind.

    Passes without gradient stay as they are: their caches and shapes would be compiled again and again.

    Raises: ConfigError: torch cannot compile here. ModelError: no decoder blocks.
    """
    parameter = next(backbone.parameters())
    try:
        torch.compile(_probe)(torch.ones(2, device=parameter.device))
    except Exception as error:  # no compiler, a device that inductor does not know: torch raises anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"train.compile: torch cannot compile for {parameter.device.type} ({reason}); "
            "install a C++ compiler or use false"
        ) from error
    keep_attention_uncompiled()
    for block in decoder_blocks(backbone):
        cast(Any, block).forward = _with_gradient_compiled(block.forward)


def _with_gradient_compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(forward, dynamic=True)

    def choose(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else forward)(*args, **kwargs)

    return choose


def _probe(x: Tensor) -> Tensor:
    return x.sin() + 1
