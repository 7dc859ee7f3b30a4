"""`report.html`: one page on one run or several, which needs nothing from outside and runs no script."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prlhf.errors import DataError
from prlhf.evaluation import figures
from prlhf.evaluation.check_table import check_rows
from prlhf.evaluation.figure_data import (
    Curve,
    accuracy_by_user,
    accuracy_over_steps,
    answers_side_by_side,
    training_curve,
    words_by_user,
    words_of_all,
    worst_users,
)
from prlhf.evaluation.run_files import RunFiles, read_runs
from prlhf.evaluation.win_table import rates_between
from prlhf.files import MAX_NAME_BYTES, write_text_atomic

REPORT = "report.html"
NUM_WORST = 10
NUM_PROMPTS = 6
NUM_ANSWERED_USERS = 12
TRAINING = {
    "loss": "loss",
    "accuracy on training rows": "rewards/accuracies",
    "gradient norm": "grad_norm",
    "learning rate": "learning_rate",
}
IMAGE = '<img src="data:image/svg+xml;base64,'
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.5rem } h3 { font-size: 1rem; margin-top: 1.5rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .87rem }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e3e3e3; white-space: nowrap }
th:first-child, td:first-child { text-align: left; min-width: 7rem; overflow-wrap: anywhere; white-space: normal }
figure { margin: 1rem 0 } img { max-width: 100%; height: auto }
figcaption, .note { color: #555; font-size: .87rem }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .8rem }
.prompt { white-space: pre-wrap; font-weight: 600; margin: 1.4rem 0 .5rem }
.answers { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .6rem }
.answers div { border: 1px solid #e0e0e0; border-radius: 4px; padding: .5rem .7rem; font-size: .87rem;
  white-space: pre-wrap; overflow-wrap: anywhere }
.answers b { display: block; color: #555 }
summary { cursor: pointer }
"""


def write_report(folders: Sequence[Path], out: Path | None, figures_in: Path | None = None) -> Path:
    """Write the page.

    Args:
        folders: run directories, finished or not.
        out: the page, or an existing directory for it; None: the first run's directory.
        figures_in: a directory for the page's figures as SVG files, too; None: the page alone.
    Returns: where the page is.
    Raises: ConfigError: matplotlib is missing. DataError: no run directory, a damaged file in one, or another file of
        one in the page's place.
    """
    figures.require_matplotlib()
    runs = read_runs(folders)
    target = folders[0] if out is None else out
    path = target / REPORT if target.is_dir() else target
    _refuse_file_of_run(path, folders)
    for folder in (path.parent, figures_in):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    page = render_report(runs)
    write_text_atomic(path, page)
    if figures_in is not None:
        images = re.findall(f'{re.escape(IMAGE)}([^"]*)" alt="([^"]*)"', page)
        for number, (image, alt) in enumerate(images, start=1):
            name = re.sub(r"[^A-Za-z0-9.-]+", "_", html.unescape(alt))[: MAX_NAME_BYTES - 8]
            write_text_atomic(figures_in / f"{number:02d}_{name}.svg", base64.b64decode(image).decode("utf-8"))
    return path


def _refuse_file_of_run(path: Path, folders: Sequence[Path]) -> None:
    inside = any(folder.resolve() in path.resolve().parents for folder in folders)
    if inside and path.exists() and path.suffix not in (".html", ".htm"):
        raise DataError(f"{path}: is a file of the run; give a name that ends in .html")


def render_report(runs: Sequence[RunFiles]) -> str:
    """The page as HTML; the same runs give the same text."""
    title = f"prlhf: {', '.join(run.name for run in runs)}"
    parts = [f"<h1>{escape(title)}</h1>", _headline(runs), _checks(runs), _training(runs), _over_steps(runs)]
    finished = [run for run in runs if run.final and run.final.get("per_user")]
    if len(finished) > 1:
        parts.append(_accuracy_side_by_side(finished))
    parts.append(_words(runs))
    parts += [_run_section(run) for run in runs]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def escape(text: str) -> str:
    """Text as it reads, whatever is in it."""
    return html.escape(text.encode("utf-8", "replace").decode("utf-8"))


