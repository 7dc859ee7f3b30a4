"""Personalized RLHF: one language model that serves every user."""

import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def load(path: str | Path, *, device: str = "cpu") -> Any:
    """A trained policy that answers its users by name: `prlhf.serving.assistant.Assistant`.

    Args:
        path: a run directory, a checkpoint, or what `prlhf adapt` wrote.
    Raises: CheckpointError, ModelError: as `prlhf.models.load_policy`.
    """
    # By its name: every module imports this one, so it cannot import them.
    return importlib.import_module("prlhf.serving.assistant").Assistant(path, device=device)
