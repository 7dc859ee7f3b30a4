"""Reference log-probs of the training rows: computed once before the first step, or live in every step."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
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
from prlhf.usermodel.row_table import check_room, lazy_zeros

logger = logging.getLogger(__name__)

PART_SEQUENCES = 512  # what is lost at most when the pass is stopped
PART_PROMPTS = 128  # one prompt in so many, by its hash, begins a part
TokenizedRow = TokenizedPair | TokenizedLabelled


class ReferenceTable:
    """Reference log-probs of every row, looked up by row id.

    Args:
        chosen: (num_rows,) float32 nats, on the CPU; of many rows mapped from a file.
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
    rows: Sequence[TokenizedRow],
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
    Raises: RunDirError: no room for it in the folder for temporary files, or for a part in the cache.
    """
    distinct = _find_distinct(rows)
    values = torch.zeros(len(distinct.first), device=reference.device)
    num_kept = 0
    with reference.active() as policy, autocast():
        for number, (start, stop) in enumerate(_parts(distinct.prompts)):
            on_batch()
            if number % world_size() != rank():
                continue
            # As the rows come, which is nearer to how a step reads them: under bf16 last bits depend on the neighbours.
            order = np.argsort(distinct.first[start:stop])
            part = [_sequence(rows, place) for place in distinct.first[start:stop][order].tolist()]
            logps = None if cache is None else cache.get(part)
            num_kept += 0 if logps is None else len(part)
            if logps is None:
                options: dict[str, Any] = {"pad_id": pad_id, "microbatch_tokens": microbatch_tokens}
                logps = score_sequences(policy, part, None, **options, on_batch=on_batch).values
                if cache is not None:
                    cache.put(part, logps)
            values[torch.from_numpy(start + order).to(values.device)] = logps.to(values.device)
    values = all_reduce_sum(values).cpu()
    logger.info("reference: log-probs of %d responses, %d of them kept from before", len(values), num_kept)
    row_ids = torch.tensor([row.row for row in rows], dtype=torch.int64)
    num_rows = int(row_ids.max()) + 1 if len(rows) else 0
    check_room(8 * num_rows)
    table = lazy_zeros(max(num_rows, 1), 2)[:num_rows].fill_(float("nan"))
    table[row_ids] = values[torch.from_numpy(distinct.numbers)].view(-1, 2)
    return ReferenceTable(table[:, 0], table[:, 1])


class _Distinct(NamedTuple):
    """The S distinct sequences of N rows, in the order of a hash of their prompts, whatever the order of the rows.

    Args:
        first: (S,) int64, the first place that holds each; place 2 i + j is response j of the i-th row.
        numbers: (2N,) int64, which of them each place holds.
        prompts: (S,) uint64, the hash of each one's prompt.
    """

    first: np.ndarray
    numbers: np.ndarray
    prompts: np.ndarray


def _find_distinct(rows: Sequence[TokenizedRow]) -> _Distinct:
    """By 24 bytes a sequence: 8 of its prompt's hash, and 16 of its own."""
    hashes = array("Q")
    for row in rows:
        prompt = hashlib.blake2b(array("q", row.prompt_ids).tobytes(), digest_size=16).digest()
        for response in row.responses:
            own = hashlib.blake2b(array("q", response).tobytes(), digest_size=16, key=prompt)
            hashes.frombytes(prompt[:8] + own.digest())
    prompts, *own_halves = np.frombuffer(hashes, dtype=np.uint64).reshape(-1, 3).T
    order = np.lexsort((*own_halves, prompts))
    is_new = np.ones(len(order), dtype=bool)
    is_new[1:] = False
    for column in (prompts, *own_halves):
        is_new[1:] |= column[order[1:]] != column[order[:-1]]
    numbers = np.empty(len(order), dtype=np.int64)
    numbers[order] = np.cumsum(is_new) - 1
    first = order[is_new]
    return _Distinct(first, numbers, prompts[first])


def _parts(prompts: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where parts begin and end: before some prompts, by their hash alone, and after `PART_SEQUENCES` at the latest.

    So a prompt that is new, changed or gone changes the part that it falls into, and hardly any other.
    """
    begins = np.flatnonzero(prompts % np.uint64(PART_PROMPTS) == 0)
    begins = begins[(begins == 0) | (prompts[begins] != prompts[begins - 1])]
    for begin, end in pairwise([0, *begins.tolist(), len(prompts)]):
        for start in range(begin, end, PART_SEQUENCES):
            yield start, min(start + PART_SEQUENCES, end)


def _sequence(rows: Sequence[TokenizedRow], place: int) -> TokenSequence:
    row = rows[place // 2]
    return TokenSequence(row.prompt_ids, row.responses[place % 2])


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
        except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in an error of its own
            with contextlib.suppress(OSError):
                temporary.unlink()
            reason = getattr(error, "strerror", None) or error
            raise RunDirError(f"{path}: cannot be written ({reason}); free space or mend its rights") from None

    def _path(self, part: Sequence[TokenSequence]) -> Path:
        digest = hashlib.sha256(self._identity)
        for sequence in part:
            digest.update(repr(tuple(sequence)).encode())
        return self.directory / f"{digest.hexdigest()}.safetensors"


def _digest(logps: Tensor) -> Tensor:
    """sha256 of the bytes, as (32,) uint8: safetensors does not notice a flipped bit."""
    return torch.tensor(list(hashlib.sha256(logps.contiguous().numpy().tobytes()).digest()), dtype=torch.uint8)
