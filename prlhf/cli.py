"""The command `prlhf`."""

from __future__ import annotations

import argparse
import codecs
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prlhf.data.quoting import escape_as_json
from prlhf.engine.launch import add_train_arguments, configure_logging, report_errors, run_training
from prlhf.engine.selftest import add_selftest_arguments, run_selftest
from prlhf.errors import ConfigError, DataError

AS_JSON = "prlhf_as_json"  # the name of an error handler of codecs


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code: 0 done, 1 unexpected, 2 bad input, 3 no valid checkpoint, 75 stopped by a signal.

    Also 130 interrupted, 141 nobody reads the output.
    """
    configure_logging()
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error(AS_JSON, escape_as_json)
        sys.stdout.reconfigure(errors=AS_JSON)
    args = parse_arguments(argv)
    return report_errors(args.run, args)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="prlhf", description="One language model that answers every user in that user's way."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train, evaluate and print the table")
    add_train_arguments(train)
    train.set_defaults(run=run_training)

    evaluate = commands.add_parser("eval", help="evaluate a run or checkpoint again, also on other data")
    evaluate.add_argument("checkpoint", metavar="CKPT", type=Path, help="a run or checkpoint directory")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="eval.* keys, such as eval.temperature=1.0")
    evaluate.add_argument(
        "--data", metavar="SOURCE", help="a prepared directory, builtin:NAME, or a .jsonl file, all of it"
    )
    evaluate.add_argument("--out", metavar="FILE", type=Path, help="also write the figures as JSON")
    evaluate.set_defaults(run=_eval)

    compare = commands.add_parser("compare", help="tabulate runs; YAML files are trained first where needed")
    compare.add_argument("runs_or_configs", nargs="+", metavar="RUN|CONFIG|key=value")
    compare.add_argument("--runs", default="runs", metavar="DIR", help="folder of run directories (default: runs)")
    compare.set_defaults(run=_compare, overrides=[])

    sweep = commands.add_parser("sweep", help="train an experiment at several settings, then tabulate them")
    sweep.add_argument("sweep", metavar="SWEEP", type=Path, help="a YAML file of experiments/sweeps")
    sweep.add_argument("overrides", nargs="*", metavar="key=value", help="of every run, such as train.max_steps=20")
    sweep.add_argument("--runs", default="runs", metavar="DIR", help="where the sweep's folder is (default: runs)")
    sweep.set_defaults(run=_sweep)

    report = commands.add_parser("report", help="one page on one run or several: curves, users, answers")
    report.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="run directories")
    report.add_argument("--out", type=Path, metavar="FILE", help="the page (default: report.html in the first run)")
    report.add_argument("--figures", type=Path, metavar="DIR", help="also write the figures as SVG files")
    report.set_defaults(run=_report)

    score = commands.add_parser("score", help="scores of a reward model for every response of a file")
    score.add_argument("checkpoint", metavar="CKPT", type=Path, help="a run or checkpoint of method rm or prm")
    score.add_argument(
        "--data", required=True, type=Path, metavar="F", help='.jsonl: "prompt", "response" or "chosen"...'
    )
    score.add_argument(
        "--users", default="all", metavar="a,b|all|generic", help="as whom to score (default: all known users)"
    )
    score.add_argument("--out", type=Path, metavar="F", help="JSONL of the scores (default: the terminal)")
    score.set_defaults(run=_score)

    _add_user_commands(commands)
    _add_generation_commands(commands)
    _add_data_commands(commands)
    selftest = commands.add_parser("selftest", help="a tiny job under faults: whether nothing is lost")
    add_selftest_arguments(selftest)
    selftest.set_defaults(run=run_selftest)
    _add_recipe_commands(commands)
    commands.add_parser("env", help="print versions and hardware").set_defaults(run=_env)
    return parser


def _add_user_commands(commands: Any) -> None:
    from prlhf.adapt.commands import add_adapt_arguments, add_forget_arguments, run_adapt, run_forget
    from prlhf.serving.commands import add_export_arguments, add_users_arguments, run_export, run_users

    adapt = commands.add_parser("adapt", help="add new users from a few judgments; choose what to ask them next")
    add_adapt_arguments(adapt)
    adapt.set_defaults(run=run_adapt)
    forget = commands.add_parser("forget", help="take a user out of a run, a checkpoint or an adapted model")
    add_forget_arguments(forget)
    forget.set_defaults(run=run_forget)
    export = commands.add_parser("export", help="a policy as files for PEFT, transformers or vLLM")
    add_export_arguments(export)
    export.set_defaults(run=run_export)
    users = commands.add_parser("users", help="who is served how well, who is like whom, a map of the users")
    add_users_arguments(users)
    users.set_defaults(run=run_users)


def _add_generation_commands(commands: Any) -> None:
    generate = commands.add_parser("generate", help="answer a file of prompts for chosen users")
    generate.add_argument("checkpoint", metavar="CKPT", type=Path)
    generate.add_argument(
        "--prompts", required=True, type=Path, metavar="F", help='.txt (one a line), or .json or .jsonl with "prompt"'
    )
    generate.add_argument(
        "--users", default="all", metavar="a,b|all|generic", help="who is answered (default: all known users)"
    )
    generate.add_argument("--out", required=True, type=Path, metavar="F", help="JSONL: user_id, prompt, response")
    chat = commands.add_parser("chat", help="talk to the model as one user")
    chat.add_argument("checkpoint", metavar="CKPT", type=Path)
    chat.add_argument("--user", default="generic", metavar="ID")
    for command in (generate, chat):
        command.add_argument(
            "--user-text", default="", metavar="TEXT",
            help="what is known of the user in words, trained on or not (default: what the checkpoint keeps of each)",
        )
        command.add_argument("--temperature", type=float, default=0.7)
        command.add_argument("--top-p", type=float, default=1.0)
        command.add_argument("--top-k", type=int, default=0)
        command.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; repeatable")
        command.add_argument("--max-new-tokens", type=int, default=160)
        command.add_argument("--repetition-penalty", type=float, default=1.0)
        command.add_argument("--no-repeat-ngram-size", type=int, default=0)
        command.add_argument("--seed", type=int, default=123)
    generate.set_defaults(run=_generate)
    chat.set_defaults(run=_chat)


def _add_recipe_commands(commands: Any) -> None:
    recipes = commands.add_parser("recipes", help="the shipped experiments: list them, copy them")
    actions = recipes.add_subparsers(dest="action", required=True, metavar="ls|cp")
    actions.add_parser("ls", help="their names and what they are").set_defaults(run=_list_recipes)
    copy = actions.add_parser("cp", help="copy some into a folder, to change and to train")
    copy.add_argument("names", nargs="+", metavar="NAME", help="such as psoups or paper/tldr")
    copy.add_argument("--out", type=Path, default=Path("experiments"), metavar="DIR", help="default: experiments")
    copy.set_defaults(run=_copy_recipes)


def _add_data_commands(commands: Any) -> None:
    data = commands.add_parser("data", help="prepare and check data").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    from prlhf.data.prepare import add_prepare_arguments, run_prepare

    prepare = data.add_parser("prepare", help="raw files to a prepared directory")
    add_prepare_arguments(prepare)
    prepare.set_defaults(run=run_prepare)
    check = data.add_parser(
        "check", help="rendered rows, masks, lengths, users, duplicates, leaks, length-only baseline"
    )
    check.add_argument(
        "target", metavar="DIR|CONFIG", help="a prepared directory, a .jsonl file, builtin:NAME or a YAML file"
    )
    check.add_argument("overrides", nargs="*", metavar="key=value")
    check.set_defaults(run=_check_data)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The parsed command line; key=value arguments may stand anywhere, also behind options."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(item.startswith("-") or "=" not in item for item in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _eval(args: argparse.Namespace) -> int:
    from prlhf.engine.evaluate import evaluate_checkpoint
    from prlhf.evaluation.report import format_figures
    from prlhf.files import make_place, write_json_atomic

    if args.out is not None:
        make_place(args.out, reads=None if args.data is None else Path(args.data))
    figures = evaluate_checkpoint(args.checkpoint, source=args.data, overrides=args.overrides)
    sys.stdout.write(format_figures(figures) + "\n")
    if args.out is not None:
        write_json_atomic(args.out, figures)
    return 0


def _compare(args: argparse.Namespace) -> int:
    from prlhf.engine.evaluate import compare_runs

    overrides = [*(item for item in args.runs_or_configs if "=" in item), *args.overrides]
    targets = [item for item in args.runs_or_configs if "=" not in item]
    if not targets:
        raise ConfigError("compare: no run; give runs/NAME or a YAML file, at least one")
    sys.stdout.write(compare_runs(targets, overrides, runs=Path(args.runs)))
    return 0


def _sweep(args: argparse.Namespace) -> int:
    from prlhf.engine.sweep import load_sweep, run_sweep

    table, failures = run_sweep(load_sweep(args.sweep, args.overrides), runs=Path(args.runs))
    sys.stdout.write(table)
    if failures:
        raise ConfigError(*failures)
    return 0


def _report(args: argparse.Namespace) -> int:
    from prlhf.evaluation.html_report import write_report

    sys.stdout.write(f"{write_report(args.runs, args.out, args.figures)}\n")
    return 0


def _score(args: argparse.Namespace) -> int:
    from prlhf.data.jsonl import write_jsonl
    from prlhf.engine.score import score_file
    from prlhf.files import make_place

    if args.out is not None:
        make_place(args.out, reads=args.data)
    records = score_file(args.checkpoint, args.data, args.users)
    if args.out is None:
        sys.stdout.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    else:
        write_jsonl(args.out, records)
    return 0


def _generate(args: argparse.Namespace) -> int:
    from prlhf.data.jsonl import write_jsonl
    from prlhf.data.records import prompt_record
    from prlhf.data.texts import read_prompts
    from prlhf.evaluation.samples import about_users, known_users, user_indices
    from prlhf.files import make_place
    from prlhf.generation import generate

    make_place(args.out, reads=args.prompts)
    prompts = read_prompts(args.prompts)
    policy, limits = _load_to_answer(args.checkpoint)
    users = known_users(policy, args.users)
    pairs = [(user, prompt) for user in users for prompt, _ in prompts]
    texts = [args.user_text or text for _ in users for _, text in prompts]
    answers = generate(
        policy,
        [prompt for _, prompt in pairs],
        user_indices(policy, [user for user, _ in pairs]),
        options=_sampling(args),
        **about_users(policy, pairs, texts),
        **limits,
    )
    write_jsonl(
        args.out,
        [
            {"user_id": user, "prompt": prompt_record(prompt), "response": answer}
            for (user, prompt), answer in zip(pairs, answers, strict=True)
        ],
    )
    return 0


def _chat(args: argparse.Namespace) -> int:
    from prlhf.data.records import Message
    from prlhf.data.render import check_text
    from prlhf.evaluation.samples import about_users, known_users, user_indices
    from prlhf.generation import generate

    policy, limits = _load_to_answer(args.checkpoint)
    user_ids = user_indices(policy, known_users(policy, [args.user]))
    history: list[Message] = []
    options = _sampling(args)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not UTF-8 is refused, and the next one read
    while True:
        sys.stdout.write(f"{args.user}> ")
        sys.stdout.flush()
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            line = ""
        if not line:
            sys.stdout.write("\n")
            return 0
        if not line.strip():
            continue
        try:
            check_text(line.strip())
        except DataError as error:
            sys.stderr.write(f"error: {error}\n")
            continue
        if policy.tokenizer.chat_template:
            history.append(Message("user", line.strip()))
        prompt = tuple(history) or line.strip()
        about = about_users(policy, [(args.user, prompt)], [args.user_text])
        answer = generate(policy, [prompt], user_ids, options=options, **about, **limits)[0]
        options = replace(options, seed=options.seed + 1)  # else every answer would be drawn alike
        if history:
            history.append(Message("assistant", answer))
        sys.stdout.write(answer + "\n")


def _load_to_answer(checkpoint: Path) -> tuple[Any, dict[str, Any]]:
    """A policy on its run's device, and how long its prompts may be."""
    from prlhf.config import load_config
    from prlhf.engine.build import pick_device
    from prlhf.engine.checkpoint import CONFIG
    from prlhf.models import load_policy
    from prlhf.models.run_folder import resolve_checkpoint

    directory = resolve_checkpoint(checkpoint)
    config = load_config(directory / CONFIG)
    policy = load_policy(directory, device=str(pick_device(config.train.device)), rows_on_demand=True)
    return policy, {"max_prompt_tokens": config.data.max_prompt_tokens}


def _sampling(args: argparse.Namespace) -> Any:
    from prlhf.generation import SamplingOptions

    return SamplingOptions(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        stop_strings=tuple(args.stop),
        seed=args.seed,
        repetition_penalty=args.repetition_penalty,
        no_repeat_ngram_size=args.no_repeat_ngram_size,
    )


def _check_data(args: argparse.Namespace) -> int:
    from prlhf.engine.check_data import check_data

    sys.stdout.write(check_data(args.target, args.overrides))
    return 0


def _list_recipes(args: argparse.Namespace) -> int:
    from prlhf.recipes import list_recipes

    recipes = list_recipes()
    width = max(map(len, recipes))
    sys.stdout.writelines(f"{name:{width}}  {words}\n" for name, words in recipes.items())
    return 0


def _copy_recipes(args: argparse.Namespace) -> int:
    from prlhf.recipes import copy_recipes

    sys.stdout.writelines(f"{path}\n" for path in copy_recipes(args.names, args.out))
    return 0


def _env(args: argparse.Namespace) -> int:
    from prlhf.engine.run_dir import describe_environment

    sys.stdout.write(json.dumps(describe_environment(), indent=2) + "\n")
    return 0
