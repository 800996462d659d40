"""The counted step of the peer: timm's model, eager and under `torch.compile`, as `peers.py` runs it on a card."""

import torch

from fastdeit import models
from fastdeit.bench import count_inductor, peers
from fastdeit.bench.count import CARD, Count, counted_card
from fastdeit.bench.step import Cell


def eager(cell: Cell, arch: int) -> Count:
    """timm's step by its operations. CannotRun for a model that timm does not have."""
    with counted_card(arch) as (card, watch):
        run, _ = peers.step_of("timm", cell, CARD)
        images = torch.empty(cell.batch, 3, cell.image_size, cell.image_size, device=CARD)
        return watch.second(card, lambda: run(images))


def compiled(cell: Cell, arch: int) -> Count:
    """timm's step with forward and loss compiled: Inductor's kernels, and the update of the eager step, which is the
    same. Its peak is not known. CannotRun as of `count_inductor.launches`."""
    model = models.build_timm(cell.model, **cell.options).inner.train()
    found, kept = count_inductor.launches(model, cell, arch)
    plain = eager(cell, arch)
    update = [launch for launch in plain.launches if launch.phase == "update"]
    return Count((*found, *update), plain.state, plain.state + kept, None)
