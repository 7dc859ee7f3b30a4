"""What every test shares: one thread, no network, the optional data folder, and markers that skip themselves."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch

from tests.cli_run import trained  # noqa: F401 (a fixture)
from tests.tiny_run import tiny  # noqa: F401 (a fixture)

hypothesis.settings.register_profile("prlhf", deadline=None, derandomize=True)
hypothesis.settings.load_profile("prlhf")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--forbid-skips", action="store_true", help="fail the run when a selected test was skipped")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        peer = item.get_closest_marker("peer")
        missing = [name for name in peer.args if not importlib.util.find_spec(name)] if peer else []
        if missing:
            reason = f"needs {' and '.join(missing)}: pip install -c constraints.txt {' '.join(missing)}"
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.config.getoption("--forbid-skips") and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _notes_of_this_session(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is remembered of weights stays out of the folder for caches, also what other processes remember."""
    os.environ["PRLHF_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public data and tokenizers beside the repository; the test is skipped where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    return folder
