"""DeiT III (Touvron et al., "DeiT III: Revenge of the ViT", ECCV 2022), and the models of "Three things everyone should
know about vision transformers" (Touvron et al., ECCV 2022).

Against DeiT they have LayerScale, positions of the patches alone, and one drop-path rate in all blocks. Names are
timm's where timm has the model, and else those of DeiT's public code (models_v2.py). There LayerScale begins at 1e-4,
and so it does here; timm's begins at 1e-6, which makes no difference for trained weights.

Pre-training at 192, 160 or 128 pixels is of the same model with `model.image_size`. The hMLP models are DeiT III with
the stem of "Three things"; the public code has that stem, but no model with it.
"""

from dataclasses import replace

from fastdeit.models.config import ViTConfig

_TINY = ViTConfig(
    image_size=224,
    patch_size=16,
    dim=192,
    depth=12,
    heads=3,
    layer_scale=1e-4,
    no_embed_class=True,
    drop_path_mode="constant",
)
_SMALL = replace(_TINY, dim=384, heads=6)
_MEDIUM = replace(_TINY, dim=512, heads=8)
_BASE = replace(_TINY, dim=768, heads=12)
_LARGE = replace(_TINY, dim=1024, depth=24, heads=16)
_HUGE = replace(_TINY, patch_size=14, dim=1280, depth=32, heads=16)

CONFIGS = {
    "deit3_tiny_patch16_224": _TINY,
    "deit3_small_patch16_224": _SMALL,
    "deit3_small_patch16_384": replace(_SMALL, image_size=384),
    "deit3_medium_patch16_224": _MEDIUM,
    "deit3_base_patch16_224": _BASE,
    "deit3_base_patch16_384": replace(_BASE, image_size=384),
    "deit3_large_patch16_224": _LARGE,
    "deit3_large_patch16_384": replace(_LARGE, image_size=384),
    "deit3_huge_patch14_224": _HUGE,
    "deit_huge_patch14_52_LS": replace(_HUGE, depth=52),
    "deit_huge_patch14_26x2_LS": replace(_HUGE, depth=26, parallel=2),
    "deit_small_patch16_36": replace(_SMALL, depth=36, layer_scale=None),
    "deit_small_patch16_36_LS": replace(_SMALL, depth=36),
    "deit_small_patch16_18x2": replace(_SMALL, depth=18, parallel=2, layer_scale=None),
    "deit_small_patch16_18x2_LS": replace(_SMALL, depth=18, parallel=2),
    "deit_base_patch16_36x1": replace(_BASE, depth=36, layer_scale=None),
    "deit_base_patch16_36x1_LS": replace(_BASE, depth=36),
    "deit_base_patch16_18x2": replace(_BASE, depth=18, parallel=2, layer_scale=None),
    "deit_base_patch16_18x2_LS": replace(_BASE, depth=18, parallel=2),
    "deit3_small_patch16_hmlp_224": replace(_SMALL, stem="hmlp"),
    "deit3_base_patch16_hmlp_224": replace(_BASE, stem="hmlp"),
}
