"""Questions are chosen for what their answers tell apart."""

from __future__ import annotations

import torch

from prlhf.adapt import Judgment
from prlhf.adapt.ask import choose_questions, pick_informative, set_apart
from prlhf.adapt.margins import Margins
from prlhf.adapt.population import make_population
from tests.adapt.test_fit import as_judged_by, make_judgments_of, make_policy


def _pick(margins: list[list[float]], count: int, log_weights: list[float]) -> list[int]:
    return pick_informative(
        torch.tensor(margins).double(), torch.tensor(log_weights).double(), count, beta=1.0,
        generator=torch.Generator().manual_seed(0),
    )


def test_the_question_that_halves_the_hypotheses_comes_first_and_its_like_last() -> None:
    same, halves, again, odd_even = [9.0, 9, 9, 9], [9.0, 9, -9, -9], [9.0, 9, -9, -9], [9.0, -9, 9, -9]
    picked = _pick([same, halves, again, odd_even], 3, [0.0, 0, 0, 0])
    assert picked[:2] in ([1, 3], [3, 1])
    assert picked[2] in (0, 2)


def test_a_question_whose_answer_is_known_is_not_asked() -> None:
    tells_the_unlikely_apart, tells_the_likely_apart = [0.0, 0, 9, -9], [9.0, -9, 0, 0]
    assert _pick([tells_the_unlikely_apart, tells_the_likely_apart], 1, [0.0, 0, -20, -20]) == [1]


def test_a_coin_tells_nothing() -> None:
    assert _pick([[0.0, 0.0], [1.0, -1.0]], 1, [0.0, 0.0]) == [1]


def test_what_all_hypotheses_agree_on_plays_no_role() -> None:
    margins = torch.tensor([[1.0, -1, 0.5, -0.5], [6.0, -6, 0.25, -0.25], [0.5, 0.5, -0.5, -0.5]]).double()
    shared = torch.tensor([[9.0], [-9.0], [0.0]]).double()
    torch.testing.assert_close(set_apart(margins + shared), set_apart(margins))
    torch.testing.assert_close(set_apart(margins), 0.5 * margins)
    # Both are for the first response of the first question, but one far more, which says more than the second does.
    assert _pick([[9.0, 1.0], [1.5, -1.0]], 1, [0.0, 0.0]) == [1]
    assert _pick(set_apart(torch.tensor([[9.0, 1.0], [1.5, -1.0]])).tolist(), 1, [0.0, 0.0]) == [0]


def test_what_a_user_said_already_changes_what_is_asked_and_counts_the_right_way_round() -> None:
    """As the definition has it: the question whose answer shares most information with whom the user is like."""
    policy = make_policy()
    pool = make_judgments_of(policy, 40, first=100)
    said = as_judged_by(policy, make_judgments_of(policy, 10), 2)
    unsaid = [Judgment(one.prompt_ids, one.responses[::-1]) for one in said]
    states = make_population(policy.user_encoder).states  # type: ignore[arg-type]

    def expected(judgments: list[Judgment]) -> int:
        margins = Margins(policy, [*judgments, *pool]).table(states)
        margins = 0.5 * (margins - margins.mean(1, keepdim=True))
        chances = torch.sigmoid(30 * margins)
        weights = chances[: len(judgments)].log().sum(0).softmax(0)
        asked = chances[len(judgments):]
        mixed = asked @ weights
        entropies = [-(p * p.log() + (1 - p) * (1 - p).log()) for p in (mixed, asked)]
        return int((entropies[0] - entropies[1] @ weights).nan_to_num(-1.0).argmax())

    picked = [choose_questions(policy, judgments, pool, 1, beta=30.0)[0] for judgments in ([], said, unsaid)]
    assert picked == [expected(judgments) for judgments in ([], said, unsaid)]
    assert picked[1] != picked[2]
