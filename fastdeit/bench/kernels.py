"""`fastdeit kernels bench`: every backend of every op at the sizes of a model, side by side.

What is measured of an op is the first of its examples (`kernels/_example.py`).
A measurement is one forward and, where there is a gradient, one backward. Sides: each backend that runs on the device,
the reference under native autograd, and that compiled by Inductor. On a GPU each side is captured in a CUDA graph over
copies of its inputs that together exceed the cache, so that neither launches nor the cache count; the copy that the
bandwidth is compared with is measured in the same rounds.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdeit import kernels, models
from fastdeit.bench import measure as bench_measure
from fastdeit.engine.dist import pick_device
from fastdeit.errors import UsageError
from fastdeit.estimate import gpus as estimate_gpus
from fastdeit.kernels import _op
from fastdeit.kernels._example import Maker, Sizes
from fastdeit.kernels.dtypes import DTYPES

CHOICES = Path(kernels.__file__).parent / "choices.json"
_L2_BYTES = 128 * 2**20
_MOST_COPIES = 8
_NO_BACKENDS = {"copy", "compiled", "apex", "quack", "flash", "cudnn"}
"""Sides that are there to compare with, and cannot be an op's default: they run where they are asked for by name."""


class Work(NamedTuple):
    """A call to measure: the op, its arguments (those that require a gradient get one), and the bytes it has to move at
    best, by the formula in the op's file, forward and backward."""

    op: str
    args: list[Any]
    bytes: float


def main(args: argparse.Namespace) -> None:
    """Print one line an op and side, append the rows to `--out`, and write the fastest into the shipped table."""
    device = pick_device(args.device)
    unknown = set(args.op or ()) - _op.OPS.keys()
    if unknown:
        raise UsageError(f"there is no op {sorted(unknown)[0]!r} to measure; there are: {', '.join(_op.OPS)}")
    try:
        config = models.build(args.model, num_classes=1000).config
    except ValueError as error:
        raise UsageError(str(error)) from error
    if args.predict:
        print(prediction(config, args))
        return
    rows = []
    for name in _op.OPS:
        if not args.op or name in args.op:
            build = partial(work_of, name, config, args.batch, DTYPES[args.dtype], device)
            row = measure(name, build, args, device)
            print(_lines(row), flush=True)
            bench_measure.append(row, args.out)
            rows.append(row)
    if device.type == "cpu":
        print("These are figures of a CPU: they say nothing of a GPU.")
    if args.update_choices:
        update_choices(rows, CHOICES)
        print(f"the fastest of each op on {_op.card(device)} written to {CHOICES}")


# ---- what is measured ------------------------------------------------------------------------------------------------


def work_of(op: str, config: Any, batch: int, dtype: torch.dtype, device: torch.device) -> Work:
    """The first example of an op at the sizes of a model: its patches, and the two tokens of a distilled one."""
    sizes = Sizes(
        "measured",
        config.dim,
        config.heads,
        int(config.dim * config.mlp_ratio),
        batch=batch,
        tokens=config.grid[0] * config.grid[1] + 2,
        depth=config.depth,
        image=tuple(config.image_size),
        patch=config.patch_size,
    )
    example = _op.OPS[op].examples[0]
    args = example.build(Maker(sizes, dtype, device))
    return Work(op, args, example.bytes(args))


# ---- how -------------------------------------------------------------------------------------------------------------


