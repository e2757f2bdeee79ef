"""How much memory a process has used."""

from __future__ import annotations

import resource
from pathlib import Path


def peak() -> int:
    """Return the peak memory of this process, in bytes."""
    status = Path("/proc/self/status")
    if not status.exists():  # on Linux, `ru_maxrss` includes the parent process
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
