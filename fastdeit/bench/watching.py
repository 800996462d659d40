"""What a training does besides computing its steps: the guard, the heartbeat, the question whether to stop, the log.

Each part is timed by itself, on an engine of the cell, and told in microseconds and as a share of a step. The
difference of a step with and without them would drown in the noise of a machine.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastdeit import kernels
from fastdeit.bench.measure import Timer, interleave, median, timed
from fastdeit.engine import replicas
from fastdeit.engine.dist import World
from fastdeit.engine.guard import Guard
from fastdeit.engine.metrics import MetricsLog
from fastdeit.engine.progress import Progress
from fastdeit.engine.step import Engine
from fastdeit.engine.watch import Watch
from fastdeit.recipe import resolve as recipes
from fastdeit.run.record import Record, RunLog

_STEPS = 10**6
_CALLS = 20
"""Calls that one measurement takes the mean of: most parts take microseconds."""
MOST = 0.01
"""The share of a step that the project wants all of it to stay below."""


def seconds(engine: Engine, rounds: int, of: str = "seconds") -> dict[str, float]:
    """Seconds, or `cpu_seconds`, of the parts for a step, by name, medians of interleaved rounds. `engine` has made a
    step, on a CPU.

    norm        the norm of the gradients, which clipping and the log want as well: it reads all gradients
    guard       what the guard makes of the norm
    drift       the checksum of the weights, as in a run of several processes, divided by the steps between two lines
    heartbeat   the places that the loop says it is at, as in a run of several processes; the thread that passes them
                on once a second is not in it
    preemption  the question whether somebody asked to stop, in a run of one process: one of several asks the others
    progress    the record and the bar
    log         a line of metrics, and the look at the guard before it, divided by the steps between two lines
    """
    recipe, device = recipes.load("deit_tiny", []), torch.device("cpu")
    weights = list(engine.method.parameters())
    gradients = [torch.randn_like(parameter) for parameter in weights if parameter.requires_grad]
    norm, world = kernels.global_norm(gradients), World(device)
    guard = Guard(engine.precision, None, device, norm=lambda gradients: norm)
    watch, record = Watch(0, 1, None, 600.0), Record()
    log = RunLog(recipe, world, _STEPS, _STEPS)

    def beat() -> None:
        for place in ("the batch of a step", "the computation of a step", "the end of a step"):
            watch.at(place, patient=False)

    def progress() -> None:
        record.add(1, 1.0, 0.1)
        log.step(1)

    def line() -> None:
        engine.sums["steps"] += 1  # else there would be no mean to tell
        log.training(1, engine, record, 1e-3)
        guard.trip()

    parts: dict[str, Callable[[], Any]] = {"norm": lambda: kernels.global_norm(gradients)}
    parts |= {"guard": lambda: guard.judge(gradients), "drift": lambda: replicas.slots(weights, 0, 2)}
    parts |= {"heartbeat": beat, "preemption": world.stop_requested, "progress": progress, "log": line}
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log.txt", "w") as stream:
        log.metrics, log.progress = MetricsLog(Path(folder) / "metrics.jsonl"), Progress(_STEPS, _STEPS, stream=stream)
        found = interleave({name: _calls(run, device) for name, run in parts.items()}, rounds, device, None)
        log.close()
    each = {name: median(found, name, of) / _CALLS for name in parts}
    return each | {name: each[name] / recipe.engine.log_every for name in ("drift", "log")}


def told(parts: dict[str, float], step_s: float) -> str:
    """What `seconds` has found, beside a step of `step_s` seconds."""
    whole = sum(parts.values())
    listed = ", ".join(f"{name} {1e6 * each:.1f}" for name, each in parts.items())
    return (
        f"watching over a run takes {1e6 * whole:.0f} us a step ({listed}), {whole / step_s:.2%} of this one and less "
        f"than {MOST:.0%} of steps longer than {1e3 * whole / MOST:.0f} ms"
    )


def _calls(run: Callable[[], Any], device: torch.device) -> Timer:
    def calls() -> None:
        for _ in range(_CALLS):
            run()

    return timed(calls, device)
