"""Bad input as files: each ends as the lines beside it say; tests/corpus/README.md tells how to add one."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from pathlib import Path

import pytest

from prlhf.data.prepared import load_prepared, read_judgments
from prlhf.data.records import record_from_row
from prlhf.errors import DataError
from tests.cli_run import Run
from tests.tiny_run import Tiny

CORPUS = Path(__file__).resolve().parent / "corpus"
EXPECTED = ".expected"
ACCEPTED = "accepted"
DATA, CONFIGS, TOKENIZERS = ("jsonl", "unicode", "data"), ("yaml", "config"), ("tokenizer",)
NOT_CASES = {ACCEPTED, "boundaries.jsonl"}  # what is in them is well
# A message says where: a file and line, a setting, or a row; and what to do, or what was expected.
PLACE = re.compile(r"\{case\}|^error: (model\.backbone|data\.source|pair) '")
REMEDY = re.compile(r"; |, expected ")
NOT_OF_ONE_LINE = {"pair_id_of_two_pairs.jsonl", "cut_short.jsonl.gz", "not_gzip.jsonl.gz"}


def cases(*folders: str) -> list[Path]:
    return [
        path
        for folder in folders
        for path in sorted((CORPUS / folder).iterdir())
        if path.suffix != EXPECTED and path.name not in NOT_CASES
    ]


def case_id(path: Path) -> str:
    return str(path.relative_to(CORPUS))


def expected_lines(case: Path) -> list[str]:
    return case.with_name(case.name + EXPECTED).read_text(encoding="utf-8").splitlines()


def matches(line: str, expected: str, case: Path) -> bool:
    """Whether a line is the expected one: {case} is the input's path, {*} the words of json, yaml or transformers."""
    pattern = re.escape(expected.replace("{case}", str(case))).replace(re.escape("{*}"), ".+")
    return re.fullmatch(pattern, line) is not None


def bad_lines() -> list[tuple[Path, int]]:
    """Cases of which a single line is bad by itself, and the number of that line."""
    found = []
    for case in cases("jsonl", "unicode"):
        place = re.match(r"error: \{case\}:(\d+): ", "".join(expected_lines(case)[:1]))
        if place and ".jsonl" in case.suffixes and case.name not in NOT_OF_ONE_LINE:
            found.append((case, int(place[1])))
    return found


@pytest.fixture
def run(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)  # where a canary would appear
    return Run(tiny, tmp_path, capsys)


def outcome(run: Run, caplog: pytest.LogCaptureFixture, *argv: object) -> tuple[int, list[str]]:
    """The exit code, and warnings and errors."""
    with caplog.at_level("WARNING", logger="prlhf"):
        code, _, err = run(*argv)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    errors = [line for line in err.splitlines() if line and not line.startswith("Loading weights")]  # a progress bar
    return code, [*(f"warning: {text}" for text in warnings), *errors]


def check(case: Path, code: int, lines: list[str], expected: list[str]) -> None:
    assert len(lines) == len(expected), lines
    for line, pattern in zip(lines, expected, strict=True):
        assert matches(line, pattern, case), line
    assert code == (2 if any(line.startswith("error: ") for line in expected) else 0)
    assert not Path("canary").exists()


def model_folder(run: Run, case: Path) -> Path:
    """The tiny model with the files of a case in place of its own."""
    folder = run.folder / case.name
    shutil.copytree(run.tiny.model, folder)
    shutil.copytree(case, folder, dirs_exist_ok=True)
    return folder


@pytest.mark.parametrize("case", cases(*DATA), ids=case_id)
def test_bad_data_ends_in_the_lines_beside_it(run: Run, caplog: pytest.LogCaptureFixture, case: Path) -> None:
    check(case, *outcome(run, caplog, "data", "check", case), expected_lines(case))


@pytest.mark.parametrize("case", cases(*CONFIGS), ids=case_id)
def test_a_bad_configuration_ends_in_the_lines_beside_it(
    run: Run, caplog: pytest.LogCaptureFixture, case: Path
) -> None:
    seen = outcome(run, caplog, "train", case, "--dry-run", "--runs", run.runs)
    check(case, *seen, expected_lines(case))


@pytest.mark.parametrize("case", cases(*TOKENIZERS), ids=case_id)
def test_a_bad_tokenizer_ends_in_the_lines_beside_it(run: Run, caplog: pytest.LogCaptureFixture, case: Path) -> None:
    folder = model_folder(run, case)
    rows = folder / "rows.jsonl"
    config = run.config(model__backbone=str(folder), data__source=str(rows if rows.exists() else run.tiny.data))
    seen = outcome(run, caplog, "train", config, "--dry-run", "--runs", run.runs)
    check(folder, *seen, expected_lines(case))


def test_special_tokens_that_nobody_writes_may_lie_beyond_the_embeddings(run: Run) -> None:
    """As Gemma 3 has it: the tokenizer knows images, the text model does not."""
    folder = model_folder(run, CORPUS / "tokenizer" / ACCEPTED / "more_special_tokens_than_the_model")
    assert run("train", run.config(model__backbone=str(folder)), "--dry-run", "--runs", run.runs)[0] == 0


@pytest.mark.parametrize("case", sorted((CORPUS / "unicode" / ACCEPTED).iterdir()), ids=case_id)
def test_every_character_comes_back_from_preparation_as_it_went_in(run: Run, case: Path) -> None:
    out = run.folder / "out"
    assert run("data", "prepare", "jsonl", "--raw", case, "--out", out, "--eval-prompts", "0")[0] == 0
    given = [json.loads(line) for line in case.read_bytes().decode("utf-8").split("\n") if line]
    data = load_prepared(out)
    records = [record_from_row(row) for row in (*data.train, *data.dev)]
    read = [{name: record.get(name) for name in given[0]} for record in records]
    assert sorted(read, key=json.dumps) == sorted(given, key=json.dumps)
    assert sorted(path.name for path in run.folder.rglob("*")) == [
        "dev.jsonl", "eval_seen.jsonl", "eval_unseen.jsonl", "out", "train.jsonl"
    ]


@pytest.mark.parametrize(("case", "number"), bad_lines(), ids=lambda value: getattr(value, "name", ""))
def test_a_bad_line_among_a_hundred_is_skipped_and_counted_on_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, case: Path, number: int
) -> None:
    data = gzip.decompress(case.read_bytes()) if case.suffix == ".gz" else case.read_bytes()
    good = b'{"user_id": "ann", "prompt": "What is ice?", "chosen": "Water.", "rejected": "Cold water."}\n'
    path = tmp_path / "rows.jsonl"
    path.write_bytes(good * 60 + data.split(b"\n")[number - 1] + b"\n" + good * 40)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}:61: "):
        read_judgments(path, "error")
    with caplog.at_level("WARNING", logger="prlhf"):
        rows = read_judgments(path, "skip")
    assert [where for where, _ in rows] == [f"{path}:{line}" for line in range(1, 102) if line != 61]
    assert f"{path}: skipped 1 bad rows of 101; the first: {path}:61: " in caplog.text


@pytest.mark.parametrize("case", cases(*DATA, *CONFIGS, *TOKENIZERS), ids=case_id)
def test_every_message_says_where_and_what_to_do(case: Path) -> None:
    for line in expected_lines(case):
        assert line.startswith("warning: ") or (PLACE.search(line) and REMEDY.search(line)), line


def test_every_expectation_has_its_case() -> None:
    expected = {path.with_suffix("") for path in CORPUS.rglob(f"*{EXPECTED}")}
    assert expected == set(cases(*DATA, *CONFIGS, *TOKENIZERS))
