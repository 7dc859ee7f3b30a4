"""What every user model shares: sizes, the check of the ids, the gathering of rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prlhf.usermodel.row_table import GatherRows, RowTable


@dataclass(frozen=True)
class UserContext:
    """What an encoder reads about each row's user: texts, as the embeddings of their tokens.

    A text encoder reads one text a row, the user's own; a history encoder 2K, the chosen and the rejected response of
    each of K pairs in turn. A text of length 0 is none.

    Args:
        embeds: (B, S, L, D) the backbone's embeddings of S texts a row, padded on the right.
        lengths: (B, S) int64 tokens of each text.
    """

    embeds: Tensor
    lengths: Tensor

    @property
    def mask(self) -> Tensor:
        """(B, S, L), true on tokens and false on pads."""
        return torch.arange(self.embeds.shape[2], device=self.lengths.device) < self.lengths[:, :, None]


class UserModel(nn.Module, ABC):
    """A soft prompt for each user; id 0 is the generic user, 1..num_users are known ones.

    Parameters are zero until `init_` or `load_state_dict` fills them.

    Args:
        num_users: known users, the generic one not counted.
        num_user_tokens: length T of the soft prompt.
        dim: width D of the backbone's embeddings.
    Raises: ValueError: a size below 1.
    """

    def __init__(self, *, num_users: int, num_user_tokens: int, dim: int) -> None:
        super().__init__()
        check_sizes(num_users=num_users, num_user_tokens=num_user_tokens, dim=dim)
        self.num_users = num_users
        self.num_user_tokens = num_user_tokens
        self.dim = dim

    def forward(self, user_ids: Tensor, context: UserContext | None = None) -> Tensor:
        """Soft prompt of each row's user.

        Args:
            user_ids: (B,) int64, 0 (generic) to num_users.
            context: B rows for encoders, None for the generic user; a model that is a table refuses one.
        Returns: (B, T, D), differentiable.
        Raises: ValueError: ids of another shape, type or range, or a context given to a table.
        """
        if user_ids.dim() != 1 or user_ids.dtype != torch.int64:
            raise ValueError(f"user_ids: got {tuple(user_ids.shape)} {user_ids.dtype}, expected (B,) torch.int64")
        # One wait for the device; an id out of range would otherwise read another row or kill the device's context.
        outside = (user_ids < 0) | (user_ids > self.num_users)
        if outside.any():
            wrong = sorted(set(user_ids[outside].tolist()))
            raise ValueError(f"user_ids: got {wrong}, expected 0 (generic) to {self.num_users}; use 0 for a new user")
        soft_prompts = self.soft_prompts(user_ids)
        return soft_prompts if context is None else soft_prompts + self.read(context)

    @property
    def table(self) -> nn.Parameter:
        """The parameter with a row a user, what `decode` takes; the generic user's row, if it has one, is the first.

        Raises: ValueError: this model has no such parameter.
        """
        raise ValueError(f"{type(self).__name__} has no parameters of one user alone, so there is nothing to fit")

    @property
    def generic_state(self) -> Tensor:
        """The generic user's row, or what stands for it: the shape of a row."""
        return torch.zeros_like(self.table[0])

    def decode(self, states: Tensor) -> Tensor:
        """Soft prompts (B, T, D) of B rows of a table, not necessarily of this one; differentiable."""
        raise ValueError(f"{type(self).__name__} has no parameters of one user alone, so there is nothing to fit")

    @abstractmethod
    def soft_prompts(self, user_ids: Tensor) -> Tensor:
        """Soft prompts (B, T, D) of ids (B,) already known to be in range, without a context."""

    def deviations(self, user_ids: Tensor) -> Tensor:
        """What sets each user apart from the generic one and a prior may shrink: (B, ...), 0 for id 0.

        Raises: ValueError: this model has no such parameters.
        """
        raise ValueError(f"{type(self).__name__} has no parameters of one user alone; set no prior")

    def read(self, context: UserContext) -> Tensor:
        """What a context adds to the soft prompts, (B, T, D).

        Raises: ValueError: this model is a table.
        """
        raise ValueError(f"{type(self).__name__} is a table of users and reads no context; pass None")

    @property
    def num_initial(self) -> int:
        """Starting soft prompts that `init_` takes."""
        return 1

    @abstractmethod
    def init_(self, initial: Tensor) -> None:
        """Set every parameter to its starting value.

        Args:
            initial: starting soft prompt (T, D), or `num_initial` of them where that is above 1.
        Raises: ValueError: another shape.
        """


def mix_prompts(shares: Tensor, basis: Tensor) -> Tensor:
    """Mixtures (..., T, D) of K soft prompts (K, T, D) in shares (..., K)."""
    return torch.einsum("...k,ktd->...td", shares, basis)


def check_sizes(**sizes: int) -> None:
    """Refuse a size below 1.

    Raises: ValueError: naming the size.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: got {size}, expected at least 1")


def check_initial(initial: Tensor, expected: Tensor) -> None:
    """Refuse a starting value of another shape: `copy_` would broadcast it.

    Raises: ValueError: naming both shapes.
    """
    if initial.shape != expected.shape:
        raise ValueError(f"initial: got {tuple(initial.shape)}, expected {tuple(expected.shape)}")


def gather_rows(table: Tensor, rows: Tensor) -> Tensor:
    """Rows of a table: (N, ...) and (B,) int64 give (B, ...); touches no other row, and brings those not read yet.

    Through `embedding`, because the gradient of `table[rows]` adds repeated rows in an order that depends on threads.
    """
    if isinstance(table, RowTable):
        if table.bring is not None:
            table.bring(rows)
        return GatherRows.apply(table, rows)
    return F.embedding(rows, table.flatten(1)).unflatten(1, table.shape[1:])
