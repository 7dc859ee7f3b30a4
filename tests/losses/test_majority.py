"""Lemma 3.1 of arXiv:2402.05133, tabular: a vanilla model votes with the majority, a personalized one does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prlhf.losses import bradley_terry_loss, dpo_loss, pdpo_loss, prm_loss
from prlhf.usermodel import IndividualUserModel

BETA = 0.5


def _minimise(parameters: list[Tensor], loss) -> None:
    """Full-batch L-BFGS with a line search: no learning rate to choose, and a flat gradient at the end."""
    optimizer = torch.optim.LBFGS(parameters, max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def _logps_of_choice(scores: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of the preferred and of the other response: scores (B, 2) over two responses, choices (B,) 0 or 1."""
    logps = scores.log_softmax(dim=1)
    return logps.gather(1, choices[:, None])[:, 0], logps.gather(1, 1 - choices[:, None])[:, 0]


def _reference(num_rows: int) -> Tensor:
    """Log-probs of a policy that answers 0.3 / 0.7, the same on each row: (B, 2)."""
    return torch.tensor([[0.3, 0.7]], dtype=torch.float64).log().expand(num_rows, 2)


def _vanilla_margin(choices: Tensor) -> float:
    """beta times the margin of response 0 over response 1 that vanilla DPO learns from these choices."""
    scores = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    reference = _logps_of_choice(_reference(len(choices)), choices)

    def loss() -> Tensor:
        policy = _logps_of_choice(scores.expand(len(choices), 2), choices)
        return dpo_loss(*policy, *reference, beta=BETA).losses.mean()

    _minimise([scores], loss)
    ratios = scores.detach().log_softmax(dim=1)[0] - _reference(1)[0]
    return (BETA * (ratios[0] - ratios[1])).item()


@pytest.mark.parametrize("num_first", [1, 3, 5, 6, 9])
def test_vanilla_dpo_learns_the_share_of_the_users(num_first):
    """Ten users judge one pair: sigmoid(reward gap) = the share that prefers the first response."""
    choices = torch.tensor([0] * num_first + [1] * (10 - num_first))
    learnt = torch.tensor(_vanilla_margin(choices)).sigmoid().item()
    assert learnt == pytest.approx(num_first / 10, abs=1e-4)


def test_vanilla_dpo_is_undecided_between_two_opposed_users():
    """Share 1/2: the reward gap is 0, each user's accuracy is a coin's."""
    assert _vanilla_margin(torch.tensor([0, 1])) == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("num_first", [1, 3])
def test_vanilla_dpo_fails_every_user_of_the_minority(num_first):
    """1 or 3 of 4 users prefer the first response: the majority's accuracy is 1, the minority's is 0."""
    choices = torch.tensor([0] * num_first + [1] * (4 - num_first))
    preferred = 0 if _vanilla_margin(choices) > 0 else 1
    assert [int(choice == preferred) for choice in choices.tolist()] == [int(num_first == 3)] * num_first + [
        int(num_first == 1)
    ] * (4 - num_first)


def test_pdpo_serves_two_users_of_opposite_taste():
    """Both judge the same four pairs and disagree on each; a user's soft prompt is that user's table of scores."""
    num_pairs = 4
    users = IndividualUserModel(num_users=2, num_user_tokens=num_pairs, dim=2).double()
    user_ids = torch.tensor([1, 2]).repeat_interleave(num_pairs)
    pairs = torch.arange(num_pairs).repeat(2)
    taste = torch.tensor([0, 1, 1, 0])
    choices = torch.cat([taste, 1 - taste])
    reference = _logps_of_choice(_reference(len(choices)), choices)

    def rewards(ids: Tensor) -> tuple[Tensor, Tensor]:
        return _logps_of_choice(users(ids)[torch.arange(len(ids)), pairs], choices)

    def out():
        return pdpo_loss(*rewards(user_ids), *rewards(torch.zeros_like(user_ids)), *reference, alpha=0.5, beta=BETA)

    optimizer = torch.optim.SGD(users.parameters(), lr=1.0)
    for _ in range(200):
        optimizer.zero_grad()
        out().losses.sum().backward()
        optimizer.step()
    individual = (out().individual.chosen_rewards > out().individual.rejected_rewards).double()
    assert individual[user_ids == 1].mean().item() == 1.0
    assert individual[user_ids == 2].mean().item() == 1.0
    gap = out().generic.chosen_rewards - out().generic.rejected_rewards
    # The generic user sees both tastes at share 1/2.
    torch.testing.assert_close(gap, torch.zeros_like(gap), rtol=0, atol=1e-3)


