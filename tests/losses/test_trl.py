"""Every loss that TRL has equals TRL's on random rows: its own loss code runs, on log-probs handed in for a model's.

A trainer is made without its constructor, with the attributes that the loss reads; rows go in one at a time where TRL
returns a mean.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from prlhf.losses import bradley_terry_loss, dpo_loss, kto_loss, orpo_loss, simpo_loss

pytestmark = pytest.mark.peer("trl")

NUM_ROWS, BETA = 16, 0.3
EXACT = {"rtol": 1e-5, "atol": 1e-6}  # float32, the same sums in another order


def random_logps(seed: int) -> Tensor:
    """Summed log-probs of (chosen, rejected, reference chosen, reference rejected), (4, NUM_ROWS)."""
    generator = torch.Generator().manual_seed(seed)
    return -1 - 30 * torch.rand(4, NUM_ROWS, generator=generator)


def random_lengths(seed: int) -> Tensor:
    """(2, NUM_ROWS) tokens of the chosen and the rejected response."""
    return torch.randint(1, 30, (2, NUM_ROWS), generator=torch.Generator().manual_seed(seed))


def make_trainer(kind: type, **settings: Any) -> Any:
    trainer = object.__new__(kind)
    keep = {"gather": lambda tensor: tensor, "gather_for_metrics": lambda tensor: tensor, "device": torch.device("cpu")}
    common = {
        "accelerator": SimpleNamespace(**keep), "model": SimpleNamespace(training=False), "aux_loss_enabled": False,
        "_metrics": {"eval": defaultdict(list)}, "_total_train_tokens": 0, "beta": BETA, "label_smoothing": 0.0,
    }
    trainer.__dict__.update(common, **settings)
    return trainer


def outputs_of(logps: Tensor, lengths: Tensor) -> tuple[SimpleNamespace, Tensor]:
    """What TRL's fused head returns for sequences with these summed log-probs, and their completion masks."""
    num_tokens = int(lengths.max())
    scored = torch.arange(num_tokens) < lengths[:, None]
    per_token = torch.where(scored, (logps / lengths)[:, None], 0.0)
    nothing = torch.zeros_like(per_token)
    outputs = SimpleNamespace(log_probs=per_token, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    return outputs, torch.cat([torch.zeros(len(logps), 1, dtype=torch.bool), scored], dim=1).long()


def trl_dpo(kind: str, logps: Tensor, lengths: Tensor, **settings: Any) -> Tensor:
    from trl import DPOTrainer

    trainer = make_trainer(
        DPOTrainer, loss_types=[kind], loss_weights=[1.0], ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type="reverse_kl", use_weighting=False, **settings,
    )
    losses = []
    for row in range(NUM_ROWS):
        outputs, mask = outputs_of(logps[:2, row], lengths[:, row])
        inputs = {
            "input_ids": mask, "attention_mask": torch.ones_like(mask), "completion_mask": mask,
            "ref_chosen_logps": logps[2, row : row + 1], "ref_rejected_logps": logps[3, row : row + 1],
        }
        losses.append(trainer._compute_loss(lambda outputs=outputs, **_: outputs, inputs, False))
    return torch.stack(losses)


@pytest.mark.parametrize(
    ("kind", "settings"), [("sigmoid", {}), ("hinge", {}), ("robust", {"label_smoothing": 0.2})]
)
def test_dpo_and_its_kinds(kind: Any, settings: dict[str, float]) -> None:
    logps, lengths = random_logps(1), random_lengths(2)
    ours = dpo_loss(*logps, beta=BETA, kind=kind, **settings).losses
    torch.testing.assert_close(ours, trl_dpo(kind, logps, lengths, **settings), **EXACT)


def test_ipo_on_mean_log_probs() -> None:
    """TRL's form of IPO is ours on log-probs per token."""
    logps, lengths = random_logps(3), random_lengths(4)
    ours = dpo_loss(*logps / lengths.repeat(2, 1), beta=BETA, kind="ipo").losses
    torch.testing.assert_close(ours, trl_dpo("ipo", logps, lengths), **EXACT)


def trl_cpo(chosen: Tensor, rejected: Tensor, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    from trl.experimental.cpo import CPOTrainer

    return make_trainer(CPOTrainer, alpha=0.0, **settings).cpo_loss(chosen, rejected)


def test_label_smoothing() -> None:
    """cDPO; TRL's DPO has no smoothing of its sigmoid any more, its CPO has, here on log-ratios."""
    logps = random_logps(5)
    ours = dpo_loss(*logps, beta=BETA, label_smoothing=0.1)
    theirs = trl_cpo(logps[0] - logps[2], logps[1] - logps[3], loss_type="sigmoid", label_smoothing=0.1)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, **EXACT)


def test_simpo() -> None:
    (chosen, rejected, *_), lengths = random_logps(6), random_lengths(7)
    ours = simpo_loss(chosen, rejected, *lengths, beta=2.0, gamma=0.7)
    theirs = trl_cpo(chosen / lengths[0], rejected / lengths[1], loss_type="simpo", simpo_gamma=0.7, beta=2.0)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, **EXACT)


