"""Checkpoints of a run: a crash at any moment leaves the last good one, and each is verified before it is read."""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from prlhf.data.context import facts_record
from prlhf.distributed import (
    DEFAULT_TIMEOUT_S,
    all_reduce_any,
    barrier,
    beat,
    counts_of_ranks,
    is_main,
    rank,
    world_size,
)
from prlhf.engine.faults import reach
from prlhf.engine.optim import RowLazyAdamW
from prlhf.engine.optimizer_state import load_optimizer_, optimizer_tensors
from prlhf.errors import CheckpointError, DataError, NoCheckpointError, PrlhfError, RunDirError
from prlhf.files import (
    MANIFEST,
    find_damage,
    fsync_path,
    link_or_copy,
    publish_directory,
    read_json,
    remove_directories,
    seal_directory,
    write_json_atomic,
    write_text_atomic,
)
from prlhf.models.assemble import (
    CONTEXTS,
    TRAINABLE,
    USER_IDS,
    USER_TEXTS,
    USERS,
    PolicySpec,
    changed_base,
    load_trained_,
    spec_to_dict,
    trained_tensors,
)
from prlhf.models.personalized import PersonalizedModel
from prlhf.models.run_folder import STATE, checkpoint_name
from prlhf.models.tensor_files import StoredTensors, layout_path, make_layout, part_path, read_tensors, row_bounds
from prlhf.models.user_rows import STORE, empty_moments, read_moments, stored_table, table_of_store, write_table
from prlhf.sharding import local_part

logger = logging.getLogger(__name__)

OPTIMIZER = "optimizer.safetensors"
CONFIG = "config.yaml"
DISK_PROBLEMS = (OSError, RunDirError, CheckpointError, DataError)  # of this rank; not the loss of another one
SMALL = 3e8  # bytes that any disk takes before other ranks are tired of waiting
SLOW_DISK = 5e6  # bytes a second, below which a rank that writes counts as one that hangs


@dataclass
class Progress:
    """Where a run stands; with sampler and schedule being functions of the step, this is all there is."""

    step: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    rows_seen: int = 0
    tokens_seen: int = 0
    train_seconds: float = 0.0
    usual_loss: float = 0.0
    num_usual_losses: int = 0
    adapter_scale: float = 1.0  # by which the last step's adapters were scaled


@dataclass(frozen=True)
class RunIdentity:
    """What does not change in a run: the model's shape, the method, the configuration and the training data."""

    spec: PolicySpec
    method: str
    config_text: str
    data_sha256: str


def save_checkpoint(
    run_dir: Path,
    model: PersonalizedModel,
    optimizer: RowLazyAdamW,
    progress: Progress,
    identity: RunIdentity,
    *,
    keep_last: int,
    keep_best: bool = False,
) -> None:
    """Write a checkpoint on all ranks: files, flush, all ranks agree, manifest, rename, then delete older ones.

    Args:
        keep_best: also the one with the best accuracy on dev rows stays, of those evaluated during training.

    Raises: RunDirError: the disk is full or unwritable; the previous checkpoint stays.
    """
    root = run_dir / "checkpoints"
    final, temporary = root / checkpoint_name(progress.step), root / f".tmp-{checkpoint_name(progress.step)}"
    if all_reduce_any(is_main() and final.is_dir()):
        return
    problem: Exception | None = None
    flushed: dict[str, tuple[int, str]] = {}
    needed = max(counts_of_ranks(_num_bytes(model, optimizer)))
    beat(patience_s=needed / SLOW_DISK)
    lora = identity.spec.lora_rank is not None
    tensors = {TRAINABLE: trained_tensors(model, lora=lora), OPTIMIZER: optimizer_tensors(model, optimizer)}
    # Before anything is written: a rank whose disk fails must not leave the others waiting.
    bounds = {name: row_bounds(of_file) for name, of_file in tensors.items()}
    _make_folder(temporary, needed)
    try:
        beat(patience_s=needed / SLOW_DISK)
        reach("checkpoint_file")
        save_file(
            {"torch": torch.get_rng_state(), **_device_rng(model.device)}, temporary / f"rng-{rank()}.safetensors"
        )
        for name, of_file in tensors.items():
            _write_tensors(temporary / name, of_file, bounds[name])
        if is_main():
            flushed = _write_shared_files(temporary, model, optimizer, progress, identity)
    except (*DISK_PROBLEMS, SafetensorError) as error:  # safetensors wraps a full disk in an error of its own
        problem = error
    _raise_together(problem, temporary, needed)
    if is_main():
        beat(patience_s=needed / SLOW_DISK)
        try:
            reach("before_manifest")
            seal_directory(temporary, flushed)
            reach("before_rename")
            publish_directory(temporary, final)
            reach("after_rename")
        except OSError as error:
            problem = error
    _raise_together(problem, temporary, needed)
    optimizer.unsaved_rows, optimizer.saved_in = set(), final
    if is_main():
        best = _best_of(_steps(root), run_dir) if keep_best else None
        remove_directories(path for path in _steps(root)[:-keep_last] if path != best)
    barrier()


