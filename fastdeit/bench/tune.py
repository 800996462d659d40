"""`fastdeit kernels tune`: what `engine.autotune` does in the first steps of a run, now and as a table.

The steps are those of a run: method, engine and optimizer on random images, so that the shapes are the run's as well.
What was found before is tried again, and replaced.
"""

import argparse
import math

from fastdeit import kernels
from fastdeit.bench import step
from fastdeit.bench.step import CannotRun
from fastdeit.engine.dist import pick_device
from fastdeit.errors import UsageError
from fastdeit.kernels.trial.store import Row, Whole

_LR = 1e-5


def main(args: argparse.Namespace) -> None:
    """Try all ops of a training step, and print what was found of each."""
    if not 0 <= args.budget < math.inf:
        raise UsageError(f"--budget {args.budget:g}: give seconds, 0 or more")
    device = pick_device(args.device)
    wanted = step.cell("step", args.model, device, batch=args.batch, precision=args.dtype, ema=True)
    tuning = kernels.Tuning("on", device, recorded=args.graph, budget=args.budget, anew=True, presets=True)
    try:
        engine, _, _ = step.engine(wanted, device, "graph" if args.graph else "none", tuning)
    except CannotRun as error:
        raise UsageError(f"--graph: {error}") from error
    samples = step.batch(wanted, engine.method.noise(), device)
    try:
        while tuning.open:
            engine.step([samples], _LR)
    finally:
        tuning.close()
    print("\n".join([*map(_lines, tuning.rows), *map(_lines_of_whole, tuning.wholes)]))
    if device.type == "cpu":
        print("On a CPU a run uses this only with engine.autotune=on.")


def _lines(row: Row) -> str:
    lines = [f"{row.op}: {row.shape}"]
    column = max(map(len, [*row.seconds, *row.failed]))
    for name, seconds in sorted(row.seconds.items(), key=lambda item: item[1]):
        faster = row.seconds["reference"] / seconds
        chosen = "  chosen" if name == row.backend else ""
        lines.append(f"  {name:{column}} {1e6 * seconds:10.1f} us  {faster:6.2f}x PyTorch{chosen}")
    return "\n".join([*lines, *(f"  {name:{column}} cannot run: {why}" for name, why in row.failed.items())])


def _lines_of_whole(whole: Whole) -> str:
    column = max(map(len, [*whole.seconds, *whole.failed]))
    lines = ["a forward and backward as a whole, by preset"]
    for name, seconds in sorted(whole.seconds.items(), key=lambda item: item[1]):
        lines.append(f"  {name:{column}} {1e3 * seconds:10.2f} ms{'  chosen' if name == whole.preset else ''}")
    return "\n".join([*lines, *(f"  {name:{column}} cannot run: {why}" for name, why in whole.failed.items())])
