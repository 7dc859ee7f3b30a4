"""Benchmarks put their tables into a document and leave the rest of it alone."""

from __future__ import annotations

import pytest

from benchmarks.document import describe_run, write_section


def test_a_section_is_replaced_and_what_stands_around_it_stays(tmp_path):
    document = tmp_path / "benchmarks.md"
    document.write_text("# Figures\n\n<!-- steps -->\nold\n<!-- end of steps -->\n\nHand-written.\n", encoding="utf-8")
    write_section(document, "steps", "new\ntable")
    write_section(document, "users", "many")
    text = document.read_text(encoding="utf-8")
    assert text.startswith("# Figures\n\n<!-- steps -->\nnew\ntable\n<!-- end of steps -->\n\nHand-written.\n")
    assert text.endswith("\n\n<!-- users -->\nmany\n<!-- end of users -->\n")
    write_section(document, "users", "more")
    assert document.read_text(encoding="utf-8").count("users -->") == 2


def test_half_a_section_is_refused_and_kept(tmp_path):
    document = tmp_path / "benchmarks.md"
    document.write_text("<!-- steps -->\nold\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"benchmarks\.md: holds one of"):
        write_section(document, "steps", "new")
    assert document.read_text(encoding="utf-8") == "<!-- steps -->\nold\n"


def test_a_run_is_described_by_date_command_and_setting():
    assert describe_run("python -m x", threads=2, seed=0).endswith(", `python -m x`: threads 2, seed 0.")
