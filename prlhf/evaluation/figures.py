"""The figures of a report, drawn with matplotlib: the colours of Okabe and Ito, and for each a marker of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prlhf.errors import ConfigError
from prlhf.evaluation.figure_data import Curve, Level, UserFigures
from prlhf.evaluation.users import KnownUser, UserMap

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")  # one more than colours: a pair of the two comes back after 56
DASHES = ("-", "--", "-.", ":")
LEVEL_DASH = (0, (6, 2, 1, 2, 1, 2))  # none of a curve's
GREY = "#6b6b6b"
MAX_LABELLED_USERS = 40  # beyond them users are sorted and not named
MAX_LABEL = 28
WIDTH = 8.0  # inches
STYLE: dict[Any, Any] = {  # matplotlib types its keys as literals
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "prlhf",
    "text.parse_math": False,  # a $ in a user id is a $
}


def require_matplotlib(command: str = "prlhf report") -> None:
    """Raises: ConfigError: it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f"{command}: matplotlib is not installed, which draws the figures; pip install matplotlib")


@contextlib.contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing")  # an emoji in a user id is drawn as a box
        yield


def to_svg(draw: Callable[[Any], None]) -> str:
    """The SVG of a figure that `draw` fills; the same figures give the same text."""
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(layout="constrained")
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue().decode("utf-8")


def save_png(draw: Callable[[Any], None], path: Path) -> None:
    """Write a figure that `draw` fills, at 150 dots an inch."""
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(layout="constrained")
        draw(figure)
        figure.savefig(path, format="png", dpi=150)


def shorten(text: str) -> str:
    """A label that fits: what cannot be printed as ?, the middle of a long one cut out."""
    text = "".join(character if character.isprintable() else "?" for character in text)
    if len(text) <= MAX_LABEL:
        return text
    half = (MAX_LABEL - 1) // 2
    return f"{text[: MAX_LABEL - 1 - half]}…{text[-half:]}"


