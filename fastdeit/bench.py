"""`fastdeit bench`: ours and the peers in turn, in one process, medians and ratios.

What is printed and appended to a results file is the ratio of medians and the spread of the ratio over rounds, never a
single time. What a row means is told in benchmarks/README.md.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastdeit import bench_data, bench_measure, bench_step, bench_train
from fastdeit.bench_measure import interleave, median
from fastdeit.engine.dist import pick_device
from fastdeit.errors import UsageError

BATCH = 16
STEP_PEERS = ("timm", "timm_compile", "timm_compile_cudnn", "accelerate", "timm_compile_graph")
DATA_PEERS = ("timm", "deit", "torchvision", "dali")
CPU_NOTE = "These are figures of a CPU: they say nothing of a GPU."


def main(args: argparse.Namespace) -> None:
    """Print one comparison, or all of the suite's, or the report of what was measured; rows are appended to `--out`."""
    if args.report is not None:
        from fastdeit import bench_report

        bench_report.main(args.results, args.report)
        return
    if args.overrides and args.what not in ("data", "train"):
        raise UsageError(f"bench {args.what} takes no section.field=value; bench data and bench train do")
    if args.eval and args.what != "data":
        raise UsageError(f"--eval belongs to bench data, not bench {args.what}")
    bench_measure.check_out(args.out)
    device = pick_device(args.device)
    if args.what in ("suite", "calibrate"):
        from fastdeit import bench_calibrate, bench_suite

        {"suite": bench_suite.main, "calibrate": bench_calibrate.main}[args.what](args, device)
    elif args.what == "data":
        finish({"what": "data", **data(args, device)}, args.out)
    elif args.what == "train":
        finish(train(args, device), args.out)
    else:
        finish(step(args, device), args.out)
    if device.type == "cpu":
        print(CPU_NOTE)


def finish(row: dict[str, Any], out: str | None) -> None:
    """Complete a row with its ratios and environment, print it, and append it to the file `out`."""
    for ratio, of in (("ratio", "seconds"), ("cpu_ratio", "cpu_seconds")):
        peers = [name for name in row[of] if not name.startswith("fastdeit") and compared_to(name, row)]
        row[ratio] = {name: median(row, name, of) / median(row, compared_to(name, row), of) for name in peers}
    row["environment"] = bench_measure.environment()
    print(sentence(row), flush=True)
    bench_measure.append(row, out)


def compared_to(peer: str, row: dict[str, Any]) -> str | None:
    """Our side that a peer of the row is compared with: in `data` the one that ends at the same place, else the first
    that ran; None where there is none."""
    if row["what"] == "data":
        return bench_data.compared_to(peer, row["seconds"])
    return next((name for name in row["seconds"] if name.startswith("fastdeit")), None)


# ---- step and forward ------------------------------------------------------------------------------------------------


