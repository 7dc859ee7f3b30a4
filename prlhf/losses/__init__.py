"""The objectives of preference training: pure functions of tensors, one value a row, no reduction."""

from prlhf.losses.dpo import dpo_loss
from prlhf.losses.logps import response_logps, response_token_counts
from prlhf.losses.pairwise import PAIRWISE_LOSSES, PairwiseKind, PreferenceLoss, compute_pairwise_losses
from prlhf.losses.pdpo import PersonalizedLoss, pdpo_loss
from prlhf.losses.prm import bradley_terry_loss, prm_loss

__all__ = [
    "PAIRWISE_LOSSES",
    "PairwiseKind",
    "PersonalizedLoss",
    "PreferenceLoss",
    "bradley_terry_loss",
    "compute_pairwise_losses",
    "dpo_loss",
    "pdpo_loss",
    "prm_loss",
    "response_logps",
    "response_token_counts",
]
