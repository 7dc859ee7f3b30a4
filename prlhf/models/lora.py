"""Low-rank adapters in any backbone's linear layers, stored under PEFT's key names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from prlhf.errors import CheckpointError, ModelError

PEFT_PREFIX = "base_model.model."


class LoraLinear(nn.Module):
    """A frozen linear layer plus a trained low-rank term: base(x) + (alpha / rank) B A dropout(x).

    A and B are float32 whatever the backbone's type; B starts at zero, so the layer starts as its base.

    Args:
        base: nn.Linear or transformers' Conv1D (GPT-2), whose weight is transposed.
        rank: rows of A.
        alpha: numerator of the scale.
        dropout: share of inputs dropped before A while training.
        generator: draws A; on the CPU, so that every device starts alike.
    Source: Hu et al. 2021, arXiv:2106.09685.
    """

    def __init__(
        self, base: nn.Linear | Conv1D, *, rank: int, alpha: float, dropout: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        num_outputs, num_inputs = (base.weight.T if isinstance(base, Conv1D) else base.weight).shape
        lora_a = torch.empty(rank, num_inputs)
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5), generator=generator)
        device = base.weight.device
        self.base = base
        self.lora_A = nn.Parameter(lora_a.to(device))
        self.lora_B = nn.Parameter(torch.zeros(num_outputs, rank, device=device))
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.scale = alpha / rank
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in the base layer's type; the base alone inside `adapters_disabled`."""
        if not self.enabled:
            return self.base(x)
        rows = x.flatten(0, -2)
        dropped = self.dropout(rows)
        if self._is_fused(x):
            weight = self.base.weight.T if isinstance(self.base, Conv1D) else self.base.weight
            inputs = (rows, None if dropped is rows else dropped)
            output = _AdaptedLinear.apply(*inputs, weight, self.base.bias, self.lora_A, self.lora_B, self.scale)
        else:
            low_rank = F.linear(dropped.to(self.lora_A.dtype), self.lora_A) * self.scale
            output = self.base(rows)
            output = (output + low_rank @ self.lora_B.T.contiguous()).to(output.dtype)
        return output.unflatten(0, x.shape[:-1])

    def _is_fused(self, x: Tensor) -> bool:
        """Whether base and adapter compute in one type; other kinds of layers hold weights of a form of their own."""
        if type(self.base) not in (nn.Linear, Conv1D) or any(p.requires_grad for p in self.base.parameters()):
            return False
        types = {x.dtype, self.base.weight.dtype, self.lora_A.dtype}
        if torch.is_autocast_enabled(x.device.type):
            return torch.float64 not in types  # which autocast leaves alone
        return len(types) == 1

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The base layer's weight and what the adapter adds to it, in the base's shape, float32."""
        update = self.scale * (self.lora_B @ self.lora_A)
        return self.base.weight.float() + (update.T if isinstance(self.base, Conv1D) else update)


class _AdaptedLinear(torch.autograd.Function):
    """A frozen layer and its adapter, in autocast's type where that is on: what the adapter adds to the outputs, and
    to the gradient of the inputs, is added in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scale: float,
    ) -> Tensor:
        """(N, out) from (N, in): rows, and what dropout left of them, or None where it left everything."""
        device = rows.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
        rows = rows.to(dtype)
        inputs = rows if dropped is None else dropped.to(dtype)
        weight, down = weight.to(dtype), lora_a.to(dtype)
        # So laid out, its gradient is a product with `rank` rows: with `rank` columns the CPU takes 5 times as long.
        up = lora_b.T.to(dtype).contiguous()
        low_rank = (inputs @ down.T).mul_(scale)  # scaled while it is still `rank` wide
        output = F.linear(rows, weight, None if bias is None else bias.to(dtype))
        output.addmm_(low_rank, up)
        ctx.save_for_backward(inputs, weight, down, up, low_rank)
        ctx.scale = scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the type of the computation; autograd gives each the type of its tensor."""
        inputs, weight, down, up, low_rank = ctx.saved_tensors
        (grad,) = grads
        with torch.autocast(grad.device.type, enabled=False):
            d_low_rank = (grad @ up.T).mul_(ctx.scale)
            d_rows = grad @ weight if ctx.needs_input_grad[0] else None
            d_dropped = d_low_rank @ down if ctx.needs_input_grad[1] else None
            if d_rows is not None and d_dropped is None:
                d_rows.addmm_(d_low_rank, down)
            return d_rows, d_dropped, None, None, d_low_rank.T @ inputs, (low_rank.T @ grad).T, None


def add_lora_(
    backbone: nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Literal["auto"] | Sequence[str],
    seed: int = 0,
) -> list[str]:
    """Freeze a backbone and wrap its linear layers, so that the adapters alone are trained.

    Args:
        rank: at least 1.
        alpha: the low-rank term is scaled by alpha / rank.
        dropout: in [0, 1), on the adapters' inputs.
        targets: "auto", every linear layer inside the transformer blocks, never the embeddings or the output layer;
            or names as in PEFT: a module's whole path or its last parts.
        seed: of the draw of A.
    Returns: paths of the wrapped modules, in the backbone's order.
    Raises: ValueError: rank or dropout out of range. ModelError: targets that name no linear layer, or a backbone that
        has adapters already.
    """
    if rank < 1:
        raise ValueError(f"lora.rank: got {rank}, expected at least 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"lora.dropout: got {dropout}, expected at least 0 and below 1")
    if _lora_layers(backbone):
        raise ModelError("the backbone has LoRA adapters already; load it anew")
    paths = _auto_paths(backbone) if targets == "auto" else _named_paths(backbone, targets)
    backbone.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for path in paths:
        base = cast("nn.Linear | Conv1D", backbone.get_submodule(path))
        layer = LoraLinear(base, rank=rank, alpha=alpha, dropout=dropout, generator=generator)
        backbone.set_submodule(path, layer.train(base.training))
    return paths


def lora_state_dict(backbone: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors, detached, under the names PEFT gives them in adapter_model.safetensors."""
    return {key: parameter.detach() for key, parameter in _lora_parameters(backbone).items()}


