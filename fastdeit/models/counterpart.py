"""timm's model for a network of ours: the same function with the same tensors, in code that every tool knows."""

from copy import deepcopy
from typing import Any

import timm
from torch import Tensor, nn

from fastdeit.models.config import ViTConfig
from fastdeit.models.timm_model import TimmModel, TimmVisionTransformer
from fastdeit.models.vit import VisionTransformer

_EPS = 1e-6
"""Of timm's vision transformers."""


def counterpart(model: nn.Module) -> TimmModel:
    """timm's model with the weights of `model`, copied, in eval mode on the CPU; a model of timm is its own.

    timm can build it by the arguments that its files hold. Raises ValueError for a network that timm does not have.
    """
    if isinstance(model, VisionTransformer):
        if model.config.stem != "patch":
            raise ValueError(f"timm has no vision transformer with the stem {model.config.stem}")
        if model.config.eps != _EPS:
            raise ValueError(f"timm's vision transformers have eps 1e-6 in LayerNorm, not {model.config.eps}")
    return traceable(model)


def traceable(model: nn.Module) -> TimmModel:
    """As `counterpart`, for programs: of PyTorch's own operators, and with a stem and an eps that timm does not have.

    Raises ValueError for a network whose blocks, tokens or heads timm does not have.
    """
    if isinstance(model, TimmModel):
        return model.cpu().eval()
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"timm has no {type(model).__name__}")
    config = model.config
    name, options = _name(config), _options(config)
    inner = timm.create_model(name, **options)
    if config.stem != "patch":
        inner.patch_embed = _OfImages(deepcopy(model.patch_embed.proj))
    if config.eps != _EPS:
        for module in inner.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = config.eps
    made = TimmVisionTransformer(name, inner, config.image_size)
    made.load_state_dict(model.state_dict())
    return made.cpu().eval()


class _OfImages(nn.Module):
    """A stem of convolutions as timm calls it: images `[B, C, H, W]` to tokens `[B, P, dim]`."""

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


def _options(config: ViTConfig) -> dict[str, Any]:
    return {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "embed_dim": config.dim,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": config.mlp_ratio,
        "in_chans": config.in_chans,
        "num_classes": config.num_classes,
        "init_values": config.layer_scale or 0.0,  # timm takes None for "as this model has it"
        "class_token": config.class_token,
        "no_embed_class": config.no_embed_class,
        "global_pool": config.pool,
        "fc_norm": config.fc_norm,
    }


def _name(config: ViTConfig) -> str:
    """The model of timm that becomes ours by `_options`; ValueError where there is none."""
    if config.distilled and (config.no_embed_class or config.parallel > 1):
        raise ValueError("timm has no distilled model with parallel blocks, or without positions of its two tokens")
    if config.parallel > 2:
        raise ValueError(f"timm has blocks of two parallel branches, not of {config.parallel}")
    if config.distilled:
        return "deit_tiny_distilled_patch16_224"
    if config.parallel == 2:
        return "vit_small_patch16_18x2_224"
    return "deit3_small_patch16_224" if config.no_embed_class else "deit_tiny_patch16_224"
