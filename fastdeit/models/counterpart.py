"""timm's model for a network of ours: the same function with the same tensors, in code that every tool knows."""

import timm
from torch import nn

from fastdeit.models.config import ViTConfig
from fastdeit.models.timm_model import TimmModel, TimmVisionTransformer
from fastdeit.models.vit import VisionTransformer


def counterpart(model: nn.Module) -> TimmModel:
    """timm's model with the weights of `model`, copied, in eval mode on the CPU; a model of timm is its own.

    Raises ValueError for a network that timm does not have.
    """
    if isinstance(model, TimmModel):
        return model.cpu().eval()
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"timm has no {type(model).__name__}")
    config = model.config
    name = _name(config)
    inner = timm.create_model(
        name,
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.dim,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        in_chans=config.in_chans,
        num_classes=config.num_classes,
        init_values=config.layer_scale or 0.0,  # timm takes None for "as this model has it"
        class_token=config.class_token,
        no_embed_class=config.no_embed_class,
        global_pool=config.pool,
        fc_norm=config.fc_norm,
    )
    made = TimmVisionTransformer(name, inner, config.image_size)
    made.load_state_dict(model.state_dict())
    return made.eval()


def _name(config: ViTConfig) -> str:
    """The model of timm that becomes ours by arguments which its files can hold; ValueError where there is none."""
    if config.stem != "patch":
        raise ValueError(f"timm has no vision transformer with the stem {config.stem}")
    if config.eps != 1e-6:
        raise ValueError(f"timm's vision transformers have eps 1e-6 in LayerNorm, not {config.eps}")
    if config.distilled and (config.no_embed_class or config.parallel > 1):
        raise ValueError("timm has no distilled model with parallel blocks, or without positions of its two tokens")
    if config.parallel > 2:
        raise ValueError(f"timm has blocks of two parallel branches, not of {config.parallel}")
    if config.distilled:
        return "deit_tiny_distilled_patch16_224"
    if config.parallel == 2:
        return "vit_small_patch16_18x2_224"
    return "deit3_small_patch16_224" if config.no_embed_class else "deit_tiny_patch16_224"
