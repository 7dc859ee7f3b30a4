"""The training run: from a configuration to a finished, evaluated run directory."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

from prlhf.config import Config, changed_keys, dump_config, load_config
from prlhf.data.collate import collate_labelled, collate_pairs, collate_responses
from prlhf.data.context import Context
from prlhf.data.sampler import cut_rows, shard
from prlhf.data.tokenize import TokenizedLabelled, TokenizedPair
from prlhf.distributed import all_reduce_any, announce_stop, beat, counts_of_ranks, is_main, rank, world_size
from prlhf.engine.build import Job, build_job
from prlhf.engine.checkpoint import (
    CONFIG,
    Progress,
    RunIdentity,
    check_same_run,
    find_checkpoint,
    load_checkpoint_,
    remove_later_checkpoints,
    remove_stale_temporaries,
    save_checkpoint,
    step_of,
)
from prlhf.engine.faults import reach
from prlhf.engine.final import evaluate_run, evaluate_step
from prlhf.engine.fsdp import whole_weights
from prlhf.engine.metrics import StepMetrics
from prlhf.engine.optim import set_learning_rate_, warmup_cosine
from prlhf.engine.reference import LiveReference, ReferenceCache, compute_reference_table, no_reference
from prlhf.engine.run_dir import RunDir
from prlhf.engine.selection import check_selection, select_weights_
from prlhf.engine.spikes import loss_limit, take_up_loss_
from prlhf.engine.step import Batch, StepResult, train_step_
from prlhf.engine.tombstones import refuse_forgotten
from prlhf.errors import Preempted, PrlhfError, RankError, RunDirError
from prlhf.evaluation.report import load_final
from prlhf.files import read_json
from prlhf.models.lora import scale_adapters_
from prlhf.models.run_folder import STATE
from prlhf.sharding import is_sharded

logger = logging.getLogger(__name__)

MAY_CHANGE_ON_RESUME = (
    "eval",
    "checkpoint",
    "train.microbatch_tokens",
    "train.packing",
    "train.separate_terms",
    "train.compile",
    "train.parallel",
    "train.log_every",
    "train.num_threads",
    "train.epochs",
    "train.max_steps",
    "train.max_skipped_steps",
    "name",
)
SCHEDULE_KEYS = ("train.epochs", "train.max_steps")
REFERENCE_CACHE = ".reference"  # beside the run directories


def train(config: Config, run_dir: Path, *, resume: str = "auto") -> dict[str, Any]:
    """Train, checkpoint, evaluate; the same on every rank.

    Args:
        resume: "auto" goes on from the newest valid checkpoint of the run directory, "never" refuses a directory that
            holds any, anything else is the run or checkpoint directory to start from.
    Returns: the final evaluation (`eval/final.json`), on the main rank.
    Raises: PrlhfError: one line for each mistake. Preempted: a signal came; everything was saved.
    """
    began = time.perf_counter()
    again = "the same command" if resume in ("auto", "never") else "the same command without --resume"
    with RunDir(run_dir, writes=is_main()) as lock, StopFlag(again) as stop:
        checkpoint = _starting_checkpoint(config, run_dir, resume)
        if checkpoint is not None and lock.is_finished(step_of(checkpoint)) and _is_unchanged(config, run_dir):
            logger.info("%s is finished; nothing to do (its data was not read); to train anew choose another name=",
                        run_dir)
            return load_final(run_dir)
        job = build_job(config)
        check_selection(job)
        if checkpoint is not None:
            _check_max_steps(config, read_json(checkpoint / STATE), job.max_steps)
        if job.preferences is not None:
            refuse_forgotten([run_dir, *([] if checkpoint is None else [checkpoint])], job.preferences.all_user_ids())
        if checkpoint is not None:
            check_same_run(checkpoint, job.model, data_sha256=job.data_sha256)  # before the reference takes its time
        reference_of = _make_reference(job, run_dir.parent / REFERENCE_CACHE, stop)
        progress = Progress()
        beat(patience_s=math.inf)  # a checkpoint takes as long as the disk does
        if checkpoint is not None:
            progress = load_checkpoint_(
                checkpoint, job.model, job.optimizer, spec=job.spec, data_sha256=job.data_sha256
            )
            progress.tokens_seen *= is_main()  # those of all ranks so far; each counts its own from here on
            logger.info("resumed from %s at step %d", checkpoint, progress.step)
        if progress.step < job.max_steps and progress.adapter_scale != 1:
            scale_adapters_(job.model.backbone, 1 / progress.adapter_scale)  # it is no longer the last step
            progress.adapter_scale = 1.0
        lock.start(dump_config(config), step=progress.step)
        if progress.step < job.max_steps:
            lock.reopen()
        if is_main():
            remove_stale_temporaries(run_dir)
            remove_later_checkpoints(run_dir, progress.step)
        setup_s = time.perf_counter() - began
        _loop(job, progress, lock, reference_of, stop)
        lock.set_status("evaluating", step=progress.step)
        beat(patience_s=math.inf)  # a full fine-tune loads the starting weights again
        on_batch = stop.check_at("eval", progress.step)
        step = select_weights_(job, progress, run_dir, on_batch=on_batch)
        with whole_weights(job.model):
            final = evaluate_run(job, progress, run_dir, step=step, setup_s=setup_s, on_batch=on_batch)
        lock.set_status("finished", step=progress.step)
        return final


def _loop(job: Job, progress: Progress, run_dir: RunDir, reference_of: Callable[[Batch], Any], stop: StopFlag) -> None:
    """Optimizer steps until the last one; every rank runs the same ones."""
    config = job.config
    names, counts = job.objective.figure_names(), job.objective.figure_counts()
    metrics = StepMetrics(run_dir, names, counts=counts, log_every=config.train.log_every)
    if _evaluates(job, progress.step) and all_reduce_any(is_main() and not run_dir.is_evaluated(progress.step)):
        _evaluate(job, progress, run_dir, stop)  # the run was stopped before it had been
    bar = tqdm(total=job.max_steps, initial=progress.step, disable=None if is_main() else True, desc=config.name)
    while progress.step < job.max_steps:
        began = time.perf_counter()
        beat()
        reach("step_begin", step=progress.step + 1)
        factor = warmup_cosine(progress.step, warmup_steps=config.train.warmup_steps, max_steps=job.max_steps)
        set_learning_rate_(job.optimizer, factor)
        batches, num_global_rows = batches_of_step(job, progress.step)
        result = train_step_(
            job.model,
            job.optimizer,
            job.objective,
            batches,
            reference_of=reference_of,
            num_global_rows=num_global_rows,
            max_grad_norm=config.train.max_grad_norm,
            autocast=job.autocast,
            max_loss=loss_limit(progress, config.train.skip_loss_above),
        )
        _count_(progress, result, num_global_rows, time.perf_counter() - began, config.train.max_skipped_steps)
        metrics.add(progress, result, lr=job.optimizer.param_groups[0]["lr"])
        bar.update()
        last, stopping = progress.step == job.max_steps, all_reduce_any(stop.is_set)
        if last and config.model.lora is not None:
            progress.adapter_scale = config.model.lora.final_scale
            scale_adapters_(job.model.backbone, progress.adapter_scale)
        evaluating = _evaluates(job, progress.step)
        # What is evaluated is saved before, so that neither is lost when the other is interrupted.
        saving = last or stopping or evaluating or _is_due(progress.step, config.checkpoint.every_steps)
        if saving or metrics.is_due(progress.step):
            bar.set_postfix(metrics.flush(progress.step, job.max_steps, to_terminal=not bar.disable))
        if saving:
            save_job(job, progress, run_dir.path)
        if stopping:
            raise Preempted(f"stopped by a signal at step {progress.step}; saved, {stop.again} goes on from there")
        if evaluating:
            _evaluate(job, progress, run_dir, stop)
    bar.close()


def save_job(job: Job, progress: Progress, run_dir: Path) -> None:
    """Write the checkpoint of the current step, on all ranks.

    Raises: PrlhfError: there is nothing worth keeping.
    """
    broken = [name for name, tensor in job.model.trainable().items() if not job.optimizer.is_finite(tensor)]
    if all_reduce_any(bool(broken)):
        raise PrlhfError(
            f"train: {', '.join(broken[:3]) or 'weights'} not finite after step {progress.step}; lower train.lr or "
            "train.user_lr; what was saved before is kept"
        )
    save_checkpoint(
        run_dir,
        job.model,
        job.optimizer,
        replace(progress, tokens_seen=sum(counts_of_ranks(progress.tokens_seen))),
        RunIdentity(job.spec, job.config.method, dump_config(job.config), job.data_sha256),
        keep_last=job.config.checkpoint.keep_last,
        keep_best=job.config.checkpoint.keep_best,
    )


def _evaluates(job: Job, step: int) -> bool:
    """Whether a step is followed by an evaluation on dev rows; the last one has the final evaluation."""
    has_dev = job.preferences is not None and len(job.preferences.dev) > 0
    return has_dev and 0 < step < job.max_steps and _is_due(step, job.config.eval.every_steps)


def _evaluate(job: Job, progress: Progress, run_dir: RunDir, stop: StopFlag) -> None:
    with whole_weights(job.model):
        evaluate_step(job, progress, run_dir.path, on_batch=stop.check_at("eval", progress.step))


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def batches_of_step(job: Job, step: int) -> tuple[list[Batch], int]:
    """This rank's micro-batches of a global step, and the global number of rows."""
    config = job.config
    indices = job.sampler.rows_of_step(step)
    cuts = _cut(job, shard(indices, rank(), world_size()))
    num_own = len(cuts)
    if config.train.parallel == "fsdp":  # ranks gather weights together, so all make as many passes
        most = max(len(_cut(job, shard(indices, other, world_size()))) for other in range(world_size()))
        cuts += (most - num_own) * [indices[:1]]
    collate: Any = collate_labelled if job.objective.is_unpaired else collate_pairs
    if config.method == "sft":
        collate = collate_responses
    batches = [collate([job.rows[i] for i in cut], job.pad_id, contexts_of(job, cut, step)) for cut in cuts]
    batches = [batch if i < num_own else replace(batch, is_idle=True) for i, batch in enumerate(batches)]
    return [batch.to(job.model.device) for batch in batches], len(indices)


