"""Tensors cut into rows are those that are whole, whoever reads which rows; what does not fit together is refused."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prlhf.errors import CheckpointError
from prlhf.models.tensor_files import StoredTensors, layout_path, make_layout, part_path, row_bounds

BOUNDS = {"weight": [0, 2, 4, 5], "bias": [0, 1, 1, 2]}  # the second rank has no row of the bias
NUM_PARTS = 3


def tensors() -> dict[str, Tensor]:
    return {
        "weight": torch.arange(30, dtype=torch.bfloat16).reshape(5, 2, 3),
        "bias": torch.tensor([0.5, -0.25]),
        "weight.step": torch.tensor(7.0),
        "head": torch.arange(4.0).reshape(2, 2),
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Tensors of which two are in three parts."""
    whole = tensors()
    path = tmp_path / "trainable.safetensors"
    for number in range(NUM_PARTS):
        cuts = {name: whole[name][bounds[number] : bounds[number + 1]] for name, bounds in BOUNDS.items()}
        save_file({name: cut for name, cut in cuts.items() if len(cut)}, part_path(path, number, NUM_PARTS))
    save_file({name: tensor for name, tensor in whole.items() if name not in BOUNDS}, path)
    layout_path(path).write_text(json.dumps(make_layout(BOUNDS, NUM_PARTS)))
    return path


def change(path: Path, **changes: Any) -> None:
    """Change tensors of a file; None takes one out."""
    state = {name: tensor.clone() for name, tensor in load_file(path).items()} | changes
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)


def message_of(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        StoredTensors(path)
    (message,) = caught.value.messages
    assert message.endswith("; use another checkpoint")
    return message


def test_parts_are_named_by_rank(path: Path) -> None:
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "trainable.parts.json",
        *(f"trainable.rank0000{number}-of-00003.safetensors" for number in range(3)),
        "trainable.safetensors",
    ]


def test_tensors_are_put_together_bitwise(path: Path) -> None:
    stored = StoredTensors(path)
    assert stored.kinds.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert (stored.kinds[name].shape, stored.kinds[name].dtype) == (tensor.shape, tensor.dtype)
        assert torch.equal(stored.read(name), tensor)


@pytest.mark.parametrize("num_readers", [1, 2, 4, 7])
def test_any_number_of_readers_gets_its_rows(path: Path, num_readers: int) -> None:
    """Also of a tensor that is in one file, and readers who get none."""
    stored = StoredTensors(path)
    for name in ("weight", "bias", "head"):
        whole = tensors()[name]
        cuts = [round(i * len(whole) / num_readers) for i in range(num_readers + 1)]
        for start, stop in pairwise(cuts):
            assert torch.equal(stored.read(name, (start, stop)), whole[start:stop])


def test_a_file_without_parts_is_read_as_it_is(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "trainable.safetensors")
    stored = StoredTensors(tmp_path / "trainable.safetensors")
    assert all(torch.equal(stored.read(name), tensor) for name, tensor in tensors().items())


def test_whole_tensors_have_no_bounds() -> None:
    assert row_bounds(tensors()) == {}


def test_a_missing_part_is_named(path: Path) -> None:
    part = part_path(path, 1, NUM_PARTS)
    part.unlink()
    assert message_of(path).startswith(f"{part}: cannot be read (")


def test_a_part_of_another_rank_is_refused(path: Path) -> None:
    first, last = (part_path(path, number, NUM_PARTS) for number in (0, 2))
    shutil.copyfile(first, last)
    assert message_of(path).startswith(f"{last}: weight: not rows 4 to 5")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"weight": None}, "weight: not rows 2 to 4"),
        ({"weight": torch.zeros(2, 2, 4, dtype=torch.bfloat16)}, "weight: not rows 2 to 4"),
        ({"weight": torch.zeros(2, 2, 3)}, "weight: not rows 2 to 4"),
        ({"weight": torch.tensor(0.0)}, "weight: not rows 2 to 4"),
        ({"bias": torch.zeros(1)}, "bias: not rows 1 to 1"),
    ],
)
def test_a_part_that_does_not_hold_its_rows_is_refused(path: Path, changes: dict[str, Any], expected: str) -> None:
    part = part_path(path, 1, NUM_PARTS)
    change(part, **changes)
    assert message_of(path).startswith(f"{part}: {expected}")


@pytest.mark.parametrize(
    "bounds",
    [[0, 2, 5], [0, 2, 4, 5, 5], [1, 2, 4, 5], [0, 4, 2, 5], [0, 0, 0, 0], [0, 2, 4, 5.0], "0245", None, [-1, 0, 2, 5]],
)
def test_rows_that_do_not_follow_one_another_are_refused(path: Path, bounds: Any) -> None:
    layout_path(path).write_text(json.dumps({"num_parts": 3, "row_bounds": {**BOUNDS, "weight": bounds}}))
    assert message_of(path).startswith(f"{layout_path(path)}: weight: got {bounds}")


@pytest.mark.parametrize("layout", [[], {}, {"num_parts": 3}, {"num_parts": None, "row_bounds": {}}, 3])
def test_what_is_no_layout_is_refused(path: Path, layout: Any) -> None:
    layout_path(path).write_text(json.dumps(layout))
    assert message_of(path).startswith(f"{layout_path(path)}: not a layout of parts")


def test_a_tensor_that_is_whole_and_in_parts_is_refused(path: Path) -> None:
    change(path, bias=torch.zeros(2))
    assert message_of(path).startswith(f"{layout_path(path)}: bias: got [0, 1, 1, 2]")


def test_what_is_not_finite_is_refused_by_name(path: Path) -> None:
    change(part_path(path, 2, NUM_PARTS), bias=torch.tensor([float("inf")]))
    stored = StoredTensors(path)
    stored.check_finite({"weight": (0, 5), "bias": (0, 1)})
    with pytest.raises(CheckpointError, match=r"trainable\.safetensors: not finite: bias; use another checkpoint"):
        stored.check_finite(dict.fromkeys(tensors()))