def step(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One cell of `bench step` or `bench forward`; see `bench_step`."""
    sides = builders(args.capture or ("none",), peers(args, STEP_PEERS))
    return bench_step.measure(cell(args, device), sides, args.rounds, device)


def train(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The same with input from files; see `bench_train`."""
    wanted = cell(args, device)
    args = argparse.Namespace(**vars(args) | {"batch": wanted.batch})
    return bench_train.measure(args, wanted, args.capture or ("none",), peers(args, STEP_PEERS), device)


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


def builders(
    captures: Sequence[str], peers: Sequence[str]
) -> dict[str, Callable[[bench_step.Cell, torch.device], bench_step.Side]]:
    """Sides by name: ours in these ways of capturing a step, then the peers. Recorded graphs keep their memory, and
    therefore come last."""
    from fastdeit.bench_peers import PEERS  # imports timm, which takes a second

    ours = {bench_step.name_of(capture): capture for capture in captures}
    direct = [name for name, capture in ours.items() if capture != "graph"]
    recorded = [name for name, capture in ours.items() if capture == "graph"]
    return {name: (bench_step.OURS | PEERS)[name] for name in [*direct, *peers, *recorded]}


def peers(args: argparse.Namespace, known: Sequence[str]) -> list[str]:
    """The peers that `--peer` asks for, in the order of `known`: by default timm, or all of the suite."""
    asked = args.peer or (["all"] if args.what == "suite" else ["timm"])
    for name in asked:
        if name not in (*known, "all", "none"):
            raise UsageError(f"--peer {name}: bench {args.what} has the peers {', '.join(known)}, all and none")
    return [name for name in known if name in asked or "all" in asked]


# ---- data ------------------------------------------------------------------------------------------------------------


def data(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The input of a recipe's training or evaluation, from JPEG files on, against the peers'; see `bench_data`."""
    asked = args.peer or ["timm"]
    peers(args, DATA_PEERS)
    if len(asked) > 1:
        raise UsageError(f"--peer {' --peer '.join(asked)}: bench data takes one peer, or all")
    args = argparse.Namespace(**vars(args) | {"peer": asked[0]})
    with bench_data.sides(args, device) as (sides, facts):
        return interleave(sides, args.rounds, device, facts["failed"]) | facts


# ---- what it says ----------------------------------------------------------------------------------------------------


def sentence(row: dict[str, Any]) -> str:
    """A row in words: what and where, each side's speed, and how the peers compare."""
    lines = [f"{_title(row)}, {row['rounds']} interleaved rounds, medians"]
    width = max(map(len, [*row["seconds"], *row.get("failed", {})]), default=0)
    lines += [f"  {name:{width}}  {_speed(row, name)}" for name in row["seconds"]]
    lines += [f"  {name:{width}}  cannot run: {why}" for name, why in row.get("failed", {}).items()]
    return "\n".join(lines)


def _title(row: dict[str, Any]) -> str:
    if row["what"] == "data":
        return f"data of {bench_data.input_of(row)} on {row['device']}, batch {row['batch']}"
    text = f"{row['what']} of {row['model']} on {row['device']}, batch {row['batch']}, {row['image_size']} px, "
    text += row["precision"]
    text += f", teacher {row['teacher']}" if row["teacher"] else ""
    text += ", EMA" if row["ema"] else ""
    return text + (f", input of {bench_data.input_of(row)}" if row["what"] == "train" else "")


def _speed(row: dict[str, Any], name: str) -> str:
    text = f"{row['images'] / median(row, name):10.2f} images/s"
    if row["what"] == "data":
        text += f" ({row['images'] / median(row, name, 'cpu_seconds'):.2f} per CPU-second)"
    if (still := bench_train.resident_of(name, row)) is not None:
        share, (low, high) = median(row, still) / median(row, name), by_round(row, still, name)
        text += f", {share:.1%} of its speed without input (by round {low:.1%} to {high:.1%})"
    if (share := mfu(row, name)) is not None:
        text += f", {share:.1%} of the matrix rate"
    if (peak := row.get("peak_bytes", {}).get(name)) is not None:
        text += f", {peak / 2**30:.2f} GiB"
    if name in row["ratio"]:
        ours = compared_to(name, row)
        low, high = by_round(row, name, ours)
        text += f"; {ours} is {row['ratio'][name]:.3f} times as fast (by round {low:.3f} to {high:.3f}"
        text += f", in CPU time {row['cpu_ratio'][name]:.3f})" if row["device"] == "cpu" else ")"
    return text


def mfu(row: dict[str, Any], name: str) -> float | None:
    """FLOPs of the side's own count over its median time, as a share of the matrix rate of the same rounds."""
    rate = row.get("matrix_flops_per_s")
    return row["flops"][name] / median(row, name) / rate if rate else None


def by_round(row: dict[str, Any], name: str, other: str, of: str = "seconds") -> tuple[float, float]:
    """Least and largest ratio of the times of `name` and `other` in a round."""
    ratios = [theirs / mine for mine, theirs in zip(row[of][other], row[of][name], strict=True)]
    return min(ratios), max(ratios)
