"""The sides of `fastdeit bench data`: ours, and the same recipe, or as much of it as they have, by timm, by
torchvision's transforms.v2, by DALI, and by facebookresearch/deit's loader (`input_peers/`).

`data.py` has what all sides share, and our side; `sides` puts ours and the peers together. A peer is a function of a
`Setting` to a `Side`, which starts nothing; it raises CannotRun where the peer has nothing that would do for this
recipe. What it leaves out or does differently is noted where it is decided, and ends in `Side.work`, which is part of
every row.
"""

import argparse
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from fastdeit.bench import data as bench_data
from fastdeit.bench.data import Setting, Side
from fastdeit.bench.input_peers.dali import dali
from fastdeit.bench.input_peers.deit import deit
from fastdeit.bench.input_peers.timm import timm
from fastdeit.bench.input_peers.torchvision import torchvision
from fastdeit.bench.measure import Timer, noting
from fastdeit.errors import UsageError

_SIDES: dict[str, Callable[[Setting], Side]] = {
    "fastdeit": bench_data.ours,
    "fastdeit_uint8": partial(bench_data.ours, uint8=True),
    "fastdeit_loader": bench_data.as_loader,
    bench_data.DECODER: bench_data.decoder,
    "timm": timm,
    "timm_uint8": partial(timm, uint8=True),
    "deit": deit,
    "torchvision": torchvision,
    "torchvision_uint8": partial(torchvision, uint8=True),
    "dali": dali,
    "dali_uint8": partial(dali, uint8=True),
}
_PEERS = {
    "none": ["fastdeit_uint8", "fastdeit_loader", bench_data.DECODER],
    "timm": ["fastdeit_uint8", "fastdeit_loader", bench_data.DECODER, "timm", "timm_uint8"],
    "deit": [bench_data.DECODER, "deit"],
    "torchvision": ["fastdeit_uint8", bench_data.DECODER, "torchvision", "torchvision_uint8"],
    "dali": ["fastdeit_uint8", bench_data.DECODER, "dali", "dali_uint8"],
    "all": [name for name in _SIDES if name != "fastdeit"],
}


@contextmanager
def sides(args: argparse.Namespace, device: torch.device) -> Generator[tuple[dict[str, Timer], dict[str, Any]]]:
    """(a timer for each side, facts for the row); a timer returns (seconds, CPU seconds) of `Setting.timed` batches. A
    peer that has nothing like the recipe is in the fact `failed`, with the reason; UsageError if that is true of all.
    """
    with bench_data.opened(args, device) as setting:
        built, failed = _built(setting, _PEERS[args.peer])
        facts = bench_data.facts(setting, args.overrides)
        facts |= {"work": {name: side.work for name, side in built.items()}, "failed": failed}
        bench_data.write_images(setting)
        yield {name: bench_data.timer(side.stream, setting) for name, side in built.items()}, facts


def _built(setting: Setting, names: list[str]) -> tuple[dict[str, Side], dict[str, str]]:
    """(`fastdeit` and the sides `names` that there are in this setting, the reasons of the others)."""
    built: dict[str, Side] = {}
    failed: dict[str, str] = {}
    for name in ["fastdeit", *names]:
        with noting(failed, name):
            built[name] = _SIDES[name](setting)
    peers = [name for name in names if not name.startswith("fastdeit")]
    if peers and all(name in failed for name in peers):
        why = "; ".join(dict.fromkeys(failed[name] for name in peers))
        raise UsageError(f"recipe {setting.recipe.name} has nothing to be compared with: {why}")
    return built, failed
