"""The users of a trained model: how well each is served, who is like whom, and a map of them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from prlhf.data.quoting import quote
from prlhf.errors import DataError
from prlhf.evaluation.run_files import base_figures, kept_figures
from prlhf.models import PersonalizedModel, load_model
from prlhf.models.run_folder import resolve_checkpoint
from prlhf.usermodel import ClusterUserModel

NUM_NEAREST = 10


@dataclass(frozen=True)
class KnownUser:
    """One user of a model.

    Args:
        accuracy: on the user's evaluation rows, as the user; None where nothing was evaluated.
        generic_accuracy: on the same rows as the generic user.
        num_rows: of the evaluation.
        cluster: the one with the largest share, from 0; None for other user models.
        share: of that cluster.
        judgments: what the user was added with by `prlhf adapt`; None for others, of whom nothing of this is known.
        leave_one_out: share of these answered right by the fit without them.
    """

    user_id: str
    accuracy: float | None
    generic_accuracy: float | None
    num_rows: int | None
    cluster: int | None
    share: float | None
    judgments: int | None = None
    leave_one_out: float | None = None


class Neighbour(NamedTuple):
    """Another user: how far the soft prompts are apart, and the cosine of what sets each apart from the generic one."""

    user_id: str
    distance: float
    cosine: float


class UserMap(NamedTuple):
    """Users and the generic one in the plane that keeps most of the users' variance.

    Args:
        users: (U, 2).
        generic: (2,).
        explained: shares of the variance along both axes.
    """

    users: Tensor
    generic: Tensor
    explained: tuple[float, float]


def load_users(checkpoint: Path) -> tuple[PersonalizedModel, list[KnownUser]]:
    """A model and its users, the worst served first; in the order of their rows where nothing was evaluated.

    Raises: DataError: a model without users. CheckpointError: as `load_model`.
    """
    directory = resolve_checkpoint(checkpoint)
    model = load_model(directory)
    if model.user_encoder is None or not model.users:
        raise DataError(f"{directory}: this model has no users; give one of method pdpo or prm")
    figures = (base_figures(directory) or {}).get("per_user", {})
    added = {own["user_id"]: own for own in kept_figures(directory).get("added", [])}
    members: list[tuple[int, float] | tuple[None, None]] = [(None, None)] * len(model.users)
    if isinstance(model.user_encoder, ClusterUserModel):
        with torch.no_grad():
            largest = model.user_encoder.cluster_shares(torch.arange(1, len(model.users) + 1)).max(dim=1)
        members = list(zip(largest.indices.tolist(), largest.values.tolist(), strict=True))
    users = []
    for user_id, (cluster, share) in zip(model.users.user_ids, members, strict=True):
        own, fit = figures.get(user_id, {}), added.get(user_id, {})
        users.append(
            KnownUser(
                user_id, own.get("accuracy"), own.get("generic_accuracy"), own.get("num_rows"), cluster, share,
                fit.get("judgments"), fit.get("leave_one_out"),
            )
        )
    return model, sorted(users, key=lambda user: 2.0 if user.accuracy is None else user.accuracy)


def nearest_users(model: PersonalizedModel, user_id: str, *, count: int = NUM_NEAREST) -> list[Neighbour]:
    """The users whose soft prompts are nearest to a user's, the nearest first.

    Raises: DataError: an unknown user.
    """
    assert model.users is not None
    place = model.users.index(user_id) - 1
    prompts = model.known_prompts().flatten(1)
    offsets = prompts[1:] - prompts[0]
    distances = (offsets - offsets[place]).norm(dim=1)
    cosines = torch.cosine_similarity(offsets, offsets[place][None], dim=1)
    others = [i for i in distances.argsort(stable=True).tolist() if i != place][:count]
    return [Neighbour(model.users.user_id(i + 1), float(distances[i]), float(cosines[i])) for i in others]


def compute_user_map(prompts: Tensor) -> UserMap:
    """Principal components of the users' soft prompts; each axis points to where its largest entry is positive.

    Args:
        prompts: (1 + U, T, D), the generic user first.
    """
    flat = prompts.double().flatten(1)
    mean = flat[1:].mean(dim=0)
    _, sizes, axes = torch.linalg.svd(flat[1:] - mean, full_matrices=False)
    axes, total = axes[:2], float(sizes.square().sum())
    shares = [float(size) ** 2 / total if total > 0 else 0.0 for size in sizes[:2]] + [0.0, 0.0]
    if len(axes) < 2:
        axes = torch.cat([axes, torch.zeros_like(flat[:1])])[:2]
    axes = axes * axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)).sign()
    return UserMap((flat[1:] - mean) @ axes.T, (flat[0] - mean) @ axes.T, (shares[0], shares[1]))


def format_users(users: Sequence[KnownUser]) -> str:
    """A table, a line a user."""
    header = ["user", "accuracy", "as generic", "rows", "cluster", "judgments", "leave-one-out"]
    lines = [
        [
            printable(user.user_id),
            "" if user.accuracy is None else f"{user.accuracy:.3f}",
            "" if user.generic_accuracy is None else f"{user.generic_accuracy:.3f}",
            "" if user.num_rows is None else str(user.num_rows),
            "" if user.cluster is None else f"{user.cluster} ({user.share:.2f})",
            "" if user.judgments is None else str(user.judgments),
            "" if user.leave_one_out is None else f"{user.leave_one_out:.3f}",
        ]
        for user in users
    ]
    kept = [i for i in range(len(header)) if i == 0 or any(line[i] for line in lines)]
    rows = [[line[i] for i in kept] for line in (header, *lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(kept))]
    widths[0] = -widths[0]  # ids on the left, figures on the right
    return "".join("  ".join(_pad(cell, width) for cell, width in zip(row, widths, strict=True)) + "\n" for row in rows)


def format_sources(checkpoint: Path) -> str:
    """Where the figures of an adapted checkpoint's users come from, a line each; nothing for other checkpoints."""
    kept = kept_figures(resolve_checkpoint(checkpoint))
    lines = []
    if kept.get("base"):
        lines.append(f"accuracy, as generic, rows: of {printable(kept['base']['run'])} at step {kept['base']['step']}, "
                     "before users were added")
    if kept.get("added"):
        lines.append("judgments, leave-one-out: what users were added with, and the share of it that the fit without "
                     "it answers right")
    return "".join(f"{line}\n" for line in lines)


def _pad(cell: str, width: int) -> str:
    return cell.ljust(-width) if width < 0 else cell.rjust(width)


def format_neighbours(user_id: str, neighbours: Sequence[Neighbour]) -> str:
    """A line for each neighbour."""
    width = max((len(printable(other.user_id)) for other in neighbours), default=0)
    lines = [
        f"  {printable(other.user_id).ljust(width)}  distance {other.distance:.3f}  cosine {other.cosine:+.3f}\n"
        for other in neighbours
    ]
    return f"nearest to {printable(user_id)}:\n" + "".join(lines)


def printable(user_id: str) -> str:
    """An id as it is, or in quotes where a terminal could not show it."""
    return user_id if user_id.isprintable() else quote(user_id)
