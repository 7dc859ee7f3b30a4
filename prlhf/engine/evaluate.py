"""Evaluation of a checkpoint, and comparison of finished runs."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prlhf.config import Config, config_from_dict, config_to_dict, load_config
from prlhf.data.load import load_evaluation_file
from prlhf.data.prepared import SPLITS
from prlhf.data.quoting import quote
from prlhf.data.records import PreferenceData
from prlhf.data.user_index import UserIndex
from prlhf.engine.build import evaluation_contexts, load_job_data, load_job_neutral, make_autocast, pick_device
from prlhf.engine.checkpoint import CONFIG
from prlhf.engine.child import SignalRelay, is_finished, train_in_child
from prlhf.engine.final import Evaluator, evaluate_preferences
from prlhf.errors import ConfigError, DataError
from prlhf.evaluation.check_table import format_checks
from prlhf.evaluation.report import format_comparison, load_final
from prlhf.evaluation.win_table import format_wins, rates_between
from prlhf.files import read_json_lines
from prlhf.models.assemble import load_model
from prlhf.models.backbone import pad_token_id
from prlhf.models.personalized import PersonalizedModel
from prlhf.models.run_folder import resolve_checkpoint

logger = logging.getLogger(__name__)

EVAL_OVERRIDES = (
    "eval.",
    "data.",
    "train.device",
    "train.num_threads",
    "train.microbatch_tokens",
    "train.packing",
    "train.precision",
    "seed",
)


def evaluate_checkpoint(checkpoint: Path, *, source: str | None, overrides: Sequence[str]) -> dict[str, Any]:
    """Figures as in `eval/final.json` of a checkpoint, on its own data or on `source`.

    A single .jsonl file other than the run's own is evaluated as a whole; of other sources the evaluation rows are.

    Raises: ConfigError: an override of anything but the evaluation. DataError: no such data.
    """
    directory = resolve_checkpoint(checkpoint)
    wrong = [key for key in overrides if not key.startswith(EVAL_OVERRIDES)]
    if wrong:
        raise ConfigError(
            *(f"{key}: cannot change in an evaluation; expected one of {', '.join(EVAL_OVERRIDES)}" for key in wrong)
        )
    config = own = load_config(directory / CONFIG, overrides)
    if source is not None:
        config = config_from_dict(
            {**config_to_dict(config), "data": {**config_to_dict(config)["data"], "source": source}}, "--data"
        )
    if config.method == "sft":
        raise ConfigError(
            f"{directory}: trained with sft, which has no preferences to evaluate; see its eval/final.json"
        )
    device = pick_device(config.train.device)
    model = load_model(directory, device=str(device), packing=config.train.packing)
    is_file = Path(config.data.source).is_file() and config.data.source != own.data.source
    data = _whole_file(Path(config.data.source), own) if is_file else load_preferences(config)
    data = _with_kept_texts(_known_rows(data, model.users if model.user_encoder else None), model)
    evaluator = Evaluator(
        config,
        model,
        pad_id=pad_token_id(model.tokenizer),
        autocast=make_autocast(config.train.precision, device),
        on_batch=lambda: None,
        contexts=evaluation_contexts(model, data),
    )
    figures, _ = evaluate_preferences(evaluator, data, load_job_neutral(config, data))
    return {
        "experiment": config.name,
        "method": config.method,
        "user_model": config.user.kind,
        "checkpoint": str(directory),
        "data": {"source": config.data.source, "seed": config.data.seed},
        **figures,
    }


def _whole_file(path: Path, own: Config) -> PreferenceData:
    """Every row of a file for evaluation, beside the training rows of the run, if they are still there."""
    data = load_evaluation_file(path)
    try:
        return dataclasses.replace(data, train=load_preferences(own).train)
    except DataError as error:
        logger.warning("the run's own training rows cannot be read (%s): what is shared with them is not known", error)
        return data


def load_preferences(config: Config) -> PreferenceData:
    """The preference data of a configuration."""
    data = load_job_data(config).preferences
    assert data is not None
    return data


def _known_rows(data: PreferenceData, known: UserIndex | None) -> PreferenceData:
    """Rows of users the model does not know move to the unseen ones, aloud; only known ones are answered."""
    if known is None:
        return data
    data = dataclasses.replace(data, declared_users=tuple(user for user in data.user_ids() if user in known))
    unknown = sorted({row.user_id for row in data.eval_seen if row.user_id not in known})
    if not unknown:
        return data
    logger.warning(
        "users of eval_seen whom the checkpoint does not know (%d, such as %s): reported as unseen, under the "
        "generic user",
        len(unknown),
        quote(unknown[0]),
    )
    seen = [row for row in data.eval_seen if row.user_id in known]
    moved = [row for row in data.eval_seen if row.user_id not in known]
    return dataclasses.replace(data, eval_seen=seen, eval_unseen=[*data.eval_unseen, *moved])


def _with_kept_texts(data: PreferenceData, model: PersonalizedModel) -> PreferenceData:
    """The data, in which a row without a user text has the one that the checkpoint keeps of its user."""
    kept = dict(model.user_texts)
    if model.contexts is not None:
        kept.update({user: facts.text for user, facts in model.contexts.facts.items() if facts.text})
    if not kept:
        return data
    filled: dict[str, Any] = {
        name: [dataclasses.replace(row, user_text=row.user_text or kept.get(row.user_id, "")) for row in rows]
        for name, rows in ((name, getattr(data, name)) for name in SPLITS)
    }
    return dataclasses.replace(data, **filled)


def compare_runs(targets: Sequence[str], overrides: Sequence[str], *, runs: Path) -> str:
    """Tables over runs; a target that is a YAML file is trained first unless it is finished.

    Raises: DataError: a run without final evaluation. ConfigError: a training run failed. Preempted: a signal came.
    """
    with SignalRelay() as relay:
        folders = [
            _train_if_needed(target, overrides, runs, relay) if target.endswith((".yaml", ".yml")) else Path(target)
            for target in targets
        ]
    names = [folder.name for folder in folders]
    named = {str(folder) if names.count(folder.name) > 1 else folder.name: folder for folder in folders}
    finals = {name: load_final(folder) for name, folder in named.items()}
    without = [name for name, final in finals.items() if not final.get("accuracy", {}).get("seen")]
    if without:
        raise DataError(
            *(f"{name}: has no preference accuracy to compare (method {finals[name]['method']})" for name in without)
        )
    judged = [name for name, final in finals.items() if final.get("win_rate")]
    wins = rates_between(finals, _kept_answers({name: named[name] for name in judged}))
    tables = (format_comparison(finals), format_checks(finals, wins), format_wins(wins))
    return "\n\n".join(table for table in tables if table) + "\n"


def _kept_answers(folders: Mapping[str, Path]) -> dict[str, list[dict[str, Any]]]:
    """Run -> rows of `samples/policy.jsonl`; runs without the file are left out, aloud."""
    paths = {name: folder / "samples" / "policy.jsonl" for name, folder in folders.items()}
    for path in paths.values():
        if not path.exists():
            logger.warning("%s: no such file; the run's answers are not held against those of other runs", path)
    return {name: read_json_lines(path) for name, path in paths.items() if path.exists()}


def _train_if_needed(target: str, overrides: Sequence[str], runs: Path, relay: SignalRelay) -> Path:
    config = load_config(target, overrides)
    run_dir = runs / config.name
    code = 0 if is_finished(config, run_dir) else train_in_child(target, overrides, runs, relay)
    if code != 0:
        raise ConfigError(f"{target}: training ended with exit code {code}; see the messages above")
    return run_dir
