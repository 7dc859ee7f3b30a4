"""What `prlhf adapt` does: new users from their feedback, and what to ask them next."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prlhf.adapt.add_users import check_new, write_with_users
from prlhf.adapt.ask import choose_questions
from prlhf.adapt.feedback import check_usable, feedback_pairs, make_judgments, num_repeated, read_feedback
from prlhf.adapt.fit import FittedUser, fit_judgments
from prlhf.config import Config, load_config
from prlhf.config_checks import REFERENCE_FREE_KINDS
from prlhf.data.context import UserFacts
from prlhf.data.jsonl import read_every_row
from prlhf.data.quoting import quote
from prlhf.data.records import JudgedRow, PreferenceRow, make_pair_id, pair_content, preference_row, prompt_record
from prlhf.engine.build import pick_device
from prlhf.engine.checkpoint import CONFIG
from prlhf.errors import ConfigError, DataError
from prlhf.models.assemble import REWARD_METHODS, load_model
from prlhf.models.personalized import PersonalizedModel
from prlhf.models.run_folder import resolve_checkpoint

logger = logging.getLogger(__name__)


def add_new_users(args: argparse.Namespace) -> int:
    """Fit, write and report as the arguments say, the report as JSON lines; the exit code."""
    _check_arguments(args)
    directory = resolve_checkpoint(args.checkpoint)
    config = load_config(directory / CONFIG)
    said = {} if args.feedback is None else read_feedback(args.feedback, args.user)
    to_measure = {} if args.held_out is None else read_feedback(args.held_out, args.user)
    pool = [] if args.pool is None else _read_pool(args.pool)
    if args.user is not None:
        said.setdefault(args.user, [])
    if args.out is not None and not said:
        raise DataError(f"{args.feedback}: holds no judgment; write one a line, or give --user ID for a generic user")
    strangers = [user for user in to_measure if user not in said]
    if strangers:
        raise DataError(*(f"{args.held_out}: user {quote(user)} is not a new user of --feedback" for user in strangers))
    again = sum(num_repeated(said[user], rows) for user, rows in to_measure.items())
    if again:
        logger.warning("%s: %d rows say what rows of %s say; they measure what was fitted", args.held_out, again,
                       args.feedback)
    if args.out is not None:
        check_new(directory, list(said), args.out)
    model = load_model(directory, device=str(pick_device(config.train.device)), rows_on_demand=True)
    _check_model(model, directory, args)
    check_usable(model, [*said.values(), *to_measure.values(), pool], **judgment_limits(config))
    feedback, held_out = ({user: [row for _, row in own] for user, own in part.items()} for part in (said, to_measure))
    pairs = _distinct(row for _, row in pool)
    if args.ask is not None:
        for question in _questions(model, config, feedback, pairs, args):
            sys.stdout.write(json.dumps(question, ensure_ascii=False) + "\n")
    if args.out is None:
        return 0
    # Where texts stand in prompts, a known user's has to be kept.
    texts = _last_texts(feedback) if config.data.user_text == "prompt" else {}
    if model.contexts is not None:
        facts = _facts(model, feedback)
        figures = [{"user_id": user, "judgments": len(own.pairs)} for user, own in facts.items() if own.pairs]
        write_with_users(directory, args.out, model, {}, facts, texts, figures)
        for user, own in facts.items():
            read = {"text": own.text} if model.contexts.kind == "text" else {"pairs": len(own.pairs)}
            sys.stdout.write(json.dumps({"user_id": user, **read}, ensure_ascii=False) + "\n")
        return 0
    fitted = _fit(model, config, feedback, held_out, pairs)
    reports = [_report(model, user, one) for user, one in fitted.items()]
    # Whom a user is like, and so that one's id, is told and not kept.
    figures = [{name: report[name] for name in report if name not in ("like", "opposite")} for report in reports]
    states = {user: one.state for user, one in fitted.items()}
    write_with_users(directory, args.out, model, states, {}, texts, figures)
    sys.stdout.writelines(json.dumps(report, ensure_ascii=False) + "\n" for report in reports)
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    wrong = []
    if args.out is None and args.ask is None:
        wrong.append("--out: missing; give a directory for the checkpoint with the new users, or --ask N")
    if args.out is not None and args.feedback is None and args.user is None:
        wrong.append("--feedback: missing; give a file of the new users' judgments, or --user ID for a generic one")
    if args.ask is not None and args.ask < 1:
        wrong.append(f"--ask: got {args.ask}, expected at least 1")
    if args.ask is not None and args.pool is None:
        wrong.append("--pool: missing; --ask picks its questions from a pool of pairs")
    if wrong:
        raise ConfigError(*wrong)


def _check_model(model: PersonalizedModel, directory: Path, args: argparse.Namespace) -> None:
    if model.user_encoder is None:
        raise ConfigError(f"{directory}: was trained without users; give a run with user.kind individual, cluster, "
                          "low_rank, text or history")
    if model.contexts is None:
        try:
            _ = model.user_encoder.table
        except ValueError as error:
            raise ConfigError(f"{directory}: {error}") from None
        return
    useless = [name for name, path in (("--pool", args.pool), ("--held-out", args.held_out)) if path is not None]
    if useless:
        reads = f"{directory} reads its users ({model.contexts.kind}) and fits nothing; leave it out"
        raise ConfigError(*(f"{name}: {reads}" for name in useless))


def _read_pool(path: Path) -> list[tuple[str, PreferenceRow]]:
    """The pairs of a file, whoever judged them."""
    return read_every_row(path, lambda record, where: preference_row({**record, "user_id": "-"}, where))


def _distinct(pairs: Iterable[PreferenceRow]) -> list[PreferenceRow]:
    """The first of each pair, whichever of the two is called chosen."""
    distinct: dict[Any, PreferenceRow] = {}
    for pair in pairs:
        distinct.setdefault(pair_content(pair), pair)
    return list(distinct.values())


def _questions(
    model: PersonalizedModel,
    config: Config,
    feedback: Mapping[str, list[JudgedRow]],
    pool: Sequence[PreferenceRow],
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    if len(feedback) > 1:
        raise ConfigError(f"--ask: {args.feedback} has {len(feedback)} users; questions are for one")
    answered = {pair_content(pair) for own in feedback.values() for pair in feedback_pairs(own)}
    questions = [pair for pair in pool if pair_content(pair) not in answered]
    if not questions:
        raise DataError(f"{args.pool}: holds no pair that the user has not judged; give others")
    limits = judgment_limits(config)
    judgments = [judgment for own in feedback.values() for judgment in make_judgments(model, own, **limits)]
    candidates = make_judgments(model, questions, **limits)
    picked = choose_questions(model, judgments, candidates, args.ask, **likelihood(config))
    return [_question(questions[i]) for i in picked]


def _question(pair: PreferenceRow) -> dict[str, Any]:
    """A line of feedback that waits for its choice: nothing of who judged the pair, nor, by its order, of how."""
    responses = sorted(pair.responses)
    if int(make_pair_id(pair.prompt, *responses), 16) % 2:  # as good as drawn, and the same whichever was preferred
        responses.reverse()
    return {"prompt": prompt_record(pair.prompt), "responses": responses, "choice": None}


def _fit(
    model: PersonalizedModel,
    config: Config,
    feedback: Mapping[str, list[JudgedRow]],
    held_out: Mapping[str, list[JudgedRow]],
    pool: Sequence[PreferenceRow],
) -> dict[str, FittedUser]:
    limits = judgment_limits(config)
    judgments = [make_judgments(model, rows, **limits) for rows in feedback.values()]
    to_measure = [make_judgments(model, held_out.get(user, []), **limits) for user in feedback]
    unjudged = make_judgments(model, pool, **limits)
    fitted = fit_judgments(model, judgments, to_measure, pool=unjudged, **likelihood(config))
    return dict(zip(feedback, fitted, strict=True))


def judgment_limits(config: Config) -> dict[str, Any]:
    """How a run's judgments are tokenized."""
    return {
        "max_tokens": config.data.max_tokens,
        "max_prompt_tokens": config.data.max_prompt_tokens,
        "with_user_text": config.data.user_text == "prompt",
    }


