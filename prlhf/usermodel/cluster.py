"""A soft prompt mixed, for each user, from a few shared ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prlhf.usermodel.base import UserModel, check_initial, check_sizes, gather_rows, mix_prompts
from prlhf.usermodel.row_table import make_table, zero_


class ClusterUserModel(UserModel):
    """e_i = V softmax(a_i): each user, the generic one too, is a mixture of K shared soft prompts.

    Parameters: `basis` (K, T, D) is V; `weights` (num_users + 1, K), row i is a_i.
    Source: Li et al. 2024, arXiv:2402.05133, the cluster-based preference model.
    """

    def __init__(self, *, num_users: int, num_user_tokens: int, dim: int, num_clusters: int) -> None:
        super().__init__(num_users=num_users, num_user_tokens=num_user_tokens, dim=dim)
        check_sizes(num_clusters=num_clusters)
        self.num_clusters = num_clusters
        self.basis = nn.Parameter(torch.zeros(num_clusters, num_user_tokens, dim))
        self.weights = make_table(num_users + 1, num_clusters)

    @property
    def num_initial(self) -> int:
        """One for each cluster."""
        return self.num_clusters

    def cluster_shares(self, user_ids: Tensor) -> Tensor:
        """Share of each cluster in each user: (B, K), positive, every row of sum 1."""
        return gather_rows(self.weights, user_ids).softmax(dim=1)

    @property
    def table(self) -> nn.Parameter:
        """The weights, the generic user's first."""
        return self.weights

    @property
    def generic_state(self) -> Tensor:
        """a_0, (K,)."""
        return self.weights.detach()[0]

    def decode(self, states: Tensor) -> Tensor:
        """V softmax(a) for each a (K,)."""
        return mix_prompts(states.softmax(dim=1), self.basis)

    def soft_prompts(self, user_ids: Tensor) -> Tensor:
        """Mixtures (B, T, D) of the K soft prompts."""
        return self.decode(gather_rows(self.weights, user_ids))

    @torch.no_grad()
    def init_(self, initial: Tensor) -> None:
        """Set V to `initial` (K, T, D) and every a_i to 0: all users start as the even mixture.

        Raises: ValueError: another shape, or two equal clusters, which would get equal gradients and never part.
        """
        check_initial(initial, self.basis)
        if len(initial.flatten(1).unique(dim=0)) < self.num_clusters:
            raise ValueError(f"initial: the {self.num_clusters} clusters must all differ; draw each one anew")
        self.basis.copy_(initial)
        zero_(self.weights)
