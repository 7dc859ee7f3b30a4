"""Splits by prompt and by user: no evaluation row shares its prompt with training, no unseen user trains."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from prlhf.data.records import (
    JudgedRow,
    LabelledData,
    LabelledRow,
    PreferenceData,
    PreferenceRow,
    Prompt,
    ResponseRow,
    Row,
)
from prlhf.errors import DataError

DEV_SHARE = 0.05
MAX_SEED = 4_000_000_000  # numpy's RandomState, which draws as the papers' authors did, takes less than 2**32
K = TypeVar("K", bound=Hashable)
Data = TypeVar("Data", PreferenceData, LabelledData)


@dataclass(frozen=True)
class Split(Generic[Data]):
    """A split and the rows that belong to none of its parts.

    Args:
        num_left_out: rows of unseen users on training prompts: in training they would not be unseen, in evaluation the
            prompt would not be.
    """

    data: Data
    num_left_out: int


def prompt_group(row: JudgedRow | ResponseRow) -> Hashable:
    """What undivided rows share; see `prompt_key`."""
    return prompt_key(row.prompt)


def prompt_key(prompt: Prompt) -> str:
    """The prompt without regard to case and spacing; of a dialogue, its opening."""
    return " ".join(_opening(prompt).casefold().split())


def split_preferences(
    rows: Sequence[PreferenceRow],
    *,
    source: str,
    seed: int,
    eval_prompts: float,
    unseen_users: float,
    group: Callable[[PreferenceRow], Hashable] = prompt_group,
) -> Split[PreferenceData]:
    """Split rows by group and by user.

    Training rows are those of seen users on training groups; `dev` is 5% of the training groups. Users who are left
    without a training row (all their groups were drawn for evaluation) count as unseen.

    Args:
        eval_prompts: share of the groups held out, 0 <= share < 1.
        unseen_users: share of the users held out, 0 <= share < 1.
        group: rows of one group go to the same part.
    Raises: DataError: a share out of range, or no training row left.
    """
    parts, num_left_out = _split_rows(
        rows, source=source, seed=seed, eval_prompts=eval_prompts, unseen_users=unseen_users, group=group
    )
    return Split(PreferenceData(**parts, source=source), num_left_out)


def split_labelled(
    rows: Sequence[LabelledRow], *, source: str, seed: int, eval_prompts: float, unseen_users: float
) -> Split[LabelledData]:
    """Split unpaired rows as `split_preferences` does pairs.

    Raises: DataError: a share out of range, or no training row left.
    """
    parts, num_left_out = _split_rows(
        rows, source=source, seed=seed, eval_prompts=eval_prompts, unseen_users=unseen_users, group=prompt_group
    )
    return Split(LabelledData(**parts, source=source), num_left_out)


def _split_rows(
    rows: Sequence[Row],
    *,
    source: str,
    seed: int,
    eval_prompts: float,
    unseen_users: float,
    group: Callable[[Row], Hashable],
) -> tuple[dict[str, Any], int]:
    """Split name -> rows, and the number of rows left out."""
    for name, share in (("eval_prompts", eval_prompts), ("unseen_users", unseen_users)):
        if not 0 <= share < 1:
            raise DataError(f"{name} is {share}, expected a share from 0 to below 1")
    users = list(dict.fromkeys(row.user_id for row in rows))
    groups = list(dict.fromkeys(group(row) for row in rows))
    drawn_users = draw(users, unseen_users, seed=[seed, 0])
    eval_groups = draw(groups, eval_prompts, seed=[seed, 1])
    dev_groups = draw([key for key in groups if key not in eval_groups], DEV_SHARE, seed=[seed, 2])
    train = [
        row
        for row in rows
        if row.user_id not in drawn_users and group(row) not in eval_groups and group(row) not in dev_groups
    ]
    if not train:
        raise DataError(f"{source}: no training row is left of {len(rows)} rows, {len(users)} users and {len(groups)} "
                        f"prompts with eval_prompts {eval_prompts}, unseen_users {unseen_users}; lower them")
    seen = {row.user_id for row in train}
    held_out = [row for row in rows if group(row) in eval_groups]
    dev = [row for row in rows if row.user_id in seen and group(row) in dev_groups]
    parts = {
        "train": train,
        "dev": dev,
        "eval_seen": [row for row in held_out if row.user_id in seen],
        "eval_unseen": [row for row in held_out if row.user_id not in seen],
    }
    return parts, len(rows) - len(train) - len(dev) - len(held_out)


def split_responses(rows: Sequence[ResponseRow], *, seed: int) -> tuple[list[ResponseRow], list[ResponseRow]]:
    """(train, dev) by prompt, 5% of the prompts for dev; running text is divided row by row."""
    keys = [prompt_group(row) if row.prompt else row.response for row in rows]
    dev = draw(list(dict.fromkeys(keys)), DEV_SHARE, seed=[seed, 2])
    paired = list(zip(rows, keys, strict=True))
    return [row for row, key in paired if key not in dev], [row for row, key in paired if key in dev]


def draw(keys: Sequence[K], share: float, *, seed: Sequence[int]) -> set[K]:
    """A share of the keys, rounded; at least one if the share is not 0, and never all of them."""
    if share == 0 or len(keys) < 2:
        return set()
    count = min(len(keys) - 1, max(1, round(share * len(keys))))
    order = np.random.default_rng(list(seed)).permutation(len(keys))
    return {keys[position] for position in order[:count]}


def _opening(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return next((message.content for message in prompt if message.role != "system"), "")
