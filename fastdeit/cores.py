"""How many processors and how much memory this process may use."""

import os
from contextlib import suppress
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_MEMORY = Path("/sys/fs/cgroup/memory.max")


def available() -> int:
    """Processors that this process may run on: its affinity, and the quota of its container where that is smaller."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = _QUOTA.read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no cgroup v2, or no limit: "max 100000"
    return cores


def memory() -> int:
    """Bytes of memory: the machine's, and the limit of its container where that is smaller."""
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no cgroup v2, or no limit: "max"
        size = min(size, int(_MEMORY.read_text()))
    return size
