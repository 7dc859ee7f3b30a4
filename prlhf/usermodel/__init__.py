"""User models: from a user's id, or what is known of the user, to the soft prompt that stands for the user."""

from prlhf.usermodel.base import UserContext, UserModel
from prlhf.usermodel.cluster import ClusterUserModel
from prlhf.usermodel.encoder import EncoderUserModel
from prlhf.usermodel.history import HistoryUserModel
from prlhf.usermodel.individual import IndividualUserModel
from prlhf.usermodel.low_rank import LowRankUserModel
from prlhf.usermodel.text import TextUserModel
from prlhf.usermodel.uniform import UniformUserModel

__all__ = [
    "ClusterUserModel",
    "EncoderUserModel",
    "HistoryUserModel",
    "IndividualUserModel",
    "LowRankUserModel",
    "TextUserModel",
    "UniformUserModel",
    "UserContext",
    "UserModel",
]
