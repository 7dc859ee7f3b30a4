"""Lemma 3.1 of arXiv:2402.05133 on a table: vanilla preference training is a majority vote, P-RM serves both sides.

python examples/majority_vote.py; ten users judge one pair, and some of them prefer the first response. With numbers in
place of a language model the minimum is reached: a vanilla reward model and vanilla DPO give the first response its
share of the users as probability, so the minority is always wrong; P-RM gives each user a soft prompt, here the user's
own two scores, and everybody is right.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from prlhf.losses import bradley_terry_loss, dpo_loss, prm_loss
from prlhf.usermodel import IndividualUserModel

NUM_USERS = 10
BETA = 0.5
ALPHA = 0.5
PRM_STEPS, PRM_RATE = 500, 4.0
REFERENCE = torch.tensor([[0.3, 0.7]], dtype=torch.float64).log()  # log-probs of a policy that prefers the second one


class Outcome(NamedTuple):
    """What each kind of training makes of one pair.

    Args:
        reward_model: sigmoid of the score gap, the first response over the second.
        dpo: likewise of the gap of implicit rewards.
        vanilla_majority: accuracy of the vanilla reward model on the users of the larger side.
        vanilla_minority: on those of the smaller one.
        personal: accuracy of P-RM on all users.
        generic: as `reward_model`, of P-RM's generic user; it nears the share as the users' own terms vanish.
    """

    reward_model: float
    dpo: float
    vanilla_majority: float
    vanilla_minority: float
    personal: float
    generic: float


def vote(num_first: int) -> Outcome:
    """Train on `num_first` of the users preferring the first response, the others the second."""
    choices = torch.tensor([0] * num_first + [1] * (NUM_USERS - num_first))
    gap = _vanilla_reward_gap(choices)
    right = (gap > 0) == (choices == 0)
    first = choices == 0
    majority = first if num_first * 2 > NUM_USERS else ~first
    personal, generic = _personal(choices)
    return Outcome(
        reward_model=gap.sigmoid().item(),
        dpo=_dpo_gap(choices).sigmoid().item(),
        vanilla_majority=right[majority].double().mean().item(),
        vanilla_minority=right[~majority].double().mean().item(),
        personal=personal,
        generic=generic,
    )


def _by_choice(values: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
    """Values (B, 2) of both responses -> those of the preferred and of the other one."""
    return values.gather(1, choices[:, None])[:, 0], values.gather(1, 1 - choices[:, None])[:, 0]


def _minimise(scores: Tensor, loss: Callable[[], Tensor]) -> None:
    """Full-batch L-BFGS: no learning rate to choose, and a flat gradient at the end."""
    optimizer = torch.optim.LBFGS([scores], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def _vanilla_reward_gap(choices: Tensor) -> Tensor:
    scores = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    table = len(choices), 2
    _minimise(scores, lambda: bradley_terry_loss(*_by_choice(scores.expand(table), choices)).losses.mean())
    return (scores[0, 0] - scores[0, 1]).detach()


def _dpo_gap(choices: Tensor) -> Tensor:
    scores = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    table = len(choices), 2
    reference = _by_choice(REFERENCE.expand(table), choices)

    def loss() -> Tensor:
        policy = _by_choice(scores.log_softmax(dim=1).expand(table), choices)
        return dpo_loss(*policy, *reference, beta=BETA).losses.mean()

    _minimise(scores, loss)
    ratios = (scores.log_softmax(dim=1) - REFERENCE)[0].detach()
    return BETA * (ratios[0] - ratios[1])


def _personal(choices: Tensor) -> tuple[float, float]:
    """Accuracy of P-RM on all users, and what its generic user thinks of the first response."""
    users = IndividualUserModel(num_users=NUM_USERS, num_user_tokens=1, dim=2).double()
    user_ids = torch.arange(1, NUM_USERS + 1)

    def scores(ids: Tensor) -> tuple[Tensor, Tensor]:
        return _by_choice(users(ids)[:, 0], choices)

    optimizer = torch.optim.SGD(users.parameters(), lr=PRM_RATE)
    for _ in range(PRM_STEPS):
        optimizer.zero_grad()
        out = prm_loss(*scores(user_ids), *scores(torch.zeros_like(user_ids)), alpha=ALPHA)
        (out.losses.sum() / len(choices)).backward()
        optimizer.step()
    chosen, rejected = scores(user_ids)
    generic = users(torch.tensor([0]))[0, 0].detach()
    return (chosen > rejected).double().mean().item(), (generic[0] - generic[1]).sigmoid().item()


def main() -> int:
    """Print the table."""
    header = ("users for the first", "vanilla RM", "vanilla DPO", "majority right", "minority right", "P-RM right")
    sys.stdout.write("| " + " | ".join((*header, "P-RM generic")) + " |\n" + "|---:" * 7 + "|\n")
    for num_first in (1, 3, 4, 6, 9):
        out = vote(num_first)
        values = (out.reward_model, out.dpo, out.vanilla_majority, out.vanilla_minority, out.personal, out.generic)
        cells = [f"{num_first / NUM_USERS:.2f}", *(f"{value:.4f}" for value in values)]
        sys.stdout.write("| " + " | ".join(cells) + " |\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