def likelihood(config: Config) -> dict[str, Any]:
    """How sure a judgment is at a margin, as in the run's loss."""
    if config.method in REWARD_METHODS:
        return {"beta": 1.0}
    return {"beta": config.loss.beta, "per_token": config.loss.kind in REFERENCE_FREE_KINDS}


def _last_texts(feedback: Mapping[str, Sequence[JudgedRow]]) -> dict[str, str]:
    """The last text about each new user of whom something is said."""
    return {user: row.user_text for user, rows in feedback.items() for row in rows if row.user_text}


def _facts(model: PersonalizedModel, feedback: Mapping[str, Sequence[JudgedRow]]) -> dict[str, UserFacts]:
    """What an encoder reads about the new users: their last text, or as many of their pairs as it takes."""
    assert model.contexts is not None
    kept, wrong, texts = {}, [], _last_texts(feedback)
    for user, rows in feedback.items():
        text = texts.get(user, "")
        pairs = feedback_pairs(rows)
        if model.contexts.kind == "text" and not text:
            wrong.append(f"user {quote(user)}: no row has a user_text, which is what this model reads; add one")
        elif model.contexts.kind == "history" and rows and not pairs:
            wrong.append(f"user {quote(user)}: no pair, and this model reads pairs; add one, or a thumb for another "
                         "response to the same prompt")
        kept[user] = (
            UserFacts(text=text) if model.contexts.kind == "text"
            else UserFacts(pairs=tuple(pairs[: model.contexts.max_pairs]))
        )
    if wrong:
        raise DataError(*wrong)
    return kept


def _report(model: PersonalizedModel, user: str, fitted: FittedUser) -> dict[str, Any]:
    assert model.users is not None
    like = None if fitted.known is None else model.users.user_id(fitted.known) if fitted.known else "generic"
    return {
        "user_id": user,
        "judgments": fitted.num_judgments,
        "like": like,
        "opposite": fitted.opposite,
        "probability": fitted.probability,
        "uncertainty": fitted.uncertainty,
        "leave_one_out": fitted.leave_one_out,
        "held_out": fitted.held_out,
    }
