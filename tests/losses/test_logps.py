"""response_logps: against a loop over tokens, in every type, with the shift and the mask where they belong."""

from __future__ import annotations

import math

import pytest
import torch

from prlhf.losses import response_logps, response_token_counts

B, L, V = 3, 7, 11


def _example(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Random logits; responses of 3, 1 and 0 tokens behind prompts, pads after the first."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(B, L, V, generator=generator, dtype=torch.float64)).to(dtype)
    labels = torch.full((B, L), -100)
    labels[0, 2:5] = torch.tensor([4, 0, 10])
    labels[1, 6] = 7
    return logits, labels


def _loop(logits: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """The definition: for each labelled position t >= 1, log p(label[t]) under the logits at t - 1."""
    sums = []
    for row_logits, row_labels in zip(logits.tolist(), labels.tolist(), strict=True):
        total = 0.0
        for t in range(1, len(row_labels)):
            if row_labels[t] != -100:
                scores = row_logits[t - 1]
                total += scores[row_labels[t]] - math.log(sum(math.exp(score) for score in scores))
        sums.append(total)
    return sums


def test_logps_equal_a_loop_over_tokens():
    logits, labels = _example(torch.float64)
    # Rounding of a few float64 operations.
    torch.testing.assert_close(
        response_logps(logits, labels), torch.tensor(_loop(logits, labels), dtype=torch.float64), rtol=1e-12, atol=1e-12
    )


def test_uniform_logits_cost_ln_vocabulary_a_token():
    """Every token has probability 1 / V: a response of n tokens has log-probability -n ln V."""
    _, labels = _example()
    logps = response_logps(torch.zeros(B, L, V), labels)
    torch.testing.assert_close(logps, torch.tensor([-3.0, -1.0, 0.0]) * math.log(V))


def test_bfloat16_logits_are_scored_in_float32():
    """The loop starts from the same rounded logits: an error of 1e-5 is float32's; bfloat16's would be near 1e-1."""
    logits, labels = _example(torch.bfloat16)
    logps = response_logps(logits, labels)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, torch.tensor(_loop(logits, labels)), rtol=1e-5, atol=1e-5)


def test_logits_at_a_position_score_the_next_token():
    """All weight on token 5 at position 2: the label 5 is certain at position 3 and nowhere else."""
    logits = torch.zeros(1, L, V)
    logits[0, 2, 5] = 1000.0
    for position in range(1, L):
        labels = torch.full((1, L), -100)
        labels[0, position] = 5
        expected = 0.0 if position == 3 else -math.log(V)
        assert response_logps(logits, labels).item() == pytest.approx(expected, abs=1e-6)


def test_label_at_the_first_position_is_not_scored():
    labels = torch.full((1, L), -100)
    labels[0, 0] = 5
    assert response_logps(torch.zeros(1, L, V), labels).tolist() == [0.0]
    assert response_token_counts(labels).tolist() == [0]


def test_only_scored_positions_get_gradient():
    logits, labels = _example(torch.float64)
    logits.requires_grad_()
    response_logps(logits, labels).sum().backward()
    touched = logits.grad.abs().sum(dim=2) > 0
    assert [[row, position] for row, position in touched.nonzero().tolist()] == [[0, 1], [0, 2], [0, 3], [1, 5]]
    assert logits.grad.isfinite().all()


def test_a_row_with_no_response_scores_zero():
    logits, labels = _example()
    assert response_logps(logits, labels)[2].item() == 0.0
    assert response_logps(logits[:, :1], labels[:, :1]).tolist() == [0.0, 0.0, 0.0]


def test_another_ignore_index_is_respected():
    logits, labels = _example()
    marked = labels.where(labels != -100, torch.tensor(-1))
    assert torch.equal(response_logps(logits, marked, ignore_index=-1), response_logps(logits, labels))
    assert torch.equal(response_token_counts(marked, ignore_index=-1), response_token_counts(labels))


def test_token_counts_are_the_tokens_scored():
    assert response_token_counts(_example()[1]).tolist() == [3, 1, 0]


def test_logps_gradient_is_right():
    logits, labels = _example(torch.float64)
    assert torch.autograd.gradcheck(lambda scores: response_logps(scores, labels), logits.requires_grad_())


@pytest.mark.parametrize(("logits_shape", "labels_shape"), [((2, 5, V), (2, 4)), ((5, V), (5,)), ((2, 5, V), (1, 5))])
def test_shapes_that_do_not_fit_are_refused(logits_shape, labels_shape):
    with pytest.raises(ValueError, match="response_logps: got logits"):
        response_logps(torch.zeros(logits_shape), torch.zeros(labels_shape, dtype=torch.int64))


def test_token_counts_refuse_labels_without_rows():
    with pytest.raises(ValueError, match="expected \\(B, L\\)"):
        response_token_counts(torch.zeros(5, dtype=torch.int64))
