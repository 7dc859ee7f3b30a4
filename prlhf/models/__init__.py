"""Backbone, adapters, soft prompt, and the policy and reward model made of them."""

from prlhf.models.assemble import (
    PolicySpec,
    load_model,
    load_policy,
    load_reward_model,
    make_policy,
    make_reward_model,
)
from prlhf.models.personalized import PersonalizedModel
from prlhf.models.policy import PersonalizedPolicy, Reference, ResponseLogps
from prlhf.models.reward import PersonalizedRewardModel, ResponseScores

__all__ = [
    "PersonalizedModel",
    "PersonalizedPolicy",
    "PersonalizedRewardModel",
    "PolicySpec",
    "Reference",
    "ResponseLogps",
    "ResponseScores",
    "load_model",
    "load_policy",
    "load_reward_model",
    "make_policy",
    "make_reward_model",
]