@torch.no_grad()
def load_lora_state_dict_(backbone: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fill the adapters of a backbone from tensors under PEFT's names; all of them or none.

    Raises: CheckpointError: every key that is missing, unexpected or of another shape.
    """
    parameters = _lora_parameters(backbone)
    wrong = [f"{key}: missing; the state has other lora targets than the model" for key in parameters.keys() - state]
    wrong += [f"{key}: unexpected; the model has no adapter there" for key in state.keys() - parameters.keys()]
    wrong += [
        f"{key}: got {tuple(state[key].shape)}, expected {tuple(parameters[key].shape)}; check lora.rank"
        for key in parameters.keys() & state.keys()
        if state[key].shape != parameters[key].shape
    ]
    if wrong:
        raise CheckpointError(*sorted(wrong))
    for key, parameter in parameters.items():
        parameter.copy_(state[key])


@torch.no_grad()
def scale_adapters_(backbone: nn.Module, factor: float) -> None:
    """Interpolate a backbone's weights between its base (0) and what the adapters make of it (1)."""
    for layer in _lora_layers(backbone).values():
        layer.lora_B.mul_(factor)


@torch.no_grad()
def merge_lora_(backbone: nn.Module) -> None:
    """Add every adapter to its base layer and take it out: the same function, up to rounding in the base's type."""
    for path, layer in _lora_layers(backbone).items():
        layer.base.weight.copy_(layer.merged_weight())
        backbone.set_submodule(path, layer.base)


def adapter_targets(backbone: nn.Module) -> list[str]:
    """What PEFT's `target_modules` calls the wrapped layers: last parts of their paths where those mean no other
    module, else whole paths.
    """
    paths = list(_lora_layers(backbone))
    names = sorted({path.rpartition(".")[2] for path in paths})
    meant = {path for path, _ in backbone.named_modules() if path.rpartition(".")[2] in names}
    return names if meant == set(paths) else paths


@contextmanager
def adapters_disabled(backbone: nn.Module) -> Iterator[None]:
    """Inside, the backbone computes what it did before `add_lora_`, bitwise: the reference of preference training."""
    layers = list(_lora_layers(backbone).values())
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


@contextmanager
def adapters_folded(backbone: nn.Module) -> Iterator[None]:
    """Inside, base layers hold what their adapters add: the same function up to rounding, in fewer operations.

    There is a second copy of them meanwhile; afterwards they are bitwise what they were. Layers that are not float32
    are left as they are, for what an adapter adds may be less than their rounding. Not for training the adapters, which
    have no gradient inside.
    """
    folded = [layer for layer in _lora_layers(backbone).values()
              if layer.enabled and layer.base.weight.dtype == torch.float32]
    before = [layer.base.weight.data for layer in folded]
    try:
        for layer in folded:
            layer.base.weight.data = layer.merged_weight()
            layer.enabled = False
        yield
    finally:
        for layer, weight in zip(folded, before, strict=True):
            layer.base.weight.data = weight
            layer.enabled = True


def _lora_layers(backbone: nn.Module) -> dict[str, LoraLinear]:
    return {path: module for path, module in backbone.named_modules() if isinstance(module, LoraLinear)}


def _lora_parameters(backbone: nn.Module) -> dict[str, nn.Parameter]:
    parameters = {}
    for path, layer in _lora_layers(backbone).items():
        parameters[f"{PEFT_PREFIX}{path}.lora_A.weight"] = layer.lora_A
        parameters[f"{PEFT_PREFIX}{path}.lora_B.weight"] = layer.lora_B
    return parameters


def _linear_paths(backbone: nn.Module) -> list[str]:
    return [path for path, module in backbone.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def _auto_paths(backbone: nn.Module) -> list[str]:
    # Every family keeps its blocks in a ModuleList, and the output layer and OPT's projections outside of it.
    lists = tuple(f"{path}." for path, module in backbone.named_modules() if isinstance(module, nn.ModuleList))
    paths = [path for path in _linear_paths(backbone) if path.startswith(lists)]
    if not paths:
        raise ModelError("lora.targets: 'auto' found no linear layer inside a block; name the layers or use lora: null")
    return paths


def _named_paths(backbone: nn.Module, targets: Sequence[str]) -> list[str]:
    linear = _linear_paths(backbone)
    matches = {target: {path for path in linear if f".{path}".endswith(f".{target}")} for target in targets}
    names = ", ".join(sorted({path.rpartition(".")[2] for path in linear}))
    unmatched = [
        f"lora.targets: {target!r} names no linear layer; there are {names}"
        for target, found in matches.items()
        if not found
    ]
    if not targets:
        unmatched = [f"lora.targets: got no name; there are {names}, and lora: null trains without adapters"]
    head = cast(Any, backbone).get_output_embeddings()
    heads = {path for path in linear if head is not None and backbone.get_submodule(path) is head}
    unmatched += [
        f"lora.targets: {target!r} names the output layer, which takes no adapter; name layers inside the blocks"
        for target, found in matches.items()
        if found & heads
    ]
    if unmatched:
        raise ModelError(*unmatched)
    wanted = set().union(*matches.values())
    return [path for path in linear if path in wanted]
