"""`fastdeit bench overhead`: what a teacher, a cache of its answers, the average of the weights and the log cost.

undistilled  the step of method `supervised`: forward, loss, backward, AdamW
cached       the step of method `distill` from a cache on the disk, whose records are read, checked and decoded before
             it. A training does that in another thread, so this is an upper bound
online       the step of `distill` with a teacher that runs along
teacher      the teacher's forward alone, on the same images
update       the optimizer's update alone; `averaged_update` also averages the weights, in the same pass

Sides run in turn, so that a machine whose speed drifts slows all of them, and what is told is the median of the ratios
of a round. The average is compared by the updates alone: as a difference of whole steps it would drown in their noise.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdeit.bench import step as cells
from fastdeit.bench import watching
from fastdeit.bench.measure import CLASSES, Timer, interleave, timed
from fastdeit.bench.step import LR, Cell
from fastdeit.data.logits import Cache, CachedLogits, Layout
from fastdeit.engine.ema import Ema
from fastdeit.engine.step import Engine

TOP_K = 10
_STEPS = 2
"""Steps in the cache: each time another one is read, as in a training."""
_OF_THE_LOG = "progress", "log"
CACHED, ONLINE, REST = 1.05, 1.15, 0.01
"""What the project wants: at most so much of the undistilled step, of step and teacher, and of a step."""


def main(args: argparse.Namespace, device: torch.device) -> None:
    """Measure and print."""
    known = {"image_size": args.image_size, "precision": args.precision, "teacher": args.teacher}
    wanted = cells.cell("step", args.model, device, batch=args.batch or 16, **known)
    print("\n".join(sentences(wanted, measure(wanted, args.rounds, device))))


def measure(wanted: Cell, rounds: int, device: torch.device) -> dict[str, Any]:
    """Seconds and CPU seconds of the sides by round; `watching`, on a CPU, has the loop's own CPU seconds."""
    plain = replace(wanted, teacher=None)
    with tempfile.TemporaryDirectory() as folder:
        cache = _filled(Path(folder), wanted)
        sides: dict[str, Timer] = {}
        ours, _, _ = cells.engine(plain, device, "none")
        sides["undistilled"] = timed(_step_of(ours, plain, device), device)
        ours, _, _ = cells.engine(plain, device, "none")
        sides |= _updates(ours, device)  # which leave weights that nobody has trained
        ours, _, _ = cells.engine(plain, device, "none", cached=cache)
        sides["cached"] = timed(_cached_step(ours, plain, CachedLogits(cache), device), device)
        ours, _, _ = cells.engine(wanted, device, "none")
        sides["online"] = timed(_step_of(ours, wanted, device), device)
        sides["teacher"] = timed(_forward_of(ours, wanted, device), device)
        found = interleave(sides, rounds, device, discard=int(device.type == "cuda"))
    found["watching"] = watching.seconds(ours, rounds, "cpu_seconds") if device.type == "cpu" else {}
    return found


def sentences(wanted: Cell, found: dict[str, Any]) -> list[str]:
    """What was measured, as ratios beside what is wanted."""
    lines = [
        f"{wanted} on {found['device']}, {wanted.precision}, {found['rounds']} interleaved rounds, medians of ratios"
    ]
    for what, side, parts, most in (
        (f"from a cache of the top {TOP_K}", "cached", ("undistilled",), CACHED),
        ("with the teacher running along", "online", ("undistilled", "teacher"), ONLINE),
    ):
        middle, low, high = _ratio(found["seconds"], side, parts)
        of = "an undistilled step" if len(parts) == 1 else "an undistilled step and the teacher's forward"
        text = f"  a step {what} takes {middle:.3f} of {of} (by round {low:.3f} to {high:.3f}"
        if found["device"] == "cpu":
            text += f", in CPU time {_ratio(found['cpu_seconds'], side, parts)[0]:.3f}"
        lines.append(f"{text}); wanted: at most {most}")
    return [*lines, *_rest(found)]


