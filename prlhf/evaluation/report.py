"""Tables for the terminal and for Markdown, from `eval/final.json` files."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prlhf.errors import DataError, printable
from prlhf.files import read_json_lines
from prlhf.models.run_folder import FINAL

COLUMN_WIDTH = 38
NUM_SIDE_BY_SIDE = 3
CEILING = "best possible under the labels' noise"
# What every final evaluation holds, and what it holds where users were compared.
FIGURES_OF_RUN: dict[str, Any] = {
    "experiment": str, "method": str, "user_model": str, "step": int, "seed": int, "data": dict, "throughput": dict,
    "seconds": (int, float),
}
FIGURES_OF_USERS: dict[str, Any] = {"accuracy": dict, "per_user": dict}
ENCODER_KINDS = ("text", "history")  # user models that read users, also those never seen


def make_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it also reads well in a terminal; numbers to the right."""
    cells = [[_cell(text) for text in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        padded = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("| " + " | ".join(padded) + " |")
    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines.insert(1, "| " + " | ".join(rule) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text of one line that neither ends a cell nor moves a terminal's cursor: ids may hold anything."""
    return printable(text).replace("|", "\\|")


def format_run(final: Mapping[str, Any], run_dir: Path) -> str:
    """The closing report of a run: figures, the table of users, three prompts answered for every user."""
    step, last = final["step"], final.get("last_step", final["step"])
    chosen = "" if step == last else f" (best on dev rows, of {last})"
    parts = [
        f"\n{final['experiment']}: method {final['method']}, user model {final['user_model']}, step {step}{chosen}, "
        f"seed {final['seed']}, data {final['data']['source']}"
    ]
    if "accuracy" not in final:
        dev = final.get("dev")
        parts.append(
            f"NLL per token on dev: {dev['nll_per_token']:.4f} ({dev['num_rows']} rows)" if dev else "no dev rows"
        )
    else:
        parts.append(format_figures(final))
        samples = run_dir / "samples" / "policy.jsonl"
        if samples.is_file():
            parts.append(_side_by_side(samples))
    speed = final["throughput"]
    parts.append(
        f"training loop {final['seconds']:.0f} s ({speed['rows_per_s']:.1f} rows/s), "
        f"set-up {final['seconds_setup']:.0f} s, evaluation {final['seconds_eval']:.0f} s, "
        f"peak memory {speed['peak_memory_bytes'] / 2**30:.2f} GiB"
    )
    parts.append(f"run directory: {run_dir}")
    return "\n\n".join(part for part in parts if part) + "\n"


def format_figures(final: Mapping[str, Any]) -> str:
    """Accuracies, shared rows, the table of users, the quality of sampled text, and the personalization tax."""
    parts = (_headline(final), _overlap_line(final), _user_table(final), _text_line(final), _tax_line(final))
    return "\n\n".join(part for part in parts if part)


def _headline(final: Mapping[str, Any]) -> str:
    rows = _block_rows(final["accuracy"], "", final.get("user_model"))
    if not rows:
        return "no evaluation rows (of thumbs, those of one user on two responses to one prompt are)"
    apart = (final.get("slices") or {}).get("length_gap_20", {})
    rows += _block_rows(apart, ", lengths 20% apart", final.get("user_model"))
    rows += _baseline_rows(final)
    for label, shares in (
        ("one preference for all", final.get("majority")),
        ("one preference for all, lengths 20% apart", apart.get("majority")),
    ):
        rows += [
            [f"{label}, {name} users", _share(value), "", "", "", ""]
            for name, value in (shares or {}).items()
            if value is not None
        ]
    if final.get("ceiling") is not None:
        rows.append([CEILING, _share(final["ceiling"]), "", "", "", ""])
    return make_table(["reward accuracy", "mean", "95% interval", "worst user", "rows", "users"], rows)


def _block_rows(blocks: Mapping[str, Any], suffix: str, user_model: str | None) -> list[list[str]]:
    names = {
        "seen": "seen users, own embedding",
        "generic": "the same rows, generic user",
        "unseen": "unseen users, generic user",
    }
    if user_model in ENCODER_KINDS:
        names |= {
            "seen": f"seen users, own {user_model}",
            "unseen": f"unseen users, own {user_model}",
            "unseen_generic": "unseen users, generic user",
        }
    return [
        _block_row(label + suffix, block)
        for name, label in names.items()
        if (block := blocks.get(name)) is not None
    ]


def _block_row(label: str, block: Mapping[str, Any]) -> list[str]:
    return [
        label,
        _share(block["mean"]),
        _interval(block),
        _share(block["worst_user"]),
        str(block["num_rows"]),
        str(block["num_users"]),
    ]


def _baseline_rows(final: Mapping[str, Any]) -> list[list[str]]:
    """What needs no training, and the accuracy with users drawn anew."""
    baselines = final.get("baselines", {})
    names = {"length_only": "length alone", "format_only": "format alone"}
    rows = [
        [f"{label}, {part} users", _share(value), "", "", "", ""]
        for name, label in names.items()
        for part, value in baselines.get(name, {}).items()
        if value is not None
    ]
    names = {"prompted": "reference told the user's wish", "few_shot": "reference shown the user's pairs"}
    rows += [_block_row(label, block) for name, label in names.items() if (block := baselines.get(name))]
    shuffled = final.get("leaks", {}).get("shuffled_users")
    if shuffled:
        label = f"users drawn anew (expected {_share(shuffled['expected']['mean'])})"
        rows.append([label, _share(shuffled["mean"]), "", "", str(shuffled["num_rows"]), ""])
    return rows


def _overlap_line(final: Mapping[str, Any]) -> str:
    """Evaluation rows that the model may know from training."""
    overlap = final.get("leaks", {}).get("overlap", {})
    parts = [
        f"of {counts['rows']} {name.removeprefix('eval_')} rows {counts['prompt']} share their prompt, "
        f"{counts['pair']} their pair, {counts['response']} a response"
        for name, counts in overlap.items()
        if counts["rows"] and "prompt" in counts
    ]
    return f"Shared with training: {'; '.join(parts)}" if parts else ""


def _user_table(final: Mapping[str, Any]) -> str:
    on_side, wins, words = final.get("on_side"), final.get("win_rate") or {}, final.get("words")
    header = ["user", "accuracy", "generic", "rows"]
    if on_side:
        header += ["on side", "reference's"]
    if wins:
        header.append("wins/ties/losses")
    if words:
        header.append("words")
    rows = []
    for user, figures in list(final["per_user"].items())[:40]:
        row = [user, _share(figures["accuracy"]), _share(figures["generic_accuracy"]), str(figures["num_rows"])]
        if on_side:
            row += [_share(on_side[user]["policy"]), _share(on_side[user]["reference"])]
        if wins:
            outcome = wins["per_user"][user]
            row.append(f"{outcome['wins']}/{outcome['ties']}/{outcome['losses']}")
        if words:
            row.append(_words(words["per_user"].get(user)))
        rows.append(row)
    if len(final["per_user"]) > len(rows):
        rows.append([f"(+{len(final['per_user']) - len(rows)} more)", *[""] * (len(header) - 1)])
    if rows and words:
        rows += [[f"({name})", *[""] * (len(header) - 2), _words(words[name])] for name in ("generic", "reference")]
    return make_table(header, rows) if rows else ""


def _text_line(final: Mapping[str, Any]) -> str:
    text = final.get("text")
    if not text:
        return ""
    rows = [
        [
            name,
            "-" if text[name]["well_formed"] is None else _share(text[name]["well_formed"]),
            _share(text[name]["repeated_4grams"]),
            _nll(text, name),
            f"{text[name]['words']:.1f}",
        ]
        for name in ("policy", "reference")
    ]
    return make_table(
        [f"text at T {text['temperature']:g}", "well-formed", "repeated 4-grams", "NLL/token", "words"], rows
    )


def _tax_line(final: Mapping[str, Any]) -> str:
    tax = final.get("tax")
    if not tax:
        return ""
    nll = tax["nll_per_token"]
    parts = [f"reference {nll['reference']:.3f}"]
    if nll["users_mean"] is None:
        parts.append(f"policy {nll['generic']:.3f}")
    else:
        parts.append(f"generic user {nll['generic']:.3f}")
        parts.append(f"mean of {tax['num_users']} users {nll['users_mean']:.3f}")
    return f"NLL/token of {tax['num_texts']} neutral texts ({tax['source']}): {', '.join(parts)}"


def _side_by_side(path: Path) -> str:
    """The first prompts, answered for every user."""
    answers: dict[str, dict[str, str]] = {}
    for sample in read_json_lines(path):
        prompt = sample["prompt"] if isinstance(sample["prompt"], str) else sample["prompt"][-1]["content"]
        answers.setdefault(prompt, {})[sample["user_id"]] = sample["response"]
    return "\n\n".join(format_answers(prompt, by_user) for prompt, by_user in list(answers.items())[:NUM_SIDE_BY_SIDE])


def format_answers(prompt: str, by_user: Mapping[str, str]) -> str:
    """One prompt and each user's answer below it, in columns, three users a row."""
    blocks = [f"> {printable(prompt)}"]
    answers = [(printable(user), printable(answer)) for user, answer in list(by_user.items())[:12]]
    for start in range(0, len(answers), 3):
        group = answers[start : start + 3]
        columns = [[user, "-" * len(user), *textwrap.wrap(answer, COLUMN_WIDTH)] for user, answer in group]
        height = max(len(column) for column in columns)
        lines = [
            "  ".join((column[i] if i < len(column) else "").ljust(COLUMN_WIDTH) for column in columns).rstrip()
            for i in range(height)
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def load_final(run_dir: Path) -> dict[str, Any]:
    """A run's final evaluation.

    Raises: DataError: the run has none yet, or the file holds something else.
    """
    path = run_dir / FINAL
    anew = "remove it and call prlhf train again, which evaluates the trained run anew"
    try:
        final = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; finish the run with prlhf train") from None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); {anew}") from None
    if not isinstance(final, dict):
        raise DataError(f"{path}: is no final evaluation, expected a JSON object; {anew}")
    needed = FIGURES_OF_RUN | (FIGURES_OF_USERS if "accuracy" in final else {})
    lacking = [name for name, kind in needed.items() if not isinstance(final.get(name), kind)]
    if lacking:
        raise DataError(f"{path}: is no final evaluation, without a sound {', '.join(lacking)}; {anew}")
    return final


def format_comparison(finals: Mapping[str, Mapping[str, Any]]) -> str:
    """One line a run: accuracies, on-side share, text quality; the untrained reference first where it was sampled."""
    users = list(dict.fromkeys(user for final in finals.values() for user in final.get("per_user", {})))
    shown = users if len(users) <= 8 else []
    header = [
        "run",
        "users' model",
        "accuracy",
        "95% interval",
        "worst user",
        "generic",
        "unseen",
        "on side",
        "NLL/token",
        *shown,
    ]
    rows = _reference_rows(finals, shown)
    for name, final in finals.items():
        accuracy, text = final["accuracy"], final.get("text")
        unseen = accuracy["unseen"]
        rows.append(
            [
                name,
                final["user_model"],
                _share(accuracy["seen"]["mean"]),
                _interval(accuracy["seen"]),
                _share(accuracy["seen"]["worst_user"]),
                _share(accuracy["generic"]["mean"]),
                _share(unseen["mean"]) if unseen else "-",
                _mean_on_side(final, "policy"),
                _nll(text, "policy"),
                *[_share(final["per_user"][user]["accuracy"]) if user in final["per_user"] else "-" for user in shown],
            ]
        )
    ceiling, *others = {final.get("ceiling") for final in finals.values()}
    if ceiling is not None and not others:
        rows.append([CEILING, "-", _share(ceiling), *["-"] * (len(header) - 3)])
    table = make_table(header, rows)
    sources = _sources(finals)
    if len(sources) > 1:
        table = f"Only runs on the same data compare; these are on {', '.join(map(printable, sources))}.\n\n{table}"
    return table


def _sources(finals: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """What data the runs were evaluated on, and one of the runs, of those with a reference if there are any."""
    sources: dict[str, Mapping[str, Any]] = {}
    for final in sorted(finals.values(), key=lambda final: not final["accuracy"].get("reference_logps")):
        sources.setdefault(_source(final), final)
    return sources


def _source(final: Mapping[str, Any]) -> str:
    return f"{final['data']['source']} (seed {final['data']['seed']})"


def _reference_rows(finals: Mapping[str, Mapping[str, Any]], shown: Sequence[str]) -> list[list[str]]:
    """What the untrained reference prefers, of each data that the runs were evaluated on."""
    sources, rows = _sources(finals), []
    for source, final in sources.items():
        block, text = final["accuracy"].get("reference_logps"), final.get("text")
        if block:
            rows.append(
                [
                    "reference (by log-probs)" + (f", {source}" if len(sources) > 1 else ""),
                    "none",
                    _share(block["mean"]),
                    _interval(block),
                    _share(block["worst_user"]),
                    "-",
                    "-",
                    _mean_on_side(final, "reference"),
                    _nll(text, "reference"),
                    *["-"] * len(shown),
                ]
            )
    return rows


def _mean_on_side(final: Mapping[str, Any], who: str) -> str:
    on_side = final.get("on_side")
    return _share(sum(user[who] for user in on_side.values()) / len(on_side)) if on_side else "-"


def _nll(text: Mapping[str, Any] | None, who: str) -> str:
    """Empty answers alone have no NLL."""
    value = text[who]["nll_per_token"] if text else None
    return "-" if value is None else f"{value:.3f}"


def _words(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _share(value: float) -> str:
    return f"{value:.3f}"


def _interval(block: Mapping[str, Any]) -> str:
    return f"{block['ci95'][0]:.3f} to {block['ci95'][1]:.3f}"