def _headline(runs: Sequence[RunFiles]) -> str:
    """A column a run; what no run has is left out."""
    columns = [_headline_figures(run) for run in runs]
    names = [name for name in columns[0] if any(column[name] != "-" for column in columns)]
    table = _table(["", *(run.name for run in runs)], [[name, *(column[name] for column in columns)] for name in names])
    unfinished = [run.name for run in runs if run.final is None]
    note = f"<p class=note>Not finished: {escape(', '.join(unfinished))}.</p>" if unfinished else ""
    return table + note


def _headline_figures(run: RunFiles) -> dict[str, str]:
    final = run.final or {}
    accuracy, on_side, text = (final.get(name) or {} for name in ("accuracy", "on_side", "text"))
    seen, generic, unseen = (accuracy.get(name) or {} for name in ("seen", "generic", "unseen"))
    sides = [user["policy"] for user in on_side.values()]
    return {
        "method": final.get("method", "-"),
        "user model": final.get("user_model", "-"),
        "data": final.get("data", {}).get("source", "-"),
        "seed": str(final.get("seed", "-")),
        "steps": str(final.get("step", run.metrics[-1]["step"] if run.metrics else 0)),
        "accuracy, seen users": _number(seen.get("mean")),
        "95% interval": "{:.3f} to {:.3f}".format(*seen["ci95"]) if seen else "-",
        "worst user": _number(seen.get("worst_user")),
        "the same rows, generic user": _number(generic.get("mean")),
        "accuracy, unseen users": _number(unseen.get("mean")),
        "answers on the user's side": _number(sum(sides) / len(sides) if sides else None),
        "NLL/token of answers": _number(text.get("policy", {}).get("nll_per_token")),
        "training loop, s": f"{final['seconds']:.0f}" if final else "-",
    }


def _checks(runs: Sequence[RunFiles]) -> str:
    """A column a run with preferences; what no run has is left out."""
    finals = {run.name: run.final for run in runs if run.final and run.final.get("per_user")}
    samples = {run.name: run.samples.get("policy", []) for run in runs if run.name in finals}
    rows = check_rows(finals, rates_between(finals, samples))
    if not rows:
        return ""
    table = _table(["", *finals], [[label, *(figures[name] for name in finals)] for label, figures in rows])
    return f"<h2>Baselines and checks</h2>{table}"


def _training(runs: Sequence[RunFiles]) -> str:
    alone = runs[0] if len(runs) == 1 else None
    panels = []
    for title, name in TRAINING.items():
        curves = [training_curve(run, name, label="" if alone else run.name) for run in runs]
        raw = [training_curve(alone, name, smooth=False)] if alone else []
        if alone and title.startswith("accuracy"):
            curves = [
                training_curve(alone, name, label="as the row's user"),
                training_curve(alone, f"generic/{name}", label="as the generic user"),
            ]
        if any(curves):
            panels.append((title, [curve for curve in curves if curve], [curve for curve in raw if curve]))
    if not panels:
        return ""
    note = "Running means over a fortieth of a run's steps" + (", each step faint behind them." if alone else ".")
    drawing = partial(figures.draw_training, panels=panels)
    return "<h2>Training</h2>" + _figure(drawing, "Training curves", note)


def _over_steps(runs: Sequence[RunFiles]) -> str:
    """Fig. 5 of the paper."""
    heading = "<h2>Accuracy over steps</h2>"
    if len(runs) > 1:
        drawn = [(accuracy_over_steps(run, "seen"), _final_point(run, "seen")) for run in runs]
    else:
        labels = {"seen": "own embedding", "generic": "generic user"}
        drawn = [
            (accuracy_over_steps(runs[0], block, label=label), _final_point(runs[0], block))
            for block, label in labels.items()
        ]
    curves = [(curve, final) for curve, final in drawn if curve]
    if not curves:
        text = "No evaluation during training in these runs; <code>eval.every_steps=50</code> makes one every 50 steps."
        return f"{heading}<p class=note>{text}</p>"
    drawing = partial(figures.draw_over_steps, curves=curves)
    note = "Dev rows with 95% intervals; hollow: held-out evaluation rows after the last step; dotted: chance."
    return heading + _figure(drawing, "Accuracy over steps", note)