def measure(name: str, build: Callable[[], Work], args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One row: seconds of every side in every round, and of a copy."""
    torch.manual_seed(0)
    first = build()
    copies = 1
    if device.type == "cuda":
        copies = min(_MOST_COPIES, math.ceil(_L2_BYTES / first.bytes))
    works = [first, *(build() for _ in range(copies - 1))]
    sides, failed = {}, {}
    for side, call in _sides(name, device):
        with bench_measure.noting(failed, side):
            calls = [lambda call=call, work=work: call(work) for work in works]
            sides[side] = bench_measure.repeated(calls, device)
    sides["copy"], copied = bench_measure.copy_timer(device)
    row = {"what": "kernel", "op": name, "model": args.model, "batch": args.batch, "dtype": args.dtype}
    row["width"] = _op.width(first.args)
    row |= bench_measure.interleave(sides, args.rounds, device) | {"bytes": first.bytes, "copy_bytes": copied}
    return row | {"card": _op.card(device), "failed": failed, "environment": bench_measure.environment()}


def _sides(name: str, device: torch.device) -> Iterator[tuple[str, Callable[[Work], Any]]]:
    """(name, call) of every backend that runs on the device, of the reference, and of that compiled."""
    op = _op.OPS[name]
    on_card = device.type == "cuda"
    for backend in op.backends:
        if backend.name == _op.REFERENCE:
            continue
        # Forced on a card, since some have to be; on a CPU that would be the interpreter.
        able, why = backend.capability(device, on_card)
        if able:
            yield backend.name, lambda work, chosen=backend.name: _chosen(op, chosen, work)
        elif on_card:
            yield backend.name, lambda work, why=why: _refuse(why)
    yield "reference", lambda work: _trained(op.native, work.args)
    compiled = torch.compile(op.native, fullgraph=True, dynamic=False)
    yield "compiled", lambda work: _trained(compiled, work.args)


def _refuse(why: str) -> None:
    raise bench_measure.CannotRun(why)


def _chosen(op: _op.Op, backend: str, work: Work) -> Any:
    with kernels.use(**{op.name: backend}):
        return _trained(op, work.args)


def _trained(function: Callable, args: list[Any]) -> Any:
    """One forward and backward with a gradient like each output."""
    free = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    results = function(*args)
    ends = [
        r for r in (results if isinstance(results, tuple) else (results,)) if isinstance(r, Tensor) and r.requires_grad
    ]
    if not ends:
        return results
    return torch.autograd.grad(ends, free, [end.detach() for end in ends])


# ---- what would be best ----------------------------------------------------------------------------------------------


def prediction(config: Any, args: argparse.Namespace) -> str:
    """A table of the bytes that each op moves at best, and the microseconds of that at the bandwidth of datasheets.

    Nothing is run. A product of matrices takes longer where it is bound by arithmetic.
    """
    gpus = [estimate_gpus.GPUS[name] for name in estimate_gpus.DEFAULT_GPUS]
    lines = [
        f"{args.model}, batch {args.batch}, {args.dtype}: predictions, not measurements; least bytes of a forward and "
        "backward, and their time at the bandwidth of the datasheet",
        f"{'op':18}{'MB':>10}" + "".join(f"{gpu.name + ' us':>12}" for gpu in gpus),
    ]
    for name in _op.OPS:
        if not args.op or name in args.op:
            moved = work_of(name, config, args.batch, DTYPES[args.dtype], torch.device("meta")).bytes
            times = "".join(f"{1e6 * moved / gpu.bandwidth:12.1f}" for gpu in gpus)
            lines.append(f"{name:18}{moved / 1e6:10.1f}{times}")
    return "\n".join(lines)


# ---- what it says ----------------------------------------------------------------------------------------------------


def _lines(row: dict[str, Any]) -> str:
    medians = {name: statistics.median(seconds) for name, seconds in row["seconds"].items()}
    bandwidth = row["copy_bytes"] / medians.pop("copy")
    column = max(10, *map(len, (*medians, *row["failed"])))
    lines = [f"{row['op']}, {row['model']}, batch {row['batch']}, {row['dtype']}, on {row['card']}"]
    for name, seconds in sorted(medians.items(), key=lambda item: item[1]):
        share = row["bytes"] / seconds / bandwidth
        spread = max(row["seconds"][name]) / min(row["seconds"][name])
        faster = medians["reference"] / seconds if "reference" in medians else math.nan
        lines.append(
            f"  {name:{column}} {1e6 * seconds:10.1f} us  {row['bytes'] / seconds / 1e9:8.1f} GB/s  "
            f"{share:6.1%} of a copy  {faster:6.2f}x reference  (slowest round {spread:.2f}x the fastest)"
        )
    return "\n".join([*lines, *(f"  {name:{column}} cannot run: {why}" for name, why in row["failed"].items())])


def update_choices(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the fastest eager backend of each measured op into the table at `path`: at each width of its tensors, and
    over the models of the rows for all other widths. Widths measured earlier stay as they are.
    """
    table = json.loads(path.read_text())
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["card"], row["op"]), []).append(row)
    for (card, op), group in groups.items():
        ops = table.setdefault(card, {})
        widths = ops.get(op, {}).get("widths", {})
        for width in {row["width"] for row in group}:
            widths[str(width)] = _fastest([row for row in group if row["width"] == width])
        ops[op] = _fastest(group) | {"widths": widths}
    path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")


def _fastest(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Backend with the least geometric mean of the times, and what was measured. Sides that are no backends of ours do
    not count."""
    names = set.intersection(*(set(row["seconds"]) for row in rows)) - _NO_BACKENDS
    means = {name: statistics.geometric_mean(statistics.median(row["seconds"][name]) for row in rows) for name in names}
    best, *others = sorted(means, key=means.__getitem__)
    rest = ", ".join(f"{means[other] / means[best]:.2f} times {other}" for other in others) or "nothing else runs"
    shapes = ", ".join(sorted({f"{row['model']} batch {row['batch']} {row['dtype']}" for row in rows}))
    return {"backend": best, "because": f"{_op.MEASURED}{rest} ({shapes})"}
