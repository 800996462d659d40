"""What is done to a run, and when, as a function of the seed."""

import random
import signal
from dataclasses import asdict, dataclass
from typing import Any

STOPS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
AT_START = -1
_SPREAD = 0.9
"""Faults fall into this part of the run: one that comes after the last step does nothing."""
_SAVE_POINTS = 12
"""Operations of the file system in a save: kills in a save fall before, between and after them."""


@dataclass(frozen=True)
class Fault:
    """One fault of one life of the run.

    kind    kill: SIGKILL; launcher: SIGKILL of the launcher of all processes; hang: SIGSTOP; signal: one that asks to
            stop; disk: files can grow to `limit` bytes and no further
    rank    the process that it befalls; None: all of them
    step    it is due at the batch of this step, or of the first one after it, a hang at the third of its life at the
            earliest; AT_START: when the process starts
    points  operations on checkpoints that have to pass after that
    delay   seconds from then on
    signal  name of the signal that is sent
    limit   bytes, of a disk
    """

    kind: str
    rank: int | None
    step: int
    points: int = 0
    delay: float = 0.0
    signal: str = "SIGKILL"
    limit: int = 0

    @property
    def number(self) -> int:
        """The number of the signal."""
        return int(signal.Signals[self.signal])

    def told(self) -> dict[str, Any]:
        """The fault as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Undisturbed:
    """What an undisturbed run tells the plan: its steps, seconds until the first and for one, and the bytes of the
    largest file of a checkpoint."""

    steps: int
    start_s: float
    step_s: float
    largest: int


def plan(seed: int, kills: int, nproc: int, run: Undisturbed) -> list[Fault]:
    """The faults of a run in their order: `kills` kills, and for every five a hang, a signal and a full disk.

    A third of the kills come in a save, a sixth at a start, the others in between, at moments that have nothing to do
    with what the run does. Of several processes mostly one is killed, at a start all, and every tenth time their
    launcher instead.
    """
    rng = random.Random(seed)
    fifths = -(-kills // 5)
    kinds = ["kill"] * kills + ["hang"] * fifths + ["signal"] * fifths + ["disk"] * fifths
    if nproc > 1:
        for place in range(0, kills, 10):
            kinds[place] = "launcher"
    rng.shuffle(kinds)
    last = max(0, run.steps - 2)
    steps = [min(last, int(_SPREAD * run.steps * (place + rng.random()) / len(kinds))) for place in range(len(kinds))]
    return [_fault(rng, kind, step, nproc, run) for kind, step in zip(kinds, steps, strict=True)]


def _fault(rng: random.Random, kind: str, step: int, nproc: int, run: Undisturbed) -> Fault:
    rank, delay = rng.randrange(nproc), rng.uniform(0, 2 * run.step_s)
    if kind == "launcher":
        return Fault(kind, 0, step, delay=delay)
    if kind == "hang":
        # At the wait for a batch, where the other processes notice: they are patient with saves and evaluations.
        return Fault(kind, rank, step, signal="SIGSTOP")
    if kind == "disk":
        return Fault(kind, 0, step, limit=rng.randrange(max(1, run.largest)))
    name = "SIGKILL" if kind == "kill" else rng.choice(STOPS)
    if rng.random() < 1 / 6 and (kind == "kill" or nproc == 1):
        return Fault(kind, None, AT_START, delay=rng.uniform(0, run.start_s), signal=name)
    if kind == "kill" and rng.random() < 0.4:
        return Fault(kind, 0, step, points=rng.randint(1, _SAVE_POINTS))
    return Fault(kind, rank, step, delay=delay, signal=name)
