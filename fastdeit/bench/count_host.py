"""What a step costs the host: ours with every launch of a Triton kernel left out, and timm's in eager mode.

Both run on the CPU on a network of the model's depth that is otherwise so small that computing hardly counts: two
images of four patches, 64 channels. What remains is Python, autograd and PyTorch's dispatch. A card adds
the time of its driver to each launch, on both sides, and Triton's launcher to ours. So the two say how they compare and
where to look, and not how long a step takes a host.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from fastdeit import kernels
from fastdeit.bench import step as bench_step
from fastdeit.bench.measure import CLASSES
from fastdeit.bench.step import LR, Cell
from fastdeit.kernels import _triton

_IMAGES, _SIDE, _WIDTH = 2, 32, 64
_CALLS = 12
"""Of which the fastest counts: whatever else the machine does only adds to the others."""
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class _Small(Cell):
    """The model's depth, and little else of it."""

    @property
    def options(self) -> dict[str, Any]:
        return super().options | {"dim": _WIDTH, "heads": 1}


def seconds(model: str, *, ema: bool) -> dict[str, float]:
    """CPU seconds of the host for a training step, ours with its Triton backends and timm's, interleaved."""
    cell = _Small("step", model, _IMAGES, _SIDE, "bf16", None, ema)
    with _nothing_launched(), kernels.use("triton"):
        engine, _, _ = bench_step.engine(cell, _CPU, "none")
        batch = bench_step.batch(cell, engine.method.noise(), _CPU)
        peer = _peer(cell)
        sides = {"fastdeit": lambda: engine.step([batch], LR), "timm": peer}
        fastest = dict.fromkeys(sides, float("inf"))
        for _ in range(_CALLS):
            for name, run in sides.items():
                began = time.process_time()
                run()
                fastest[name] = min(fastest[name], time.process_time() - began)
    return fastest


def _peer(cell: Cell) -> Callable[[], None]:
    import timm

    from fastdeit.bench import peers

    shape = {"embed_dim": _WIDTH, "num_heads": 1, "img_size": cell.image_size, "num_classes": CLASSES}
    model = timm.create_model(cell.model, drop_path_rate=cell.drop_path, **shape)
    step = peers.training_step(model, None, cell, _CPU, peers.VARIANTS["timm"])
    images = bench_step.floats(cell, _CPU)
    return lambda: step(images)


def _nothing_launched() -> AbstractContextManager:
    """Inside, Triton's backends take tensors of the CPU, as they do under its interpreter, and launch nothing."""
    nothing = {"launch": lambda *_, **__: None, "require_products": lambda *_: None}
    return patch.multiple(_triton, INTERPRETED=True, **nothing)