def draw_training(figure: Any, panels: Sequence[tuple[str, Sequence[Curve], Sequence[Curve]]]) -> None:
    """A panel a figure of training: its title, smoothed curves, and (faint) raw ones."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure.set_size_inches(WIDTH, 2.3 * ((len(panels) + 1) // 2) + 0.4)
    axes = figure.subplots((len(panels) + 1) // 2, 2, squeeze=False).flatten()
    for axis, (title, curves, raw) in zip(axes, panels, strict=False):
        for i, curve in enumerate(raw):
            axis.plot(curve.steps, curve.values, color=_colour(i), alpha=0.25, linewidth=0.6)
        for i, curve in enumerate(curves):
            axis.plot(curve.steps, curve.values, color=_colour(i), linestyle=_dash(i), linewidth=1.4,
                      label=shorten(curve.label) or None)
        axis.set_title(title, loc="left", fontsize=9.0)
        if title == "gradient norm":
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
        if title == "accuracy on training rows":
            axis.set_ylim(-0.02, 1.02)
        axis.set_xlim(left=0)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[: len(panels)][-2:]:
        axis.set_xlabel("step")
    _legend(figure, axes[: len(panels)])


def draw_over_steps(figure: Any, curves: Sequence[tuple[Curve, Curve | None]]) -> None:
    """Accuracy on dev rows over steps, each with the final figure on evaluation rows as a hollow marker."""
    figure.set_size_inches(WIDTH, 3.4)
    axis = figure.subplots()
    for i, (curve, final) in enumerate(curves):
        axis.plot(curve.steps, curve.values, color=_colour(i), linestyle=_dash(i), marker=_marker(i), markersize=4,
                  label=shorten(curve.label))
        if curve.bounds:
            low, high = zip(*curve.bounds, strict=True)
            axis.fill_between(curve.steps, low, high, color=_colour(i), alpha=0.12, linewidth=0)
        if final is not None and final.bounds:
            value, bounds = final.values[0], final.bounds[0]
            axis.errorbar(final.steps, final.values, yerr=[[value - bounds[0]], [bounds[1] - value]], color=_colour(i),
                          marker=_marker(i), markersize=7, markerfacecolor="white", linestyle="none", capsize=2)
    axis.axhline(0.5, color=GREY, linewidth=0.8, linestyle=":")
    axis.set_ylim(-0.02, 1.02)
    axis.set_xlim(left=0)
    axis.set_xlabel("step")
    axis.set_ylabel("accuracy")
    _legend(figure, [axis])


def draw_users(
    figure: Any,
    series: Sequence[UserFigures],
    *,
    xlabel: str,
    share: bool,
    bars: bool = False,
    levels: Sequence[Level] = (),
) -> None:
    """A figure of each user with its interval: a row a user, or beyond 40 users sorted curves.

    Args:
        share: values are shares of 1, of which one half is chance.
        bars: the first series as bars; the others stay points.
        levels: lines through all rows, with their intervals as bands.
    """
    users = list(dict.fromkeys(user for one in series for user in one.by_user))
    if len(users) > MAX_LABELLED_USERS:
        return _draw_sorted(figure, series, xlabel=xlabel, share=share, levels=levels)
    row = max(0.26, 0.12 * len(series) + 0.12)  # inches
    figure.set_size_inches(WIDTH, 1.0 + row * max(len(users), 2))
    axis = figure.subplots()
    places = np.arange(len(users))
    spread = 0.0 if bars else 0.62 * (1 - 1 / len(series))
    for place in places[1::2] if spread else ():  # bands hold together what belongs to one user
        axis.axhspan(place - 0.5, place + 0.5, color="#f4f4f4", zorder=0)
    for i, one in enumerate(series):
        known = [j for j, user in enumerate(users) if user in one.by_user]
        figures = [one.by_user[users[j]] for j in known]
        values = np.array([estimate.value for estimate in figures])
        errors = [values - [e.low for e in figures], [e.high for e in figures] - values]
        shift = spread * (i / max(1, len(series) - 1) - 0.5)
        colour = _colour(i)
        if bars and i == 0:
            axis.barh(places[known], values, height=0.62, color="#9ecae9", label=shorten(one.label))
        axis.errorbar(
            values, places[known] + shift, xerr=errors if i == 0 or not bars else None, color=colour,
            ecolor=colour, elinewidth=1.0, capsize=2, linestyle="none", markersize=4.5,
            marker="none" if bars and i == 0 else _marker(i), label=None if bars and i == 0 else shorten(one.label),
        )
    _draw_levels(levels, line=axis.axvline, band=axis.axvspan)
    if share:
        axis.axvline(0.5, color=GREY, linewidth=0.8, linestyle=":")
    axis.set_xlim(0, 1.02 if share else None)
    axis.set_yticks(places, [shorten(user) for user in users])
    axis.set_ylim(len(users) - 0.5, -0.5)
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel(xlabel)
    _legend(figure, [axis])


def _draw_sorted(
    figure: Any, series: Sequence[UserFigures], *, xlabel: str, share: bool, levels: Sequence[Level]
) -> None:
    figure.set_size_inches(WIDTH, 3.4)
    axis = figure.subplots()
    for i, one in enumerate(series):
        figures = sorted(one.by_user.values(), key=lambda estimate: estimate.value)
        ranks = np.arange(1, len(figures) + 1)
        axis.plot(ranks, [e.value for e in figures], color=_colour(i), linestyle=_dash(i), linewidth=1.4,
                  label=f"{shorten(one.label)} ({len(figures)} users)")
        axis.fill_between(ranks, [e.low for e in figures], [e.high for e in figures], color=_colour(i), alpha=0.12,
                          linewidth=0)
    _draw_levels(levels, line=axis.axhline, band=axis.axhspan)
    if share:
        axis.axhline(0.5, color=GREY, linewidth=0.8, linestyle=":")
        axis.set_ylim(-0.02, 1.02)
    else:
        axis.set_ylim(bottom=0)
    axis.set_xlim(left=0)
    axis.set_xlabel("users, each series from its lowest to its highest")
    axis.set_ylabel(xlabel)
    _legend(figure, [axis])


def _draw_levels(levels: Sequence[Level], *, line: Callable[..., Any], band: Callable[..., Any]) -> None:
    """In the colour of their series; black and dotted those of none."""
    for level in levels:
        colour, style = ("#000000", ":") if level.series is None else (_colour(level.series), LEVEL_DASH)
        band(level.estimate.low, level.estimate.high, color=colour, alpha=0.1, linewidth=0, zorder=0.5)
        line(level.estimate.value, color=colour, linestyle=style, linewidth=1.4, label=level.label)


def draw_map(figure: Any, places: UserMap, users: Sequence[KnownUser], *, by_cluster: bool) -> None:
    """Users in a plane, coloured by cluster (each with a marker of its own) or by accuracy, and the generic user.

    Args:
        users: in the order of `places.users`; up to 40 are named.
    """
    figure.set_size_inches(WIDTH, 6.0)
    axis = figure.subplots()
    points = places.users.numpy()
    if by_cluster:
        for cluster in sorted({user.cluster for user in users if user.cluster is not None}):
            members = points[[i for i, user in enumerate(users) if user.cluster == cluster]]
            axis.scatter(*members.T, s=36, color=_colour(cluster), marker=_marker(cluster), label=f"cluster {cluster}")
    else:
        known = [i for i, user in enumerate(users) if user.accuracy is not None]
        unknown = [i for i, user in enumerate(users) if user.accuracy is None]
        axis.scatter(*points[unknown].T, s=36, color=GREY, label="not evaluated" if unknown else None)
        if known:
            shown = axis.scatter(*points[known].T, s=36, c=[users[i].accuracy for i in known], cmap="cividis",
                                 edgecolors=GREY, linewidths=0.5)
            figure.colorbar(shown, label="accuracy")
    # Below the users, of whom it would cover those who are like nobody else.
    axis.scatter(*places.generic.numpy(), s=140, marker="*", color="#000000", label="generic user", zorder=0.9)
    axis.margins(0.12)
    axis.set_xlabel(f"first component ({places.explained[0]:.0%} of the variance of the soft prompts)")
    axis.set_ylabel(f"second component ({places.explained[1]:.0%})")
    _legend(figure, [axis])
    named, names = places.generic.numpy()[None], ["generic user"]
    if len(users) <= MAX_LABELLED_USERS:
        named, names = np.concatenate([points, named]), [*(shorten(user.user_id) for user in users), *names]
    figure.draw_without_rendering()  # only now axes have their places
    _name_points(axis, named, names)


def _name_points(axis: Any, points: Any, names: Sequence[str]) -> None:
    """Names to the right of their points, from the lowest on; one that would lie on another is lifted, on a line."""
    in_points = axis.transData.transform(points) * 72 / axis.figure.dpi
    placed: list[tuple[float, float, float]] = []
    for i in np.argsort(in_points[:, 1], kind="stable"):
        x, y = in_points[i]
        height, end = y, x + 12 + 5 * len(names[i])
        for other_x, other_end, other_height in sorted(placed, key=lambda other: other[2]):
            if x < other_end and other_x < end and abs(height - other_height) < 10:
                height = other_height + 10
        placed.append((x, end, height))
        axis.annotate(names[i], points[i], xytext=(9, height - y), textcoords="offset points", fontsize=8,
                      va="center", arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkB": 3})


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    """One legend for all panels, above them, users' points before lines; none for a single series that says nothing."""
    from matplotlib.container import Container

    found: dict[str, Any] = {}
    for axis in axes:
        entries = zip(*axis.get_legend_handles_labels(), strict=True)
        for handle, label in sorted(entries, key=lambda entry: not isinstance(entry[0], Container)):
            found.setdefault(label, handle)
    if len(found) > 1:
        columns = max(1, min(len(found), 96 // (max(map(len, found)) + 8)))
        figure.legend(found.values(), found.keys(), loc="outside upper left", ncols=columns)


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _marker(i: int) -> str:
    return MARKERS[i % len(MARKERS)]


def _dash(i: int) -> str:
    return DASHES[i % len(DASHES)]