def _final_point(run: RunFiles, block: str) -> Curve | None:
    figures_of = (run.final or {}).get("accuracy", {}).get(block)
    if run.final is None or not figures_of:
        return None
    return Curve("", [run.final["step"]], [figures_of["mean"]], [(figures_of["ci95"][0], figures_of["ci95"][1])])


def _accuracy_side_by_side(runs: Sequence[RunFiles]) -> str:
    """Fig. 4 of the paper."""
    series = [accuracy_by_user(run) for run in runs]
    drawing = partial(figures.draw_users, series=series, xlabel="accuracy", share=True)
    note = "Held-out rows of seen users, each with its own embedding; 95% Wilson intervals over rows; dotted: chance."
    return "<h2>Accuracy of each user, run by run</h2>" + _figure(drawing, "Accuracy of each user in each run", note)


def _words(runs: Sequence[RunFiles]) -> str:
    """Fig. 3 of the paper."""
    sampled = [run for run in runs if run.samples.get("policy")]
    if not sampled:
        return ""
    series = [words_by_user(run.samples["policy"], run.name) for run in sampled]
    levels = []
    for i, run in enumerate(sampled):
        if answers := run.samples.get("generic"):
            whose = f"{figures.shorten(run.name)}, " if len(sampled) > 1 else ""
            levels.append(words_of_all(answers, f"{whose}generic user", series=i))
    references = [run.samples["reference"] for run in sampled if run.samples.get("reference")]
    if references:
        levels.append(words_of_all(references[0], "the reference", series=None))
    drawing = partial(figures.draw_users, series=series, xlabel="words an answer", share=False, levels=levels)
    note = "Mean words of the sampled answers to each user, 95% intervals over answers (t); lines: to all as one."
    return "<h2>Words of each user's answers</h2>" + _figure(drawing, "Words of each user's answers", note)


def _run_section(run: RunFiles) -> str:
    parts = [f"<h2>{escape(run.name)}</h2>"]
    if run.final and run.final.get("per_user"):
        parts += _users(run)
    answers = answers_side_by_side(run, num_prompts=NUM_PROMPTS, num_users=NUM_ANSWERED_USERS)
    if answers:
        parts.append("<h3>Answers side by side</h3>")
    for prompt, cards in answers:
        parts.append(f'<p class=prompt>{escape(prompt)}</p><div class="answers">')
        parts += [f"<div><b>{escape(who)}</b>{escape(answer)}</div>" for who, answer in cards]
        parts.append("</div>")
    parts.append(f"<h3>Configuration</h3><details><summary>config.yaml</summary><pre>{escape(run.config)}</pre></details>")
    return "\n".join(parts)


def _users(run: RunFiles) -> list[str]:
    own = accuracy_by_user(run, label="own embedding")
    series = [own, accuracy_by_user(run, generic=True, label="generic user")]
    drawing = partial(figures.draw_users, series=series, xlabel="accuracy", share=True, bars=True)
    note = "Held-out rows; 95% Wilson intervals over rows; dotted: chance."
    rows = [
        [user, _number(mine.value), f"{mine.low:.3f} to {mine.high:.3f}", _number(generic.value), str(mine.size)]
        for user, mine, generic in worst_users(run, NUM_WORST)
    ]
    return [
        "<h3>Accuracy of each user</h3>",
        _figure(drawing, f"Accuracy of each user of {run.name}", note),
        f"<h3>Worst users{f', {NUM_WORST} of {len(own.by_user)}' if len(own.by_user) > NUM_WORST else ''}</h3>",
        _table(["user", "accuracy", "95% interval", "generic", "rows"], rows),
    ]


def _figure(draw: Callable[[Any], None], alt: str, caption: str) -> str:
    data = base64.b64encode(figures.to_svg(draw).encode("utf-8")).decode("ascii")
    image = f'{IMAGE}{data}" alt="{escape(alt)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
