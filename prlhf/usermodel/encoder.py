"""What the encoders share: the generic soft prompt, and what a small network reads about a user added to it."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prlhf.usermodel.base import UserContext, UserModel, check_initial, check_sizes, mix_prompts

ROUNDING = 1e-5  # of a feature's size: below it the same text, padded otherwise, differs from itself


class EncoderUserModel(UserModel):
    """A soft prompt from what is known of a user; ids say nothing, so users never seen are served like known ones.

    e = e_0 + g, an offset g_t = h_t H_t of each soft token t; or, with K shared soft prompts, the mixture
    e = V softmax(a_0 + g), g = T^(-1/2) sum_t h_t H. In both h_t = tanh(W f_t + b_t), with f the features of a context.
    A row without a context, or with an empty one, is the generic user: g(nothing) is exactly 0.

    Parameters: `generic` (T, D) is e_0; or `basis` (K, T, D) V and `encoder.generic` (K,) a_0. `encoder.layer` (H, F) W
    and `encoder.heads` (T, H, D) or (H, K), zero at the start; others by kind. Of a mixture only V, a_0 and the heads
    are trained: at the rates that its weights need, the layers before them would wear away.

    Args:
        hidden_dim: width H of g.
        num_clusters: K; None for offsets.
        seed: of g's first layers.
    """

    centered: bool  # whether features are seen from the known users' mean, by a bias `encoder.bias` (T, H)
    smallest_deviation: float  # of users from each other, as a share of the largest: below it is nothing to learn from

    def __init__(
        self,
        *,
        num_users: int,
        num_user_tokens: int,
        dim: int,
        hidden_dim: int = 64,
        num_clusters: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(num_users=num_users, num_user_tokens=num_user_tokens, dim=dim)
        check_sizes(hidden_dim=hidden_dim, num_clusters=num_clusters or 1)
        self.hidden_dim = hidden_dim
        self.num_clusters = num_clusters
        self.seed = seed
        first: dict[str, tuple[int, ...]] = {**self.layer_shapes()}
        if self.centered:
            first["bias"] = (num_user_tokens, hidden_dim)
        last: dict[str, tuple[int, ...]]
        if num_clusters is None:
            self.generic = nn.Parameter(torch.zeros(num_user_tokens, dim))
            last = {"heads": (num_user_tokens, hidden_dim, dim)}
        else:
            self.basis = nn.Parameter(torch.zeros(num_clusters, num_user_tokens, dim))
            last = {"heads": (hidden_dim, num_clusters), "generic": (num_clusters,)}
        self.encoder = nn.ParameterDict({name: torch.zeros(shape) for name, shape in {**first, **last}.items()})
        if num_clusters is not None:
            for name in first:
                self.encoder[name].requires_grad_(False)

    @property
    def num_initial(self) -> int:
        """One, or one for each shared soft prompt."""
        return self.num_clusters or 1

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
        """The generic soft prompt for each of the B rows."""
        if self.num_clusters is None:
            return self.generic.expand(len(user_ids), -1, -1)
        return mix_prompts(self.encoder["generic"].softmax(dim=0), self.basis).expand(len(user_ids), -1, -1)

    def read(self, context: UserContext) -> Tensor:
        """What each row's context adds to the generic soft prompt, (B, T, D)."""
        hidden = F.linear(self.features(self._tokens(context), context), self.encoder["layer"])
        if self.centered:
            hidden = hidden + self.encoder["bias"]
        hidden = torch.tanh(hidden) * _is_known(context)[:, None, None]
        hidden = hidden.expand(-1, self.num_user_tokens, -1)
        if self.num_clusters is None:
            return torch.einsum("bth,thd->btd", hidden, self.encoder["heads"])
        generic = self.encoder["generic"]
        own = hidden.sum(dim=1) @ self.encoder["heads"] / math.sqrt(self.num_user_tokens)
        return mix_prompts((generic + own).softmax(dim=-1) - generic.softmax(dim=-1), self.basis)

    def _tokens(self, context: UserContext) -> Tensor:
        # Families differ in the size of their embeddings by a factor of fifty.
        return F.normalize(context.embeds.to(self.encoder["layer"].dtype), dim=-1) * math.sqrt(self.dim)

    @torch.no_grad()
    def init_(self, initial: Tensor) -> None:
        """Set e_0 to `initial` (T, D), or V to `initial` (K, T, D); the last layer to 0, the others to draws that keep
        the size of their input.

        Every user starts as the generic one, a mixture as the even one.
        """
        started = self.generic if self.num_clusters is None else self.basis
        check_initial(initial, started)
        started.copy_(initial)
        self.encoder["heads"].zero_()
        if self.num_clusters is not None:
            self.encoder["generic"].zero_()
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
        kept = deviations > max(self.smallest_deviation * deviations[0].item(), ROUNDING * usual_size)
        layer = self.encoder["layer"]
        layer[:most][kept.to(layer.device)] = (directions / deviations).T[kept].to(layer)
        if self.centered:
            self.encoder["bias"].copy_(-F.linear(mean, layer))


def _is_known(context: UserContext) -> Tensor:
    """(B,), whether there is anything to read."""
    return (context.lengths > 0).any(dim=1)
