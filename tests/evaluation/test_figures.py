"""The figures show the numbers they are given, whatever the users are called and however many there are."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from prlhf.evaluation.figure_data import Curve, Estimate, Level, UserFigures
from prlhf.evaluation.figures import (
    COLOURS,
    MARKERS,
    draw_map,
    draw_over_steps,
    draw_training,
    draw_users,
    shorten,
    to_svg,
)
from prlhf.evaluation.html_report import write_report
from prlhf.evaluation.users import KnownUser, UserMap
from tests.evaluation.runs import finished_run


@pytest.fixture
def figure() -> Any:
    return pytest.importorskip("matplotlib.figure").Figure(layout="constrained")


def users(label: str, values: dict[str, float]) -> UserFigures:
    return UserFigures(label, {user: Estimate(value, value - 0.1, value + 0.05, 9) for user, value in values.items()})


def points(axis: Any) -> list[tuple[list[float], list[float]]]:
    """x and y of every marked series, without interval caps and rules."""
    lines = [line for line in axis.get_lines() if line.get_marker() in MARKERS and len(line.get_xdata())]
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in lines]


@pytest.mark.parametrize("num_users", [6, 40])
def test_no_name_on_the_map_lies_on_another_and_the_generic_star_below_the_users(num_users: int, figure: Any) -> None:
    """Users in a heap, the first right on the generic one."""
    around = 0.02 * torch.randn(num_users, 2, generator=torch.Generator().manual_seed(0))
    around[0], around[1] = 0, torch.tensor([1.0, 1.0])
    known = [KnownUser(f"user {i}", 0.9, 0.5, 4, None, None) for i in range(num_users)]
    draw_map(figure, UserMap(around, torch.zeros(2), (0.6, 0.4)), known, by_cluster=False)
    figure.draw_without_rendering()
    extent = pytest.importorskip("matplotlib.text").Text.get_window_extent  # an annotation's own has its line, too
    texts = {text.get_text(): extent(text).shrunk(0.99, 0.85) for text in figure.axes[0].texts}
    assert texts.keys() == {"generic user", *(user.user_id for user in known)}
    boxes = list(texts.values())
    assert not [1 for i, box in enumerate(boxes) for other in boxes[:i] if box.overlaps(other)]
    *others, star = figure.axes[0].collections
    assert star.get_label() == "generic user" and all(star.get_zorder() < other.get_zorder() for other in others)


def test_each_user_has_a_row_with_a_point_for_each_run(figure: Any) -> None:
    draw_users(
        figure, [users("mine", {"ann": 0.9, "bob": 0.7}), users("other", {"bob": 0.4})], xlabel="accuracy", share=True
    )
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["ann", "bob"]
    (mine, mine_rows), (other, other_rows) = points(axis)
    assert (mine, other) == ([0.9, 0.7], [0.4])
    assert [round(row) for row in mine_rows + other_rows] == [0, 1, 1]
    assert mine_rows[1] != other_rows[0], "points of one row do not hide each other"
    assert axis.get_xlim() == (0, 1.02)
    assert axis.yaxis_inverted(), "the first user on top"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["mine", "other"]


def test_bars_start_at_zero_and_the_generic_user_is_a_point(figure: Any) -> None:
    series = [users("own", {"ann": 0.9, "bob": 0.7}), users("generic", {"ann": 0.5, "bob": 0.6})]
    draw_users(figure, series, xlabel="accuracy", share=True, bars=True)
    (axis,) = figure.axes
    assert [(bar.get_x(), bar.get_width()) for bar in axis.patches] == [(0, 0.9), (0, 0.7)]
    assert points(axis) == [([0.5, 0.6], [0, 1])]


def test_beyond_forty_users_they_are_sorted_and_not_named(figure: Any) -> None:
    values = {f"u{i}": (i * 37 % 200) / 200 for i in range(200)}
    draw_users(figure, [users("mine", values)], xlabel="accuracy", share=True)
    (axis,) = figure.axes
    assert list(axis.get_lines()[0].get_ydata()) == sorted(values.values())
    assert figure.get_size_inches()[1] < 5


@pytest.mark.parametrize(("count", "named"), [(10, True), (40, True), (41, False)])
def test_what_belongs_to_no_user_is_a_line_and_takes_no_name_from_a_user(figure: Any, count: int, named: bool) -> None:
    values = {f"u{i}": 20.0 + i for i in range(count)}
    generic = Level("generic user", Estimate(38.0, 36.0, 40.0, 9), 0)
    levels = [generic, Level("the reference", Estimate(30.0, 30.0, 30.0, 1), None)]
    draw_users(figure, [users("mine", values)], xlabel="words", share=False, levels=levels)
    (axis,) = figure.axes
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert (names == list(values)) is named
    lines = {line.get_label(): line for line in axis.get_lines()}
    own, reference = lines["generic user"], lines["the reference"]
    for line, value in ((own, 38.0), (reference, 30.0)):
        assert list(line.get_xdata() if named else line.get_ydata()) == [value, value]
    assert (own.get_color(), reference.get_color()) == (COLOURS[0], "#000000")
    first = "mine" if named else f"mine ({count} users)"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [first, "generic user", "the reference"]


@pytest.mark.parametrize("count", [1, 2, 10, 40])
def test_rows_leave_room_for_their_labels(figure: Any, count: int) -> None:
    draw_users(figure, [users("mine", {f"u{i}": 0.5 for i in range(count)})], xlabel="accuracy", share=True)
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert len(boxes) == count
    assert not any(first.overlaps(second) for first, second in zip(boxes, boxes[1:], strict=False))


def test_a_panel_a_figure_of_training_with_one_legend(figure: Any) -> None:
    curves = [Curve("mine", [1, 2], [0.7, 0.5]), Curve("other", [1, 2], [0.7, 0.6])]
    draw_training(figure, [("loss", curves, []), ("gradient norm", curves, [Curve("", [1, 2], [3.0, 4.0])])])
    loss, norm = figure.axes
    assert [list(line.get_ydata()) for line in loss.get_lines()] == [[0.7, 0.5], [0.7, 0.6]]
    assert (norm.get_yscale(), len(norm.get_lines())) == ("log", 3)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["mine", "other"]


def test_the_last_figure_is_set_apart_from_those_during_training(figure: Any) -> None:
    curve = Curve("mine", [20, 100], [0.25, 0.5], [(0.1, 0.4), (0.4, 0.6)])
    draw_over_steps(figure, [(curve, Curve("", [120], [0.75], [(0.7, 0.8)])), (Curve("b", [20], [0.5]), None)])
    assert points(figure.axes[0]) == [([20, 100], [0.25, 0.5]), ([120], [0.75]), ([20], [0.5])]


def test_no_two_of_many_runs_look_alike() -> None:
    count = len(COLOURS) * len(MARKERS)
    assert len({(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i in range(count)}) == count


def test_names_are_drawn_as_they_are() -> None:
    pytest.importorskip("matplotlib")
    names = ("$x$", "_hidden", "a\x00b", "\ud800", "<&>", "\U0001f600", "x" * 300)
    svg = to_svg(partial(draw_users, series=[users("$run$", dict.fromkeys(names, 0.5))] * 2, xlabel="x", share=True))
    assert svg.startswith("<?xml") and "<script" not in svg
    assert svg == to_svg(
        partial(draw_users, series=[users("$run$", dict.fromkeys(names, 0.5))] * 2, xlabel="x", share=True)
    )


def test_long_and_unprintable_names_are_shortened() -> None:
    assert shorten("ann") == "ann"
    assert shorten("a\nb\x00") == "a?b?"
    assert shorten("worker-" + "0" * 30 + "-end") == "worker-0000000…000000000-end"
    assert len(shorten("x" * 300)) == 28


def test_a_report_of_real_figures_is_the_same_twice(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = finished_run(tmp_path / "mine")
    first, second = (write_report([run], tmp_path / f"{i}.html").read_text() for i in range(2))
    assert first == second and first.count("<img ") == 4
