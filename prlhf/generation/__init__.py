"""Sampling of answers, each row as its own user."""

from prlhf.generation.generate import SamplingOptions, generate, generate_ids

__all__ = ["SamplingOptions", "generate", "generate_ids"]
