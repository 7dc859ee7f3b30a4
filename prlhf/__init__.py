"""Personalized RLHF: one language model that serves every user."""

__version__ = "0.1.0"
