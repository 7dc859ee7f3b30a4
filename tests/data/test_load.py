"""Sources of data by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prlhf.data.load import load_preference_data, load_response_rows
from prlhf.data.records import ResponseRow
from prlhf.errors import DataError

OPTIONS = {"seed": 3, "eval_prompts": 0.1, "unseen_users": 0.2}


def write(path: Path, records: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


def preferences(num_prompts: int = 40) -> list[dict]:
    return [
        {"user_id": user, "prompt": f"p{number}", "chosen": f"c{number} {user}", "rejected": "r"}
        for number in range(num_prompts)
        for user in "abcde"
    ]


def test_one_file_is_split_by_prompt_and_user_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write(tmp_path / "rows.jsonl", preferences())
    with caplog.at_level("INFO"):
        data = load_preference_data(source, **OPTIONS)
    assert "split in memory by prompt and user (seed 3)" in caplog.text
    assert len({row.prompt for row in data.eval_seen}) == 4 and len({row.user_id for row in data.eval_unseen}) == 1
    assert not {row.prompt for row in data.train} & {row.prompt for row in data.eval_seen}


def test_sft_on_the_same_file_never_sees_the_prompts_held_out_for_preferences(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", preferences())
    data = load_preference_data(source, **OPTIONS)
    train, dev = load_response_rows(source, **OPTIONS)
    assert train == [ResponseRow(row.prompt, row.chosen) for row in data.train]
    assert dev == [ResponseRow(row.prompt, row.chosen) for row in data.dev]


def test_sft_reads_text_files_and_directories(tmp_path: Path) -> None:
    texts = [{"text": f"text {number}"} for number in range(40)]
    train, dev = load_response_rows(write(tmp_path / "text.jsonl", texts), **OPTIONS)
    assert (len(train), len(dev)) == (38, 2)
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.jsonl", [{"prompt": "p", "response": "r"}, preferences()[0]])
    assert load_response_rows(str(folder), **OPTIONS) == ([ResponseRow("p", "r"), ResponseRow("p0", "c0 a")], [])


def test_a_file_of_two_kinds_of_rows_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"text": "t"}, *preferences()[:2]])
    with pytest.raises(DataError, match="2 of 3 rows are preferences"):
        load_response_rows(source, **OPTIONS)


@pytest.mark.parametrize("name", ["response", "completion"])
def test_sft_imitates_no_response_that_somebody_judged_by_a_label(tmp_path: Path, name: str) -> None:
    thumbs = [{"user_id": "u", "prompt": f"p{number}", name: "r", "label": number % 2 == 0} for number in range(40)]
    folder = tmp_path / "folder"
    folder.mkdir()
    for source in (write(tmp_path / "rows.jsonl", thumbs), write(folder / "train.jsonl", thumbs)):
        with pytest.raises(DataError, match=r"\.jsonl:1: has a label, .*method dpo or pdpo and loss.kind kto"):
            load_response_rows(source if source.endswith("rows.jsonl") else str(folder), **OPTIONS)


def test_columns_without_a_meaning_are_named_in_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write(tmp_path / "rows.jsonl", [{**record, "user_txt": "x"} for record in preferences()])
    with caplog.at_level("WARNING"):
        load_preference_data(source, **OPTIONS)
    assert "columns that are not used: ['user_txt']" in caplog.text


def test_one_pair_id_for_two_pairs_of_one_file_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{**record, "pair_id": "1"} for record in preferences()[:2]])
    with pytest.raises(DataError, match=r"rows\.jsonl:2: pair_id '1' names another prompt .*rows\.jsonl:1;"):
        load_preference_data(source, **OPTIONS)


def test_bad_rows_are_skipped_only_when_asked(tmp_path: Path) -> None:
    records = [*preferences(), {"user_id": 5}]
    source = write(tmp_path / "rows.jsonl", records)
    with pytest.raises(DataError, match=r"rows\.jsonl:201: no 'prompt'"):
        load_preference_data(source, **OPTIONS)
    data = load_preference_data(source, **OPTIONS, on_bad_row="skip")
    assert len(data.user_ids()) == 4


@pytest.mark.parametrize("source", ["builtin:psoup", "absent.jsonl", "absent/"])
def test_an_unknown_source_is_refused_with_the_known_ones(source: str) -> None:
    with pytest.raises(DataError, match=f"data.source '{source}': no such file.*builtin:psoups"):
        load_preference_data(source, **OPTIONS)
    with pytest.raises(DataError, match=f"data.source '{source}': no such file.*builtin:text"):
        load_response_rows(source, **OPTIONS)


@pytest.mark.parametrize("content", ["", '{"user_id": "u", "prompt": "p", "chosen": "s", "rejected": "s"}'])
def test_a_file_without_usable_rows_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="no usable rows"):
        load_preference_data(str(path), **OPTIONS)
