"""How deep each parameter of a model lies: embedding, blocks, head.

Layer-wise learning rates (`optim.layer_decay`), freezing (`model.freeze`) and Muon need to know it. The layers are
timm's: what comes before the blocks is the first layer, each block is one, the norm after the blocks belongs to the
last of them, and the heads are the last layer, with the norm behind the mean of the patches where there is one.
"""

import re
from collections import Counter

from torch import nn

from fastdeit.models.contract import Tokens, not_once

_BLOCK = re.compile(r"blocks\.(\d+)\.")


def layers(model: nn.Module) -> list[list[str]]:
    """Names of all parameters of `model` by layer, from the input to the heads.

    A model says it by a method `layers()`. Of a `contract.Tokens` without one they are read from the names. Raises
    ValueError for any other model.
    """
    if hasattr(model, "layers"):
        found = model.layers()
        if problems := not_once("layers()", Counter(name for names in found for name in names), model):
            raise ValueError(f"{type(model).__name__} says wrongly how deep its parameters lie: {'; '.join(problems)}")
        return found
    if isinstance(model, Tokens):
        return block_layers(model)
    raise ValueError(
        f"{type(model).__name__} does not say how deep its parameters lie; give it a method layers() that returns "
        "their names in lists: those before the blocks, those of each block, those of the heads"
    )


def block_layers(model: nn.Module) -> list[list[str]]:
    """`layers` of a transformer whose children are registered in the order of the computation, the blocks as `blocks`.

    That order and the names say it all: heads are what `head_names` lists.
    """
    children = [name for name, _ in model.named_children()]
    after = set(children[children.index("blocks") + 1 :])
    heads = tuple(f"{head}." for head in (*model.head_names, "fc_norm"))
    depth = len(model.blocks)
    found: list[list[str]] = [[] for _ in range(depth + 2)]
    for name, _ in model.named_parameters():
        if name.startswith(heads):
            place = depth + 1
        elif block := _BLOCK.match(name):
            place = 1 + int(block[1])
        else:
            place = depth if name.partition(".")[0] in after else 0
        found[place].append(name)
    return [names for names in found if names]


def layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """Factor on the learning rate of each parameter, by name: decay ** (last layer - layer), 1 for the heads.

    The formula of BEiT (Bao et al., ICLR 2022), with the layers of timm's `param_groups_layer_decay`.
    """
    found = layers(model)
    return {name: decay ** (len(found) - 1 - depth) for depth, names in enumerate(found) for name in names}


def hidden_matrices(model: nn.Module) -> set[str]:
    """Names of the 2-D parameters between the first layer and the last: the weights of the blocks' linear layers."""
    inner = {name for names in layers(model)[1:-1] for name in names}
    return {name for name, parameter in model.named_parameters() if name in inner and parameter.ndim == 2}
