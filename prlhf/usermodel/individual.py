"""A soft prompt of each user's own: the generic one plus an offset."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prlhf.usermodel.base import UserModel, check_initial, gather_rows
from prlhf.usermodel.row_table import make_table, zero_


class IndividualUserModel(UserModel):
    """e_i = e_0 + o_i, with o_0 fixed at 0.

    Parameters: `generic` (T, D) is e_0; `offsets` (num_users, T, D), row i - 1 is o_i. The generic user has no row, so
    nothing can move o_0.
    Source: Li et al. 2024, arXiv:2402.05133, the individualized preference model.
    """

    def __init__(self, *, num_users: int, num_user_tokens: int, dim: int) -> None:
        super().__init__(num_users=num_users, num_user_tokens=num_user_tokens, dim=dim)
        self.generic = nn.Parameter(torch.zeros(num_user_tokens, dim))
        self.offsets = make_table(num_users, num_user_tokens, dim)

    @property
    def table(self) -> nn.Parameter:
        """The offsets."""
        return self.offsets

    def decode(self, states: Tensor) -> Tensor:
        """e_0 + o for each offset o (T, D)."""
        return self.generic + states

    def soft_prompts(self, user_ids: Tensor) -> Tensor:
        """e_0 for id 0, e_0 + o_i for id i."""
        return self.decode(self.deviations(user_ids))

    def deviations(self, user_ids: Tensor) -> Tensor:
        """o_i, (B, T, D)."""
        # Id 0 borrows row 0 and drops it again: a batch of generic rows alone still leaves a gradient, of zeros.
        offsets = gather_rows(self.offsets, (user_ids - 1).clamp(min=0))
        known = (user_ids > 0)[:, None, None]
        return offsets.where(known, torch.zeros_like(offsets))

    @torch.no_grad()
    def init_(self, initial: Tensor) -> None:
        """Set e_0 to `initial` (T, D) and every o_i to 0: a user starts as the generic one."""
        check_initial(initial, self.generic)
        self.generic.copy_(initial)
        zero_(self.offsets)
