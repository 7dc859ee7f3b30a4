"""Users who come and go after training: their states from a few judgments, what to ask them, how they leave."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prlhf.adapt.ask import choose_questions
    from prlhf.adapt.fit import FittedUser, fit_judgments, fit_user
    from prlhf.adapt.margins import Judgment

__all__ = ["FittedUser", "Judgment", "choose_questions", "fit_judgments", "fit_user"]


def __getattr__(name: str) -> Any:
    """A public name, imported when it is used: the command line reads this package before it knows what is asked."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    homes = {"choose_questions": "ask", "Judgment": "margins"}
    return getattr(importlib.import_module(f"prlhf.adapt.{homes.get(name, 'fit')}"), name)
