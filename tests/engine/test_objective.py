"""The loss of each row under every method, on log-probs made by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from prlhf.data.collate import collate_pairs, collate_responses
from prlhf.data.context import collate_contexts
from prlhf.data.tokenize import TokenizedPair, TokenizedResponse
from prlhf.engine.objective import LOGP_FIGURES, REWARD_FIGURES, Objective, ReferenceLogps
from prlhf.models.policy import ResponseLogps

PAIRS = collate_pairs([TokenizedPair(row, row + 1, (1,), (2, 3), (4,)) for row in range(2)], pad_id=0)
RESPONSES = collate_responses([TokenizedResponse(row, 0, (1,), (2, 3)) for row in range(2)], pad_id=0)
REFERENCE = ReferenceLogps(torch.tensor([-5.0, -5.0]), torch.tensor([-6.0, -6.0]))

# by user: chosen and rejected log-probs of the two rows; the chosen response has 2 tokens, the rejected 1
INDIVIDUAL = (torch.tensor([-3.0, -7.0]), torch.tensor([-6.0, -7.0]))  # margins over the reference: 2, -1
GENERIC = (torch.tensor([-5.0, -4.0]), torch.tensor([-6.0, -8.0]))  # 0, 3


class HandMadePolicy:
    """Answers with the log-probs above, and notes whom it was asked about."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.contexts: list[Any] = []

    def logps(self, batch: Any, user_ids: Tensor | None, context: Any = None) -> ResponseLogps:
        self.asked.append(None if user_ids is None else user_ids.tolist())
        self.contexts.append(context)
        personal = user_ids is None or bool(user_ids.any())
        return ResponseLogps(*(INDIVIDUAL if personal else GENERIC), torch.tensor([2, 2]), torch.tensor([1, 1]))

    def sequence_logps(self, *args: Any) -> tuple[Tensor, Tensor]:
        assert args[-1] is None, "sft knows no user"
        return torch.tensor([-3.0, -8.0]), torch.tensor([2, 4])


def softplus(x: float) -> float:
    """-log sigmoid(-x)"""
    return math.log1p(math.exp(x))


def losses_of(objective: Objective, batch: Any = PAIRS) -> tuple[list[float], dict[str, float], list[Any]]:
    policy = HandMadePolicy()
    out = objective(policy, batch, REFERENCE)  # type: ignore[arg-type]
    return out.losses.tolist(), {name: float(value) for name, value in out.sums.items()}, policy.asked


def test_dpo_is_the_sigmoid_of_the_margin_without_any_soft_prompt() -> None:
    losses, _, asked = losses_of(Objective("dpo", beta=0.5))
    assert losses == pytest.approx([softplus(-1.0), softplus(0.5)])
    assert asked == [None]


def test_pdpo_weighs_the_rows_user_and_the_generic_one() -> None:
    losses, _, asked = losses_of(Objective("pdpo", beta=0.5, alpha=0.75))
    expected = [0.75 * softplus(-1.0) + 0.25 * softplus(0.0), 0.75 * softplus(0.5) + 0.25 * softplus(-1.5)]
    assert losses == pytest.approx(expected)
    assert asked == [[1, 2], [0, 0]]


def test_the_generic_term_gets_no_context() -> None:
    policy = HandMadePolicy()
    batch = replace(PAIRS, context=collate_contexts([((1,),), ((2, 3),)], pad_id=0))
    Objective("pdpo")(policy, batch, REFERENCE)  # type: ignore[arg-type]
    assert policy.contexts == [batch.context, None]


def test_ipo_is_the_squared_distance_to_half_of_one_over_beta() -> None:
    losses, _, _ = losses_of(Objective("dpo", kind="ipo", beta=0.5))
    assert losses == pytest.approx([(2 - 1) ** 2, (-1 - 1) ** 2])


def test_label_smoothing_mixes_in_the_flipped_label() -> None:
    losses, _, _ = losses_of(Objective("dpo", beta=0.5, label_smoothing=0.1))
    expected = [0.9 * softplus(-1.0) + 0.1 * softplus(1.0), 0.9 * softplus(0.5) + 0.1 * softplus(-0.5)]
    assert losses == pytest.approx(expected)


def test_sft_weight_adds_the_chosen_nll_per_token_to_both_terms() -> None:
    bare, _, _ = losses_of(Objective("pdpo", beta=0.5, alpha=0.75))
    with_nll, _, _ = losses_of(Objective("pdpo", beta=0.5, alpha=0.75, sft_weight=2.0))
    nll = [0.75 * 3.0 / 2 + 0.25 * 5.0 / 2, 0.75 * 7.0 / 2 + 0.25 * 4.0 / 2]
    assert with_nll == pytest.approx([loss + 2.0 * extra for loss, extra in zip(bare, nll, strict=True)])


def test_sft_is_the_nll_of_each_whole_response() -> None:
    losses, sums, _ = losses_of(Objective("sft"), RESPONSES)
    assert losses == pytest.approx([3.0, 8.0])
    assert sums == pytest.approx({"loss": 11.0})


def test_figures_are_sums_over_rows_with_the_individual_term_under_the_plain_names() -> None:
    losses, sums, _ = losses_of(Objective("pdpo", beta=0.5))
    # rewards are beta times the log-ratio: chosen 0.5 * (2, -2), rejected 0.5 * (0, -1)
    individual = {
        "rewards/accuracies": 1.0, "rewards/margins": 1.0 - 0.5, "rewards/chosen": 0.0, "rewards/rejected": -0.5,
        "logps/chosen": -10.0, "logps/rejected": -13.0, "nll/chosen": 5.0,
    }
    generic = {
        "rewards/accuracies": 1.0, "rewards/margins": 1.5, "rewards/chosen": 0.5, "rewards/rejected": -1.0,
        "logps/chosen": -9.0, "logps/rejected": -14.0, "nll/chosen": 4.5,
    }
    expected = {
        "loss": sum(losses), **individual,
        **{f"individual/{name}": value for name, value in individual.items()},
        **{f"generic/{name}": value for name, value in generic.items()},
    }
    assert sums == pytest.approx(expected)
    assert set(individual) == {*REWARD_FIGURES, *LOGP_FIGURES}


@pytest.mark.parametrize(("method", "batch"), [("sft", RESPONSES), ("dpo", PAIRS), ("pdpo", PAIRS)])
def test_figure_names_are_known_before_the_first_batch(method: Any, batch: Any) -> None:
    objective = Objective(method)
    _, sums, _ = losses_of(objective, batch)
    assert set(objective.figure_names()) == set(sums)
