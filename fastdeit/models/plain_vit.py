"""Vision transformers of others than DeiT's authors, which begin as the first ones did (`init`: vit).

vit_small_patch16_gap_224 is the plain ViT-S/16 of "Better plain ViT baselines for ImageNet-1k" (Beyer et al.,
arXiv:2205.01580): fixed positions, the mean of the patches behind the last LayerNorm, one linear head. In timm's words
it is `class_token=False, global_pool="avg", fc_norm=False`.

vitc_* are the ViT_C of "Early convolutions help transformers see better" (Xiao et al., NeurIPS 2021): the stem of 3x3
convolutions costs about as much as a block, so each has one block less than the model of its size with a patch stem.
Widths, depths, heads and MLP ratios are the paper's; eps is that of the authors' code (pycls).
"""

from dataclasses import replace

from fastdeit.models.config import ViTConfig

_SMALL = ViTConfig(
    image_size=224,
    patch_size=16,
    dim=384,
    depth=12,
    heads=6,
    class_token=False,
    positions="sincos",
    pool="avg",
    init="vit",
)
_VITC = ViTConfig(
    image_size=224,
    patch_size=16,
    dim=192,
    depth=11,
    heads=3,
    mlp_ratio=3.0,
    eps=1e-5,
    stem="conv",
    conv_widths=(24, 48, 96, 192),
    init="vit",
)
_WIDE = (64, 128, 128, 256, 256, 512)

CONFIGS = {
    "vit_small_patch16_gap_224": _SMALL,
    "vitc_1gf_224": _VITC,
    "vitc_4gf_224": replace(_VITC, dim=384, heads=6, conv_widths=(48, 96, 192, 384)),
    "vitc_18gf_224": replace(_VITC, dim=768, heads=12, mlp_ratio=4.0, conv_widths=_WIDE),
    "vitc_36gf_224": replace(_VITC, dim=1024, depth=13, heads=16, mlp_ratio=4.0, conv_widths=_WIDE),
}
