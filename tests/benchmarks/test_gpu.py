"""The GPU benchmark, with tiny models on the CPU: everything but the kernels and the figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import gpu
from benchmarks.cpu import useful_flops
from benchmarks.ways import NUM_USER_TOKENS, has_trl
from prlhf.data.tokenize import TokenizedPair


@pytest.mark.slow
def test_one_command_measures_every_job_and_writes_figures_and_table(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    gpu.main(["--tiny", "--repeats", "1", "--out", str(out)])
    results = json.loads(out.read_text())["results"]
    expected = [
        ("1B", "LoRA", "160 tokens", "prlhf"),
        ("1B", "full", "160 tokens", "prlhf"),
        ("8B", "LoRA", "160 tokens", "prlhf"),
        ("8B", "LoRA", "tldr", "prlhf"),
        *([("8B", "LoRA", "tldr", "TRL, known reference")] if has_trl() else []),
    ]
    assert [(result["model"], result["train"], result["rows"], result["by"]) for result in results] == expected
    for result in results:
        assert 0 < result["share_of_matmul_rate"] < 2 and result["peak_gib"] > 0
        assert result["rows_per_s"] == pytest.approx(4 / result["step_s"])
        # A tree has a prompt of 40 to 119 tokens, 10 of the soft prompt, and two responses that end at 160; one of
        # tldr's shape some 54, 10 and twice 5.
        least, most = (201, 281) if result["rows"] == "160 tokens" else (40, 120)
        assert 2 * least < result["tokens_per_s"] / result["rows_per_s"] < 2 * most
        assert len(result["losses"]) == 3 and all(abs(loss - math.log(2)) < 0.2 for loss in result["losses"])
    about, _, *table = out.with_suffix(".md").read_text().strip().splitlines()
    assert about.startswith("20") and "`python -m benchmarks.gpu`" in about and "torch" in about
    assert len(table) == 2 + len(expected)


def test_without_a_gpu_it_refuses_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as refusal:
        gpu.main([])
    assert "no CUDA device" in str(refusal.value) and "\n" not in str(refusal.value)


def test_micro_batches_are_halved_until_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = gpu.Setting("cpu", gpu.tiny_models(), 160, 8, 8, 64, 1, 0)
    tried: list[int] = []

    def measure(setting: gpu.Setting, work: gpu.Work, *, microbatch_rows: int) -> dict[str, Any]:
        tried.append(microbatch_rows)
        if microbatch_rows > limit:
            raise torch.OutOfMemoryError
        return {"microbatch_rows": microbatch_rows}

    monkeypatch.setattr(gpu, "measure", measure)
    limit = 2
    assert gpu.measure_what_fits(setting, gpu.JOBS["1B-lora"]) == {"microbatch_rows": 2} and tried == [8, 4, 2]
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        gpu.measure_what_fits(setting, gpu.JOBS["1B-lora"])


@pytest.mark.peer
@pytest.mark.slow
def test_trls_job_makes_the_steps_of_prlhfs_rows() -> None:
    """The loss begins at ln 2, as the reference that TRL is given is its own, and every step moves the adapters."""
    pytest.importorskip("trl")
    setting = gpu.Setting("cpu", gpu.tiny_models(), 160, 4, 2, 64, 1, 0)
    ours, theirs = (
        kind(setting, gpu.JOBS[name], microbatch_rows=2)
        for kind, name in ((gpu.PrlhfJob, "8B-lora-tldr"), (gpu.TrlJob, "8B-lora-tldr-trl"))
    )
    assert ours.steps == theirs.steps
    assert theirs.run_step(0) == pytest.approx(math.log(2), abs=1e-3)  # bf16, and adapters that start at 0
    before = [parameter.detach().clone() for parameter in theirs.trl.parameters()]
    theirs.run_step(1)
    assert not any(map(torch.equal, before, theirs.trl.parameters()))


def test_every_sequence_has_the_same_length() -> None:
    setting = gpu.Setting("cuda", gpu.real_models(), 1024, 16, 8, 8192, 5, 0)
    rows = gpu.draw_rows(setting, 128256, 50)
    for row in rows:
        for response in row.responses:
            assert NUM_USER_TOKENS + len(row.prompt_ids) + len(response) == 1024
    assert len({len(row.prompt_ids) for row in rows}) > 20


@pytest.mark.parametrize(("model", "num_parameters"), [("1B", 1_235_814_400), ("8B", 8_030_261_248)])
def test_models_are_those_of_their_names_and_so_are_their_flops(model: str, num_parameters: int) -> None:
    """Sizes as on the model cards. A prompt of 1 and 10 soft tokens in two trees, 6 FLOPs a parameter and token."""
    config = gpu.real_models()[model]
    with torch.device("meta"):
        backbone = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in backbone.parameters()) == num_parameters
    linear = sum(m.weight.numel() for m in backbone.model.layers.modules() if isinstance(m, torch.nn.Linear))
    attention = 3 * 4 * config.hidden_size * config.num_hidden_layers * 11**2 / 2
    expected = 2 * (6 * 11 * linear + attention)
    assert useful_flops([TokenizedPair(0, 1, (1,), (), ())], config, lora=False) == pytest.approx(expected)
