"""How many judgments a new user needs: accuracy on held-out rows over their number, and what good questions save.

    python -m benchmarks.adapt runs/psoups                                    # new users of known tastes
    python -m benchmarks.adapt runs/tldr                                      # unseen workers
    python -m benchmarks.adapt --leave-out P1A --world 0 --data data/no_P1A   # a world without a profile, to train on,
    prlhf train experiments/psoups.yaml name=no_P1A data.source=data/no_P1A
    python -m benchmarks.adapt runs/no_P1A --source builtin:psoups --users P1A   # and the profile as a new user

Each user is fitted anew in every draw, from judgments drawn without replacement: of a user of the run from evaluation
rows about other prompts than the measured ones, which the matching state never saw, or, where those are too few, from
training and dev rows; of an unseen user from half of the rows, and accuracy is on the other half. Intervals resample
users' draws. Questions are asked and fitted as `prlhf adapt` does, all of a batch before the first answer; a pair that
is not of the user's axis is answered by a coin. A batch of users is timed twice: all judge the same 64 pairs of their
taste, or everybody judges pairs of their own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.adapt_speed import measure_batch, measure_pool
from prlhf.adapt import FittedUser, Judgment, fit_judgments
from prlhf.adapt.add_users import write_with_users
from prlhf.adapt.ask import choose_questions
from prlhf.adapt.feedback import make_judgments
from prlhf.adapt.margins import Margins
from prlhf.adapt.new_users import judgment_limits, likelihood
from prlhf.config import Config, load_config
from prlhf.config_checks import REFERENCE_FREE_KINDS
from prlhf.data.load import load_preference_data
from prlhf.data.prepared import write_prepared
from prlhf.data.records import PreferenceData, PreferenceRow
from prlhf.data.tokenize import tokenize_pairs
from prlhf.engine.build import tokenize_limits
from prlhf.engine.checkpoint import CONFIG
from prlhf.engine.final import sampling_options
from prlhf.errors import DataError
from prlhf.evaluation.accuracy import bootstrap_interval, has_length_gap, score_pairs
from prlhf.evaluation.judges import RuleJudge
from prlhf.evaluation.report import make_table
from prlhf.evaluation.samples import user_indices
from prlhf.generation import generate
from prlhf.models.assemble import load_model, resolve_checkpoint
from prlhf.models.backbone import pad_token_id
from prlhf.models.personalized import PersonalizedModel
from prlhf.models.policy import PersonalizedPolicy

COUNTS = (0, 1, 2, 4, 8, 16, 32)
SIMULATED_USERS = 4  # of each taste, who answer questions


@dataclasses.dataclass(frozen=True)
class Subject:
    """A user to be fitted: rows to draw judgments from, and rows to measure on."""

    user_id: str
    pool: list[PreferenceRow]
    test: list[PreferenceRow]


def leave_out(seed: int, user_id: str, out: Path) -> None:
    """Write builtin:psoups without a profile: its judgments of held-out topics become an unseen user's."""
    data = load_preference_data("builtin:psoups", seed=seed, eval_prompts=0.1, unseen_users=0.0)

    def others(rows: list[PreferenceRow]) -> list[PreferenceRow]:
        return [row for row in rows if row.user_id != user_id]

    unseen = [row for row in data.eval_seen if row.user_id == user_id]
    changed = {name: others(getattr(data, name)) for name in ("train", "dev", "eval_seen")}
    write_prepared(out, dataclasses.replace(data, eval_unseen=unseen, **changed))


def pick_subjects(
    data: PreferenceData, users: Sequence[str] | None, test_rows: int, enough: int = max(COUNTS)
) -> list[Subject]:
    """Users to fit: those asked for, else the unseen ones, else the seen ones as if they were new.

    Args:
        enough: judgments to draw from; where evaluation rows leave fewer, they are training and dev rows.
    """
    unseen = list(dict.fromkeys(row.user_id for row in data.eval_unseen))
    subjects = []
    for user in users or unseen or data.user_ids():
        known = [row for row in (*data.dev, *data.train) if row.user_id == user]
        measured = [row for row in (*data.eval_seen, *data.eval_unseen) if row.user_id == user]
        if known:
            prompts = {row.prompt for row in measured[:test_rows]}
            others = [row for row in measured[test_rows:] if row.prompt not in prompts]
            known = others if len(others) >= enough else known
        else:
            known, measured = measured[::2], measured[1::2]
        subjects.append(Subject(user, known, measured[:test_rows]))
    return subjects


