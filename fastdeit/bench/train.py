"""`fastdeit bench train`: training from image files, ours and timm's, and how near ours comes to no input at all.

fastdeit           our step, fed by the recipe's input pipeline
fastdeit_resident  our step on one batch that stays on the device: what it would reach if input cost nothing
timm, ...          a peer's step (`peers.py`), fed by timm's loader with the recipe's augmentation

Steps are those of `step.py`, input that of `data.py`. A side is built and warmed on its first batch; each
measurement then opens its stream anew, and counts once `data.WARM_BATCHES` were trained on.
"""

import argparse
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from fastdeit import kernels
from fastdeit.batch import map_tensors
from fastdeit.bench import data, data_peers
from fastdeit.bench import step as bench_step
from fastdeit.bench.data import Setting
from fastdeit.bench.measure import WARM_CALLS, CannotRun, Timer, clocks, interleave, noting
from fastdeit.bench.step import LR, Cell
from fastdeit.engine.dist import World

RESIDENT = "_resident"
"""What the names of our sides without input end in."""

Batches = Generator[Any, None, None]
Open = Callable[[], Batches]
Step = Callable[[Any], Any]


def measure(
    args: argparse.Namespace, wanted: Cell, captures: Sequence[str], peers: Sequence[str], device: torch.device
) -> dict[str, Any]:
    """The row of a cell, without its environment. On a GPU the first round warms it up and is thrown away."""
    with data.opened(args, device, {"model.image_size": wanted.image_size}) as setting:
        data.write_images(setting)
        timers, failed, work = _sides(wanted, setting, captures, peers)
        found = interleave(timers, args.rounds, device, failed, discard=int(device.type == "cuda"))
        return {
            **asdict(wanted),
            **data.facts(setting, args.overrides),
            **found,
            "what": "train",
            "drop_path": wanted.drop_path,
            "work": {name: work[name] for name in found["seconds"]},
            "kernels": {item.name: item.backend for item in kernels.info()},
            "clocks": clocks(device),
            "failed": failed,
        }


def resident_of(name: str, row: dict[str, Any]) -> str | None:
    """The side of a row that trains as `name` does, but without input; None if there is none."""
    side = f"{name}{RESIDENT}"
    return side if row["what"] == "train" and side in row["seconds"] else None


def _sides(
    wanted: Cell, setting: Setting, captures: Sequence[str], peers: Sequence[str]
) -> tuple[dict[str, Timer], dict[str, str], dict[str, str]]:
    """Timers, why others cannot run, and what each side's input does, by the names of sides."""
    timers: dict[str, Timer] = {}
    failed: dict[str, str] = {}
    work: dict[str, str] = {}
    makers = {bench_step.name_of(capture): partial(_ours, capture=capture) for capture in captures}
    makers |= {name: partial(_peer, name=name) for name in peers}
    for name, make in makers.items():
        with noting(failed, name):
            step, warm, stream, kind_of_work = make(wanted, setting)
            with closing(stream()) as batches:
                kept = map_tensors(torch.clone, next(batches))
            for _ in range(max(warm, WARM_CALLS[setting.device.type])):
                step(kept)
            World(setting.device).synchronize()
            timers[name], work[name] = data.timer(partial(_trained, step, stream), setting), kind_of_work
            if name not in peers:
                still = partial(_trained, step, partial(_repeated, kept))
                timers[name + RESIDENT], work[name + RESIDENT] = data.timer(still, setting), "none"
        bench_step.release(setting.device)
    return timers, failed, work


def _ours(wanted: Cell, setting: Setting, *, capture: str) -> tuple[Step, int, Open, str]:
    """(step, calls before the first that is like all others, its input, what that does)"""
    engine, _, warm = bench_step.engine(wanted, setting.device, capture)
    stream = partial(data.batches, setting, engine.method.noise())
    return lambda batch: engine.step([batch], LR), warm, stream, data.OURS


def _peer(wanted: Cell, setting: Setting, *, name: str) -> tuple[Step, int, Open, str]:
    from fastdeit.bench import peers as bench_peers  # imports timm, which takes a second

    if bench_peers.VARIANTS[name].flash is not None:
        raise CannotRun("the process's FlashAttention is not changed between steps; measure this peer by bench step")
    step, _ = bench_peers.step_of(name, wanted, setting.device)
    loader = data_peers.timm(setting)
    return step, 0, loader.stream, loader.work


def _trained(step: Step, stream: Open) -> Batches:
    """The batches of a stream, each after a step on it."""
    with closing(stream()) as batches:
        for batch in batches:
            step(batch)
            yield batch


def _repeated(batch: Any) -> Batches:
    while True:
        yield batch
