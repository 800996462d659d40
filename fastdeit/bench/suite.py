"""`fastdeit bench suite`: the grid of cells, the most telling first, each appended as soon as it is measured."""

import argparse
import time
from collections.abc import Iterator, Sequence

import torch

from fastdeit.bench import cells as bench_cells
from fastdeit.bench import step
from fastdeit.bench.names import GRAPHED_PEERS
from fastdeit.bench.step import Cell

TEACHERS = {"cpu": "regnety_002", "cuda": "regnety_160"}
_SIZES = ("base", "small", "tiny")
GRAPHED_SIZE = 224
"""Above it recorded steps are left out, ours and the peer's: a graph keeps the memory of its activations, which the
others then lack."""


def grid(device: torch.device) -> Iterator[Cell]:
    """On a GPU DeiT-B, S and Ti, plain and distilled with a teacher, batch 256 and 64, 224 and 384 pixels, step and
    forward. On a CPU DeiT-Ti with batch 8 and a small teacher."""
    on_cpu = device.type == "cpu"
    for image_size in (224,) if on_cpu else (224, 384):
        for batch in (8,) if on_cpu else (256, 64):
            for what in ("step", "forward"):
                for size in ("tiny",) if on_cpu else _SIZES:
                    for middle in ("", "distilled_"):
                        training = {"teacher": TEACHERS[device.type] if middle else None, "ema": True}
                        yield step.cell(
                            what,
                            f"deit_{size}_{middle}patch16_224",
                            device,
                            batch=batch,
                            image_size=image_size,
                            **(training if what == "step" else {}),
                        )


def captures(cell: Cell, device: torch.device) -> tuple[str, ...]:
    """How our step is captured in a cell of the suite."""
    return ("none", "graph") if device.type == "cuda" and cell.image_size <= GRAPHED_SIZE else ("none",)


def peers(cell: Cell, asked: Sequence[str]) -> list[str]:
    """Those that run in a cell of the suite."""
    return [name for name in asked if cell.image_size <= GRAPHED_SIZE or name not in GRAPHED_PEERS]


def main(args: argparse.Namespace, device: torch.device) -> None:
    """Measure all cells, or as many as begin within `--time-limit` minutes."""
    began = time.monotonic()
    cells = list(grid(device))
    asked = bench_cells.peers(args)
    for number, cell in enumerate(cells):
        if args.time_limit is not None and time.monotonic() - began > 60 * args.time_limit:
            print(f"{args.time_limit} minutes are over; not measured:")
            print("\n".join(f"  {left}" for left in cells[number:]))
            return
        sides = bench_cells.builders(args.capture or captures(cell, device), peers(cell, asked))
        bench_cells.finish(step.measure(cell, sides, args.rounds, device), args.out)
        forget(device)


def forget(device: torch.device) -> None:
    """Free all that a cell has left; the compiler gives up on code that it has compiled for too many models."""
    torch.compiler.reset()
    step.release(device)