def measure_curve(
    model: PersonalizedModel,
    config: Config,
    subjects: Sequence[Subject],
    counts: Sequence[int],
    draws: int,
    seed: int,
    pool: Sequence[PreferenceRow] = (),
) -> list[dict[str, Any]]:
    """Accuracy after each number of judgments, over all subjects and draws.

    Args:
        pool: pairs from which the fits learn what opposites of known tastes are.
    """
    # More judgments go on from fewer, so that one call computes each once.
    cells = [(count, user, draw) for count in counts for user in range(len(subjects)) for draw in range(draws)]
    given = [
        [subjects[user].pool[i] for i in np.random.default_rng([seed, user, draw]).permutation(
            len(subjects[user].pool))[:count]]
        for count, user, draw in cells
    ]
    tests = [subjects[user].test for _, user, _ in cells]
    fits: list[FittedUser] = []
    if model.contexts is not None:
        right = read_users(model, config, given, tests)
    else:
        right, fits = fit_users(model, config, given, tests, pool)
    clear = [np.array([has_length_gap(row) for row in subject.test]) for subject in subjects]
    results = []
    for count in counts:
        own = [i for i, cell in enumerate(cells) if cell[0] == count]
        means = np.array([right[i].mean() for i in own])
        users = np.array([cells[i][1] for i in own])
        gaps = [part.mean() for part in (right[i][clear[cells[i][1]]] for i in own) if len(part)]
        results.append({
            "judgments": count,
            **with_interval("accuracy", means, seed),
            **with_interval("length_gap_20", gaps, seed),
            "per_user": {subject.user_id: float(means[users == user].mean()) for user, subject in enumerate(subjects)},
            **describe_fits([fits[i] for i in own] if fits else [], seed),
        })
    return results


def with_interval(name: str, values: Sequence[float] | np.ndarray, seed: int) -> dict[str, Any]:
    """Mean of what draws gave, and its 95% interval; None where there is nothing."""
    if not len(values):
        return {name: None, f"{name}_ci95": None}
    numbers = np.asarray(values, dtype=float)
    interval = bootstrap_interval(numbers, [str(i) for i in range(len(numbers))], seed=seed)
    return {name: float(numbers.mean()), f"{name}_ci95": interval}


def describe_fits(fits: Sequence[FittedUser], seed: int) -> dict[str, Any]:
    """Shares of states that are a known user's, or an opposite; the mean accuracy on judgments left out of the fit."""
    return {
        **with_interval("known_state", [float(fit.known is not None) for fit in fits], seed),
        **with_interval("opposite", [float(fit.opposite) for fit in fits], seed),
        **with_interval("leave_one_out", [fit.leave_one_out for fit in fits if fit.leave_one_out is not None], seed),
        **with_interval("uncertainty", [fit.uncertainty for fit in fits], seed),
    }


def fit_users(
    model: PersonalizedModel,
    config: Config,
    given: Sequence[Sequence[PreferenceRow]],
    tests: Sequence[Sequence[PreferenceRow]],
    pool: Sequence[PreferenceRow] = (),
) -> tuple[list[np.ndarray], list[FittedUser]]:
    """Whether each test row of each user is answered right by the state fitted to what the user judged; the fits."""
    known: dict[PreferenceRow, Judgment] = {}
    for row in (row for rows in (*given, *tests) for row in rows):
        if row not in known:
            [known[row]] = make_judgments(model, [row], **judgment_limits(config))
    unjudged = make_judgments(model, pool, **judgment_limits(config))
    fitted = fit_judgments(
        model, [[known[row] for row in rows] for rows in given], pool=unjudged, **likelihood(config)
    )
    judged = [[known[row] for row in rows] for rows in tests]
    return score_states(model, [one.state for one in fitted], judged, config), fitted


def read_users(
    model: PersonalizedModel,
    config: Config,
    given: Sequence[Sequence[PreferenceRow]],
    tests: Sequence[Sequence[PreferenceRow]],
) -> list[np.ndarray]:
    """The same of an encoder, which reads what the user judged, as many pairs as it learned to read."""
    assert model.contexts is not None
    rows = [row for test in tests for row in test]
    contexts = [
        model.contexts.read_pairs(pairs[: model.contexts.max_pairs])
        for pairs, test in zip(given, tests, strict=True) for _ in test
    ]
    tokenized = tokenize_pairs(rows, model.tokenizer, None, **tokenize_limits(config, model))
    if tokenized.dropped:
        raise DataError(f"rows to measure on that cannot be used: {tokenized.dropped}")
    margins = score_pairs(
        model, rows, tokenized.rows, contexts, pad_id=pad_token_id(model.tokenizer),
        microbatch_tokens=config.train.microbatch_tokens, reference_free=config.loss.kind in REFERENCE_FREE_KINDS,
    )
    ends = np.cumsum([len(test) for test in tests])
    return np.split((margins.individual > 0).astype(float), ends[:-1])


