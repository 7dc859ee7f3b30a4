"""Why tensors of a file do not fill a model's."""

from __future__ import annotations

from torch import Tensor


def find_misfits(expected: dict[str, Tensor], state: dict[str, Tensor]) -> list[str]:
    """What keeps a state from filling the tensors, a line each."""
    missing = [f"{name}: missing; use another checkpoint" for name in sorted(expected.keys() - state.keys())]
    unexpected = [f"{name}: unexpected; use another checkpoint" for name in sorted(state.keys() - expected.keys())]
    other_kind = [
        f"{name}: got {_kind(state[name])}, expected {_kind(expected[name])}; use another checkpoint"
        for name in sorted(expected.keys() & state.keys())
        if _kind(state[name]) != _kind(expected[name])
    ]
    return missing + unexpected + other_kind


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
