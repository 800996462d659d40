"""The clock of a run: wall-clock time from the start of the command, over all the commands that have gone on with it.

    seconds   of the processes of the run, until now: start-up, teachers, input, evaluations and checkpoints included
    paused    between the end of a process and the start of the next

A process that dies leaves its last line in metrics.jsonl. Until that line it has worked, though the steps after its
newest checkpoint are made again: this time counts to `seconds`. What lies behind the line is a pause.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from fastdeit.engine import metrics
from fastdeit.run import directory


class Clock:
    """Started by `began`, the start of the command by `time.monotonic()`; None: now."""

    def __init__(self, began: float | None = None) -> None:
        self._began = time.monotonic() if began is None else began
        self._earlier = 0.0
        self.paused = 0.0

    @classmethod
    def going_on(cls, run: Path, began: float | None) -> Self:
        """The clock of a process that goes on with `run`, as far as the logs tell. Ask before a log is cut."""
        clock = cls(began)
        clock._earlier = _logged(run)
        return clock

    @property
    def seconds(self) -> float:
        """Wall-clock of all processes of the run, until now."""
        return self._earlier + time.monotonic() - self._began

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps; `at` is the time of day, in seconds since 1970."""
        return {"seconds": self.seconds, "paused": self.paused, "at": time.time()}

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from a checkpoint with this `state`."""
        self._earlier = max(self._earlier, state["seconds"])
        lost = self._earlier - state["seconds"]
        started = time.time() - (time.monotonic() - self._began)
        self.paused = state["paused"] + max(0.0, started - state["at"] - lost)


def _logged(run: Path) -> float:
    """The last `seconds` in the log of a run. While its teachers are trained it has none: then the sum of theirs."""
    records = metrics.read(run / directory.METRICS) if (run / directory.METRICS).is_file() else []
    if records or directory.has_checkpoint(run):
        return max((record.get("seconds", 0.0) for record in records), default=0.0)
    return sum(_logged(teacher) for teacher in directory.teachers_in(run))
