"""Faults on purpose, to see that a run survives them: `PRLHF_FAULT="point:step:rank:action"`."""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from prlhf.distributed import rank
from prlhf.errors import ConfigError

VARIABLE = "PRLHF_FAULT"
POINTS = (
    "reference", "step_begin", "after_backward", "before_optimizer", "checkpoint_file_<i>", "before_manifest",
    "before_rename", "after_rename", "eval",
)
ACTIONS = ("kill9", "raise", "hang", "nan", "enospc", "sigterm", "sigint")
_POINT = re.compile("|".join(point.replace("<i>", "[0-9]+") for point in POINTS))
_NUMBER = re.compile("[0-9]{1,9}")


class InjectedFault(RuntimeError):
    """What the action `raise` raises: an error that nothing expects."""


@dataclass
class Fault:
    """One fault, which happens once.

    Args:
        step: as in metrics.jsonl, from 1; of `eval` the step that is evaluated, of `reference` 0.
    """

    point: str
    step: int
    rank: int
    action: str
    current_step: int = 0
    num_files: int = 0
    is_done: bool = False

    def reach(self, point: str, step: int | None, parameters: Iterable[nn.Parameter]) -> None:
        """Act, if this is the place."""
        if step is not None:
            self.current_step = step
        if self.is_done or (self.current_step, rank()) != (self.step, self.rank):
            return
        if point == "checkpoint_file":
            point = f"checkpoint_file_{self.num_files}"
            self.num_files += 1
        if point == self.point:
            self.is_done = True
            _act(self.action, parameters)


_armed: Fault | None = None


def parse_fault(text: str) -> Fault:
    """The fault that `point:step:rank:action` describes.

    Raises: ConfigError: it describes none.
    """
    parts = text.split(":")
    if len(parts) == 4:
        point, step, number, action = parts
        is_known = _POINT.fullmatch(point) is not None and action in ACTIONS
        is_possible = action != "nan" or point == "after_backward"
        if is_known and is_possible and _NUMBER.fullmatch(step) and _NUMBER.fullmatch(number):
            return Fault(point, int(step), int(number), action)
    raise ConfigError(
        f"environment: {VARIABLE} is {text!r}, expected point:step:rank:action with a point of {', '.join(POINTS)} and "
        f"an action of {', '.join(ACTIONS)} (nan: after_backward alone); mend it or unset it"
    )


def arm_faults() -> None:
    """Take the fault of the environment, if there is one; a rank that was started again has had it.

    Raises: ConfigError: the variable is malformed.
    """
    global _armed
    text = os.environ.get(VARIABLE)
    fault = parse_fault(text) if text else None
    _armed = fault if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0 else None


def reach(point: str, *, step: int | None = None, parameters: Iterable[nn.Parameter] = ()) -> None:
    """Say that a run is at a point; files of a checkpoint are numbered from 0 in the order of these calls.

    Args:
        step: from now on; None in the midst of one.
        parameters: whose gradients the action `nan` spoils.
    """
    if _armed is not None:
        _armed.reach(point, step, parameters)


def _act(action: str, parameters: Iterable[nn.Parameter]) -> None:
    if action == "kill9":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "raise":
        raise InjectedFault(f"{VARIABLE} asked for it")
    elif action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif action == "nan":
        next(parameter.grad for parameter in parameters if parameter.grad is not None).fill_(float("nan"))
    elif action == "hang":
        while True:
            time.sleep(3600)
    else:  # twice, as those who are in a hurry send it
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM if action == "sigterm" else signal.SIGINT)
