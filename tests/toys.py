"""Batches and contexts for tests that need no loader and no run."""

import torch
from torch import nn

from fastdeit import models
from fastdeit.batch import Batch, Labels, Step, map_tensors
from fastdeit.engine.ema import EmaTeacher
from fastdeit.methods.base import Context

HALF, QUARTER = (0.5,) * 3, (0.25,) * 3


def toy_batch(images, y1, *, y2=None, lam=None, partner=None, pixel_lam=None, box=None, step=0, steps=100, **others):
    """A batch of these images (a tensor, or one for each view): not mixed, unless the arguments say so."""
    images = images if isinstance(images, tuple) else (images,)
    count, device = len(y1), y1.device
    lam = torch.ones(count, device=device) if lam is None else lam
    return Batch(
        images=images,
        targets=Labels(y1, y1 if y2 is None else y2, lam),
        partner=torch.arange(count, device=device) if partner is None else partner,
        pixel_lam=lam if pixel_lam is None else pixel_lam,
        box=torch.zeros(len(images), count, 4, dtype=torch.int32, device=device) if box is None else box,
        copy=torch.zeros(count, dtype=torch.int64, device=device),
        step=map_tensors(lambda tensor: tensor.to(device), Step.at(step, 10, steps)),
        **{"index": y1, "mean": HALF, "std": QUARTER} | others,
    )


def batch_norm_convnet(**options):
    """The ConvNet of the digits with BatchNorm in place of GroupNorm; a recipe names it by its import path."""
    network = models.build("convnet_digits", **options)
    network.norms = nn.ModuleList(nn.BatchNorm2d(norm.num_channels) for norm in network.norms)
    return network


def toy_context(num_classes=10, teacher=None, epochs=1, steps=1):
    """A context whose `teacher(config)` is `teacher`."""
    return Context(num_classes, epochs, steps, lambda config: teacher, EmaTeacher)
