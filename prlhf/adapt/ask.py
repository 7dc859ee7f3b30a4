"""Which pairs to ask a user about next: those whose answers say most about whom the user is like."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from prlhf.adapt.margins import Judgment, Margins
from prlhf.adapt.population import make_population
from prlhf.models.personalized import PersonalizedModel

NUM_SIMULATED = 256
SURENESS = 0.5  # of hypotheses: they have answers, too, to pairs the like of which their users never judged


def choose_questions(
    model: PersonalizedModel,
    judgments: Sequence[Judgment],
    pool: Sequence[Judgment],
    count: int,
    *,
    beta: float,
    per_token: bool = False,
    seed: int = 0,
) -> list[int]:
    """Places in the pool of `count` pairs, best first, all different.

    Args:
        judgments: what the user has said so far, perhaps nothing.
        pool: pairs; which of the two is called chosen does not matter.
        seed: of the simulated answers to the first questions, which the later ones take into account.
    """
    assert model.user_encoder is not None
    states = make_population(model.user_encoder).states
    with model.evaluating():
        margins = set_apart(Margins(model, [*judgments, *pool], per_token=per_token).table(states))
    told = F.logsigmoid(beta * margins[: len(judgments)]).sum(0)
    generator = torch.Generator().manual_seed(seed)
    return pick_informative(margins[len(judgments) :], told, min(count, len(pool)), beta=beta, generator=generator)


def set_apart(margins: Tensor) -> Tensor:
    """What hypotheses think of pairs beyond what all of them think, taken half as seriously: (N, A) from (N, A).

    What all share tells nobody apart, and where it is wrong it spoils the posterior.
    """
    return SURENESS * (margins - margins.mean(dim=1, keepdim=True))


def pick_informative(
    margins: Tensor, log_weights: Tensor, count: int, *, beta: float, generator: torch.Generator
) -> list[int]:
    """Greedy choice of the questions that together share most information with the hypothesis that is true.

    The next question has the largest I(answer; hypothesis | answers so far), averaged over simulated users: each is
    one of the hypotheses and answers as it would.

    Args:
        margins: (N, A) float64 of each question under each hypothesis.
        log_weights: (A,) of the hypotheses before the questions, up to a constant.
    Source: Houlsby et al. 2011, arXiv:1112.5745 (BALD), conditioned on the earlier questions of a batch.
    """
    preferred = torch.sigmoid(beta * margins)
    surprise = _entropy(preferred)
    weights = log_weights.softmax(0)
    truth = torch.multinomial(weights, NUM_SIMULATED, replacement=True, generator=generator)
    beliefs = log_weights.expand(NUM_SIMULATED, -1)
    picked: list[int] = []
    for _ in range(count):
        current = beliefs.softmax(1)
        information = (_entropy(current @ preferred.T) - current @ surprise.T).mean(0)
        information[picked] = -1
        picked.append(int(information.argmax()))
        chance = preferred[picked[-1]]
        answers = torch.rand(NUM_SIMULATED, dtype=chance.dtype, generator=generator) < chance[truth]
        signed = torch.where(answers[:, None], margins[picked[-1]], -margins[picked[-1]])
        beliefs = beliefs + F.logsigmoid(beta * signed)
    return picked


def _entropy(chance: Tensor) -> Tensor:
    return -torch.xlogy(chance, chance) - torch.xlogy(1 - chance, 1 - chance)