def contexts_of(job: Job, indices: Sequence[int], step: int) -> list[Context] | None:
    """What an encoder reads beside training rows at a step, a function of (seed, step, row); None without one."""
    if job.contexts is None:
        return None
    places = [job.rows[i].row for i in indices]
    return [
        job.contexts.of_row(job.judged[place], (job.config.seed, step, place), training=True) for place in places
    ]


def _cut(job: Job, indices: list[int]) -> list[list[int]]:
    """Micro-batches of a step's rows: by their tokens where rows are packed, by their padded size elsewhere."""
    rows, num_soft = job.rows, job.model.soft_prompt.num_user_tokens
    num_terms = len(job.objective.passes()[0].terms)
    copies = 1 if job.config.method == "sft" else 2
    return cut_rows(
        indices,
        packs=lambda i: job.model.packs(rows[i].num_tokens),
        num_packed=lambda i: num_terms * (rows[i].num_packed_tokens + num_soft),
        num_padded=lambda i: copies * (rows[i].num_tokens + num_soft),
        microbatch_tokens=job.config.train.microbatch_tokens,
        group_of=lambda i: rows[i].prompt_ids,  # the generic user's tree is computed once in a micro-batch
    )


def _count_(progress: Progress, result: StepResult, num_rows: int, seconds: float, max_skipped: int) -> None:
    progress.step += 1
    progress.rows_seen += num_rows
    progress.tokens_seen += result.num_tokens
    progress.train_seconds += seconds
    progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if result.skipped else 0
    if result.skipped:
        progress.skipped_steps += 1
        is_finite = result.mean_loss is not None and math.isfinite(result.mean_loss)
        reason = f"loss {result.mean_loss:.4g} is far above the usual" if is_finite else "loss or gradient not finite"
        logger.warning("step %d: %s; skipped on all ranks", progress.step, reason)
    elif result.mean_loss is not None:
        take_up_loss_(progress, result.mean_loss)
    if progress.skipped_in_a_row >= max_skipped:
        raise PrlhfError(
            f"train: {max_skipped} steps in a row without a finite loss and gradient, or above train.skip_loss_above, "
            f"up to step {progress.step}; lower train.lr or train.user_lr, or look at the data"
        )


