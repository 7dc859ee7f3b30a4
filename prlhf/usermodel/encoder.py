"""What the encoders share: an offset in a subspace that all users share, from what is read about a user."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prlhf.usermodel.base import UserContext, UserModel, check_initial, check_sizes

SMALLEST_DEVIATION = 1e-3  # of the largest: below it users do not differ


class EncoderUserModel(UserModel):
    """e_0 + B g(context): the ids say nothing, so users never seen are served like known ones.

    g = C tanh(W f + b), with f the features of a context: rank numbers a user, as few as a low-rank table has, because
    every number more is one more that noisy labels move. A row without a context, or with an empty one, is the generic
    user: g(nothing) is exactly 0.

    Parameters: `generic` (T, D) is e_0; `basis` (R, T, D) is B; `encoder.layer` (H, F) W; `encoder.codes` (R, H) C, 0
    at the start; others by kind.

    Args:
        rank: numbers R that are made of a context.
        hidden_dim: width H of g.
        seed: of g's first layers.
    """

    centered: bool  # whether features are seen from the known users' mean, by a bias `encoder.bias` (H,)

    def __init__(
        self, *, num_users: int, num_user_tokens: int, dim: int, rank: int = 4, hidden_dim: int = 64, seed: int = 0
    ) -> None:
        super().__init__(num_users=num_users, num_user_tokens=num_user_tokens, dim=dim)
        check_sizes(rank=rank, hidden_dim=hidden_dim)
        self.rank = rank
        self.hidden_dim = hidden_dim
        self.seed = seed
        self.generic = nn.Parameter(torch.zeros(num_user_tokens, dim))
        self.basis = nn.Parameter(torch.zeros(rank, num_user_tokens, dim))
        zeros = {name: torch.zeros(shape) for name, shape in self.layer_shapes().items()}
        if self.centered:
            zeros["bias"] = torch.zeros(hidden_dim)
        self.encoder = nn.ParameterDict({**zeros, "codes": torch.zeros(rank, hidden_dim)})

    @abstractmethod
    def layer_shapes(self) -> dict[str, tuple[int, int]]:
        """Name -> (outputs, inputs) of each matrix of g that starts as a random draw."""

    @abstractmethod
    def features(self, tokens: Tensor, context: UserContext) -> Tensor:
        """f of each row's context: (B, F); 0 for rows without a context.

        Args:
            tokens: (B, S, L, D) embeddings whose entries have a mean square of 1.
        """

    @property
    def num_initial(self) -> int:
        """e_0, and one more for each direction."""
        return 1 + self.rank

    def soft_prompts(self, user_ids: Tensor) -> Tensor:
        """e_0 for each of the B rows."""
        return self.generic.expand(len(user_ids), -1, -1)

    def read(self, context: UserContext) -> Tensor:
        """B g of each row's context, (B, T, D)."""
        hidden = F.linear(
            self.features(self._tokens(context), context),
            self.encoder["layer"],
            self.encoder["bias"] if self.centered else None,
        )
        codes = F.linear(torch.tanh(hidden), self.encoder["codes"]) * _is_known(context)[:, None]
        return torch.einsum("br,rtd->btd", codes, self.basis)

    def _tokens(self, context: UserContext) -> Tensor:
        # Families differ in the size of their embeddings by a factor of fifty.
        return F.normalize(context.embeds.to(self.generic.dtype), dim=-1) * math.sqrt(self.dim)

    @torch.no_grad()
    def init_(self, initial: Tensor) -> None:
        """Set e_0 to `initial[0]` of (1 + R, T, D), B to the others' differences from it, C to 0 and the other layers
        to draws that keep the size of their input.

        Every user starts as the generic one.
        """
        check_initial(initial, torch.cat([self.generic[None], self.basis]))
        self.generic.copy_(initial[0])
        self.basis.copy_(initial[1:] - initial[0])
        generator = torch.Generator().manual_seed(self.seed)
        for parameter in self.encoder.values():
            parameter.zero_()
        for name, shape in self.layer_shapes().items():
            self.encoder[name].copy_(torch.randn(shape, generator=generator) / math.sqrt(shape[1]))

    @torch.no_grad()
    def whiten_(self, contexts: Iterable[UserContext]) -> None:
        """Start W and b where what g reads of known users has mean 0 (if centered), variance 1 and no correlations.

        People's texts are far more alike than different: what tells them apart would be learned last, under the noise
        of what they share. Directions in which users hardly differ stay as they were drawn.

        Args:
            contexts: of users, at least one in all; those without a context are left out.
        """
        features = torch.cat([self.features(self._tokens(c), c)[_is_known(c)] for c in contexts])
        if len(features) < 2:
            return
        mean = features.mean(dim=0) if self.centered else torch.zeros_like(features[0])
        most = min(self.hidden_dim, *features.shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            _, sizes, directions = torch.svd_lowrank(features - mean, q=most, niter=4)
        deviations = sizes / math.sqrt(len(features))
        kept = deviations > SMALLEST_DEVIATION * deviations[0]
        layer = self.encoder["layer"]
        layer[:most][kept] = (directions / deviations).T[kept].to(layer.dtype)
        if self.centered:
            self.encoder["bias"].copy_(-F.linear(mean, layer))


def _is_known(context: UserContext) -> Tensor:
    """(B,), whether there is anything to read."""
    return (context.lengths > 0).any(dim=1)
