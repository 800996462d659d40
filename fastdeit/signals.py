"""The signals that ask a run to stop, and what a second one means.

SIGINT   Ctrl-C
SIGTERM  `kill`, schedulers and containers; the launcher's word to its workers
SIGHUP   the terminal is gone
SIGUSR1  a scheduler's early warning, as of `sbatch --signal=USR1@120`
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
REPEAT_S = 1.0
"""Seconds within which a second SIGTERM is the first one again: a scheduler signals a whole process group, and the
parent in that group passes on what it got."""


def listened() -> tuple[signal.Signals, ...]:
    """The signals of `STOP_SIGNALS` that this process is to obey.

    What the parent ignores stays ignored, as `nohup` wants it of SIGHUP and a script of the Ctrl-C of a job that it has
    put into the background. SIGTERM is obeyed in any case: it is how a launcher speaks to its workers.
    """
    ignored = {number for number in STOP_SIGNALS if signal.getsignal(number) is signal.SIG_IGN}
    return tuple(number for number in STOP_SIGNALS if number not in ignored - {signal.SIGTERM})


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None], *others: signal.Signals) -> Iterator[None]:
    """`handler` gets the signals of `listened` and the `others` for the time of the block, in the main thread."""
    before = {number: signal.signal(number, handler) for number in (*listened(), *others)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@dataclass
class Demand:
    """What the signals so far ask for.

    first    the signal that asked to save and stop; None: nobody has
    at_once  whether to stop without saving: Ctrl-C after any other signal, or SIGTERM again
    """

    first: signal.Signals | None = None
    at_once: bool = False
    _since: float = field(default=0.0, repr=False)

    def receive(self, number: int) -> None:
        """Take a signal into account. Of the others a second one changes nothing: a closed terminal sends SIGHUP twice,
        and SLURM's SIGTERM at the time limit follows its SIGUSR1 while the run may still be saving."""
        if self.first is None:
            self.first, self._since = signal.Signals(number), time.monotonic()
            return
        again = number == self.first == signal.SIGTERM and time.monotonic() - self._since >= REPEAT_S
        self.at_once = self.at_once or again or number == signal.SIGINT
