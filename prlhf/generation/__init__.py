"""Sampling of answers, each row as its own user."""

from prlhf.generation.generate import generate, generate_ids
from prlhf.generation.options import SamplingOptions

__all__ = ["SamplingOptions", "generate", "generate_ids"]