@pytest.mark.parametrize("loss", ["pdpo", "prm"])
def test_with_alpha_0_a_users_offset_has_a_gradient_of_exactly_0(loss):
    users = IndividualUserModel(num_users=2, num_user_tokens=1, dim=2).double()
    user_ids = torch.tensor([1, 2, 2])
    own, generic = (users(ids)[:, 0].unbind(dim=1) for ids in (user_ids, torch.zeros_like(user_ids)))
    if loss == "pdpo":
        reference = (torch.zeros(3), torch.ones(3))
        out = pdpo_loss(*own, *generic, *reference, alpha=0.0, beta=BETA)
    else:
        out = prm_loss(*own, *generic, alpha=0.0)
    out.losses.sum().backward()
    assert not users.offsets.grad.to_dense().any()
    assert users.generic.grad.abs().min() > 0


@pytest.mark.parametrize("num_first", [1, 3, 5, 6, 9])
def test_a_vanilla_reward_model_learns_the_share_of_the_users(num_first):
    choices = torch.tensor([0] * num_first + [1] * (10 - num_first))
    scores = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    rows = choices[:, None]

    def loss() -> Tensor:
        table = scores.expand(len(choices), 2)
        return bradley_terry_loss(table.gather(1, rows)[:, 0], table.gather(1, 1 - rows)[:, 0]).losses.mean()

    _minimise([scores], loss)
    gap = (scores[0, 0] - scores[0, 1]).detach()
    assert gap.sigmoid().item() == pytest.approx(num_first / 10, abs=1e-4)


def test_among_three_responses_wins_are_as_many_as_expected_of_the_scores():
    """sum_j n_ij (p_ij - sigmoid(r_i - r_j)) = 0 for each response i, though no scores give the shares of a cycle."""
    wins = torch.tensor([[0, 7, 2], [3, 0, 6], [4, 2, 0]], dtype=torch.float64)  # [i, j]: how often i beat j
    won, lost = torch.tensor([(i, j) for i in range(3) for j in range(3) for _ in range(int(wins[i, j]))]).T
    scores = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    _minimise([scores], lambda: bradley_terry_loss(scores[won], scores[lost]).losses.mean())
    expected = (scores[:, None] - scores[None, :]).detach().sigmoid()
    number = wins + wins.T
    gaps = wins - number * expected
    assert gaps.sum(dim=1).abs().max().item() < 1e-4
    assert gaps.abs().max() > 0.1, "no pair's share alone"


@pytest.mark.parametrize("loss", ["pdpo", "prm"])
def test_with_alpha_1_the_generic_prompt_learns_through_the_users(loss):
    users = IndividualUserModel(num_users=2, num_user_tokens=1, dim=2).double()
    ids = torch.tensor([1, 2, 2])
    own, generic = (users(rows)[:, 0].unbind(dim=1) for rows in (ids, torch.zeros_like(ids)))
    out = prm_loss(*own, *generic, alpha=1.0)
    if loss == "pdpo":
        out = pdpo_loss(*own, *generic, torch.zeros(3), torch.ones(3), alpha=1.0, beta=BETA)
    out.losses.sum().backward()
    torch.testing.assert_close(users.generic.grad, users.offsets.grad.to_dense().sum(dim=0))
    assert users.generic.grad.abs().min() > 0


@pytest.mark.parametrize("num_first", [1, 3])
def test_prm_serves_minority_and_majority(num_first):
    """Four users judge one pair; each one's soft prompt is that user's two scores."""
    users = IndividualUserModel(num_users=4, num_user_tokens=1, dim=2).double()
    user_ids = torch.arange(1, 5)
    choices = torch.tensor([0] * num_first + [1] * (4 - num_first))[:, None]

    def scores(ids: Tensor) -> tuple[Tensor, Tensor]:
        table = users(ids)[:, 0]
        return table.gather(1, choices)[:, 0], table.gather(1, 1 - choices)[:, 0]

    optimizer = torch.optim.SGD(users.parameters(), lr=1.0)
    for _ in range(200):
        optimizer.zero_grad()
        prm_loss(*scores(user_ids), *scores(torch.zeros_like(user_ids)), alpha=0.5).losses.sum().backward()
        optimizer.step()
    chosen, rejected = scores(user_ids)
    assert (chosen > rejected).all()
