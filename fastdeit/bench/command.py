"""`fastdeit bench ...`: ours and the peers in turn, in one process, medians and ratios.

What is printed and appended to a results file is the ratio of medians and the spread of the ratio over rounds, never a
single time. The meaning of a row stands in benchmarks/README.md.
"""

import argparse
from typing import Any

import torch

from fastdeit.bench import cells, data_peers
from fastdeit.bench import step as bench_step
from fastdeit.bench import train as bench_train
from fastdeit.bench.cells import builders, finish, peers
from fastdeit.bench.measure import interleave
from fastdeit.engine.dist import pick_device

BATCH = 16


def main(args: argparse.Namespace) -> None:
    """Measure what `args.what` says and append its rows to `--out`; or measure or count a step, or report what was
    measured, and print that."""
    if args.what == "report":
        from fastdeit.bench import report

        report.main(args.results, args.folder)
        return
    if args.what in ("parity", "count"):
        from fastdeit.bench import count_command, parity

        {"parity": parity.main, "count": count_command.main}[args.what](args)
        return
    device = pick_device(args.device)
    if args.what in ("suite", "calibrate", "overhead"):
        from fastdeit.bench import calibrate, overhead, suite

        {"suite": suite.main, "calibrate": calibrate.main, "overhead": overhead.main}[args.what](args, device)
    elif args.what == "data":
        finish({"what": "data", **data(args, device)}, args.out)
    elif args.what == "train":
        finish(train(args, device), args.out)
    else:
        finish(step(args, device), args.out)
    if device.type == "cpu":
        print(cells.CPU_NOTE)


# ---- step and forward ------------------------------------------------------------------------------------------------


def step(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One cell of `bench step` or `bench forward`; see `bench_step`."""
    sides = builders(args.capture or ("none",), peers(args))
    return bench_step.measure(cell(args, device), sides, args.rounds, device)


def train(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The same with input from files; see `bench_train`."""
    wanted = cell(args, device)
    args = argparse.Namespace(**vars(args) | {"batch": wanted.batch})
    return bench_train.measure(args, wanted, args.capture or ("none",), peers(args), device)


def cell(args: argparse.Namespace, device: torch.device) -> bench_step.Cell:
    """The cell that the flags name."""
    return bench_step.cell(
        "forward" if args.what == "forward" else "step",
        args.model,
        device,
        batch=args.batch or BATCH,
        image_size=args.image_size,
        precision=args.precision,
        teacher=None if args.teacher == "none" else args.teacher,
        ema=args.ema,
    )


# ---- data ------------------------------------------------------------------------------------------------------------


def data(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The input of a recipe's training or evaluation, from JPEG files on, against the peers'; see `bench_data`."""
    with data_peers.sides(args, device) as (sides, facts):
        return interleave(sides, args.rounds, device, facts["failed"]) | facts