def score_states(
    model: PersonalizedModel, states: Sequence[torch.Tensor], tests: Sequence[Sequence[Judgment]], config: Config
) -> list[np.ndarray]:
    """Whether each test judgment of each user is answered right; what equal states share is computed once."""
    known: dict[tuple[bytes, Judgment], int] = {}
    places = [
        [known.setdefault((state.numpy().tobytes(), judgment), len(known)) for judgment in own]
        for state, own in zip(states, tests, strict=True)
    ]
    flat = {place: state.flatten() for state, own in zip(states, places, strict=True) for place in own}
    per_token = bool(likelihood(config).get("per_token"))
    with model.evaluating():
        margins = Margins(model, [judgment for _, judgment in known], per_token=per_token).values(
            range(len(known)), torch.stack([flat[i] for i in range(len(known))])
        )
    return [(margins[own] > 0).double().numpy() for own in places]


def measure_questions(
    model: PersonalizedModel, config: Config, subjects: Sequence[Subject], pool_rows: int, most: int, seed: int
) -> dict[str, dict[int, dict[str, Any]]]:
    """Accuracy of the fitted state after a batch of 0, 1, 2, 4, ... `most` questions: chosen ones, and random ones.

    Args:
        pool_rows: of each subject; what to ask is chosen among all.
    """
    limits, rng = judgment_limits(config), np.random.default_rng(seed)
    pool = list({row.pair_id: row for subject in subjects for row in subject.pool[:pool_rows]}.values())
    questions = make_judgments(model, pool, **limits)
    chosen = choose_questions(model, [], questions, most, **likelihood(config), seed=seed)
    counts = sorted({0, most, *(2**k for k in range(most.bit_length()) if 2**k <= most)})
    people = [subject for subject in subjects for _ in range(SIMULATED_USERS)]
    tests = [make_judgments(model, subject.test, **limits) for subject in people]
    own = {subject.user_id: {row.pair_id: row.chosen for row in subject.pool} for subject in subjects}
    curves = {}
    for way in ("chosen", "random"):
        answered = []
        for person in people:
            asked = chosen if way == "chosen" else rng.permutation(len(pool))[:most].tolist()
            answered.append([
                questions[i] if agrees else dataclasses.replace(questions[i], responses=questions[i].responses[::-1])
                for i, agrees in ((i, answer(own[person.user_id], pool[i], rng)) for i in asked)
            ])
        fitted = fit_judgments(model, [own[:count] for count in counts for own in answered], **likelihood(config))
        right = score_states(model, [one.state for one in fitted], tests * len(counts), config)
        means = np.array([one.mean() for one in right]).reshape(len(counts), len(people))
        curves[way] = {
            count: with_interval("accuracy", row, seed) for count, row in zip(counts, means, strict=True)
        }
    return curves


def answer(own: dict[str, str], row: PreferenceRow, rng: np.random.Generator) -> bool:
    """Whether a user prefers what a pair calls chosen; of a pair that the user has no preference about, a coin.

    Args:
        own: pair id -> the response that the user prefers.
    """
    coin = bool(rng.integers(2))
    return own[row.pair_id] == row.chosen if row.pair_id in own else coin


def measure_generations(
    directory: Path, model: PersonalizedModel, config: Config, subjects: Sequence[Subject], judgments: int, prompts: int
) -> dict[str, float]:
    """Share of new users' answers on their side, to prompts of their held-out rows, sampled as the run's own were.

    Each is added to a copy of the checkpoint under another id, from so many judgments, and loaded with it.
    """
    limits, rng, judge = judgment_limits(config), np.random.default_rng(config.seed), RuleJudge()
    given = [
        make_judgments(model, [one.pool[i] for i in rng.permutation(len(one.pool))[:judgments]], **limits)
        for one in subjects
    ]
    names = {f"new {subject.user_id}": subject for subject in subjects}
    fitted = fit_judgments(model, given, **likelihood(config))
    with tempfile.TemporaryDirectory() as folder:
        states = {name: one.state for name, one in zip(names, fitted, strict=True)}
        write_with_users(directory, Path(folder) / "with_users", model, states, {})
        policy = load_model(Path(folder) / "with_users")
    assert isinstance(policy, PersonalizedPolicy)
    shares = {}
    for name, subject in names.items():
        asked = list(dict.fromkeys(row.prompt for row in subject.test))[:prompts]
        answers = generate(
            policy, asked, user_indices(policy, [name] * len(asked)), options=sampling_options(config),
            max_prompt_tokens=config.data.max_prompt_tokens,
        )
        shares[subject.user_id] = float(np.mean([judge.on_side(answer, subject.user_id) for answer in answers]))
    return shares


