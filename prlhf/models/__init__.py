"""Backbone, adapters, soft prompt, and the policy made of them."""

from prlhf.models.assemble import PolicySpec, load_policy, make_policy
from prlhf.models.policy import PersonalizedPolicy, Reference, ResponseLogps

__all__ = ["PersonalizedPolicy", "PolicySpec", "Reference", "ResponseLogps", "load_policy", "make_policy"]
