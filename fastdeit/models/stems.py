"""What makes tokens of pixels: the first layers of a vision transformer.

A stem that looks at each patch by itself takes flat patches. It can be given some of them alone. One of convolutions
that overlap takes images.
"""

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn

from fastdeit import kernels
from fastdeit.models.config import ViTConfig


class PatchEmbed(nn.Module):
    """Linear embedding of flat patches. The weight is kept as that of a convolution, which is how it is published."""

    takes_patches = True

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        side = config.patch_size
        self.proj = nn.Conv2d(config.in_chans, config.dim, kernel_size=side, stride=side)

    def forward(self, patches: Tensor) -> Tensor:
        """Flat patches `[B, P, C*p*p]` as tokens `[B, P, dim]`."""
        weight, bias = kernels.autocast_copies([self.proj.weight, self.proj.bias])
        return F.linear(patches, weight.flatten(1), bias)

    def multiply_adds(self, patches: int) -> int:
        """Multiply-adds of one image of so many patches."""
        return patches * self.proj.weight.numel()


class HMlpStem(nn.Module):
    """hMLP (Touvron et al., "Three things everyone should know about vision transformers", ECCV 2022): an MLP of each
    patch that grows from its 4x4 parts to 2x2 of them and to the whole, with BatchNorm and GELU.

    Patches do not see each other, so the stem can follow masking. Parameters have the names of `hMLP_stem` in DeiT's
    public code, whose BatchNorm is over all processes: `engine.sync_batchnorm`.
    """

    takes_patches = True

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.patch_size, part, narrow = config.patch_size, config.patch_size // 4, config.dim // 4
        self.proj = nn.Sequential(
            nn.Conv2d(config.in_chans, narrow, kernel_size=part, stride=part),
            nn.BatchNorm2d(narrow),
            nn.GELU(),
            nn.Conv2d(narrow, narrow, kernel_size=2, stride=2),
            nn.BatchNorm2d(narrow),
            nn.GELU(),
            nn.Conv2d(narrow, config.dim, kernel_size=2, stride=2),
            nn.BatchNorm2d(config.dim),
        )

    def forward(self, patches: Tensor) -> Tensor:
        """Flat patches `[B, P, C*p*p]` as tokens `[B, P, dim]`."""
        batch, count, _ = patches.shape
        tiles = patches.reshape(batch * count, -1, self.patch_size, self.patch_size)
        return self.proj(tiles).view(batch, count, -1)

    def multiply_adds(self, patches: int) -> int:
        """Multiply-adds of the convolutions for one image of so many patches."""
        return patches * _per_patch(self.proj, self.patch_size)


class ConvStem(nn.Module):
    """The stem of ViT_C (Xiao et al., "Early convolutions help transformers see better", NeurIPS 2021): 3x3
    convolutions, each with BatchNorm and ReLU, which have more channels and stride 2 or keep the number of both, and a
    1x1 convolution to `dim`.

    The last one begins as in the authors' code (pycls): normal of standard deviation sqrt(2 / dim), bias 0.
    """

    takes_patches = False

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        layers: list[nn.Module] = []
        before = config.in_chans
        for width, stride in zip(config.conv_widths, config.conv_strides, strict=True):
            convolution = nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        last = nn.Conv2d(before, config.dim, 1)
        nn.init.trunc_normal_(last.weight, std=(2 / config.dim) ** 0.5)  # at -2 and 2, which is beyond what occurs
        nn.init.zeros_(last.bias)
        self.proj = nn.Sequential(*layers, last)

    def forward(self, images: Tensor) -> Tensor:
        """Images `[B, C, H, W]` as tokens `[B, P, dim]`, row by row."""
        return self.proj(images).flatten(2).transpose(1, 2)

    def multiply_adds(self, patches: int) -> int:
        """Multiply-adds of the convolutions for one image of so many patches."""
        return patches * _per_patch(self.proj, self.patch_size)


def _per_patch(layers: Iterable[nn.Module], patch_size: int) -> int:
    """Multiply-adds of the convolutions among `layers` for the pixels of one patch, which they make one token."""
    count, pixels = 0, patch_size
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            pixels //= layer.stride[0]
            count += pixels**2 * layer.weight.numel()
    return count


STEMS = {"patch": PatchEmbed, "hmlp": HMlpStem, "conv": ConvStem}
"""By `ViTConfig.stem`."""
