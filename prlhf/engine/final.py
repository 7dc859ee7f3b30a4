"""Evaluation of a job: the figures of `eval/final.json`, the samples, and the shorter ones during training."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prlhf.config import Config
from prlhf.config_checks import REFERENCE_FREE_KINDS
from prlhf.data.check import count_overlap, length_only_accuracy, majority_share
from prlhf.data.context import UserContexts
from prlhf.data.load import BUILTIN_TEXT
from prlhf.data.records import PreferenceData, PreferenceRow, Prompt, ResponseRow
from prlhf.data.tokenize import TokenizedPair, TokenizedResponse, tokenize_pairs, tokenize_responses
from prlhf.data.user_index import GENERIC, UserIndex
from prlhf.distributed import barrier, counts_of_ranks, is_main
from prlhf.engine.build import Autocast, Job, evaluation_contexts, restore_reference_, tokenize_limits
from prlhf.engine.checkpoint import Progress
from prlhf.engine.memory import peak_device_bytes, peak_memory_bytes
from prlhf.engine.step import Model
from prlhf.evaluation.accuracy import (
    PairMargins,
    draw_rows,
    has_length_gap,
    score_pairs,
    summarize_accuracy,
    user_accuracies,
)
from prlhf.evaluation.baselines import few_shot_baseline, format_only_accuracy, prompted_baseline
from prlhf.evaluation.judges import Judge, judge_of
from prlhf.evaluation.leaks import expected_when_shuffled, shuffled_users
from prlhf.evaluation.samples import Sample, judge_generations, sample_answers, score_under_reference, words_per_user
from prlhf.evaluation.scoring import TokenSequence, score_sequences
from prlhf.evaluation.tax import personalization_tax
from prlhf.files import write_json_atomic, write_text_atomic
from prlhf.generation import SamplingOptions
from prlhf.models.backbone import position_limit
from prlhf.models.policy import PersonalizedPolicy
from prlhf.models.run_folder import FINAL, checkpoint_name

logger = logging.getLogger(__name__)

OnBatch = Callable[[], None]
FEW_SHOT_TOKENS = 512  # a prompt with labelled pairs may be longer than the training rows, where positions allow
GENERATION_TIMEOUT_S = 24 * 3600.0  # the main rank answers alone, the others wait


class Evaluator:
    """Evaluates one policy or reward model under one configuration.

    Args:
        on_batch: called between batches; may raise to stop.
        with_reference: False leaves the reference's figures out, for a policy that has none now.
        contexts: of the rows to evaluate, for an encoder; see `evaluation_contexts`.
    """

    def __init__(
        self,
        config: Config,
        model: Model,
        *,
        pad_id: int,
        autocast: Autocast,
        on_batch: OnBatch,
        with_reference: bool = True,
        contexts: UserContexts | None = None,
    ) -> None:
        self.config = config
        self.model = model
        self.pairs: dict[str, Any] = {
            "reference_free": config.loss.kind in REFERENCE_FREE_KINDS,
            "with_reference": with_reference,
        }
        self.autocast = autocast
        self.contexts = contexts
        self.scoring: dict[str, Any] = {
            "pad_id": pad_id,
            "microbatch_tokens": config.train.microbatch_tokens,
            "on_batch": on_batch,
        }

    def usable(self, data: PreferenceData) -> tuple[PreferenceData, dict[str, dict[str, int]]]:
        """The data with the evaluation rows that can be scored, and of the others split -> reason -> number."""
        kept: dict[str, Any] = {}
        dropped: dict[str, dict[str, int]] = {}
        for name in ("eval_seen", "eval_unseen"):
            rows = getattr(data, name)
            tokenized = tokenize_pairs(rows, self.model.tokenizer, None, **tokenize_limits(self.config, self.model))
            kept[name] = [rows[row.row] for row in tokenized.rows]
            if tokenized.dropped:
                dropped[name] = tokenized.dropped
                logger.warning("%s: %d of %d rows cannot be scored and are left out: %s", name,
                               len(rows) - len(kept[name]), len(rows), tokenized.dropped)
        return dataclasses.replace(data, **kept), dropped

    def accuracy(self, seen: Sequence[PreferenceRow], unseen: Sequence[PreferenceRow]) -> dict[str, Any]:
        """Accuracy blocks, per-user figures and slices."""
        seen_margins, unseen_margins = self._margins(seen), self._margins(unseen, known_users=False)
        blocks = self._blocks(seen_margins, unseen_margins)
        apart = [
            margins.part([i for i, row in enumerate(margins.rows) if has_length_gap(row)])
            for margins in (seen_margins, unseen_margins)
        ]
        slices = {"length_gap_20": self._slice(*apart)} if any(margins.rows for margins in apart) else {}
        return {**blocks, "margin": self._margin_name(), "slices": slices}

    def _margin_name(self) -> str:
        """What a row's margin is the difference of."""
        if not isinstance(self.model, PersonalizedPolicy):
            return "score"
        return "mean_logp" if self.pairs["reference_free"] else "log_ratio"

    def _blocks(self, seen: PairMargins, unseen: PairMargins) -> dict[str, Any]:
        seed = self.config.seed
        individual, generic = user_accuracies(seen.individual, seen.rows), user_accuracies(seen.generic, seen.rows)
        counts = Counter(row.user_id for row in seen.rows)
        # An encoder reads users it never saw; a table has nothing for them but the generic one.
        unseen_own = unseen.generic if self.contexts is None else unseen.individual
        return {
            "accuracy": {
                "seen": summarize_accuracy(seen.individual, seen.rows, seed=seed),
                "unseen": summarize_accuracy(unseen_own, unseen.rows, seed=seed),
                "unseen_generic": summarize_accuracy(unseen.generic, unseen.rows, seed=seed),
                "generic": summarize_accuracy(seen.generic, seen.rows, seed=seed),
                "reference_logps": None
                if seen.reference is None
                else summarize_accuracy(seen.reference, seen.rows, seed=seed),
            },
            "per_user": {
                user: {"accuracy": individual[user], "generic_accuracy": generic[user], "num_rows": counts[user]}
                for user in individual
            },
            "per_unseen_user": user_accuracies(unseen_own, unseen.rows),
            "majority": {"seen": majority_share(seen.rows), "unseen": majority_share(unseen.rows)},
        }

    def _slice(self, seen: PairMargins, unseen: PairMargins) -> dict[str, Any]:
        blocks = self._blocks(seen, unseen)
        return {**blocks.pop("accuracy"), **blocks}

    def _margins(self, rows: Sequence[PreferenceRow], *, known_users: bool = True) -> PairMargins:
        users = self.model.users if known_users and self.model.user_encoder is not None else None
        tokenized = self._tokenize_pairs(rows, users)
        contexts = None
        if self.contexts is not None:
            places = [row.row for row in tokenized]
            contexts = [self.contexts.of_row(rows[place], (self.config.seed, place)) for place in places]
        with self.autocast():
            return score_pairs(self.model, rows, tokenized, contexts, **self.pairs, **self.scoring)

    def baselines(self, data: PreferenceData) -> dict[str, Any]:
        """What needs no training: rules on form, and for a policy its reference told what the user likes."""
        parts = (("seen", data.eval_seen), ("unseen", data.eval_unseen))
        blocks: dict[str, Any] = {
            "length_only": {name: length_only_accuracy(data.train, rows) for name, rows in parts},
            "format_only": {name: format_only_accuracy(data.train, rows) for name, rows in parts},
        }
        if not isinstance(self.model, PersonalizedPolicy):
            return blocks
        max_tokens, with_user_text = self.config.data.max_tokens, self.config.data.user_text == "prompt"
        rows = [row if with_user_text else dataclasses.replace(row, user_text="") for row in data.eval_seen]
        tokenized = self._tokenize_pairs(rows, None, num_user_tokens=0)
        positions = position_limit(self.model.backbone) or FEW_SHOT_TOKENS
        longest = max(max_tokens, min(FEW_SHOT_TOKENS, positions))
        options = {"max_tokens": longest, "seed": self.config.seed, **self.scoring}
        num_pairs = self.config.eval.few_shot
        with self.autocast():
            blocks["prompted"] = prompted_baseline(self.model, rows, tokenized, data.preferences, **options)
            blocks["few_shot"] = few_shot_baseline(
                self.model, rows, tokenized, data.train, num_pairs=num_pairs, **options
            )
        return blocks

    def leaks(self, data: PreferenceData) -> dict[str, Any]:
        """What evaluation shares with training, and accuracy with the users drawn anew, for a model with users."""
        parts = {"eval_seen": data.eval_seen, "eval_unseen": data.eval_unseen}
        overlap: dict[str, dict[str, int]] = {name: {"rows": len(rows)} for name, rows in parts.items()}
        if data.train:
            overlap = {name: {**own, **count_overlap(data.train, parts[name])} for name, own in overlap.items()}
        if self.model.user_encoder is None:
            return {"overlap": overlap, "shuffled_users": None}
        tokenized = self._tokenize_pairs(data.eval_seen, self.model.users)
        options = {"seed": self.config.seed, **self.pairs, **self.scoring}
        with self.autocast():
            shuffled = shuffled_users(self.model, data.eval_seen, tokenized, self.contexts, **options)
        expected = expected_when_shuffled(data.train, data.eval_seen)
        return {"overlap": overlap, "shuffled_users": shuffled and {**shuffled, "expected": expected}}

    def nll(self, rows: Sequence[ResponseRow]) -> dict[str, Any] | None:
        """Mean NLL per token of demonstrations, for sft; None when no row is left after tokenizing."""
        tokenized = self._tokenize_responses(rows)
        if not tokenized:
            return None
        self.model.eval()
        with self.autocast():
            scores = score_sequences(
                self.model, [TokenSequence(r.prompt_ids, r.response_ids) for r in tokenized], None, **self.scoring
            )
        return {"nll_per_token": float(-scores.values.sum() / scores.tokens.sum()), "num_rows": len(tokenized)}

    def tax(self, texts: Sequence[ResponseRow]) -> dict[str, Any] | None:
        """What the users' tastes cost on neutral texts; None for a reward model, or when no text can be used."""
        tokenized = self._tokenize_responses(texts)
        if not tokenized or not isinstance(self.model, PersonalizedPolicy):
            return None
        with self.autocast():
            tax = personalization_tax(self.model, tokenized, **self.scoring)
        return {"source": self.config.eval.neutral or BUILTIN_TEXT, **tax}

    def generations(
        self,
        prompts: Sequence[Prompt],
        users: Sequence[str],
        judge: Judge | None,
        *,
        user_texts: Mapping[str, str],
    ) -> dict[str, Any]:
        """Answers of policy (the generic user's too) and reference, and what judge and reference say of them.

        Args:
            user_texts: of users about whom something is known; in front of their prompts where training has it there.
        """
        texts = user_texts if self.config.data.user_text == "prompt" else {}
        samples = {
            name: self._sample(prompts, users, texts, as_reference=name == "reference")
            for name in ("policy", "reference")
        }
        if self.model.user_encoder is not None:
            samples["generic"] = self._sample(prompts, [GENERIC], {}, as_reference=False)
        made = {"samples": samples, "words": words_per_user(samples)}
        if judge is None:
            return {**made, "win_rate": None, "on_side": None, "text": None}
        return {**made, **judge_generations(samples, judge, temperature=self.config.eval.temperature)}

    def _sample(
        self, prompts: Sequence[Prompt], users: Sequence[str], texts: Mapping[str, str], *, as_reference: bool
    ) -> list[Sample]:
        assert isinstance(self.model, PersonalizedPolicy)
        policy, settings, options = self.model, self.config.eval, sampling_options(self.config)
        with self.autocast():
            return sample_answers(
                policy,
                prompts,
                users,
                options=options,
                as_reference=as_reference,
                max_prompt_tokens=self.config.data.max_prompt_tokens,
                batch_rows=settings.batch_rows,
                user_texts=texts,
                score=lambda answers: score_under_reference(
                    policy, answers, lambda given: self._tokenize_answers(given, texts), **self.scoring
                ),
                on_batch=self.scoring["on_batch"],
            )

    def _tokenize_answers(
        self, answers: Sequence[tuple[str, Prompt, str]], texts: Mapping[str, str]
    ) -> list[TokenizedResponse]:
        return self._tokenize_responses(
            [ResponseRow(prompt, answer, texts.get(user, "")) for user, prompt, answer in answers]
        )

    def _tokenize_pairs(
        self, rows: Sequence[PreferenceRow], users: UserIndex | None, **changes: int
    ) -> list[TokenizedPair]:
        limits = {**tokenize_limits(self.config, self.model), **changes}
        return tokenize_pairs(rows, self.model.tokenizer, users, **limits).rows

    def _tokenize_responses(self, rows: Sequence[ResponseRow]) -> list[TokenizedResponse]:
        limits = tokenize_limits(self.config, self.model)
        return tokenize_responses(rows, self.model.tokenizer, **limits).rows


