"""P-RM serves two opposed users of the same pairs, the plain reward model cannot; a checkpoint keeps the scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prlhf.data.collate import collate_pairs
from prlhf.data.tokenize import TokenizedPair
from prlhf.engine.build import build_job
from prlhf.engine.checkpoint import Progress
from prlhf.engine.trainer import save_job, train
from prlhf.models import PersonalizedRewardModel, load_reward_model
from tests.tiny_run import Tiny, perturb_, read_metrics

LEARN: dict[str, Any] = {
    "train__max_steps": 40, "train__batch_rows": 8, "train__user_lr": 5e-2, "checkpoint__every_steps": 0
}


def test_opposed_users_are_both_served_by_prm_and_cancel_out_in_rm(tiny: Tiny, tmp_path: Path) -> None:
    final = train(tiny.config(method="prm", **LEARN), tmp_path / "prm")
    assert final["per_user"]["ann"]["accuracy"] == final["per_user"]["bob"]["accuracy"] == 1.0
    assert final["accuracy"]["reference_logps"] is None and final["on_side"] is None
    vanilla = train(tiny.config(method="rm", **LEARN), tmp_path / "rm")
    accuracies = [vanilla["per_user"][user]["accuracy"] for user in ("ann", "bob")]
    assert sum(accuracies) == 1.0, "every pair is judged by both, so one of the two is wrong"


def test_the_first_loss_is_ln_2(tiny: Tiny, tmp_path: Path) -> None:
    """The head starts at zero, so every margin is exactly 0."""
    train(tiny.config(method="prm", train__max_steps=1), tmp_path / "run")
    (line,) = read_metrics(tmp_path / "run")
    assert line["loss"] == pytest.approx(0.69314718, abs=1e-7)
    assert not any(name.startswith(("logps", "nll")) for name in line)


@pytest.mark.parametrize("kind", ["uniform", "individual", "cluster", "low_rank"])
@pytest.mark.parametrize("lora", [{"rank": 2, "alpha": 4}, None], ids=["lora", "full"])
def test_a_checkpoint_gives_back_the_scores(tiny: Tiny, tmp_path: Path, kind: str, lora: dict | None) -> None:
    job = perturb_(build_job(tiny.config(method="prm", user__kind=kind, model__lora=lora)))
    assert isinstance(job.model, PersonalizedRewardModel)
    save_job(job, Progress(step=1), tmp_path / "run")
    loaded = load_reward_model(tmp_path / "run")
    rows = [row for row in job.rows[:4] if isinstance(row, TokenizedPair)]
    batch = collate_pairs(rows, job.pad_id)
    job.model.eval()
    with torch.no_grad():
        expected, actual = (model.scores(batch, batch.user_ids) for model in (job.model, loaded))
    assert torch.equal(actual.chosen, expected.chosen) and torch.equal(actual.rejected, expected.rejected)
    assert (expected.chosen != expected.rejected).any()