def _make_folder(temporary: Path, needed: int) -> None:
    """The main rank makes the folder, anew, and the others wait for it; where it cannot, all ranks stop."""
    problem: Exception | None = None
    try:
        if is_main():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    except OSError as error:
        problem = error
    _raise_together(problem, temporary, needed)


def _write_tensors(path: Path, tensors: dict[str, Tensor], bounds: dict[str, list[int]]) -> None:
    """This rank's rows of sharded tensors, flushed, but of those of which it has none; the main rank's: all the rest.

    Args:
        bounds: `row_bounds` of the tensors.
    """
    if bounds:
        own = {name: local_part(tensors[name]) for name in bounds}
        part = part_path(path, rank(), world_size())
        _save({name: rows for name, rows in own.items() if len(rows)}, part)
        fsync_path(part)
    if is_main():
        _save({name: local_part(tensor) for name, tensor in tensors.items() if name not in bounds}, path)
        if bounds:
            write_json_atomic(layout_path(path), make_layout(bounds, world_size()))


def _write_shared_files(
    directory: Path, model: PersonalizedModel, optimizer: RowLazyAdamW, progress: Progress, identity: RunIdentity
) -> dict[str, tuple[int, str]]:
    """Write all but tensors of the model and moments; returns size and sha256 of what is flushed already, by name."""
    if model.user_encoder is not None:
        shared = dict(model.user_encoder.named_parameters())
        if (stored := stored_table(model.user_encoder)) is not None:
            del shared[stored[0]]
        _save(shared, directory / USERS)
    if model.user_texts:
        write_json_atomic(directory / USER_TEXTS, model.user_texts)
    if model.contexts is not None:
        write_json_atomic(directory / CONTEXTS, facts_record(model.contexts.facts))
    reach("checkpoint_file")
    write_json_atomic(
        directory / STATE,
        {
            **asdict(progress),
            "method": identity.method,
            "policy": spec_to_dict(identity.spec),
            "base_sha256": model.base_sha256,
            "base_config": model.base_config,
            "data_sha256": identity.data_sha256,
        },
    )
    reach("checkpoint_file")
    write_text_atomic(directory / CONFIG, identity.config_text)
    reach("checkpoint_file")
    model.tokenizer.save_pretrained(directory)
    return {**_write_user_ids(directory, model, optimizer), **_write_user_store(directory, model, optimizer)}


def _write_user_ids(
    directory: Path, model: PersonalizedModel, optimizer: RowLazyAdamW
) -> dict[str, tuple[int, str]]:
    """Write the list of users; returns size and sha256 of what is flushed already, by name.

    In a run it stays the same. Beside a store it may be long, so there it is a link to the previous checkpoint's.
    """
    reach("checkpoint_file")
    path = directory / USER_IDS
    previous = None if stored_table(model.user_encoder) is None else optimizer.saved_in
    if previous is not None and (previous / STORE).is_dir():
        link_or_copy(previous / USER_IDS, path)
        entry = read_json(previous / MANIFEST)["files"][USER_IDS]
        return {USER_IDS: (entry["size"], entry["sha256"])} if path.samefile(previous / USER_IDS) else {}
    write_json_atomic(path, {"user_ids": [] if model.users is None else list(model.users.user_ids)})
    return {}


def _write_user_store(
    directory: Path, model: PersonalizedModel, optimizer: RowLazyAdamW
) -> dict[str, tuple[int, str]]:
    """Keep the rows of a large table as a store; returns size and sha256 of what is flushed already, by name."""
    stored = stored_table(model.user_encoder)
    if stored is None or model.users is None:
        return {}
    table, previous = stored[1], optimizer.saved_in
    moments = dict(optimizer.state[table]) or empty_moments(table)
    rows = sorted(optimizer.unsaved_rows)
    if previous is None or not (previous / STORE).is_dir():
        previous, rows = None, moments["step"].nonzero()[:, 0].tolist()
    files = write_table(directory / STORE, previous and previous / STORE, table, moments, model.users, rows)
    return {f"{STORE}/{name}": entry for name, entry in files.items()}


def load_checkpoint_(
    directory: Path, model: PersonalizedModel, optimizer: RowLazyAdamW, *, spec: PolicySpec, data_sha256: str
) -> Progress:
    """Put a verified checkpoint's weights, optimizer state and random state back.

    Raises: CheckpointError: another base model, other data, other users, or tensors that do not fit.
    """
    check_same_run(directory, model, data_sha256=data_sha256)
    state = read_json(directory / STATE)
    if state["data_sha256"] is None:
        logger.warning("%s: a user was forgotten, so the training data is not compared with the run's", directory)
    load_trained_(model, directory, lora=spec.lora_rank is not None)
    load_optimizer_(model, optimizer, StoredTensors(directory / OPTIMIZER))
    stored = table_of_store(directory, model.user_encoder)
    if stored is not None and model.users is not None:
        optimizer.state[stored[1]].update(read_moments(directory / STORE, stored[1], model.users))
        optimizer.unsaved_rows, optimizer.saved_in = set(), directory
    rng = directory / f"rng-{rank()}.safetensors"
    if rng.is_file():
        states = read_tensors(rng)
        torch.set_rng_state(states["torch"])
        if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"])
        if "mps" in states:
            torch.mps.set_rng_state(states["mps"])
    else:
        logger.warning(
            "%s: no random state for rank %d (other world size); dropout masks will differ", directory, rank()
        )
    return Progress(**{name: state[name] for name in asdict(Progress()) if name in state})