def sampling_options(config: Config) -> SamplingOptions:
    """How a run's own answers are sampled."""
    settings = config.eval
    return SamplingOptions(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=config.seed,
        repetition_penalty=settings.repetition_penalty,
        no_repeat_ngram_size=settings.no_repeat_ngram_size,
    )


def evaluate_preferences(
    evaluator: Evaluator, data: PreferenceData, neutral: Sequence[ResponseRow]
) -> tuple[dict[str, Any], dict[str, list[Sample]]]:
    """The figures of a preference job, and the samples if `eval.generate` asks for any.

    Args:
        neutral: texts that no user judged.
    """
    data, dropped = evaluator.usable(data)
    figures = {**evaluator.accuracy(data.eval_seen, data.eval_unseen), "dropped": dropped}
    figures["baselines"], figures["leaks"] = evaluator.baselines(data), evaluator.leaks(data)
    figures.update({"tax": evaluator.tax(neutral), "ceiling": data.ceiling})
    figures.update({"win_rate": None, "on_side": None, "text": None, "words": None})
    wanted = evaluator.config.eval.generate
    if not wanted or not data.eval_seen or not isinstance(evaluator.model, PersonalizedPolicy):
        return figures, {}
    judge = judge_of(data)
    prompts = list(dict.fromkeys(row.prompt for row in data.eval_seen))[:wanted]
    generated: dict[str, Any] = {"samples": {}}
    if is_main():
        generated = evaluator.generations(prompts, data.user_ids(), judge, user_texts=data.user_texts())
    barrier(timeout_s=GENERATION_TIMEOUT_S)
    samples = generated.pop("samples")
    return {**figures, **generated}, samples


