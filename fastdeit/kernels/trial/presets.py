"""Presets of a whole step: what all of its ops run on, of which a trial takes the fastest.

An op that is the fastest alone need not be so in a step, where it finds other data in the caches, leaves the host more
or less time to launch the next, and shares the card's power with what runs before it. So where the ops of a forward and
backward have been tried out one by one (`candidates.py`), both are run as a whole in each preset, in turn, and timed.
The update is not: it runs the same kernels in every preset.

A preset names backends by op. Of these it takes the one that was fastest alone, at each shape, among those that are
right there. Where none is, and for ops that it does not name, it takes what `DEFAULT` takes: Triton's kernels, and of
attention what was fastest alone. The default gives way only to a preset that was faster in every round.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from time import monotonic
from typing import Any

from fastdeit.kernels._op import REFERENCE
from fastdeit.kernels._tried import INDUCTOR
from fastdeit.kernels.trial.candidates import ROUNDS, line
from fastdeit.kernels.trial.store import Row, Whole

DEFAULT = "default"
ALONE = "each op's fastest"
LEAST_ROUNDS = 3
"""With fewer nothing can be said against the default."""

ATTENTIONS = {
    "two-kernel attention": ("triton",),
    "one-kernel attention": ("fused_backward", "hopper"),
    "libraries' attention": ("fa3", "fa4", "efficient", "flash", "cudnn"),
}
EPILOGUES = "epilogue", "epilogue_forward", "epilogue_backward", "quack"
"""Backends of the MLP whose products have GELU in their epilogues, on both ways or on one."""
_OF_ATTENTION, _OF_MLP = ("attention", "query_attention"), ("mlp", "layer_norm_mlp")

Forms = Mapping[str, tuple[str, ...]]
"""Backends by op; "" stands for all ops that are not named."""


def _table() -> dict[str, Forms]:
    attentions = {"": {}, **{name: dict.fromkeys(_OF_ATTENTION, names) for name, names in ATTENTIONS.items()}}
    mlps = {"": {}, "epilogues": dict.fromkeys(_OF_MLP, EPILOGUES)}
    both = product(mlps.items(), attentions.items())
    return {
        ", ".join(filter(None, (mlp, attention))) or DEFAULT: mlp_forms | attention_forms
        for (mlp, mlp_forms), (attention, attention_forms) in both
    } | {ALONE: {}, "reference": {"": (REFERENCE,)}, "reference, compiled": {"": (INDUCTOR,)}}


PRESETS: dict[str, Forms] = _table()
"""By name, the default first. "reference, compiled" has each op's reference compiled by Inductor."""


def backend(preset: str, row: Row) -> str:
    """What the preset runs calls like the row's on."""
    if preset == ALONE:
        return row.backend
    usual = () if row.op in _OF_ATTENTION else ("triton",)
    forms = PRESETS[preset]
    for names in (forms.get(row.op, forms.get("", ())), usual):
        right = [name for name in names if name in row.seconds]
        if right:
            return min(right, key=row.seconds.__getitem__)
    return row.backend


def distinct(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The presets that differ for these rows, each with the backend of every row."""
    found: dict[tuple[str, ...], str] = {}
    for name in PRESETS:
        found.setdefault(tuple(backend(name, row) for row in rows), name)
    return {name: list(backends) for backends, name in found.items()}


def fastest(rounds: Mapping[str, Sequence[float]]) -> str:
    """Of presets with the seconds of each round, which had one of each: that with the least median, where it was faster
    than the default in every round, else the default. Without the default, the least median alone."""
    medians = {name: statistics.median(times) for name, times in rounds.items()}
    for name in sorted(medians, key=medians.__getitem__):
        pairs = zip(rounds[name], rounds.get(DEFAULT, ()), strict=False)
        if name == DEFAULT or all(mine < usual for mine, usual in pairs):
            return name
    raise ValueError("no preset was timed")


# ---- how long they take ----------------------------------------------------------------------------------------------


@dataclass
class Times:
    """Seconds of a step by preset, a number for each round; why some could not run; and whether time was left for
    enough rounds."""

    rounds: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    complete: bool = True


def timed(names: Sequence[str], run: Callable[[str], float], seconds: float, share: Callable[[Any], Any]) -> Times:
    """`run(name)` makes a step in a preset, and returns how long it took. A first round is thrown away. All processes
    make as many steps, as many as the main one's `seconds` leave time for; the times are the main one's. What fails
    there is left out, whenever it does; if all do, the last error is raised."""
    began, found = monotonic(), Times(complete=False)

    def made(name: str) -> float | None:
        try:
            return run(name)
        except Exception as error:  # kept as a line: an error holds the frames that it left, and their activations
            found.failed[name] = line(error)
            if len(found.failed) == len(names):
                raise
            return None

    for name in names:
        if not share(monotonic() - began < seconds):
            return found
        made(name)
    spent = monotonic() - began
    count, found.failed = share((min(ROUNDS, int((seconds - spent) / max(spent, 1e-9))), found.failed))
    found.complete = count >= LEAST_ROUNDS
    rounds: dict[str, list[float | None]] = {name: [] for name in names if name not in found.failed}
    for number in range(count if found.complete else 0):
        for name in list(rounds) if number % 2 == 0 else reversed(list(rounds)):
            rounds[name].append(made(name))
    found.rounds = {name: times for name, times in rounds.items() if name not in found.failed}
    return found


def judged(calls: str, found: Times) -> Whole:
    """What was found for the step."""
    seconds = {name: statistics.median(times) for name, times in found.rounds.items()}
    return Whole(calls, fastest(found.rounds), seconds, found.failed)
