"""What this process holds and has held, from Linux's /proc."""

from __future__ import annotations

import re
from pathlib import Path


def memory_kib() -> dict[str, int]:
    """KiB by the kernel's names: VmRSS now, VmHWM at most, RssAnon without files.

    VmHWM starts from nothing with the program; getrusage's maximum starts from what the parent process had taken.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return {name: int(kib) for name, kib in re.findall(r"(\w+):\s+(\d+) kB", status)}