def _make_reference(job: Job, cache: Path, stop: StopFlag) -> Callable[[Batch], Any]:
    """Reference log-probs of the rows that the run trains on, looked for in a cache that runs share."""
    if job.reference is None:
        return no_reference
    if job.config.model.reference == "live":
        return LiveReference(job.reference)
    needed = job.sampler.rows_of_first_steps(job.max_steps)
    microbatch_tokens = job.config.train.microbatch_tokens
    precision: str = job.config.train.precision
    # Gathered weights are bf16, where those of ddp are fp32 under autocast; in fp32 they are the same.
    if precision == "bf16" and any(map(is_sharded, job.model.parameters())):
        precision += " fsdp"
    identity = {
        "weights": job.model.base_sha256,
        "architecture": job.model.base_config,
        "dtype": job.config.model.dtype,
        "precision": precision,
        "packed": job.model.packing is not None,
        "microbatch_tokens": microbatch_tokens,
        "device": job.model.device.type,
        "torch": torch.__version__,
    }
    with whole_weights(job.model):
        return compute_reference_table(
            job.reference,
            cast(Sequence[TokenizedPair | TokenizedLabelled], [row for i, row in enumerate(job.rows) if i in needed]),
            pad_id=job.pad_id,
            microbatch_tokens=microbatch_tokens,
            autocast=job.autocast,
            cache=ReferenceCache(cache, identity),
            on_batch=stop.check_at("reference", 0),
        )


