"""A soft prompt from what a user says of themselves."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from prlhf.usermodel.base import UserContext
from prlhf.usermodel.encoder import EncoderUserModel

NEVER = -1e9  # finite: a softmax over nothing but minus infinity is not a number


class TextUserModel(EncoderUserModel):
    """g(u^t): each soft token has a query of its own that attends to the tokens of the user's text.

    g_t = gelu(W sum_l softmax_l(q_t x_l) x_l) H_t, with x_l the normalized embedding of token l.

    Parameters: `encoder.queries` (T, D) q; `encoder.layer` (H, D) W; `encoder.heads` (T, H, D).
    """

    def layer_shapes(self) -> dict[str, tuple[int, int]]:
        """Queries and one layer."""
        return {"queries": (self.num_user_tokens, self.dim), "layer": (self.hidden_dim, self.dim)}

    def hidden(self, tokens: Tensor, context: UserContext) -> Tensor:
        """(B, T, H) of the tokens (B, 1, L, D) of one text a row."""
        mask = context.mask[:, :1]
        scores = torch.einsum("bld,td->btl", tokens[:, 0], self.encoder["queries"])
        shares = scores.masked_fill(~mask, NEVER).softmax(dim=-1) * mask
        pooled = shares @ tokens[:, 0]
        return F.gelu(F.linear(pooled, self.encoder["layer"]))