def _rest(found: dict[str, Any]) -> list[str]:
    """What is done beside a step, as shares of it. On a CPU it is the CPU time, in which others have no part."""
    seconds = found["cpu_seconds" if found["device"] == "cpu" else "seconds"]
    whole = statistics.median(seconds["undistilled"])
    added = statistics.median(m - u for m, u in zip(seconds["averaged_update"], seconds["update"], strict=True)) / whole
    logged = sum(found["watching"].get(name, 0.0) for name in _OF_THE_LOG) / whole
    lines = [f"  the average of the weights adds {added:.2%} to an undistilled step"]
    if found["watching"]:
        lines[0] += f", the log {logged:.2%}, together {added + logged:.2%}; wanted: at most {REST:.0%}"
        lines.append(f"  {watching.told(found['watching'], whole)}")
    return lines


def _ratio(seconds: dict[str, list[float]], side: str, parts: Sequence[str]) -> tuple[float, float, float]:
    """(median, least, largest) over the rounds of `side` as a share of the sum of `parts`."""
    ratios = [
        mine / sum(others) for mine, *others in zip(seconds[side], *(seconds[part] for part in parts), strict=True)
    ]
    return statistics.median(ratios), min(ratios), max(ratios)


# ---- the sides -------------------------------------------------------------------------------------------------------


def _step_of(ours: Engine, wanted: Cell, device: torch.device) -> Callable[[], None]:
    samples = cells.batch(wanted, ours.method.noise(), device)
    return lambda: ours.step([samples], LR)


def _forward_of(ours: Engine, wanted: Cell, device: torch.device) -> Callable[[], Any]:
    samples, teacher = cells.batch(wanted, ours.method.noise(), device), ours.method.teacher

    @torch.no_grad()
    def run() -> None:
        with cells.autocast(device, wanted.precision):
            teacher(samples)

    return run


def _filled(folder: Path, wanted: Cell) -> Path:
    """A cache of random answers to the images of a few steps."""
    layout = Layout(CLASSES, TOP_K, 1.0, wanted.batch, _STEPS)
    cache = Cache(folder, layout, {}, {})
    cache.create()
    generator = torch.Generator().manual_seed(0)
    answers = [torch.randn(wanted.batch, CLASSES, generator=generator) for _ in range(_STEPS)]
    for shard in layout.shards(range(1)):
        cache.write(shard, [layout.encode(np.arange(wanted.batch), answers[step]) for step in shard.steps])
    return folder


def _cached_step(ours: Engine, wanted: Cell, store: CachedLogits, device: torch.device) -> Callable[[], None]:
    samples, index, steps = (
        cells.batch(wanted, ours.method.noise(), device),
        np.arange(wanted.batch),
        cycle(range(_STEPS)),
    )

    def run() -> None:
        logits = store.read(0, index, np.zeros_like(index), index + next(steps) * wanted.batch)
        ours.step([replace(samples, extras={"teacher": torch.from_numpy(logits).to(device)})], LR)

    return run


def _updates(ours: Engine, device: torch.device) -> dict[str, Timer]:
    """The update alone and with the average, on gradients that stay."""
    optimizer = ours.optimizer
    average = Ema(optimizer.params, cells.EMA_DECAY, ours.method)
    gradients = {name: torch.randn_like(parameter) for name, parameter in optimizer.params.items()}

    def update(into: dict[str, torch.Tensor] | None, decay: float) -> None:
        for name, parameter in optimizer.params.items():
            parameter.grad = gradients[name]
        optimizer.step(LR, verdict, into, decay, None)
        optimizer.zero_grad()

    verdict = ours.guard.judge(list(gradients.values()))
    return {
        "update": timed(lambda: update(None, 0.0), device),
        "averaged_update": timed(lambda: update(average.average, average.decay), device),
    }
