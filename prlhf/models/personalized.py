"""What a personalized policy and a personalized reward model share: backbone, user encoder, soft-prompt adapter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prlhf.data.collate import PairBatch, ResponseBatch
from prlhf.data.context import ContextBatch, UserContexts
from prlhf.data.records import UserIndex
from prlhf.models.backbone import input_embedding
from prlhf.models.soft_prompt import SoftPromptAdapter
from prlhf.usermodel import UserContext, UserModel


class PersonalizedModel(nn.Module, ABC):
    """A causal LM that reads each user's soft prompt in front of the text.

    Args:
        backbone: any transformers causal LM, with or without LoRA inside.
        tokenizer: the backbone's tokenizer; its BOS decides where the soft prompt goes.
        user_encoder: user ids -> (B, T, D); None for methods without users.
        users: string ids of the user encoder's rows.
        contexts: what an encoder reads about known users; None for user models that are tables.
    """

    def __init__(
        self,
        backbone: nn.Module,
        tokenizer: Any,
        *,
        user_encoder: UserModel | None = None,
        users: UserIndex | None = None,
        contexts: UserContexts | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.user_encoder = user_encoder
        self.users = users
        self.contexts = contexts
        self.soft_prompt = SoftPromptAdapter(
            has_bos=tokenizer.bos_token_id is not None,
            num_user_tokens=0 if user_encoder is None else user_encoder.num_user_tokens,
        )
        self.base_sha256 = ""  # of the backbone's weights before training, set by whoever loads them
        self.complete_()

    @abstractmethod
    def complete_(self) -> None:
        """Add what only this kind of model has; called once, when the shared parts are there."""

    @property
    def device(self) -> torch.device:
        """Device of the backbone's weights."""
        return next(self.backbone.parameters()).device

    def input_embeds(
        self, input_ids: Tensor, user_ids: Tensor | None, context: ContextBatch | None = None
    ) -> Tensor:
        """Embeddings of the sequence, with the users' soft prompts in their place.

        Args:
            input_ids: (N, L) int64, right-padded.
            user_ids: (N / k,) int64 for k stacked blocks of the same users; None: no soft prompt.
            context: of the N / k users, for an encoder; None for the generic user.
        Returns: (N, L + T, D), or (N, L, D) without soft prompt.
        Raises: ValueError: user ids for a model without users.
        """
        token_embeds = input_embedding(self.backbone)(input_ids)
        if user_ids is None:
            return token_embeds
        if self.user_encoder is None:
            raise ValueError("user_ids were given, but this model has no user encoder; pass user_ids=None")
        return self.soft_prompt(token_embeds, self.user_encoder(user_ids, self._embed_context(context)))

    def _embed_context(self, context: ContextBatch | None) -> UserContext | None:
        if context is None:
            return None
        # Read, not trained: the backbone's embeddings learn from the text that the model itself reads.
        with torch.no_grad():
            return UserContext(input_embedding(self.backbone)(context.input_ids), context.lengths)

    @abstractmethod
    def sequence_values(
        self, batch: PairBatch | ResponseBatch, user_ids: Tensor | None, context: ContextBatch | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the model says of each sequence of a batch: a policy its response's log-prob, a reward model its score.

        Args:
            batch: N sequences (2B of a pair batch), padded on the right.
            user_ids: as for `input_embeds`.
            context: likewise.
        Returns: values (N,) float32, response tokens (N,) int64.
        """

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that training moves, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside: no dropout, no gradient, a working KV cache under gradient checkpointing; the mode is put back."""
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(was_training)
