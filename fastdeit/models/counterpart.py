"""timm's model for a network of ours: the same function with the same tensors, in code that every tool knows."""

import timm
from torch import nn

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
    name = "deit_tiny_distilled_patch16_224" if config.distilled else "deit_tiny_patch16_224"
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
    )
    made = TimmVisionTransformer(name, inner, config.image_size)
    made.load_state_dict(model.state_dict())
    return made.eval()
