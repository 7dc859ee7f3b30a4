"""One soft prompt for everybody."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prlhf.usermodel.base import UserModel, check_initial


class UniformUserModel(UserModel):
    """e_i = e for every user, the generic one included: prompt tuning without personalization."""

    def __init__(self, *, num_users: int, num_user_tokens: int, dim: int) -> None:
        super().__init__(num_users=num_users, num_user_tokens=num_user_tokens, dim=dim)
        self.generic = nn.Parameter(torch.zeros(num_user_tokens, dim))

    def soft_prompts(self, user_ids: Tensor) -> Tensor:
        """The same (T, D) for each of the B rows."""
        return self.generic.expand(len(user_ids), -1, -1)

    @torch.no_grad()
    def init_(self, initial: Tensor) -> None:
        """Set e to `initial` (T, D)."""
        check_initial(initial, self.generic)
        self.generic.copy_(initial)
