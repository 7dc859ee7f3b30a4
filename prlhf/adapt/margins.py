"""Margins of judgments as a function of a user's state, with their slopes; shared weights stand still."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from prlhf.data.collate import ResponseTree, collate_trees
from prlhf.data.sampler import cut_packs
from prlhf.data.user_index import GENERIC_USER_ID
from prlhf.models.backbone import pad_token_id
from prlhf.models.lora import adapters_folded
from prlhf.models.personalized import PersonalizedModel
from prlhf.models.policy import PersonalizedPolicy
from prlhf.usermodel import UserModel

MICROBATCH_TOKENS = 4096


@dataclass(frozen=True)
class Judgment:
    """A pair, of which the first response was preferred, or one response with a thumb.

    The margin of a pair is that of the model's rewards. That of a thumb is the response's reward to the user over its
    reward to the generic user, or the other way round: whether this user likes it more than everybody does.

    Args:
        responses: chosen and rejected, or one.
        liked: of one response.
    """

    prompt_ids: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    liked: bool = True

    @property
    def signs(self) -> tuple[int, ...]:
        """What each response's value counts for in the margin."""
        return (1, -1) if len(self.responses) == 2 else (1 if self.liked else -1,)

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and of the responses."""
        return len(self.prompt_ids) + sum(map(len, self.responses))


class Margins:
    """Margins of distinct judgments under any state; what does not depend on the state is computed once.

    Args:
        model: a policy or reward model with a user model that has rows.
        judgments: N of them.
        per_token: mean log-probs per token without reference, as in simpo and orpo.
    """

    def __init__(self, model: PersonalizedModel, judgments: Sequence[Judgment], *, per_token: bool = False) -> None:
        assert model.user_encoder is not None
        self.model = model
        self.user_model: UserModel = model.user_encoder
        self.judgments = judgments
        self._per_token = per_token
        self._pad_id = pad_token_id(model.tokenizer)
        self._offsets = self._state_free()

    @torch.no_grad()
    def values(self, rows: Sequence[int], states: Tensor) -> Tensor:
        """Margins (B,) float64 of judgments `rows` under the flat states (B, S)."""
        with adapters_folded(self.model.backbone):
            parts = [margins for margins, _ in self._batches(rows, states, False)]
        return self._offset(rows, torch.cat([torch.zeros(0), *parts]))

    def table(self, states: Tensor) -> Tensor:
        """Margins (N, A) float64 of every judgment under each of the flat states (A, S)."""
        everything = range(len(self.judgments))
        return torch.stack([self.values(everything, state.expand(len(everything), -1)) for state in states], dim=1)

    def slopes(self, rows: Sequence[int], states: Tensor) -> tuple[Tensor, Tensor]:
        """Margins (B,) and their gradients (B, S) in the states, float64."""
        with torch.enable_grad(), adapters_folded(self.model.backbone):
            parts = list(self._batches(rows, states, True))
        margins = torch.cat([margins.detach() for margins, _ in parts])
        return self._offset(rows, margins), torch.cat([slope for _, slope in parts]).double()

    def _offset(self, rows: Sequence[int], margins: Tensor) -> Tensor:
        return margins.double() - self._offsets[torch.tensor(rows, dtype=torch.int64)]

    def _batches(self, rows: Sequence[int], states: Tensor, with_slopes: bool) -> Iterator[tuple[Tensor, Tensor]]:
        shape = self.user_model.generic_state.shape
        num_soft = self.model.soft_prompt.num_user_tokens
        sizes = [self.judgments[row].num_tokens + num_soft for row in rows]
        for part in cut_packs(range(len(rows)), lambda i: sizes[i], MICROBATCH_TOKENS):
            own = states[part].to(self.model.device, torch.float32).requires_grad_(with_slopes)
            prompts = self.user_model.decode(own.unflatten(1, shape))
            with _serving(self.model, prompts):
                margins = self._margins(self.model, [rows[i] for i in part], range(1, len(part) + 1))
            slope = torch.autograd.grad(margins.sum(), own)[0] if with_slopes else own
            yield margins.cpu(), slope.cpu()

    def _margins(self, model: PersonalizedModel, rows: Sequence[int], user_ids: Sequence[int] | None) -> Tensor:
        """Signed sums of values, of the judgments read as these users."""
        judgments = [self.judgments[row] for row in rows]
        ids = [GENERIC_USER_ID] * len(rows) if user_ids is None else user_ids
        trees = [
            ResponseTree(i, user, judgment.prompt_ids, judgment.responses)
            for i, (judgment, user) in enumerate(zip(judgments, ids, strict=True))
        ]
        batch = collate_trees(trees, self._pad_id).to(self.model.device)
        values, tokens = model.sequence_values(batch, None if user_ids is None else batch.user_ids)
        if self._per_token:
            values = values / tokens
        signs = torch.tensor([sign for judgment in judgments for sign in judgment.signs], device=values.device)
        sums = torch.zeros(len(rows), device=values.device)
        return sums.index_add(0, batch.sequence_row_ids(), values * signs)

    @torch.no_grad()
    def _state_free(self) -> Tensor:
        """What is taken off each margin: the reference's margin of a pair, the generic user's value of a thumb."""
        offsets = torch.zeros(len(self.judgments), dtype=torch.float64)
        pairs = [i for i, judgment in enumerate(self.judgments) if len(judgment.responses) == 2]
        thumbs = [i for i, judgment in enumerate(self.judgments) if len(judgment.responses) == 1]
        for part in cut_packs(thumbs, lambda i: self.judgments[i].num_tokens, MICROBATCH_TOKENS):
            offsets[part] = self._margins(self.model, part, [GENERIC_USER_ID] * len(part)).double().cpu()
        if isinstance(self.model, PersonalizedPolicy) and not self._per_token:
            with self.model.reference.active() as frozen:
                for part in cut_packs(pairs, lambda i: self.judgments[i].num_tokens, MICROBATCH_TOKENS):
                    offsets[part] = self._margins(frozen, part, None).double().cpu()
        return offsets


class _Prompts(UserModel):
    """Soft prompts that are there already: id i is the i-th of them."""

    def __init__(self, prompts: Tensor) -> None:
        super().__init__(num_users=len(prompts), num_user_tokens=prompts.shape[1], dim=prompts.shape[2])
        self._prompts = prompts

    def soft_prompts(self, user_ids: Tensor) -> Tensor:
        """Rows of the prompts."""
        return self._prompts[user_ids - 1]

    def init_(self, initial: Tensor) -> None:
        """There is nothing to set."""


@contextmanager
def _serving(model: PersonalizedModel, prompts: Tensor) -> Iterator[None]:
    """Inside, the model's users are these soft prompts (B, T, D)."""
    before = model.user_encoder
    model.user_encoder = _Prompts(prompts)
    try:
        yield
    finally:
        model.user_encoder = before
