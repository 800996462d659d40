"""The DeiT family (Touvron et al., "Training data-efficient image transformers & distillation
through attention", ICML 2021).

Tiny, small and base are the shapes of the paper's table 1. The digits models are the same architecture for 32x32
images, small enough to be trained on a CPU.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastdeit.models.contract import with_options
from fastdeit.models.vit import VisionTransformer, ViTConfig

_TINY = ViTConfig(image_size=224, patch_size=16, dim=192, depth=12, heads=3)
_SMALL = replace(_TINY, dim=384, heads=6)
_BASE = replace(_TINY, dim=768, heads=12)
_DIGITS = ViTConfig(image_size=32, patch_size=8, dim=96, depth=4, heads=3, num_classes=10)

CONFIGS = {
    "deit_tiny_patch16_224": _TINY,
    "deit_small_patch16_224": _SMALL,
    "deit_base_patch16_224": _BASE,
    "deit_base_patch16_384": replace(_BASE, image_size=384),
    "deit_tiny_distilled_patch16_224": replace(_TINY, distilled=True),
    "deit_small_distilled_patch16_224": replace(_SMALL, distilled=True),
    "deit_base_distilled_patch16_224": replace(_BASE, distilled=True),
    "deit_base_distilled_patch16_384": replace(_BASE, image_size=384, distilled=True),
    "deit_digits_patch8_32": _DIGITS,
    "deit_digits_distilled_patch8_32": replace(_DIGITS, distilled=True),
}


def deit(name: str, **options: Any) -> VisionTransformer:
    """The model `name` of `CONFIGS`, with fields of its `ViTConfig` replaced by `options`."""
    return VisionTransformer(with_options(CONFIGS[name], name, options))


def names_by_shapes(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Names of `CONFIGS` that a state dict with these shapes can be of: same width, depth, tokens and grid."""
    distilled = "dist_token" in shapes
    depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.") and name.count(".") > 1})
    fitting = []
    for name, config in CONFIGS.items():
        length = config.grid[0] * config.grid[1] + 1 + config.distilled
        kernel = (config.dim, config.in_chans, config.patch_size, config.patch_size)
        same = shapes.get("patch_embed.proj.weight") == kernel and shapes.get("pos_embed") == (1, length, config.dim)
        if same and (config.depth, config.distilled) == (depth, distilled):
            fitting.append(name)
    return tuple(fitting)
