"""The objectives of preference training: pure functions of tensors, one value a row, no reduction."""

from prlhf.losses.dpo import dpo_loss
from prlhf.losses.kto import UnpairedLoss, kto_loss
from prlhf.losses.logps import response_logps, response_token_counts
from prlhf.losses.orpo import orpo_loss, orpo_term
from prlhf.losses.pairwise import PAIRWISE_LOSSES, SMOOTHED_KINDS, PairwiseKind, PreferenceLoss, compute_pairwise_losses
from prlhf.losses.pdpo import PersonalizedLoss, mix_terms, pdpo_loss
from prlhf.losses.prior import gaussian_prior
from prlhf.losses.prm import bradley_terry_loss, prm_loss
from prlhf.losses.simpo import simpo_loss
from prlhf.losses.token_logps import linear_token_logps

__all__ = [
    "PAIRWISE_LOSSES",
    "SMOOTHED_KINDS",
    "PairwiseKind",
    "PersonalizedLoss",
    "PreferenceLoss",
    "UnpairedLoss",
    "bradley_terry_loss",
    "compute_pairwise_losses",
    "dpo_loss",
    "gaussian_prior",
    "kto_loss",
    "linear_token_logps",
    "mix_terms",
    "orpo_loss",
    "orpo_term",
    "pdpo_loss",
    "prm_loss",
    "response_logps",
    "response_token_counts",
    "simpo_loss",
]
