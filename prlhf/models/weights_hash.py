"""The sha256 of a backbone's weights, computed once and remembered while the files they come from stay the same."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from pathlib import Path

import transformers
from huggingface_hub import try_to_load_from_cache
from torch import nn

from prlhf.errors import CheckpointError
from prlhf.files import read_json, write_json_atomic
from prlhf.models.backbone import BUILTIN_SCRATCH, hash_state, resolve_backbone

logger = logging.getLogger(__name__)

RECENT_S = 2.0  # a file that was written this shortly ago may change again without its time telling
FileStates = list[tuple[str, int, int]]


def state_of_files(name: str) -> FileStates:
    """Path, size and time of change (ns) of each file that decides a backbone's weights; none where there are no files.

    To be asked before the weights are read, and given to `hash_weights` after.

    Args:
        name: as of `load_backbone`.
    Raises: ModelError: no such folder.
    """
    if name == BUILTIN_SCRATCH:
        return []
    folder = resolve_backbone(name)
    if isinstance(folder, str):
        config = try_to_load_from_cache(folder, "config.json")
        if not isinstance(config, str):
            return []
        folder = Path(config).parent
    paths = sorted(path.resolve() for pattern in ("*.safetensors", "*.json") for path in folder.glob(pattern))
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.is_file()]


def hash_weights(backbone: nn.Module, name: str, *, dtype: str, files: FileStates) -> str:
    """`hash_state` of a backbone as it was loaded, from a note of an earlier load if its files are as they were then.

    Notes are files below the folder for caches (PRLHF_CACHE, else `prlhf` in XDG_CACHE_HOME or ~/.cache), which hold
    hashes alone and may be deleted at any time; where none can be written, weights are hashed at every load.

    Args:
        dtype: of the weights in memory.
        files: `state_of_files` before the load.
    """
    if not files or state_of_files(name) != files:
        return hash_state(backbone)
    note = _note(files, dtype)
    if note.is_file():
        try:
            remembered = read_json(note)["sha256"]
            if re.fullmatch("[0-9a-f]{64}", remembered):
                return remembered
        except (CheckpointError, OSError, KeyError, TypeError):
            logger.debug("%s: not readable", note, exc_info=True)
    digest = hash_state(backbone)
    newest = max(changed_ns for _, _, changed_ns in files)
    if newest < time.time_ns() - RECENT_S * 1e9:
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomic(note, {"sha256": digest})
        except OSError:
            logger.debug("%s: cannot be written", note, exc_info=True)
    return digest


def _note(files: FileStates, dtype: str) -> Path:
    """Where the hash of weights from these files is noted: another version of transformers may read them otherwise."""
    root = os.environ.get("PRLHF_CACHE")
    if not root:
        root = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "prlhf")
    key = hashlib.sha256(json.dumps([transformers.__version__, dtype, files]).encode()).hexdigest()
    return Path(root) / "weights" / f"{key}.json"
