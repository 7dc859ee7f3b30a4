"""Reference log-probs of the training rows: computed once before the first step, or live in every step."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from prlhf.data.collate import LabelledBatch, PairBatch, ResponseBatch
from prlhf.data.tokenize import TokenizedLabelled, TokenizedPair
from prlhf.distributed import all_reduce_sum, rank, world_size
from prlhf.engine.objective import ReferenceLogps
from prlhf.errors import RunDirError
from prlhf.evaluation.scoring import TokenSequence, score_sequences
from prlhf.files import fsync_path
from prlhf.models.policy import Reference

logger = logging.getLogger(__name__)

PART_SEQUENCES = 512  # what is lost at most when the pass is stopped


class ReferenceTable:
    """Reference log-probs of every row, looked up by row id.

    Args:
        chosen: (num_rows,) float32 nats, on the CPU.
        rejected: likewise.
    """

    def __init__(self, chosen: Tensor, rejected: Tensor) -> None:
        self.chosen = chosen
        self.rejected = rejected

    def __call__(self, batch: PairBatch | ResponseBatch | LabelledBatch) -> ReferenceLogps:
        """Log-probs of the batch's rows, on the batch's device."""
        rows = batch.rows.cpu()
        device = batch.input_ids.device
        return ReferenceLogps(self.chosen[rows].to(device), self.rejected[rows].to(device))


class LiveReference:
    """Reference log-probs from a forward pass of the reference in every step."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference

    def __call__(self, batch: PairBatch | ResponseBatch | LabelledBatch) -> ReferenceLogps:
        """Log-probs of the batch's rows."""
        if isinstance(batch, LabelledBatch):
            parts = (batch.responses, batch.mismatched)
            return ReferenceLogps(*(self._reference.sequence_logps(part)[0] for part in parts))
        logps, _ = self._reference.sequence_logps(batch)
        chosen, rejected = logps.chunk(2)
        return ReferenceLogps(chosen, rejected)


def no_reference(batch: PairBatch | ResponseBatch | LabelledBatch) -> None:
    """For what compares with nothing: sft, reward models, losses without reference."""
    return None


def compute_reference_table(
    reference: Reference,
    rows: Sequence[TokenizedPair | TokenizedLabelled],
    *,
    pad_id: int,
    microbatch_tokens: int,
    autocast: Callable[[], AbstractContextManager[object]],
    cache: ReferenceCache | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> ReferenceTable:
    """Score each distinct (prompt, response) once, in parts that the ranks share and that a cache keeps.

    The reference knows no user, so rows of several users over one pair, and both labels of it, share the work. A part
    holds the same sequences whatever the number of ranks, so its log-probs are the same to the last bit.

    Args:
        on_batch: called before every part and batch; may raise to stop; the parts before are in the cache.
    Returns: ReferenceTable indexed by each row's `row`.
    """
    by_prompt: dict[tuple[int, ...], dict[TokenSequence, None]] = {}
    for row in rows:
        for response in row.responses:
            by_prompt.setdefault(row.prompt_ids, {})[TokenSequence(row.prompt_ids, response)] = None
    sequences = list(chain.from_iterable(by_prompt.values()))
    values = torch.zeros(len(sequences), device=reference.device)
    num_kept = 0
    with reference.active() as policy, autocast():
        for number, start in enumerate(range(0, len(sequences), PART_SEQUENCES)):
            on_batch()
            if number % world_size() != rank():
                continue
            part = sequences[start : start + PART_SEQUENCES]
            logps = None if cache is None else cache.get(part)
            num_kept += 0 if logps is None else len(part)
            if logps is None:
                options: dict[str, Any] = {"pad_id": pad_id, "microbatch_tokens": microbatch_tokens}
                logps = score_sequences(policy, part, None, **options, on_batch=on_batch).values
                if cache is not None:
                    cache.put(part, logps)
            values[start : start + len(part)] = logps.to(values.device)
    values = all_reduce_sum(values).cpu()
    logger.info("reference: log-probs of %d responses, %d of them kept from before", len(sequences), num_kept)
    places = {sequence: place for place, sequence in enumerate(sequences)}
    table = torch.full((max((row.row for row in rows), default=-1) + 1, 2), float("nan"))
    for row in rows:
        for side, response in enumerate(row.responses):
            table[row.row, side] = values[places[TokenSequence(row.prompt_ids, response)]]
    return ReferenceTable(table[:, 0], table[:, 1])


class ReferenceCache:
    """Reference log-probs on disk: a file for each part, named by everything that its numbers depend on.

    Nothing stale can be read: other weights, another tokenizer, template, limit or precision give another name. A
    damaged file is computed again. The files name no user and hold no text; any may be deleted at any time.

    Args:
        directory: made when the first part is kept; runs at the same time may share it.
        identity: what the numbers depend on besides the token ids: weights, precision, how sequences are batched.
    """

    def __init__(self, directory: Path, identity: Mapping[str, object]) -> None:
        self.directory = directory
        self._identity = json.dumps(identity, sort_keys=True).encode()

    def get(self, part: Sequence[TokenSequence]) -> Tensor | None:
        """Log-probs (N,) of the sequences, float32; None where they are not kept."""
        path = self._path(part)
        if not path.exists():
            return None
        try:
            tensors = load_file(path)
            logps, digest = tensors["logps"], tensors["sha256"]
            if logps.shape == (len(part),) and logps.dtype == torch.float32 and torch.equal(digest, _digest(logps)):
                return logps
        except (OSError, SafetensorError, KeyError):
            logger.debug("%s: not readable", path, exc_info=True)
        logger.warning("%s: damaged; its reference log-probs are computed again", path)
        return None

    def put(self, part: Sequence[TokenSequence], logps: Tensor) -> None:
        """Keep the log-probs (N,) of the sequences.

        Raises: RunDirError: the directory cannot be written.
        """
        path = self._path(part)
        temporary = path.with_suffix(f".tmp-{os.getpid()}")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            save_file({"logps": logps, "sha256": _digest(logps)}, temporary)
            fsync_path(temporary)
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise RunDirError(f"{path}: cannot be written ({error.strerror}); free space or mend its rights") from None

    def _path(self, part: Sequence[TokenSequence]) -> Path:
        digest = hashlib.sha256(self._identity)
        for sequence in part:
            digest.update(repr(tuple(sequence)).encode())
        return self.directory / f"{digest.hexdigest()}.safetensors"


def _digest(logps: Tensor) -> Tensor:
    """sha256 of the bytes, as (32,) uint8: safetensors does not notice a flipped bit."""
    return torch.tensor(list(hashlib.sha256(logps.contiguous().numpy().tobytes()).digest()), dtype=torch.uint8)
