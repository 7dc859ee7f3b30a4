"""A checkpoint directory with users added: nothing that was there before changes by a bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from prlhf.adapt.checkpoint_rows import RECEIPT
from prlhf.data.context import UserFacts, facts_record
from prlhf.data.quoting import is_utf8, quote
from prlhf.data.user_index import RESERVED_IDS, UserIndex
from prlhf.engine.tombstones import TOMBSTONES, find_forgotten, refuse_forgotten
from prlhf.errors import DataError
from prlhf.evaluation.run_files import FIGURES, figures_with_users
from prlhf.files import (
    MANIFEST,
    check_can_appear,
    link_or_copy,
    publish_directory,
    read_json,
    seal_directory,
    write_json_atomic,
    writing_directory,
    writing_tensors,
)
from prlhf.models.assemble import CONTEXTS, USER_IDS, USER_TEXTS, USERS
from prlhf.models.personalized import PersonalizedModel
from prlhf.models.tensor_files import read_tensors
from prlhf.models.user_rows import STORE, write_rows
from prlhf.usermodel.store import UserStore

NOT_TAKEN = ("optimizer.", "rng-")  # of a training run, which new users are no part of


def check_new(checkpoint: Path, user_ids: Sequence[str], out: Path) -> None:
    """Refuse, before any work, users whom the checkpoint knows, or who were forgotten by it, its store or its run, ids
    that are none, and a directory that is there or cannot be.

    Raises: DataError: each of them. RunDirError: no directory can be there, or a forgetting was cut short.
    """
    check_can_appear(out)
    buried = _with_tombstones(checkpoint)
    refuse_forgotten(buried, ())
    known = set(read_json(checkpoint / USER_IDS)["user_ids"])
    wrong = [f"user {quote(user)}: the checkpoint knows them already; choose another id"
             for user in user_ids if user in known]
    wrong += [f"user {quote(user)}: is empty, or no text that UTF-8 can write; choose another id"
              for user in user_ids if not user or not is_utf8(user)]
    forgotten = find_forgotten(buried, user_ids)
    if (checkpoint / STORE).is_dir():
        with UserStore.open(checkpoint / STORE) as store:
            forgotten |= {user for user in user_ids if is_utf8(user) and store.is_forgotten(user)}
    wrong += [f"user {quote(user)}: was forgotten, and the checkpoint takes the id no more; choose another id"
              for user in user_ids if user in forgotten]
    wrong += [f"user {quote(word)}: {meaning}; choose another id"
              for word, meaning in RESERVED_IDS.items() if word in user_ids]
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        wrong.append(f"{out}: exists; --out names a new directory")
    if wrong:
        raise DataError(*wrong)


def _with_tombstones(checkpoint: Path) -> list[Path]:
    """The checkpoint, and the run that it lies in, where they have tombstones."""
    checkpoint = checkpoint.resolve()
    homes = [checkpoint, *([checkpoint.parents[1]] if checkpoint.parent.name == "checkpoints" else [])]
    return [home for home in homes if (home / TOMBSTONES).is_file()]


def write_with_users(
    checkpoint: Path,
    out: Path,
    model: PersonalizedModel,
    states: Mapping[str, Tensor],
    facts: Mapping[str, UserFacts],
    texts: Mapping[str, str] | None = None,
    figures: Sequence[dict[str, Any]] = (),
) -> None:
    """Write a self-sufficient checkpoint directory, whole or not at all; unchanged files are hard-linked where it goes.

    Args:
        checkpoint: the directory the model was loaded from.
        states: user id -> row of the user model's table; the new rows follow the known ones in this order, or come
            into the store of a large table.
        facts: of an encoder's new users, who have no rows.
        texts: new user id -> what stands in front of the user's prompts.
        figures: what is known of how well new users are served; see `kept_figures`.
    """
    assert model.users is not None
    out = out.resolve()
    with writing_directory(out) as temporary:
        table = STORE if (checkpoint / STORE).is_dir() else USERS
        changed = {MANIFEST, USER_IDS, FIGURES}
        changed.update(name for name, new in ((table, states), (CONTEXTS, facts), (USER_TEXTS, texts)) if new)
        for path in sorted(checkpoint.iterdir()):
            if path.name not in changed and not path.name.startswith((".", *NOT_TAKEN)):
                link_or_copy(path, temporary / path.name)
        _bring_tombstones(checkpoint, temporary)
        write_json_atomic(temporary / USER_IDS, {"user_ids": [*model.users.user_ids, *(states or facts)]})
        write_json_atomic(temporary / FIGURES, figures_with_users(checkpoint, figures))
        if facts:
            assert model.contexts is not None
            write_json_atomic(temporary / CONTEXTS, facts_record({**model.contexts.facts, **facts}))
        if texts:
            write_json_atomic(temporary / USER_TEXTS, {**model.user_texts, **texts})
        shards = _write_states(checkpoint, temporary, model, states) if states else {}
        seal_directory(temporary, shards)
        if out.is_dir():
            out.rmdir()  # empty: `check_new` refuses others
        publish_directory(temporary, out)


def _bring_tombstones(checkpoint: Path, directory: Path) -> None:
    """A run's tombstones and receipts: who was forgotten there is so in what comes from it."""
    if (directory / TOMBSTONES).exists():
        return
    for home in _with_tombstones(checkpoint):
        for path in (home / TOMBSTONES, *home.glob(RECEIPT.format(tag="*"))):
            link_or_copy(path, directory / path.name)


def _write_states(
    checkpoint: Path, directory: Path, model: PersonalizedModel, states: Mapping[str, Tensor]
) -> dict[str, tuple[int, str]]:
    """Write the table with the new users' rows; returns size and sha256 of a store's full shards by name."""
    rows = torch.stack(list(states.values()))
    if not (checkpoint / STORE).is_dir():
        tensors = read_tensors(checkpoint / USERS)
        name = _table_name(model)
        tensors[name] = torch.cat([tensors[name], rows.to(tensors[name].dtype)])
        with writing_tensors(directory / USERS):
            save_file(tensors, directory / USERS)
        return {}
    assert model.user_encoder is not None
    rows = rows.to(model.user_encoder.table.dtype)
    users = UserIndex(list(states))
    files = write_rows(directory / STORE, checkpoint / STORE, rows, {}, users, range(len(users)))
    return {f"{STORE}/{name}": entry for name, entry in files.items()}


def _table_name(model: PersonalizedModel) -> str:
    assert model.user_encoder is not None
    table = model.user_encoder.table
    return next(name for name, parameter in model.user_encoder.named_parameters() if parameter is table)
