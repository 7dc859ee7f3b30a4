"""How much memory a process took."""

from __future__ import annotations

import resource
import sys

import torch


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_device_bytes(device: torch.device) -> int:
    """Most memory of a CUDA device that tensors took so far; 0 on other devices."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
