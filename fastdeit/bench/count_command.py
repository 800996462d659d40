"""`fastdeit bench count`: a training step as launches, bytes, FLOPs, memory and host time, ours and timm's.

One row for each model and architecture. Everything but the host's time is counted (`count.py`, `count_peers.py`) and
the same on every machine; the golden file pins our part of it. "as expected" is the preset of kernels that a trial is
expected to choose, by the model of `fastdeit plan` (`count_expected.py`).
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastdeit.bench import count, count_expected, count_host, count_peers, measure
from fastdeit.bench import step as bench_step
from fastdeit.bench.count import FORMS, KINDS, ONLY_ON, Count, Counted
from fastdeit.bench.count_expected import Expected
from fastdeit.bench.names import ARCHS
from fastdeit.engine.optimizers import Muon
from fastdeit.engine.progress import table
from fastdeit.errors import UsageError

MODELS = tuple(f"deit_{size}_distilled_patch16_224" for size in ("base", "small", "tiny"))
BATCH = 256
GIB = 2**30

GOLDEN = Path(__file__).parents[2] / "tests" / "golden" / "counts"
SHORT = 2
"""Blocks of the model that is pinned in every form: one whole, and the last, which is pruned."""
WHOLE = "auto", "mlp=epilogue,attention=fused_backward"
"""The forms in which whole models are pinned, which `fastdeit plan` is held to: what runs untried, and what a trial is
expected to choose."""

OURS = {"fastdeit" if form == "auto" else f"fastdeit {form}": form for form in FORMS}
PEERS: dict[str, Callable[[Counted, int], Count]] = {"timm": count_peers.eager, "timm_compile": count_peers.compiled}
SIDES: dict[str, Callable[[Counted, int], Count]] = {
    **{name: partial(count.ours, form=form) for name, form in OURS.items()},
    "fastdeit keep_activations": partial(count.ours, form="auto", keep=True),
    "fastdeit residual=bf16": partial(count.ours, form="auto", residual=torch.bfloat16),
    "fastdeit products=fp8": partial(count.ours, form="auto", fp8=True),
    "fastdeit drop_path_skip": partial(count.ours, form="auto", skip=True),
    "fastdeit optim=muon": partial(count.ours, form="auto", optimizer=Muon),
    "fastdeit as expected": count_expected.counted,
    **PEERS,
}
"""Every side of a row, by name: what counts its step for a cell and an architecture."""


def main(args: argparse.Namespace) -> None:
    """Print the counts of the models and architectures that are asked for, or write the golden file."""
    if args.update_golden:
        update_golden()
        return
    for model in args.model or MODELS:
        for arch in args.arch or (90,):
            found = row(cell(model, args.batch or BATCH, drop_path=args.drop_path), arch)
            if args.json:
                print(json.dumps(found), flush=True)
            else:
                show(found)


def cell(model: str, batch: int, depth: int | None = None, drop_path: float = bench_step.DROP_PATH) -> Counted:
    """DeiT's step: bf16, drop-path, averaged weights. UsageError for a model that cannot be built."""
    known = bench_step.cell("step", model, torch.device("cpu"), batch=batch, precision="bf16", ema=True)
    return Counted(**asdict(known), depth=depth, drop_path=drop_path)


def row(cell: Counted, arch: int) -> dict[str, Any]:
    """Everything that is counted of a cell, as plain values that JSON can hold; a side that cannot be counted is named
    in `failed`, with the reason."""
    sides: dict[str, Count] = {}
    failed: dict[str, str] = {}
    for name, counted in SIDES.items():
        with measure.noting(failed, name):
            sides[name] = counted(cell, arch)
    host: dict[str, float] = {}
    with measure.noting(failed, "host"):
        host = count_host.seconds(cell.model, ema=cell.ema)
    return {
        **asdict(cell),
        "what": "count",
        "arch": arch,
        "launches": {name: found.total.launches for name, found in sides.items()},
        "bytes": {name: found.total.bytes for name, found in sides.items()},
        "flops": {name: found.total.flops for name, found in sides.items()},
        "kinds": {name: _plain(found, "kind") for name, found in sides.items()},
        "phases": {name: _plain(found, "phase") for name, found in sides.items()},
        "state_bytes": {name: found.state for name, found in sides.items()},
        "live_bytes": {name: found.live for name, found in sides.items()},
        "peak_bytes": {name: found.peak for name, found in sides.items()},
        "host_seconds": host,
        "expected": [expected._asdict() for expected in count_expected.of(cell, arch)],
        "failed": failed,
        "environment": measure.environment(),
    }