def check_same_run(directory: Path, model: PersonalizedModel, *, data_sha256: str) -> None:
    """Compare what a checkpoint was trained on with what a run has now.

    Raises: CheckpointError: another base model, other data, or other users.
    """
    state = read_json(directory / STATE)
    users = [] if model.users is None else model.users.user_ids
    wrong = []
    changed = changed_base(model, state)
    if changed:
        wrong.append(
            f"{directory}: the base model changed since ({changed}); restore it or start a run of another name"
        )
    if state["data_sha256"] not in (None, data_sha256):
        wrong.append(f"{directory}: the training data changed since; restore it or start a run of another name")
    if users != read_json(directory / USER_IDS)["user_ids"]:
        wrong.append(f"{directory}: the users changed since; restore the data or start a run of another name")
    if wrong:
        raise CheckpointError(*wrong)


def find_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run directory that verifies, or the directory itself if it is a checkpoint.

    Returns: None when there is none at all.
    Raises: NoCheckpointError: there are checkpoints and every one is damaged.
    """
    candidates = [run_dir] if (run_dir / STATE).is_file() else _steps(run_dir / "checkpoints")[::-1]
    for directory in candidates:
        damage = find_damage(directory)
        if not damage:
            return directory
        for line in damage:
            logger.warning("checkpoint not used: %s", line)
    if candidates:
        raise NoCheckpointError(
            f"{run_dir}: none of {len(candidates)} checkpoint(s) verifies; start a run of another name"
        )
    return None


def best_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint that verifies with the best accuracy on dev rows, the earliest of equal ones; None without any."""
    return _best_of([path for path in _steps(run_dir / "checkpoints") if not find_damage(path)], run_dir)


def step_of(directory: Path) -> int:
    """The step after which a checkpoint was written."""
    return read_json(directory / STATE)["step"]


def remove_stale_temporaries(run_dir: Path) -> None:
    """Delete what an interrupted checkpoint write left behind."""
    remove_directories((run_dir / "checkpoints").glob(".tmp-*"))


def remove_later_checkpoints(run_dir: Path, step: int) -> None:
    """Delete checkpoints after `step`, aloud: damaged, or of a course that is left; the run writes their steps anew."""
    later = [path for path in _steps(run_dir / "checkpoints") if path.name > checkpoint_name(step)]
    for directory in later:
        logger.warning("%s: removed, since training goes on from step %d", directory, step)
    remove_directories(later)


def _steps(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("step-[0-9]*") if path.is_dir())


def _save(tensors: dict[str, Any], path: Path) -> None:
    reach("checkpoint_file")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _device_rng(device: torch.device) -> dict[str, Tensor]:
    if device.type == "cuda":
        return {"cuda": torch.cuda.get_rng_state(device)}
    return {"mps": torch.mps.get_rng_state()} if device.type == "mps" else {}


def _best_of(directories: list[Path], run_dir: Path) -> Path | None:
    """The checkpoint with the best accuracy on dev rows, the earliest of equal ones; None where none was evaluated."""
    accuracies = {}
    for directory in directories:
        evaluation = run_dir / "eval" / f"{directory.name}.json"
        if evaluation.is_file() and (seen := read_json(evaluation)["accuracy"]["seen"]):
            accuracies[directory] = seen["mean"]
    return max(accuracies, key=accuracies.__getitem__, default=None)


def _raise_together(problem: Exception | None, temporary: Path, needed: int) -> None:
    """A rank that cannot write its part stops all of them, and leaves nothing half-written.

    The others wait for the main rank as long as a slow disk needs for it, which may be longer than a collective takes.
    """
    if needed > SMALL:
        barrier(timeout_s=DEFAULT_TIMEOUT_S + needed / SLOW_DISK)
    if all_reduce_any(problem is not None):
        if is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        raise problem if isinstance(problem, PrlhfError) else _disk_error(temporary, problem, needed)


def _num_bytes(model: PersonalizedModel, optimizer: RowLazyAdamW) -> int:
    """About what a checkpoint takes; what is beside the tensors is small."""
    tensors = [*model.trainable().values(), *optimizer_tensors(model, optimizer).values()]
    return sum(tensor.nbytes for tensor in tensors) + 2**20


def _disk_error(path: Path, error: Exception | None, needed: int) -> RunDirError:
    if error is None:
        return RunDirError(f"{path}: another rank could not write its part; see its log")
    free = shutil.disk_usage(path.parent if path.parent.exists() else Path.cwd()).free
    return RunDirError(
        f"{path}: {getattr(error, 'strerror', None) or error}; {free / 2**20:.0f} MiB free, about "
        f"{needed / 2**20:.0f} MiB needed; make room and start again, the previous checkpoint is kept"
    )
