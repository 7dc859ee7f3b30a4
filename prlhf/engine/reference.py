"""Reference log-probs of the training rows: computed once before the first step, or live in every step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from prlhf.data.collate import LabelledBatch, PairBatch, ResponseBatch
from prlhf.data.tokenize import TokenizedLabelled, TokenizedPair
from prlhf.engine.objective import ReferenceLogps
from prlhf.evaluation.scoring import score_pair_responses
from prlhf.models.policy import Reference

logger = logging.getLogger(__name__)


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
    on_batch: Callable[[], None] = lambda: None,
) -> ReferenceTable:
    """Score each distinct (prompt, response) once, shared between ranks.

    The reference knows no user, so rows of several users over one pair, and both labels of it, share the work.

    Args:
        on_batch: called between batches; may raise to stop.
    Returns: ReferenceTable indexed by each row's `row`.
    """
    with reference.active() as policy, autocast():
        logps = score_pair_responses(
            policy, rows, None, pad_id=pad_id, microbatch_tokens=microbatch_tokens, on_batch=on_batch
        )
    logger.info("reference: log-probs of %d rows computed once", len(rows))
    table = torch.full((max((row.row for row in rows), default=-1) + 1, 2), float("nan"))
    table[torch.tensor([row.row for row in rows], dtype=torch.int64)] = logps
    return ReferenceTable(table[:, 0], table[:, 1])