def evaluate_run(
    job: Job, progress: Progress, run_dir: Path, *, step: int, setup_s: float, on_batch: OnBatch
) -> dict[str, Any]:
    """The final evaluation, written to `eval/final.json` and `samples/`; of the weights after `step`."""
    began = time.perf_counter()
    if job.preferences is not None:
        restore_reference_(job)
    evaluator = _evaluator_of(job, on_batch, with_reference=True)
    samples: dict[str, list[Sample]] = {}
    if job.preferences is None:
        figures: dict[str, Any] = {"dev": evaluator.nll(job.dev_responses)}
    else:
        figures, samples = evaluate_preferences(evaluator, job.preferences, job.neutral)
    seconds = max(progress.train_seconds, 1e-9)
    final = {
        "experiment": job.config.name,
        "method": job.config.method,
        "user_model": job.spec.user_kind,
        "step": step,
        "last_step": progress.step,
        "seed": job.config.seed,
        "data": {
            "source": job.config.data.source,
            "seed": job.config.data.seed,
            "train_rows": len(job.rows),
            "dropped": job.dropped,
        },
        **figures,
        "throughput": {
            "rows_per_s": progress.rows_seen / seconds,
            "tokens_per_s": sum(counts_of_ranks(progress.tokens_seen)) / seconds,
            "peak_memory_bytes": max(counts_of_ranks(peak_memory_bytes())),
            "peak_device_bytes": max(counts_of_ranks(peak_device_bytes(job.model.device))),
        },
        "skipped_steps": progress.skipped_steps,
        "seconds": progress.train_seconds,
        "seconds_setup": setup_s,
        "seconds_eval": time.perf_counter() - began,
    }
    if is_main():
        write_final(run_dir, final, samples)
    return final


