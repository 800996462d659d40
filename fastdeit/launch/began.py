"""When a process was started, which is when the user's command was."""

import os
import time
from pathlib import Path


def process_began(pid: int | None = None) -> float:
    """The start of process `pid` (None: of this one) by `time.monotonic()`, to a hundredth of a second.

    Where /proc does not tell (it is Linux's), and for a process that is no more, it is now.
    """
    try:
        # The command name, in parentheses, may hold spaces. Field 22, the start in ticks since boot, comes later.
        stat = Path(f"/proc/{pid or os.getpid()}/stat").read_text()
    except OSError:
        return time.monotonic()
    ticks = int(stat.rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age
