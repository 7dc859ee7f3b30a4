"""What the encoders share: the generic soft prompt, and what a small network reads about a user added to it."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prlhf.usermodel.base import UserContext, UserModel, check_initial, check_sizes


class EncoderUserModel(UserModel):
    """e_0 + g(context): the ids say nothing, so users never seen are served like known ones.

    A row without a context, or with an empty one, is the generic user: g has no bias, and g(nothing) is exactly 0.

    Parameters: `generic` (T, D) is e_0; `encoder.*` are g's, those of the last layer, `encoder.heads` (T, H, D), zero
    at the start.

    Args:
        hidden_dim: width H of g.
        seed: of g's first layers.
    """

    def __init__(
        self, *, num_users: int, num_user_tokens: int, dim: int, hidden_dim: int = 64, seed: int = 0
    ) -> None:
        super().__init__(num_users=num_users, num_user_tokens=num_user_tokens, dim=dim)
        check_sizes(hidden_dim=hidden_dim)
        self.hidden_dim = hidden_dim
        self.seed = seed
        self.generic = nn.Parameter(torch.zeros(num_user_tokens, dim))
        shapes = {**self.layer_shapes(), "heads": (num_user_tokens, hidden_dim, dim)}
        self.encoder = nn.ParameterDict({name: torch.zeros(shape) for name, shape in shapes.items()})

    @abstractmethod
    def layer_shapes(self) -> dict[str, tuple[int, int]]:
        """Name -> (outputs, inputs) of each layer of g but the last."""

    @abstractmethod
    def hidden(self, tokens: Tensor, context: UserContext) -> Tensor:
        """What the last layer takes: (B, T, H), or (B, 1, H) for all soft tokens alike; 0 for rows without a context.

        Args:
            tokens: (B, S, L, D) embeddings whose entries have a mean square of 1.
        """

    def soft_prompts(self, user_ids: Tensor) -> Tensor:
        """e_0 for each of the B rows."""
        return self.generic.expand(len(user_ids), -1, -1)

    def read(self, context: UserContext) -> Tensor:
        """g of each row's context, (B, T, D)."""
        # Families differ in the size of their embeddings by a factor of fifty.
        tokens = F.normalize(context.embeds.to(self.generic.dtype), dim=-1) * math.sqrt(self.dim)
        hidden = self.hidden(tokens, context).expand(-1, self.num_user_tokens, -1)
        return torch.einsum("bth,thd->btd", hidden, self.encoder["heads"])

    @torch.no_grad()
    def init_(self, initial: Tensor) -> None:
        """Set e_0 to `initial` (T, D), the last layer to 0 and the others to draws that keep the size of their input.

        Every user starts as the generic one.
        """
        check_initial(initial, self.generic)
        self.generic.copy_(initial)
        self.encoder["heads"].zero_()
        generator = torch.Generator().manual_seed(self.seed)
        for name, shape in self.layer_shapes().items():
            self.encoder[name].copy_(torch.randn(shape, generator=generator) / math.sqrt(shape[1]))