def _starting_checkpoint(config: Config, run_dir: Path, resume: str) -> Path | None:
    """The checkpoint to go on from; refuses one that belongs to another configuration."""
    source = run_dir if resume in ("auto", "never") else Path(resume)
    found = find_checkpoint(source)
    if found is None and resume not in ("auto", "never"):
        raise RunDirError(f"--resume {resume}: holds no checkpoint; give a run or checkpoint directory")
    if found is None:
        return None
    if resume == "never":
        raise RunDirError(f"{run_dir}: holds a checkpoint and --resume is never; choose another name= or resume")
    if run_dir.resolve() not in (found.resolve(), *found.resolve().parents) and find_checkpoint(run_dir) is not None:
        raise RunDirError(f"--resume {resume}: {run_dir} holds checkpoints of its own; leave --resume out to go on "
                          "from them, or choose another name=")
    changed = changed_keys(load_config(found / CONFIG), config)
    refused = [key for key in changed if not any(key == k or key.startswith(k + ".") for k in MAY_CHANGE_ON_RESUME)]
    if refused:
        raise RunDirError(
            *(f"{key}: differs from the run in {source}; set it back, or choose another name=" for key in refused)
        )
    for key in set(changed) & set(SCHEDULE_KEYS):
        logger.warning("%s changed on resume: the learning-rate schedule changes with it", key)
    return found


def _is_unchanged(config: Config, run_dir: Path) -> bool:
    return not set(changed_keys(load_config(run_dir / CONFIG), config)) - {"name"}


def _check_max_steps(config: Config, state: dict[str, Any], max_steps: int) -> None:
    """Refuse a last step that is past, or that was saved as one among others where the last one scales the adapters.

    Args:
        state: of the checkpoint that the run goes on from.
    Raises: RunDirError: `train.max_steps` was lowered so far.
    """
    scale = 1.0 if config.model.lora is None else config.model.lora.final_scale
    step = state["step"]
    if step > max_steps:
        raise RunDirError(f"train.max_steps: the run is to have {max_steps} steps and is at step {step}; set it to "
                          f"{step} or more, or choose another name=")
    if step == max_steps and state.get("adapter_scale", 1.0) != scale:
        raise RunDirError(
            f"train.max_steps: the run is at step {step}, whose adapters were not multiplied by "
            f"model.lora.final_scale {scale}, as those of a last step are; set it above {step}"
        )


class StopFlag:
    """Set by SIGTERM or SIGINT inside the context; looked at between steps and batches.

    Args:
        again: the command that goes on from what was saved.
    """

    def __init__(self, again: str = "the same command") -> None:
        self.again = again
        self.is_set = False

    def __enter__(self) -> StopFlag:
        self._before = {number: signal.signal(number, self._set) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.is_set and isinstance(error, RankError):  # the others got the signal, too, and looked at it first
            raise Preempted("stopped by a signal; the same command goes on from the last checkpoint") from None

    def _set(self, number: int, frame: object) -> None:
        self.is_set = True

    def check(self) -> None:
        """Between the batches of phases that keep no state of their own and are taken again on resume.

        Raises: Preempted: once a signal has come.
        """
        if self.is_set:
            announce_stop()
            raise Preempted("stopped by a signal; the same command goes on from the last checkpoint")

    def check_at(self, point: str, step: int) -> Callable[[], None]:
        """What to call between the batches of a phase that has a name among the faults."""

        def between_batches() -> None:
            beat()
            reach(point, step=step)
            self.check()

        return between_batches
