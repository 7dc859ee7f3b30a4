"""The loss of each row under every method, on log-probs made by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from prlhf.data.collate import collate_labelled, collate_pairs, collate_responses
from prlhf.data.tokenize import TokenizedLabelled, TokenizedPair, TokenizedResponse
from prlhf.engine.objective import LOGP_FIGURES, REWARD_FIGURES, Objective, ReferenceLogps
from prlhf.models.packing import Term
from prlhf.models.policy import ResponseLogps

PAIRS = collate_pairs([TokenizedPair(row, row + 1, (1,), (2, 3), (4,)) for row in range(2)], pad_id=0)
LABELLED = collate_labelled(
    [TokenizedLabelled(row, row + 1, (1,), (2, 3), (4,), label) for row, label in enumerate((True, False))], pad_id=0
)
RESPONSES = collate_responses([TokenizedResponse(row, 0, (1,), (2, 3)) for row in range(2)], pad_id=0)
REFERENCE = ReferenceLogps(torch.tensor([-5.0, -5.0]), torch.tensor([-6.0, -6.0]))

# by user: chosen and rejected log-probs of the two rows; the chosen response has 2 tokens, the rejected 1
INDIVIDUAL = (torch.tensor([-3.0, -7.0]), torch.tensor([-6.0, -7.0]))  # margins over the reference: 2, -1
GENERIC = (torch.tensor([-5.0, -4.0]), torch.tensor([-6.0, -8.0]))  # 0, 3


class HandMadePolicy:
    """Answers with the log-probs above, and notes whom it was asked about."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def logps(self, batch: Any, user_ids: Tensor | None) -> ResponseLogps:
        self.asked.append(None if user_ids is None else user_ids.tolist())
        personal = user_ids is None or bool(user_ids.any())
        return ResponseLogps(*(INDIVIDUAL if personal else GENERIC), torch.tensor([2, 2]), torch.tensor([1, 1]))

    def term_logps(self, batch: Any, terms: list[Term]) -> list[ResponseLogps]:
        return [self.logps(batch, term.user_ids) for term in terms]

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
    rows = [TokenizedPair(row, row + 1, (1,), (2, 3), (4,)) for row in range(2)]
    batch = collate_pairs(rows, pad_id=2, contexts=[((5,),), ((6, 7),)])
    individual, generic = Objective("pdpo").read_as(batch)
    assert individual.user_ids is batch.user_ids and individual.context is batch.context
    assert generic.user_ids is not None and generic.user_ids.tolist() == [0, 0] and generic.context is None
    assert [(term.user_ids, term.context) for term in Objective("dpo").read_as(batch)] == [(None, None)]


@pytest.mark.parametrize(
    ("alpha", "asked", "margins", "term"),
    [(1.0, [[1, 2]], (2.0, -1.0), "individual/"), (0.0, [[0, 0]], (0.0, 3.0), "generic/")],
)
def test_a_term_without_weight_is_not_computed(alpha: float, asked: Any, margins: Any, term: str) -> None:
    objective = Objective("pdpo", beta=0.5, alpha=alpha)
    losses, sums, seen = losses_of(objective)
    assert losses == pytest.approx([softplus(-0.5 * margin) for margin in margins])
    assert seen == asked
    assert set(sums) == set(objective.figure_names())
    assert sums["rewards/margins"] == sums[f"{term}rewards/margins"] == pytest.approx(0.5 * sum(margins))


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


def test_simpo_is_on_mean_log_probs_and_asks_for_no_reference() -> None:
    """Means -1.5 and -6, -3.5 and -7 (individual), -2.5 and -6, -2 and -8 (generic); beta 0.5, gamma 1."""
    policy = HandMadePolicy()
    objective = Objective("pdpo", kind="simpo", beta=0.5, gamma=1.0, alpha=0.75)
    out = objective(policy, PAIRS, None)  # type: ignore[arg-type]
    individual, generic = [0.5 * 4.5 - 1, 0.5 * 3.5 - 1], [0.5 * 3.5 - 1, 0.5 * 6.0 - 1]
    expected = [0.75 * softplus(-i) + 0.25 * softplus(-g) for i, g in zip(individual, generic, strict=True)]
    assert out.losses.tolist() == pytest.approx(expected)
    assert float(out.sums["rewards/margins"]) == pytest.approx(0.5 * (4.5 + 3.5))


def test_orpo_is_the_nll_per_token_and_the_odds_ratio() -> None:
    def log_odds(logp: float) -> float:
        return logp - math.log(1 - math.exp(logp))

    policy = HandMadePolicy()
    out = Objective("dpo", kind="orpo", beta=0.5)(policy, PAIRS, None)  # type: ignore[arg-type]
    ratios = [log_odds(-1.5) - log_odds(-6.0), log_odds(-3.5) - log_odds(-7.0)]
    expected = [1.5 + 0.5 * softplus(-ratios[0]), 3.5 + 0.5 * softplus(-ratios[1])]
    assert out.losses.tolist() == pytest.approx(expected, rel=1e-5)
    assert float(out.sums["rewards/margins"]) == pytest.approx(0.5 * sum(ratios), rel=1e-5)


class HandMadeUnpairedPolicy:
    """Log-probs of a liked and a disliked response, as the rows' users and as the generic one."""

    def term_values(self, batch: Any, terms: list[Term]) -> list[tuple[Tensor, Tensor]]:
        assert batch.num_rows == 2
        personal = [term.user_ids is not None and bool(term.user_ids.any()) for term in terms]
        return [(torch.tensor([-3.0, -7.0] if each else [-5.0, -4.0]), torch.tensor([2, 2])) for each in personal]


def test_kto_weighs_liked_and_disliked_rows_of_both_terms_against_the_kl_of_each() -> None:
    """Log-ratios to -5 and -6: 2 and -1 (individual), 0 and 2 (generic); KL 0.5 and 1; beta 1."""
    policy, reference = HandMadeUnpairedPolicy(), ReferenceLogps(torch.tensor([-5.0, -6.0]), torch.zeros(2))
    objective = Objective("pdpo", kind="kto", beta=1.0, alpha=0.75, desirable_weight=2.0, undesirable_weight=3.0)
    out = objective(policy, LABELLED, reference, torch.tensor([0.5, 1.0]))  # type: ignore[arg-type]

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    liked = 2.0 * (0.75 * sigmoid(0.5 - 2) + 0.25 * sigmoid(1 - 0))
    disliked = 3.0 * (0.75 * sigmoid(-1 - 0.5) + 0.25 * sigmoid(2 - 1))
    assert out.losses.tolist() == pytest.approx([liked, disliked])
    figures = {name: float(value) for name, value in out.sums.items()}
    assert set(figures) == set(objective.figure_names())
    assert (figures["labels/liked"], figures["labels/disliked"]) == (1.0, 1.0)
    assert (figures["rewards/chosen"], figures["rewards/rejected"]) == (2.0, -1.0)
    assert figures["rewards/accuracies"] == 2.0 and figures["generic/rewards/accuracies"] == 0.0
    assert figures["rewards/margins"] == pytest.approx((2 - 0.5) + (0.5 + 1))
    assert (figures["individual/kl"], figures["generic/kl"]) == (1.0, 2.0), "sums over two rows"
    assert objective.figure_counts()["generic/rewards/rejected"] == "labels/disliked"