def _plain(found: Count, column: str) -> dict[str, dict[str, int]]:
    return {name: total._asdict() for name, total in found.by(column).items()}


# ---- for people ------------------------------------------------------------------------------------------------------


def show(row: dict[str, Any]) -> None:
    """Print a row as two tables with a line for each side: all of it, and its bytes by kind of work."""
    print(
        f"{row['model']}, batch {row['batch']}, {row['image_size']} px, {row['precision']}, drop-path "
        f"{row['drop_path']}, EMA, sm_{row['arch']}: counted without a card"
    )
    table(list(_sides(row)), ["", "launches", "GB", "TFLOP", "live GiB", "peak GiB", "host ms"])
    used = [kind for kind in KINDS if any(kind in kinds for kinds in row["kinds"].values())]
    print("\nGB by kind")
    table([[name, *_by_kind(row["kinds"][name], used)] for name in row["launches"]], ["", *used])
    for expected in row["expected"]:
        print(count_expected.words(Expected(**expected)))
    for name, why in row["failed"].items():
        print(f"{name} is not counted: {why}")
    print()


def _sides(row: dict[str, Any]) -> Iterator[list[str]]:
    for name in row["launches"]:
        memory = (row[column][name] for column in ("live_bytes", "peak_bytes"))
        host = row["host_seconds"].get(name)
        yield [
            name,
            f"{row['launches'][name]:,}",
            f"{row['bytes'][name] / 1e9:.1f}",
            f"{row['flops'][name] / 1e12:.2f}",
            *("" if size is None else f"{size / GIB:.2f}" for size in memory),
            "" if host is None else f"{1e3 * host:.1f}",
        ]


def _by_kind(found: dict[str, dict[str, int]], kinds: Sequence[str]) -> list[str]:
    return [f"{found[kind]['bytes'] / 1e9:.2f}" if kind in found else "" for kind in kinds]


# ---- the golden file -------------------------------------------------------------------------------------------------


def golden_file() -> Path:
    """File of the counts that the installed torch makes: another release may launch other operations."""
    return GOLDEN / f"torch-{'.'.join(torch.__version__.split('.')[:2])}.json"


def pinned(
    models: Sequence[str], archs: Sequence[int] = ARCHS, forms: Sequence[str] = tuple(FORMS), depth: int | None = None
) -> dict[str, Any]:
    """Our counts by "model | depth | form | sm", as the golden file holds them: launches, bytes and FLOPs of each kind,
    and bytes of memory."""
    found = {}
    for model in models:
        wanted = cell(model, BATCH, depth)
        for arch in archs:
            for form in forms:
                if ONLY_ON.get(form, arch) != arch:
                    continue
                counted = count.ours(wanted, arch, form)
                kinds = {kind: list(total) for kind, total in sorted(counted.by("kind").items())}
                memory = {"state": counted.state, "live": counted.live, "peak": counted.peak}
                found[f"{model} | {depth or 'all'} blocks | {form} | sm_{arch}"] = kinds | {"memory": memory}
    return found


def update_golden() -> None:
    """Count everything that is pinned and write it. UsageError outside of a checkout."""
    if not GOLDEN.parent.is_dir():
        raise UsageError(f"--update-golden writes to {GOLDEN}, but there is no {GOLDEN.parent}: this is no checkout")
    found = pinned(MODELS[-1:], depth=SHORT) | pinned(MODELS, archs=(90,), forms=WHOLE)
    GOLDEN.mkdir(exist_ok=True)
    lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
    golden_file().write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"wrote {len(found)} counts to {golden_file()}")
