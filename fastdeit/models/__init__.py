"""Models by name. All follow one contract (`docs/architecture.md`, section "Model").

State dicts of the DeiT family are interchangeable with timm's.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from fastdeit.models.contract import did_you_mean
from fastdeit.models.convnet import convnet_digits
from fastdeit.models.deit import deit

MODELS: dict[str, Callable[..., nn.Module]] = {
    "deit_tiny_patch16_224": partial(deit, "deit_tiny_patch16_224"),
    "deit_small_patch16_224": partial(deit, "deit_small_patch16_224"),
    "deit_base_patch16_224": partial(deit, "deit_base_patch16_224"),
    "deit_base_patch16_384": partial(deit, "deit_base_patch16_384"),
    "deit_tiny_distilled_patch16_224": partial(deit, "deit_tiny_distilled_patch16_224"),
    "deit_small_distilled_patch16_224": partial(deit, "deit_small_distilled_patch16_224"),
    "deit_base_distilled_patch16_224": partial(deit, "deit_base_distilled_patch16_224"),
    "deit_base_distilled_patch16_384": partial(deit, "deit_base_distilled_patch16_384"),
    "deit_digits_patch8_32": partial(deit, "deit_digits_patch8_32"),
    "deit_digits_distilled_patch8_32": partial(deit, "deit_digits_distilled_patch8_32"),
    "convnet_digits": convnet_digits,
}


def build(name: str, **options: Any) -> nn.Module:
    """The model `name` of `MODELS`, freshly initialised from torch's generator.

    `options` replace fields of its configuration (`ViTConfig`, `ConvNetConfig`): image_size, num_classes, drop_path,
    ... Raises ValueError for a name or an option that does not exist, and for a value that makes no model.
    """
    if name not in MODELS:
        hint = did_you_mean(name, MODELS)
        raise ValueError(f"there is no model {name!r}{hint or '; known are ' + ', '.join(MODELS)}")
    return MODELS[name](**options)


def build_timm(name: str, **options: Any) -> nn.Module:
    """timm's model `name` under the same contract; `options` as `timm_model.TimmModel` has them."""
    # timm takes a second to import, and only runs that name one of its models need it.
    from fastdeit.models.timm_model import TimmModel

    return TimmModel(name, **options)
