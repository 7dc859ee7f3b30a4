"""What the encoders share: the generic soft prompt, and what a small network reads about a user added to it."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prlhf.usermodel.base import UserContext, UserModel, check_initial, check_sizes

SMALLEST_DEVIATION = 1e-3  # of the largest: below it users do not differ
ROUNDING = 1e-5  # of a feature's size: below it the same text, padded otherwise, differs from itself


class EncoderUserModel(UserModel):
    """e_0 + g(context): the ids say nothing, so users never seen are served like known ones.

    g_t = tanh(W f_t + b_t) H_t, with f the features of a context. A row without a context, or with an empty one, is the
    generic user: g(nothing) is exactly 0.

    Parameters: `generic` (T, D) is e_0; `encoder.layer` (H, F) W; `encoder.heads` (T, H, D), zero at the start; others
    by kind.

    Args:
        hidden_dim: width H of g.
        seed: of g's first layers.
    """

    centered: bool  # whether features are seen from the known users' mean, by a bias `encoder.bias` (T, H)

    def __init__(
        self, *, num_users: int, num_user_tokens: int, dim: int, hidden_dim: int = 64, seed: int = 0
    ) -> None:
        super().__init__(num_users=num_users, num_user_tokens=num_user_tokens, dim=dim)
        check_sizes(hidden_dim=hidden_dim)
        self.hidden_dim = hidden_dim
        self.seed = seed
        self.generic = nn.Parameter(torch.zeros(num_user_tokens, dim))
        shapes: dict[str, tuple[int, ...]] = {**self.layer_shapes(), "heads": (num_user_tokens, hidden_dim, dim)}
        if self.centered:
            shapes["bias"] = (num_user_tokens, hidden_dim)
        self.encoder = nn.ParameterDict({name: torch.zeros(shape) for name, shape in shapes.items()})

    @abstractmethod
    def layer_shapes(self) -> dict[str, tuple[int, int]]:
        """Name -> (outputs, inputs) of each matrix of g that starts as a random draw."""

    @abstractmethod
    def features(self, tokens: Tensor, context: UserContext) -> Tensor:
        """f of each row's context: (B, T, F), or (B, 1, F) for all soft tokens alike; 0 for rows without a context.

        Args:
            tokens: (B, S, L, D) embeddings whose entries have a mean square of 1.
        """

    def soft_prompts(self, user_ids: Tensor) -> Tensor:
        """e_0 for each of the B rows."""
        return self.generic.expand(len(user_ids), -1, -1)

    def read(self, context: UserContext) -> Tensor:
        """g of each row's context, (B, T, D)."""
        hidden = F.linear(self.features(self._tokens(context), context), self.encoder["layer"])
        if self.centered:
            hidden = hidden + self.encoder["bias"]
        hidden = torch.tanh(hidden) * _is_known(context)[:, None, None]
        hidden = hidden.expand(-1, self.num_user_tokens, -1)
        return torch.einsum("bth,thd->btd", hidden, self.encoder["heads"])

    def _tokens(self, context: UserContext) -> Tensor:
        # Families differ in the size of their embeddings by a factor of fifty.
        return F.normalize(context.embeds.to(self.generic.dtype), dim=-1) * math.sqrt(self.dim)

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
        if self.centered:
            self.encoder["bias"].zero_()

    @torch.no_grad()
    def whiten_(self, contexts: Iterable[UserContext]) -> None:
        """Start W and b where what g reads of known users has mean 0 (if centered), variance 1 and no correlations.

        People's texts are far more alike than different: what tells them apart would be learned last, under the noise
        of what they share. Directions in which users hardly differ stay as they were drawn.

        Args:
            contexts: of users, at least one in all; those without a context are left out.
        """
        parts = [self.features(self._tokens(c), c)[_is_known(c)] for c in contexts]
        features = torch.cat(parts)  # (N, T or 1, F)
        if len(features) < 2:
            return
        mean = features.mean(dim=0) if self.centered else torch.zeros_like(features[0])
        samples = (features - mean).flatten(0, 1)
        most = min(self.hidden_dim, *samples.shape)
        with torch.random.fork_rng(devices=[]):  # on the CPU: torch.manual_seed would give all ranks' GPUs one seed
            torch.default_generator.manual_seed(self.seed)
            _, sizes, directions = torch.svd_lowrank(samples.cpu(), q=most, niter=4)
        deviations = sizes / math.sqrt(len(samples))
        usual_size = features.square().sum(dim=-1).mean().sqrt().item()
        kept = deviations > max(SMALLEST_DEVIATION * deviations[0].item(), ROUNDING * usual_size)
        layer = self.encoder["layer"]
        layer[:most][kept.to(layer.device)] = (directions / deviations).T[kept].to(layer)
        if self.centered:
            self.encoder["bias"].copy_(-F.linear(mean, layer))


def _is_known(context: UserContext) -> Tensor:
    """(B,), whether there is anything to read."""
    return (context.lengths > 0).any(dim=1)
