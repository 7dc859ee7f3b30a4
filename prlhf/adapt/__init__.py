"""New users of a trained model: their states from a few judgments, and what to ask them."""

from prlhf.adapt.ask import choose_questions
from prlhf.adapt.fit import FittedUser, fit_judgments, fit_user
from prlhf.adapt.margins import Judgment

__all__ = ["FittedUser", "Judgment", "choose_questions", "fit_judgments", "fit_user"]
