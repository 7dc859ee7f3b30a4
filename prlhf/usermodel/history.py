"""A soft prompt from a few pairs that a user has judged."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from prlhf.usermodel.base import UserContext
from prlhf.usermodel.encoder import EncoderUserModel


class HistoryUserModel(EncoderUserModel):
    """g(pairs): each pair casts a vote, what sets its chosen response apart from the rejected one; g reads their sum.

    r(response) = [mean over its tokens of gelu(A x_l), log of its length]
    vote_k = tanh(P (r(chosen_k) - r(rejected_k))),   f = sum_k vote_k / (K + 1)
    with x_l the normalized embedding of token l. A swapped label is the opposite vote, swapped labels of all pairs are
    the opposite user, the order of the pairs means nothing, and few pairs stay nearer to the generic user than many.

    Parameters: `encoder.tokens` (H, D) A; `encoder.votes` (H, H + 1) P; `encoder.layer` (H, H) W; `encoder.heads`
    (T, H, D).
    Source: after the encoder of variational preference learning (Poddar et al. 2024, arXiv:2408.10075), without its
    latent distribution.
    """

    centered = False  # what one taste votes for the other votes against
    smallest_deviation = 0.15  # votes by taste add up, and the topics of a few pairs do not

    def layer_shapes(self) -> dict[str, tuple[int, int]]:
        """One layer for tokens, one for pairs, one for the user."""
        width = self.hidden_dim
        return {"tokens": (width, self.dim), "votes": (width, width + 1), "layer": (width, width)}

    def features(self, tokens: Tensor, context: UserContext) -> Tensor:
        """(B, 1, H) of the tokens (B, 2K, L, D) of K pairs a row."""
        counts = context.lengths.clamp(min=1)[:, :, None]
        features = F.gelu(F.linear(tokens, self.encoder["tokens"])) * context.mask[..., None]
        responses = torch.cat([features.sum(dim=2) / counts, counts.to(features.dtype).log()], dim=-1)
        chosen, rejected = responses[:, 0::2], responses[:, 1::2]
        present = (context.lengths > 0).unflatten(1, (-1, 2)).all(dim=2)[:, :, None]
        votes = torch.tanh(F.linear(chosen - rejected, self.encoder["votes"])) * present
        return votes.sum(dim=1, keepdim=True) / (present.sum(dim=1, keepdim=True) + 1)
