"""Losses of a preference pair as functions of its margin h; every objective here is made of these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

PairwiseKind = Literal["sigmoid", "robust", "ipo", "hinge"]
SMOOTHED_KINDS = ("sigmoid", "robust")


class PreferenceLoss(NamedTuple):
    """Loss and implicit rewards of each pair: three (B,) tensors, the rewards detached."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def _sigmoid(margins: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """-(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h): arXiv:2305.18290 eq. 7; with eps > 0, cDPO."""
    agree, disagree = F.logsigmoid(beta * margins), F.logsigmoid(-beta * margins)
    return -(1 - label_smoothing) * agree - label_smoothing * disagree


def _robust(margins: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """(-(1 - eps) log sigmoid(beta h) + eps log sigmoid(-beta h)) / (1 - 2 eps): rDPO, arXiv:2403.00409.

    Its mean over labels flipped with chance eps is the DPO loss of the true labels.
    """
    agree, disagree = F.logsigmoid(beta * margins), F.logsigmoid(-beta * margins)
    return (-(1 - label_smoothing) * agree + label_smoothing * disagree) / (1 - 2 * label_smoothing)


def _ipo(margins: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """(h - 1 / (2 beta))^2: arXiv:2310.12036 eq. 17, whose tau is beta here."""
    return (margins - 1 / (2 * beta)) ** 2


def _hinge(margins: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """max(0, 1 - beta h): SLiC's calibration loss, arXiv:2305.10425, on log-ratios as in arXiv:2309.06657."""
    return torch.relu(1 - beta * margins)


PAIRWISE_LOSSES: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "sigmoid": _sigmoid,
    "robust": _robust,
    "ipo": _ipo,
    "hinge": _hinge,
}


def compute_pairwise_losses(
    margins: Tensor, *, beta: float, kind: PairwiseKind = "sigmoid", label_smoothing: float = 0.0
) -> Tensor:
    """Loss of each pair from its margin, unreduced.

    Args:
        margins: (B,) policy margin minus reference margin, nats.
        beta: inverse temperature, > 0.
        kind: a key of `PAIRWISE_LOSSES`.
        label_smoothing: assumed share of wrong labels, in [0, 0.5); above 0 for SMOOTHED_KINDS only.
    Returns: (B,), the type of the margins.
    Raises: ValueError: an unknown kind, or beta or label_smoothing out of range.
    """
    if kind not in PAIRWISE_LOSSES:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(PAIRWISE_LOSSES)}")
    if not beta > 0:
        raise ValueError(f"beta: got {beta}, expected > 0")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing: got {label_smoothing}, expected at least 0 and below 0.5")
    if label_smoothing and kind not in SMOOTHED_KINDS:
        smoothed = " or ".join(repr(name) for name in SMOOTHED_KINDS)
        raise ValueError(f"label_smoothing: got {label_smoothing} with kind {kind!r}, expected 0; smooth {smoothed}")
    return PAIRWISE_LOSSES[kind](margins, beta, label_smoothing)


def check_row_shapes(**rows: Tensor) -> None:
    """Refuse tensors that are not all (B,) of one B: a (B, 1) would broadcast every row against every other.

    Raises: ValueError: naming every tensor's shape.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in rows.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        got = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"rows must all be (B,) of one B; got {got}")
