"""A soft prompt from what a user says of themselves."""

from __future__ import annotations

from torch import Tensor

from prlhf.usermodel.base import UserContext
from prlhf.usermodel.encoder import EncoderUserModel

NEVER = -1e9  # finite: a softmax over nothing but minus infinity is not a number


class TextUserModel(EncoderUserModel):
    """g(u^t): a query attends to the tokens of the user's text.

    f = sum_l softmax_l(q x_l) x_l, with x_l the normalized embedding of token l; at the start their mean, nearly.

    Parameters: `encoder.query` (1, D) q; `encoder.layer` (H, D) W; `encoder.bias` (H,) b; `encoder.codes` (R, H).
    """

    centered = True

    def layer_shapes(self) -> dict[str, tuple[int, int]]:
        """The query and one layer."""
        return {"query": (1, self.dim), "layer": (self.hidden_dim, self.dim)}

    def features(self, tokens: Tensor, context: UserContext) -> Tensor:
        """(B, D) of the tokens (B, 1, L, D) of one text a row."""
        mask = context.mask[:, 0]
        scores = tokens[:, 0] @ self.encoder["query"][0]
        shares = scores.masked_fill(~mask, NEVER).softmax(dim=-1) * mask
        return (shares[:, None] @ tokens[:, 0])[:, 0]
