"""User models: from a user's id to the soft prompt that stands for the user."""

from prlhf.usermodel.base import UserContext, UserModel
from prlhf.usermodel.cluster import ClusterUserModel
from prlhf.usermodel.individual import IndividualUserModel
from prlhf.usermodel.low_rank import LowRankUserModel
from prlhf.usermodel.uniform import UniformUserModel

__all__ = [
    "ClusterUserModel",
    "IndividualUserModel",
    "LowRankUserModel",
    "UniformUserModel",
    "UserContext",
    "UserModel",
]
