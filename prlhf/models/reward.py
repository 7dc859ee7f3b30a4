"""PersonalizedRewardModel: a score for each response, as each user would give it (P-RM)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from prlhf.data.collate import IGNORE_INDEX, PairBatch, ResponseBatch
from prlhf.data.context import ContextBatch
from prlhf.losses import response_token_counts
from prlhf.models.backbone import decoder, input_embedding
from prlhf.models.packing import Pack, Term, packed_call
from prlhf.models.personalized import PersonalizedModel


class ResponseScores(NamedTuple):
    """Scores of both responses of each row; both (B,) float32, a reward up to a constant of each prompt and user."""

    chosen: Tensor
    rejected: Tensor


class PersonalizedRewardModel(PersonalizedModel):
    """A causal LM with a linear head on the hidden state of a response's last token (EOS, unless it was cut).

    The head starts at zero, so every score is 0 and the first loss ln 2. It has no bias: a constant cancels in every
    pair, and nothing would train it.

    Args: those of `PersonalizedModel`.
    Source: Li et al. 2024, arXiv:2402.05133, the P-RM objective; the head as in Ouyang et al. 2022, arXiv:2203.02155.
    """

    def complete_(self) -> None:
        """Give the model its head."""
        self.score = nn.Linear(_hidden_dim(self.backbone), 1, bias=False, device=self.device)
        nn.init.zeros_(self.score.weight)
        _freeze_output_layer_(self.backbone)

    def sequence_scores(
        self, batch: PairBatch | ResponseBatch, user_ids: Tensor | None, context: ContextBatch | None = None
    ) -> Tensor:
        """Score of each sequence of a batch: (N,) float32; see `sequence_values`."""
        return self.sequence_values(batch, user_ids, context)[0]

    def scores(
        self, batch: PairBatch, user_ids: Tensor | None, context: ContextBatch | None = None
    ) -> ResponseScores:
        """Scores of both responses of each row.

        Args:
            batch: B rows.
            user_ids: (B,) int64, 0 is the generic user; None: no soft prompt at all (the vanilla reward model).
            context: of the rows' users, for an encoder (`batch.context`); None for the generic user.
        """
        return ResponseScores(*self.sequence_scores(batch, user_ids, context).chunk(2))

    def term_scores(self, batch: PairBatch, terms: Sequence[Term]) -> list[ResponseScores]:
        """`scores` of the batch read in several ways."""
        return [ResponseScores(*scores.chunk(2)) for scores, _ in self.term_values(batch, terms)]

    def padded_values(
        self, batch: PairBatch | ResponseBatch, user_ids: Tensor | None, context: ContextBatch | None = None
    ) -> tuple[Tensor, Tensor]:
        """A score is read at the last labelled position of its sequence."""
        embeds = self.input_embeds(batch.input_ids, user_ids, context, batch.sequence_row_ids())
        num_soft = embeds.shape[1] - batch.input_ids.shape[1]
        hidden = decoder(self.backbone)(inputs_embeds=embeds, use_cache=False).last_hidden_state
        labelled = (batch.labels != IGNORE_INDEX).long()
        positions = torch.arange(labelled.shape[1], device=labelled.device)
        last = (labelled * positions).argmax(dim=1) + num_soft
        scores = self._score(hidden[torch.arange(len(last), device=last.device), last])
        return scores, response_token_counts(batch.labels)

    def packed_values(self, pack: Pack, embeds: Tensor) -> Tensor:
        """A score is read at the last position of its response."""
        hidden = packed_call(decoder(self.backbone), embeds, pack.trees, pack.position_ids).last_hidden_state[0]
        return self._score(hidden[pack.last])

    def _score(self, hidden: Tensor) -> Tensor:
        # Differences between two responses are small beside the scores: no bfloat16 here.
        with torch.autocast(hidden.device.type, enabled=False):
            return self.score(hidden.float()).squeeze(1)


def _freeze_output_layer_(backbone: nn.Module) -> None:
    """No score depends on the output layer, unless its weight is the input embedding's too."""
    layer = cast(Any, backbone).get_output_embeddings()
    if layer is not None and layer.weight is not next(input_embedding(backbone).parameters()):
        layer.requires_grad_(False)


@torch.no_grad()
def _hidden_dim(backbone: nn.Module) -> int:
    """Width of the decoder's output (OPT may project it)."""
    device = next(backbone.parameters()).device
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    return decoder(backbone)(input_ids=token, use_cache=False).last_hidden_state.shape[-1]
