"""The DeiT family (Touvron et al., "Training data-efficient image transformers & distillation through attention", ICML
2021).

Tiny, small and base are the shapes of the paper's table 1. The digits models are the same architecture for 32x32
images, small enough to be trained on a CPU.
"""

from dataclasses import replace

from fastdeit.models.config import ViTConfig

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
