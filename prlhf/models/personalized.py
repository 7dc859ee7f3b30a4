"""What a personalized policy and a personalized reward model share: backbone, user encoder, soft-prompt adapter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prlhf.data.collate import PairBatch, ResponseBatch
from prlhf.data.context import ContextBatch, UserContexts, collate_contexts
from prlhf.data.user_index import GENERIC_USER_ID, UserIndex
from prlhf.errors import DataError
from prlhf.models.backbone import describe_positions, input_embedding, pad_token_id
from prlhf.models.head import Head
from prlhf.models.packing import Pack, Packing, Term, make_pack
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
        self.user_texts: dict[str, str] = {}  # user id -> what training had in front of a known user's prompts
        self.packing: Packing | None = None  # set by whoever tried the backbone; None: rows are padded
        self.head: Head | None = None  # of the backbone's logits, likewise; None: they are taken from the backbone
        self.max_positions: int | None = None  # of a sequence, set by whoever loads the backbone; None: any number
        self.base_sha256 = ""  # of the backbone's weights before training, set by whoever loads them
        self.base_config: dict[str, Any] = {}  # its architecture, likewise
        self.complete_()

    @abstractmethod
    def complete_(self) -> None:
        """Add what only this kind of model has; called once, when the shared parts are there."""

    @property
    def device(self) -> torch.device:
        """Device of the backbone's weights."""
        return next(self.backbone.parameters()).device

    def input_embeds(
        self,
        input_ids: Tensor,
        user_ids: Tensor | None,
        context: ContextBatch | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Embeddings of the sequence, with the users' soft prompts in their place.

        Args:
            input_ids: (N, L) int64, right-padded.
            user_ids: (B,) int64; None: no soft prompt.
            context: of the B users, for an encoder; None for the generic user.
            rows: (N,) int64, the place of each sequence's user in `user_ids`; None: N is B.
        Returns: (N, L + T, D), or (N, L, D) without soft prompt.
        Raises: ValueError: user ids for a model without users.
        """
        token_embeds = input_embedding(self.backbone)(input_ids)
        if user_ids is None:
            return token_embeds
        soft_prompts = self.user_prompts(user_ids, context)
        return self.soft_prompt(token_embeds, soft_prompts if rows is None else soft_prompts[rows])

    def sequence_values(
        self, batch: PairBatch | ResponseBatch, user_ids: Tensor | None, context: ContextBatch | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the model says of each sequence of a batch: a policy its response's log-prob, a reward model its score.

        Args:
            batch: N sequences (2B of a pair batch).
            user_ids: (B,) int64, 0 is the generic user; None: no soft prompt.
            context: of the B users, for an encoder (`batch.context`); None for the generic user.
        Returns: values (N,) float32, scored response tokens (N,) int64.
        """
        return self.term_values(batch, [Term(user_ids, context, shared=user_ids is None)])[0]

    def term_values(self, batch: PairBatch | ResponseBatch, terms: Sequence[Term]) -> list[tuple[Tensor, Tensor]]:
        """`sequence_values` of a batch read in several ways, in one forward pass where rows can be packed.

        Raises: DataError: a sequence longer than the backbone's positions.
        """
        num_soft = self.soft_prompt.num_user_tokens
        longest = max(map(sum, batch.lengths)) + (num_soft if any(term.user_ids is not None for term in terms) else 0)
        if self.max_positions is not None and longest > self.max_positions:
            raise DataError(f"a row of {longest} tokens, but the backbone has {describe_positions(self.backbone)}; "
                            "shorten it or lower data.max_tokens")
        if not self.packs(max(map(sum, batch.lengths))):
            return [self.padded_values(batch, term.user_ids, term.context) for term in terms]
        pack = make_pack(batch, terms, num_soft=num_soft, num_bos=self.soft_prompt.num_bos)
        values = self.packed_values(pack, self._packed_embeds(pack, terms))
        return [(values[numbers], tokens) for numbers, tokens in zip(pack.members, pack.tokens, strict=True)]

    def packs(self, num_tokens: int) -> bool:
        """Whether a sequence of so many tokens, soft prompt not counted, is read in a pack.

        A batch is packed if all of its sequences are.
        """
        return self.packing is not None and self.packing.fits(num_tokens + self.soft_prompt.num_user_tokens)

    @abstractmethod
    def padded_values(
        self, batch: PairBatch | ResponseBatch, user_ids: Tensor | None, context: ContextBatch | None = None
    ) -> tuple[Tensor, Tensor]:
        """`sequence_values` from rows padded on the right: for any backbone, and the oracle of packed rows."""

    @abstractmethod
    def packed_values(self, pack: Pack, embeds: Tensor) -> Tensor:
        """Value of each distinct response of a pack, (R,) float32.

        Args:
            embeds: (1, N, D), embeddings of the pack's positions.
        """

    def _packed_embeds(self, pack: Pack, terms: Sequence[Term]) -> Tensor:
        parts = [input_embedding(self.backbone)(pack.token_ids)]
        for term in terms:
            if term.user_ids is not None:
                soft_prompts = self.user_prompts(term.user_ids, term.context)
                parts.append(soft_prompts.flatten(0, 1).to(parts[0].dtype))
        return torch.cat(parts)[pack.order][None]

    def user_prompts(self, user_ids: Tensor, context: ContextBatch | None) -> Tensor:
        """Soft prompts (B, T, D) of users; arguments as for `input_embeds`."""
        if self.user_encoder is None:
            raise ValueError("user_ids were given, but this model has no user encoder; pass user_ids=None")
        return self.user_encoder(user_ids, None if context is None else self.embed_context(context))

    @torch.no_grad()
    def known_prompts(self, *, batch_users: int = 64) -> Tensor:
        """Soft prompts of the generic user, in row 0, and of every known one: (1 + U, T, D).

        An encoder reads what it keeps of each user, whatever is asked.

        Raises: ValueError: a model without users.
        """
        parts = [self.user_prompts(torch.tensor([GENERIC_USER_ID], device=self.device), None)]
        for user_ids, context in self.known_contexts(batch_users=batch_users):
            parts.append(self.user_prompts(user_ids, context))
        return torch.cat(parts)

    def known_contexts(self, *, batch_users: int = 64) -> Iterator[tuple[Tensor, ContextBatch | None]]:
        """Batches of known users, ids (B,) and what an encoder keeps of them; None for other user models."""
        known = () if self.users is None else self.users.user_ids
        for start in range(0, len(known), batch_users):
            members = known[start : start + batch_users]
            context = None
            if self.contexts is not None:
                contexts = [self.contexts.of_user(user_id, "") for user_id in members]
                context = collate_contexts(contexts, pad_token_id(self.tokenizer)).to(self.device)
            yield torch.arange(start + 1, start + 1 + len(members), device=self.device), context

    @torch.no_grad()
    def embed_context(self, context: ContextBatch) -> UserContext:
        """What an encoder reads: read, not trained, since the embeddings learn from the text that the model reads."""
        return UserContext(input_embedding(self.backbone)(context.input_ids), context.lengths)

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