def cell(point: dict[str, Any], name: str) -> str:
    """A figure and its interval."""
    if point[name] is None:
        return "-"
    return "{:.3f} ({:.3f} to {:.3f})".format(point[name], *point[f"{name}_ci95"])


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--source", help="data with the users to fit (default: the run's own)")
    parser.add_argument("--users", nargs="+", help="default: the unseen users of the data, else its seen ones")
    parser.add_argument("--counts", nargs="+", type=int, default=list(COUNTS))
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--test-rows", type=int, default=100, help="of each user")
    parser.add_argument("--pool", type=int, default=0, metavar="N", help="give the fits N training pairs, unjudged")
    parser.add_argument("--time-pool", action="store_true", help="also time one user who wants an opposite")
    parser.add_argument("--questions", type=int, default=0, metavar="N", help="also ask batches of up to N, two ways")
    parser.add_argument("--generate", type=int, default=0, metavar="N", help="also answer N prompts (psoups' users)")
    parser.add_argument("--judgments", type=int, default=16, help="of a new user who is answered")
    parser.add_argument("--batch", type=int, default=0, metavar="N", help="also time N users at once")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    parser.add_argument("--leave-out", metavar="ID", help="write builtin:psoups without this profile to --data, stop")
    parser.add_argument("--world", type=int, default=0)
    parser.add_argument("--data", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measure a checkpoint, or write the world to train one on."""
    args = parse_arguments()
    if args.leave_out:
        leave_out(args.world, args.leave_out, args.data)
        return
    torch.set_num_threads(args.threads)
    directory = resolve_checkpoint(args.checkpoint)
    config, model = load_config(directory / CONFIG), load_model(directory)
    data = load_preference_data(
        args.source or config.data.source, seed=config.data.seed, eval_prompts=config.data.eval_prompts,
        unseen_users=config.data.unseen_users,
    )
    subjects = pick_subjects(data, args.users, args.test_rows, max(args.counts))
    pairs = list({row.pair_id: row for row in data.train}.values())
    pool = [pairs[i] for i in np.random.default_rng(args.seed).permutation(len(pairs))[: args.pool]]
    curve = measure_curve(model, config, subjects, args.counts, args.draws, args.seed, pool)
    columns = {"accuracy": "accuracy", "length_gap_20": "lengths >= 20% apart", "known_state": "known or opposite",
               "opposite": "opposite", "leave_one_out": "left out", "uncertainty": "uncertainty"}
    rows = [[str(point["judgments"]), *(cell(point, name) for name in columns)] for point in curve]
    sys.stdout.write(make_table(["judgments", *columns.values()], rows) + "\n")
    results: dict[str, Any] = {"checkpoint": str(directory), "seed": args.seed, "draws": args.draws, "curve": curve}
    if args.questions:
        results["questions"] = measure_questions(model, config, subjects, 42, args.questions, args.seed)
        asked = [[way, *(cell(point, "accuracy") for point in points.values())]
                 for way, points in results["questions"].items()]
        header = ["questions", *map(str, results["questions"]["chosen"])]
        sys.stdout.write("\n" + make_table(header, asked) + "\n")
    if args.generate:
        on_side = measure_generations(directory, model, config, subjects, args.judgments, args.generate)
        results["on_side"] = on_side
        sys.stdout.write("\n" + make_table(["user", "on side"], [[u, f"{v:.3f}"] for u, v in on_side.items()]) + "\n")
    if args.batch:
        users = [subject.user_id for subject in subjects]
        results["users_per_s"] = {
            count: measure_batch(model, config, data, users, count, args.seed) for count in (1, args.batch)
        }
        for rates in results["users_per_s"].values():
            for way, (number, rate) in rates.items():
                sys.stdout.write(f"\n{rate:.1f} users/s at {number} users, {way} pairs\n")
    if args.time_pool:
        results["pool_s"] = measure_pool(model, config, subjects[0].pool, pool, args.seed)
        sys.stdout.write(f"\n{results['pool_s']:.1f} s for one user with a pool of {len(pool)} pairs\n")
    if args.out:
        args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
