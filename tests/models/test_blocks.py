"""The decoder's blocks: found in every family, recomputed one in n, and compiled to the same numbers."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import nn

from prlhf.engine.build import build_job
from prlhf.engine.trainer import batches_of_step
from prlhf.errors import ConfigError, ModelError
from prlhf.models.blocks import checkpoint_blocks_, decoder_blocks
from tests.engine.cuts import FULL_STEP, RAGGED_STEP, assert_same, gradients_of, gradients_of_step
from tests.families import FAMILIES, tiny_model
from tests.tiny_run import Tiny

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with g++")


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_blocks_are_found_in_every_family(family: str) -> None:
    model = tiny_model(family)
    blocks = decoder_blocks(model)
    assert len(blocks) == 2
    inside = {parameter for block in blocks for parameter in block.parameters()}
    attention = {parameter for name, parameter in model.named_parameters() if "attn" in name or "attention" in name}
    assert attention and attention <= inside
    assert not inside & set(model.get_input_embeddings().parameters())


def test_blocks_inside_of_blocks_stay_with_them() -> None:
    block = nn.Module()
    block.experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    backbone = nn.Module()
    backbone.layers = nn.ModuleList([block])
    assert decoder_blocks(backbone) == [block]


def test_a_backbone_without_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match="no list of decoder blocks"):
        decoder_blocks(nn.Linear(2, 2))


@pytest.mark.parametrize(("every", "expected"), [(1, [2, 2]), (2, [2, 1]), (3, [2, 1])])
def test_one_block_in_n_is_computed_again(tiny: Tiny, every: int, expected: list[int]) -> None:
    """Blocks that are computed again run twice in a step without reference, others once; the gradient is the same."""
    settings: dict[str, Any] = {"method": "prm", "user__kind": "individual"}
    job = build_job(
        tiny.config(model__gradient_checkpointing=True, model__gradient_checkpointing_every=every, **settings)
    )
    calls = [0, 0]
    for index, block in enumerate(decoder_blocks(job.model.backbone)[:2]):
        # Each call binds its own index.
        block.mlp.register_forward_pre_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    checkpointed = gradients_of(job, *batches_of_step(job, FULL_STEP))
    assert calls == expected
    plain = build_job(tiny.config(**settings))
    assert_same(checkpointed, gradients_of(plain, *batches_of_step(plain, FULL_STEP)))


def test_a_family_that_cannot_choose_its_blocks_is_refused() -> None:
    class AllOrNone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

        def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
            pass

    checkpoint_blocks_(AllOrNone())
    with pytest.raises(ModelError, match="model.gradient_checkpointing_every: this backbone knows only all blocks"):
        checkpoint_blocks_(AllOrNone(), every=2)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    "settings",
    [{"model__gradient_checkpointing": True}, {"model__lora": None, "train__packing": False}],
    ids=["lora_packed_checkpointed", "full_padded"],
)
def test_compiled_blocks_have_the_gradient_of_plain_ones(tiny: Tiny, settings: dict[str, Any]) -> None:
    from torch._dynamo.utils import counters

    torch.compiler.reset()  # what other tests compiled would serve here
    before = counters["stats"]["unique_graphs"]
    for step in (FULL_STEP, RAGGED_STEP):
        compiled = gradients_of_step(tiny.config(train__compile=True, **settings), step)
        assert_same(compiled, gradients_of_step(tiny.config(**settings), step))
    assert counters["stats"]["unique_graphs"] > before, "nothing was compiled"


def test_where_torch_cannot_compile_it_is_said(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ConfigError, match=r"train.compile: torch cannot compile for cpu \(no compiler\); install"):
        build_job(tiny.config(train__compile=True))
