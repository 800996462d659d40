"""A small convolutional network: the teacher of the digits recipe.

DeiT's best teachers are convolutional (paper, section 5.2). This one uses GroupNorm, so that the result of an image
never depends on which others are in its batch, and training on the number of processes.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastdeit.fields import size_pair
from fastdeit.models.contract import ImageSize, counted_flops, refuse_patches, split_decay, with_options


@dataclass(frozen=True)
class ConvNetConfig:
    """Shape of a `ConvNet`.

    image_size  pixels: int or (height, width); documents the input, as the parameters do not depend on it
    widths      channels after each convolution, multiples of 8
    strides     of the convolutions
    drop_path   must be 0: there are no residual branches to drop
    """

    image_size: ImageSize = 32
    widths: tuple[int, ...] = (32, 64, 64, 128)
    strides: tuple[int, ...] = (2, 2, 1, 2)
    num_classes: int = 10
    drop_path: float = 0.0
    in_chans: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", size_pair(self.image_size, "image_size"))
        if self.drop_path != 0:
            raise ValueError(f"drop_path is {self.drop_path}, but a ConvNet has no branches to drop; set it to 0")


class ConvNet(nn.Module):
    """3x3 convolutions with GroupNorm and ReLU, global average pool, linear head."""

    patch_size = None
    distilled = False
    head_names = ("head",)
    noise_per_sample = 0

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__()
        self.config = config
        channels = (config.in_chans, *config.widths)
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
            for (before, after), stride in zip(pairwise(channels), config.strides, strict=True)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in config.widths)
        self.head = nn.Linear(config.widths[-1], config.num_classes)
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Logits `[B, num_classes]` of float images `[B, C, H, W]`; `noise` is accepted and unused."""
        refuse_patches(x, "ConvNet")
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return self.head(x.mean((2, 3)))

    def layers(self) -> list[list[str]]:
        """Names of the parameters by layer: each convolution with its norm, then the head (`models.layers`)."""
        count = len(self.convs)
        found: list[list[str]] = [[] for _ in range(count + 1)]
        for name, _ in self.named_parameters():
            part, number = name.split(".")[:2]
            found[count if part == "head" else int(number)].append(name)
        return found

    def decay_groups(self, decay_dist_token: bool = False) -> tuple[list[str], list[str]]:
        """Names of the parameters `(with, without)` weight decay: without are 1-D parameters and biases."""
        return split_decay(self, ())

    def flops(self, image_size: ImageSize | None = None) -> int:
        """Floating-point operations (2 per multiply-add) of `forward` for one image: convolutions and head."""
        size = size_pair(self.config.image_size if image_size is None else image_size, "image_size")
        return counted_flops(self, (1, self.config.in_chans, *size))


def convnet_digits(**options: Any) -> ConvNet:
    """The digits teacher, with fields of its `ConvNetConfig` replaced by `options`."""
    return ConvNet(with_options(ConvNetConfig(), "convnet_digits", options))
