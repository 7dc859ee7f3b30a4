"""The two-rank runs, made once for all tests that look at them."""

from __future__ import annotations

from pathlib import Path

import pytest

from prlhf.engine.trainer import train
from prlhf.errors import Preempted
from tests.engine.two_ranks import resumable, run_everything
from tests.run_distributed import run_distributed_test
from tests.tiny_run import Tiny, at_step, stop_signal


@pytest.fixture(scope="session")
def two_ranks(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `run_everything` filled; a run that one rank began is gone on with there."""
    folder = tmp_path_factory.mktemp("two_ranks")
    with pytest.raises(Preempted), at_step(2, stop_signal):
        train(resumable(tiny), folder / "one_then_two")
    run_distributed_test(run_everything, 2, tiny, folder)
    return folder
