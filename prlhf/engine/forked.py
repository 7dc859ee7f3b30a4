"""Training in a forked process: it dies like any other, and starts in no time, since everything is imported already."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from prlhf.engine.launch import main

CAP_DAC_OVERRIDE = 1  # to write and read whatever the permissions say
CAPABILITY_VERSION = 0x20080522


class ForkedProcess:
    """Calls a function in a fork of this process, whose exit code it returns.

    Args:
        log: where the fork's output goes, behind what is there.
    """

    def __init__(self, call: Callable[[], int], log: Path) -> None:
        self._code: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                code = _run_fork(call, log)
            finally:  # whatever happens, the parent's frames are not the fork's to leave
                os._exit(code)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self) -> int:
        """The exit code, once there is one."""
        while (code := self.poll()) is None:
            time.sleep(0.005)
        return code

    def send_signal(self, sig: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, sig)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)


def fork_training(
    argv: list[str],
    environment: Mapping[str, str],
    log: Path,
    file_limit: int | None = None,
    obeys_permissions: bool = False,
) -> ForkedProcess:
    """`python -m prlhf.engine.launch ARGV` in a fork.

    Args:
        file_limit: bytes that a file may have; writing more fails as on a full disk.
        obeys_permissions: of files, also where this process is root and need not.
    """

    def call() -> int:
        """The exit code of the launcher."""
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        if obeys_permissions and sys.platform == "linux":
            _drop_capability(CAP_DAC_OVERRIDE)
        os.environ.update(environment)
        return main(argv)

    return ForkedProcess(call, log)


def kill_later(pid: int, after_s: float, log: Path) -> ForkedProcess:
    """SIGKILL to a process after a while, from a third one, so at whatever it is doing then."""

    def call() -> int:
        """The exit code of the launcher."""
        time.sleep(after_s)
        os.kill(pid, signal.SIGKILL)
        return 0

    return ForkedProcess(call, log)


def _drop_capability(number: int) -> None:
    """Give up one of root's powers; see capabilities(7). A process that has none stays as it is.

    Raises: OSError: the system refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)  # 0: this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: the lower 32 numbers, then the upper ones
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    for index in range(3):
        sets[index] &= ~(1 << number)
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _run_fork(call: Callable[[], int], log: Path) -> int:
    try:
        for number in (signal.SIGTERM, signal.SIGINT):  # the parent's handlers are not the fork's
            signal.signal(number, signal.SIG_DFL)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        # The objects that these replace may own the descriptors: they must not close them.
        sys.stdout, sys.stderr = (os.fdopen(os.dup(descriptor), "w", buffering=1) for descriptor in (1, 2))
        return call()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
