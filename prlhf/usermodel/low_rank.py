"""A soft prompt a few numbers away from the generic one: an offset in a subspace that all users share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prlhf.usermodel.base import UserModel, check_initial, check_sizes, gather_rows
from prlhf.usermodel.row_table import make_table, zero_


class LowRankUserModel(UserModel):
    """e_i = e_0 + B w_i, w_i unconstrained: rank numbers a user.

    Parameters: `generic` (T, D) is e_0; `basis` (R, T, D) is B; `weights` (num_users, R), row i - 1 is w_i. The generic
    user has no row.
    Source: PReF's linear preference space (Shenfeld et al. 2025, arXiv:2503.06358), here of soft prompts.
    """

    def __init__(self, *, num_users: int, num_user_tokens: int, dim: int, rank: int) -> None:
        super().__init__(num_users=num_users, num_user_tokens=num_user_tokens, dim=dim)
        check_sizes(rank=rank)
        self.rank = rank
        self.generic = nn.Parameter(torch.zeros(num_user_tokens, dim))
        self.basis = nn.Parameter(torch.zeros(rank, num_user_tokens, dim))
        self.weights = make_table(num_users, rank)

    @property
    def num_initial(self) -> int:
        """e_0, and one more for each direction."""
        return 1 + self.rank

    @property
    def table(self) -> nn.Parameter:
        """The weights."""
        return self.weights

    def decode(self, states: Tensor) -> Tensor:
        """e_0 + B w for each w (R,)."""
        return self.generic + torch.einsum("br,rtd->btd", states, self.basis)

    def soft_prompts(self, user_ids: Tensor) -> Tensor:
        """e_0 for id 0, e_0 + B w_i for id i."""
        return self.decode(self.deviations(user_ids))

    def deviations(self, user_ids: Tensor) -> Tensor:
        """w_i, (B, R)."""
        # Id 0 borrows row 0 and drops it again: a batch of generic rows alone still leaves a gradient, of zeros.
        return gather_rows(self.weights, (user_ids - 1).clamp(min=0)) * (user_ids > 0)[:, None]

    @torch.no_grad()
    def init_(self, initial: Tensor) -> None:
        """Set e_0 to `initial[0]` of (1 + R, T, D), B to the others' differences from it, and every w_i to 0.

        A basis of zeros under weights of zeros would get no gradient at all.
        """
        check_initial(initial, torch.cat([self.generic[None], self.basis]))
        self.generic.copy_(initial[0])
        self.basis.copy_(initial[1:] - initial[0])
        zero_(self.weights)
