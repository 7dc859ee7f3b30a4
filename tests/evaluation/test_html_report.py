"""The page holds the figures it is given, runs nothing, fetches nothing, and shows hostile text as text."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from prlhf.cli import main
from prlhf.evaluation import figures
from prlhf.evaluation.html_report import render_report, write_report
from prlhf.evaluation.run_files import read_runs
from tests.evaluation.runs import finished_run, write_lines, write_run
from tests.evaluation.test_report import final_of, judged, tax_of

HOSTILE = "<script>alert('x')</script>&\"\x00\u202e"


class Page(HTMLParser):
    """Tags with their attributes, the text outside style, and the cells of every table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.text = "".join(self.words)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.words.append(data)
        if self._open and self._open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would be drawn, so that the page is tested without matplotlib too."""
    calls: list[Any] = []

    def to_svg(draw: Callable[[Any], None]) -> str:
        calls.append(draw)
        return "<svg/>"

    monkeypatch.setattr(figures, "require_matplotlib", lambda: None)
    monkeypatch.setattr(figures, "to_svg", to_svg)
    return calls


def page_of(*folders: Path) -> Page:
    return Page(render_report(read_runs(folders)))


def drawings(drawn: list[Any], function: Callable[..., None]) -> list[dict[str, Any]]:
    return [draw.keywords for draw in drawn if draw.func is function]


def test_a_run_is_shown_with_its_figures_users_answers_and_configuration(tmp_path: Path, drawn: list[Any]) -> None:
    page = page_of(finished_run(tmp_path / "mine", **judged(), tax=tax_of(1, 1.25, 1.5)))
    for row in (
        ["accuracy, seen users", "0.750"], ["95% interval", "0.650 to 0.850"], ["worst user", "0.250"],
        ["the same rows, generic user", "0.500"], ["accuracy, unseen users", "0.625"],
        ["answers on the user's side", "0.700"], ["NLL/token of answers", "1.500"],
        ["NLL/token of neutral text: reference", "1.000"], ["the same, generic user", "1.250"],
        ["the same, mean of users", "1.500"],
        ["bob", "0.250", "0.046 to 0.699", "0.750", "4"],
    ):  # fmt: skip
        assert row in page.rows, row
    assert "one two three four five" in page.text and "so so" in page.text
    assert "name: exp\nseed: 3" in page.text
    assert len(drawn) == len([tag for tag, _ in page.tags if tag == "img"]) == 4
    (training,) = drawings(drawn, figures.draw_training)
    assert [title for title, *_ in training["panels"]] == [
        "loss", "accuracy on training rows", "gradient norm", "learning rate"
    ]
    assert [curve.label for curve in training["panels"][1][1]] == ["as the row's user", "as the generic user"]
    (over_steps,) = drawings(drawn, figures.draw_over_steps)
    ((curve, final),) = over_steps["curves"]
    assert (curve.values, final.steps, final.values) == ([0.25, 0.5], [7], [0.75])


def test_several_runs_stand_side_by_side(tmp_path: Path, drawn: list[Any]) -> None:
    page = page_of(finished_run(tmp_path / "mine"), finished_run(tmp_path / "vanilla", user_model="none"))
    assert ["user model", "individual", "none"] in page.rows
    users = drawings(drawn, figures.draw_users)
    assert [[series.label for series in call["series"]] for call in users] == [
        ["mine", "vanilla"],
        ["mine", "vanilla"],
        ["own embedding", "generic user"],
        ["own embedding", "generic user"],
    ]
    assert [call.get("bars", False) for call in users] == [False, False, True, True]
    assert [[level.label for level in call.get("levels", [])] for call in users] == [[], ["the reference"], [], []]
    (training,) = drawings(drawn, figures.draw_training)
    assert [[curve.label for curve in curves] for _, curves, _ in training["panels"]] == [["mine", "vanilla"]] * 4


def test_baselines_and_checks_of_the_runs_with_preferences_stand_side_by_side(tmp_path: Path) -> None:
    mine = finished_run(tmp_path / "mine", baselines={"length_only": {"seen": 0.7}}, **judged())
    vanilla = finished_run(tmp_path / "vanilla", user_model="none", ceiling=0.9, **judged())
    for folder, score in ((mine, 1.0), (vanilla, 0.5)):
        rows = [{"user_id": user, "prompt": "Q", "response": "so", "score": score} for user in ("ann", "bob")]
        write_lines(folder / "samples" / "policy.jsonl", rows)
    sft = write_run(tmp_path / "sft", final={**final_of(method="sft"), "accuracy": {}, "per_user": {}})
    page = page_of(mine, sft, vanilla)
    for row in (
        ["", "mine", "vanilla"], ["length alone, seen users", "0.700", "-"],
        ["best possible under the labels' noise", "-", "0.900"],
        ["generic user's accuracy less the vanilla run's", "-0.250", "-"],
        ["answers against the reference's (a tie is half)", "0.688", "0.688"],
        ["answers against the vanilla run's", "1.000", "-"],
    ):  # fmt: skip
        assert row in page.rows, row
    assert "Baselines and checks" not in page_of(write_run(tmp_path / "going on")).text


@pytest.mark.parametrize("num_runs", [1, 2])
def test_the_generic_user_and_the_reference_are_no_users_of_the_words(
    tmp_path: Path, drawn: list[Any], num_runs: int
) -> None:
    folders = [finished_run(tmp_path / name) for name in ("mine", "other")[:num_runs]]
    for folder in folders:
        rows = [{"user_id": "generic", "prompt": f"Q{i}", "response": "so " * i} for i in (1, 3)]
        write_lines(folder / "samples" / "generic.jsonl", rows)
    page_of(*folders)
    (words,) = (call for call in drawings(drawn, figures.draw_users) if call["xlabel"] == "words an answer")
    assert [list(series.by_user) for series in words["series"]] == [["ann", "bob"]] * num_runs
    whose = ["generic user"] if num_runs == 1 else ["mine, generic user", "other, generic user"]
    assert [(level.label, level.estimate.value, level.series) for level in words["levels"]] == [
        *((label, 2.0, i) for i, label in enumerate(whose)), ("the reference", 2.0, None)
    ]


def test_a_run_that_is_not_finished_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "mine", samples=False, evaluations=False))
    assert ["steps", "3"] in page.rows
    assert "Not finished: mine." in page.text
    assert "eval.every_steps" in page.text


def test_a_run_without_preferences_is_shown_too(tmp_path: Path) -> None:
    final = final_of(method="sft")
    del final["accuracy"], final["per_user"]
    assert ["method", "sft"] in page_of(write_run(tmp_path / "mine", final=final)).rows


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    users = {HOSTILE: {"accuracy": 1.0, "generic_accuracy": 0.5, "num_rows": 4}}
    folder = finished_run(tmp_path / "<b>run", per_user=users, data={"source": HOSTILE, "seed": 0})
    (folder / "config.yaml").write_text(f"name: {HOSTILE}\n")
    write_lines(
        folder / "samples" / "policy.jsonl",
        [{"user_id": HOSTILE, "prompt": f"</p>{HOSTILE}", "response": f"</div><img src=x onerror=alert(1)>{HOSTILE}"}],
    )
    text = render_report(read_runs([folder]))
    page = Page(text)
    assert "<script" not in text and "onerror=alert(1)>" not in text
    assert {tag for tag, _ in page.tags} <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "div", "table", "thead", "tbody", "tr",
        "th", "td", "p", "b", "code", "pre", "details", "summary", "figure", "figcaption", "img",
    }  # fmt: skip
    assert "</div><img src=x onerror=alert(1)><script>alert('x')</script>" in page.text
    assert any(HOSTILE.replace("\x00", "\ufffd") in row[0] or HOSTILE in row[0] for row in page.rows)


def test_nothing_comes_from_outside_and_nothing_runs(tmp_path: Path) -> None:
    text = render_report(read_runs([finished_run(tmp_path / "mine")]))
    page = Page(text)
    sources = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert sources and all(source is not None and source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert not re.search(r"https?:|//|@import|url\(", re.sub(r"base64,[A-Za-z0-9+/=]*", "", text))
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy is not None and policy.startswith("default-src 'none'")


def test_many_users_are_cut_to_the_worst_ten(tmp_path: Path) -> None:
    users = {f"u{i}": {"accuracy": i / 200, "generic_accuracy": 0.5, "num_rows": 200} for i in range(200)}
    page = page_of(finished_run(tmp_path / "mine", per_user=users))
    assert "Worst users, 10 of 200" in page.text
    assert [row[0] for row in page.rows if row[0].startswith("u") and len(row) == 5][1:] == [f"u{i}" for i in range(10)]


def test_the_page_is_written_beside_the_first_run_or_where_it_is_wanted(tmp_path: Path) -> None:
    first, second = finished_run(tmp_path / "first"), finished_run(tmp_path / "second")
    assert write_report([first, second], None) == first / "report.html"
    assert write_report([first], tmp_path) == tmp_path / "report.html"
    assert write_report([first], tmp_path / "new" / "page.html") == tmp_path / "new" / "page.html"
    assert (tmp_path / "new" / "page.html").read_text() == (tmp_path / "report.html").read_text(), "nothing but the run"


def test_the_command_says_where_the_page_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished_run(tmp_path / "mine")
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"


def test_figures_are_files_too_where_a_directory_is_given(tmp_path: Path) -> None:
    run, folder = finished_run(tmp_path / "a&b"), tmp_path / "new" / "figures"
    assert main(["report", str(run), "--figures", str(folder)]) == 0
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == sum(tag == "img" for tag, _ in page.tags) > 1
    assert names[0] == "01_Training_curves.svg" and names[-1] == f"{len(names):02d}_Accuracy_of_each_user_of_a_b.svg"
    assert all("<svg" in path.read_text(encoding="utf-8") for path in folder.iterdir())


def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: no run directory (no config.yaml); give runs/NAME\n"


def test_without_matplotlib_the_way_to_get_it_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_run(tmp_path / "mine")
    monkeypatch.undo()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    assert main(["report", str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install matplotlib" in line
    assert not (run / "report.html").exists()
