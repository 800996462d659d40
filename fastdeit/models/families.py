"""Vision transformers by name, and which of them a file of weights can be of."""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from fastdeit.models.contract import with_options
from fastdeit.models.convert import timm_names
from fastdeit.models.names import CONFIGS
from fastdeit.models.vit import VisionTransformer

Shapes = Mapping[str, tuple[int, ...]]

_BLOCK = re.compile(r"blocks\.(\d+)\.(.*)")
_HEAD = re.compile(r"head(_dist)?\.")


def transformer(name: str, **options: Any) -> VisionTransformer:
    """The model `name` of `CONFIGS`, with fields of its `ViTConfig` replaced by `options`."""
    return VisionTransformer(with_options(CONFIGS[name], name, options))


def names_by_shapes(shapes: Shapes) -> tuple[str, ...]:
    """Names of `CONFIGS` that a state dict with these shapes can be of: same depth, first block, embedding and grid.

    Heads may be of any number of classes, or missing. LayerScale and parallel blocks may have the names of DeiT's code.
    """
    depth, outline = _outline(timm_names(shapes))
    return tuple(name for name, config in CONFIGS.items() if config.depth == depth and _outline_of(name)[1] == outline)


@cache
def _outline_of(name: str) -> tuple[int, Shapes]:
    # Blocks are equal, and one is enough.
    with torch.device("meta"):
        model = VisionTransformer(replace(CONFIGS[name], depth=1))
    return _outline({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})


def _outline(shapes: Shapes) -> tuple[int, Shapes]:
    """(number of blocks, shapes of all tensors but those of heads and of further blocks)."""
    blocks = {int(match[1]) for name in shapes if (match := _BLOCK.fullmatch(name))}
    others = {f"blocks.{number}." for number in blocks if number > 0}
    return len(blocks), {
        name: tuple(shape)
        for name, shape in shapes.items()
        if not _HEAD.match(name) and not name.startswith(tuple(others))
    }