def test_orpo() -> None:
    """The NLL of a row is its chosen response's mean, as in TRL for a batch of one row."""
    from trl.experimental.orpo import ORPOTrainer

    (chosen, rejected, *_), lengths = random_logps(8), random_lengths(9)
    means = chosen / lengths[0], rejected / lengths[1]
    trainer = make_trainer(ORPOTrainer)
    losses = []
    for row in range(NUM_ROWS):
        one = [mean[row : row + 1] for mean in means]
        trainer.concatenated_forward = lambda *_, one=one: (*one, torch.zeros(1), torch.zeros(1), -one[0].mean())
        losses.append(trainer.get_batch_loss_metrics(None, {}, "eval")[0])
    ours = orpo_loss(chosen, rejected, *lengths, beta=BETA).losses
    torch.testing.assert_close(ours, torch.stack(losses), **EXACT)


@pytest.mark.parametrize("lift", [0.0, 20.0], ids=["negative estimate", "positive estimate"])
def test_kto(lift: float) -> None:
    """`lift` moves the mismatched log-probs, so that the estimate of the KL is clamped or not."""
    from trl import KTOTrainer

    policy, reference, kl_policy, kl_reference = random_logps(10) + torch.tensor([[0.0], [0.0], [lift - 10], [0.0]])
    lengths, labels = random_lengths(11)[0], torch.arange(NUM_ROWS) % 3 == 0
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.8}
    trainer = make_trainer(
        KTOTrainer, calculate_KL=True, precompute_ref_logps=True, loss_type="kto", _tp_size=1, **weights
    )
    outputs, mask = outputs_of(policy, lengths)
    kl_outputs, kl_mask = outputs_of(kl_policy, lengths)
    inputs = {
        "input_ids": mask, "attention_mask": torch.ones_like(mask), "completion_mask": mask, "label": labels,
        "KL_input_ids": kl_mask + 7, "KL_attention_mask": torch.ones_like(mask), "KL_completion_mask": kl_mask,
        "ref_logps": reference, "ref_KL_logps": kl_reference,
    }
    loss = trainer._compute_loss(
        lambda input_ids, **_: kl_outputs if int(input_ids.max()) > 1 else outputs, inputs, False
    )
    kl = (kl_policy - kl_reference).mean().clamp(min=0)
    assert (kl > 0) == (lift > 0)
    assert trainer._metrics["eval"]["kl"] == pytest.approx([kl.item()], rel=1e-5)
    ours = kto_loss(policy, reference, labels, kl, beta=BETA, **weights)
    torch.testing.assert_close(ours.losses.mean(), loss, **EXACT)
    rewards = trainer._metrics["eval"]["rewards/chosen"]
    assert ours.rewards[labels].mean().item() == pytest.approx(rewards[0], rel=1e-4)


def test_bradley_terry() -> None:
    from trl import RewardTrainer

    chosen, rejected = torch.randn(2, NUM_ROWS, generator=torch.Generator().manual_seed(12))
    trainer = make_trainer(RewardTrainer, args=SimpleNamespace(center_rewards_coefficient=None))
    losses = []
    for pair in zip(chosen, rejected, strict=True):
        scores = SimpleNamespace(logits=torch.stack(pair)[:, None])
        losses.append(trainer.compute_loss(lambda scores=scores, **_: scores, {}))
    torch.testing.assert_close(bradley_terry_loss(chosen, rejected).losses, torch.stack(losses), **EXACT)
