"""PersonalizedPolicy: one language model that answers each user in that user's way."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from prlhf.data.collate import IGNORE_INDEX, PairBatch, ResponseBatch
from prlhf.data.context import ContextBatch
from prlhf.losses import response_logps, response_token_counts
from prlhf.models.backbone import decoder
from prlhf.models.lora import adapters_disabled
from prlhf.models.packing import Pack, Term, packed_call
from prlhf.models.personalized import PersonalizedModel


class ResponseLogps(NamedTuple):
    """Summed log-probs (nats) and scored tokens of both responses of each row; all (B,)."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor


class PersonalizedPolicy(PersonalizedModel):
    """A causal LM, a user encoder, the soft-prompt adapter between them, and the frozen reference.

    Every log-prob that training, evaluation and scoring use comes from `term_values`, over packed rows that share their
    prompts where the backbone allows it and over padded rows elsewhere.

    Args: those of `PersonalizedModel`.
    """

    def complete_(self) -> None:
        """Give the policy its reference."""
        self.reference: Reference = Reference(self)

    def sequence_logps(
        self, batch: PairBatch | ResponseBatch, user_ids: Tensor | None, context: ContextBatch | None = None
    ) -> tuple[Tensor, Tensor]:
        """Summed log-probs (N,) of the responses of a batch, in nats, and their scored tokens: `sequence_values`."""
        return self.sequence_values(batch, user_ids, context)

    def logps(
        self, batch: PairBatch, user_ids: Tensor | None, context: ContextBatch | None = None
    ) -> ResponseLogps:
        """Summed log-probs of both responses of each row.

        Args:
            batch: B rows.
            user_ids: (B,) int64, 0 is the generic user; None: no soft prompt at all (reference, vanilla methods).
            context: of the rows' users, for an encoder (`batch.context`); None for the generic user.
        """
        return _of_pairs(*self.sequence_logps(batch, user_ids, context))

    def term_logps(self, batch: PairBatch, terms: Sequence[Term]) -> list[ResponseLogps]:
        """`logps` of the batch read in several ways."""
        return [_of_pairs(*values) for values in self.term_values(batch, terms)]

    def padded_values(
        self, batch: PairBatch | ResponseBatch, user_ids: Tensor | None, context: ContextBatch | None = None
    ) -> tuple[Tensor, Tensor]:
        """No attention mask is needed: under causal attention no real token sees a pad on its right, and pads carry
        no label. Logits exist as in `packed_values`, or from the first position on that scores a label in some row.
        """
        embeds = self.input_embeds(batch.input_ids, user_ids, context, batch.sequence_row_ids())
        num_soft = embeds.shape[1] - batch.input_ids.shape[1]
        if self.head is not None:
            scored, targets, tokens = _scored(batch, num_soft)
            hidden = decoder(self.backbone)(inputs_embeds=embeds, use_cache=False).last_hidden_state.flatten(0, 1)
            token_logps = self.head.token_logps(self.backbone, hidden[scored], targets)
            return _sum(token_logps, tokens), torch.tensor(tokens).to(self.device, non_blocking=True)
        # The soft prompt stands before every label, and a label is scored by the position before it.
        first = max(num_soft + batch.num_unscored - 1, 0)
        labels = F.pad(batch.labels, (num_soft, 0), value=IGNORE_INDEX)[:, first:]
        logits = self.backbone(inputs_embeds=embeds, use_cache=False, logits_to_keep=labels.shape[1]).logits
        return response_logps(logits, labels), response_token_counts(labels)

    def packed_values(self, pack: Pack, embeds: Tensor) -> Tensor:
        """Logits exist for response tokens alone, and under a known head only a chunk of them at a time."""
        if self.head is not None:
            hidden = packed_call(decoder(self.backbone), embeds, pack.trees, pack.position_ids).last_hidden_state[0]
            token_logps = self.head.token_logps(self.backbone, hidden[pack.scored], pack.targets)
        else:
            logits = packed_call(
                self.backbone, embeds, pack.trees, pack.position_ids, logits_to_keep=pack.scored
            ).logits[0]
            token_logps = -F.cross_entropy(logits.float(), pack.targets, reduction="none")
        return _sum(token_logps, pack.num_scored)


def _sum(token_logps: Tensor, tokens: list[int]) -> Tensor:
    """Log-prob of each response, of those of its tokens."""
    return torch.stack([part.sum() for part in token_logps.split(tokens)])


def _scored(batch: PairBatch | ResponseBatch, num_soft: int) -> tuple[Tensor, Tensor, list[int]]:
    """What padded rows score: places among the (N, T + L) positions, their next tokens, and how many each row has.

    The soft prompt stands before every response. From lengths that the host knows, so nothing waits for the device.
    """
    width = batch.input_ids.shape[1]
    places, targets, tokens = [], [], []
    for row, (prompt, response) in enumerate(batch.lengths):
        # Without anything in front the first token of a response has no probability.
        scored = np.arange(prompt if prompt + num_soft else 1, prompt + response)
        places.append(row * (num_soft + width) + num_soft + scored - 1)
        targets.append(row * width + scored)
        tokens.append(len(scored))
    both = torch.as_tensor(np.stack([np.concatenate(places), np.concatenate(targets)]))
    both = both.to(batch.input_ids.device, non_blocking=True)
    return both[0], batch.input_ids.flatten()[both[1]], tokens


def _of_pairs(logps: Tensor, tokens: Tensor) -> ResponseLogps:
    return ResponseLogps(*logps.chunk(2), *tokens.chunk(2))


class Reference:
    """The starting policy, frozen: no soft prompt, no adapters.

    Args:
        policy: the policy to refer to, before its first step and on its device.
        frozen_copy: False for LoRA: the same weights with adapters off, no second copy exists.
            True for full fine-tuning: a frozen copy of the backbone as it is now.
    """

    def __init__(self, policy: PersonalizedPolicy, *, frozen_copy: bool = False) -> None:
        self.frozen_copy = frozen_copy
        if frozen_copy:
            backbone = copy.deepcopy(policy.backbone).requires_grad_(False)
            frozen = PersonalizedPolicy(backbone, policy.tokenizer).eval()
            frozen.packing, frozen.head, frozen.max_positions = policy.packing, policy.head, policy.max_positions
            policy = frozen
        self.policy = policy

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.policy.device

    @contextmanager
    def active(self) -> Iterator[PersonalizedPolicy]:
        """The policy whose weights are the reference's for as long as the context lasts; give it no user ids."""
        with torch.no_grad(), adapters_disabled(self.policy.backbone):
            yield self.policy

    def sequence_logps(self, batch: PairBatch | ResponseBatch) -> tuple[Tensor, Tensor]:
        """As PersonalizedPolicy.sequence_logps without users and without gradient."""
        with self.active() as policy:
            return policy.sequence_logps(batch, None)
