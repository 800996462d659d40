"""What several peers share."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from fastdeit.bench.data import Setting
from fastdeit.bench.measure import CannotRun
from fastdeit.data.plan import policy

if TYPE_CHECKING:
    from torch.utils.data import DataLoader


Transform = Callable[[Any], Any]

BINS = 31
"""Magnitudes of TrivialAugment (Mueller and Hutter, 2021), and as many for DALI's RandAugment."""
KERNEL = 9
"""Side of torchvision's Gaussian: 2 standard deviations each way at the largest of 3-Augment's."""
THREE_AUGMENT = ("three_augment", "3a")
SOLARIZE, BLUR = 128, (0.1, 2.0)
"""3-Augment's threshold and range of radii (Touvron et al., "DeiT III", 2022)."""


def loader(setting: Setting, files: torch.utils.data.Dataset) -> "DataLoader":
    """PyTorch's DataLoader, as training scripts set it up."""
    from torch.utils.data import DataLoader

    return DataLoader(
        files,
        setting.batch,
        shuffle=not setting.evaluation,
        num_workers=setting.data.threads,
        pin_memory=setting.device.type == "cuda",
        drop_last=not setting.evaluation,
    )


def short_side(setting: Setting) -> int:
    """To what torchvision's Resize brings the short side."""
    height, width = setting.covered
    if height != width:
        raise CannotRun("torchvision resizes to a short side, which does not fit an input that is not square")
    return height


def magnitude_of(rand: policy.Policy, peer: str) -> float:
    """Of RandAugment, in tenths of the largest, as timm's; CannotRun where `peer` has nothing like it."""
    magnitude, names = rand.rows[0][0].magnitude, {op.name.removesuffix("Increasing") for (op,) in rand.rows}
    if magnitude > 10 or rand.weights is not None or not {"Rotate", "Invert"} <= names:
        raise CannotRun(f"{peer} has RandAugment with its own operations, up to magnitude 10")
    return magnitude
