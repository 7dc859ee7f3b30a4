"""A soft prompt from what a user says of themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from prlhf.usermodel.base import UserContext
from prlhf.usermodel.encoder import EncoderUserModel

NEVER = -1e9  # finite: a softmax over nothing but minus infinity is not a number


class TextUserModel(EncoderUserModel):
    """g(u^t): each soft token has a query of its own that attends to the tokens of the user's text.

    f_t = sum_l softmax_l(q_t x_l) x_l, with x_l the normalized embedding of token l.

    Parameters: `encoder.queries` (T, D) q; `encoder.layer` (H, D) W; `encoder.bias` (T, H) b; `encoder.heads`
    (T, H, D).
    """

    centered = True
    smallest_deviation = 1e-3  # people may differ in a word or two

    def layer_shapes(self) -> dict[str, tuple[int, int]]:
        """Queries and one layer."""
        return {"queries": (self.num_user_tokens, self.dim), "layer": (self.hidden_dim, self.dim)}

    def features(self, tokens: Tensor, context: UserContext) -> Tensor:
        """(B, T, D) of the tokens (B, 1, L, D) of one text a row."""
        mask = context.mask[:, :1]
        scores = torch.einsum("bld,td->btl", tokens[:, 0], self.encoder["queries"])
        shares = scores.masked_fill(~mask, NEVER).softmax(dim=-1) * mask
        return shares @ tokens[:, 0]