def evaluate_step(job: Job, progress: Progress, run_dir: Path, *, on_batch: OnBatch) -> None:
    """Accuracy on the dev rows during training, to `eval/step-*.json`."""
    if job.preferences is None or not job.preferences.dev:
        return
    evaluator = _evaluator_of(job, on_batch, with_reference=job.reference is not None)
    rows = draw_rows(job.preferences.dev, job.config.eval.rows, seed=job.config.seed)
    figures = evaluator.accuracy(rows, [])
    if is_main():
        (run_dir / "eval").mkdir(exist_ok=True)
        path = run_dir / "eval" / f"{checkpoint_name(progress.step)}.json"
        write_json_atomic(path, {"step": progress.step, **figures})
    barrier()


def _evaluator_of(job: Job, on_batch: OnBatch, *, with_reference: bool) -> Evaluator:
    return Evaluator(
        job.config,
        job.model,
        pad_id=job.pad_id,
        autocast=job.autocast,
        on_batch=on_batch,
        with_reference=with_reference,
        contexts=None if job.preferences is None else evaluation_contexts(job.model, job.preferences),
    )


def write_final(run_dir: Path, final: dict[str, Any], samples: dict[str, list[Sample]]) -> None:
    """Write `eval/final.json` and a samples file for each of policy, reference and generic user, and no others'."""
    for folder in ("eval", "samples"):
        (run_dir / folder).mkdir(parents=True, exist_ok=True)
    for name, group in samples.items():
        text = "".join(json.dumps(sample.record(), ensure_ascii=False) + "\n" for sample in group)
        write_text_atomic(run_dir / "samples" / f"{name}.jsonl", text)
    for path in (run_dir / "samples").glob("*.jsonl"):
        if path.stem not in samples:
            path.unlink()  # of an earlier evaluation
    write_json_atomic(run_dir / FINAL, final)
