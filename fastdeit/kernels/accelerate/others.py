"""Blocks and MLPs of other libraries than timm: torchvision's vision transformer, and those of transformers that are
built like ViT, DINOv2 or SigLIP. Their attention is called, whatever it is (`other_attention`).

They are recognised by the names of their children, tried out, and compared at every call, as timm's are.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fastdeit.kernels import nn as drop_in
from fastdeit.kernels.accelerate.modules import (
    Accelerated,
    AnyBlock,
    Kind,
    MlpMixin,
    Names,
    Structure,
    called_as_it_is,
    drop_path,
    exact_gelu,
    layer_norm,
    linear,
    normed_sum,
    nothing,
    passed_by,
    summed,
    traced,
)
from fastdeit.kernels.layer_norm.op import add_layer_norm
from fastdeit.kernels.mlp.op import mlp

# ---- blocks ----------------------------------------------------------------------------------------------------------


def _layer_scale(module: nn.Module) -> str | None:
    if type(module).__name__.endswith("LayerScale"):
        return passed_by(module, "lambda1")
    return nothing(module)


def _sum_of(block: AnyBlock, x: Tensor, branch: Tensor, number: str) -> drop_in.Tokens:
    """`summed`, with the factor and the drop-path of the block."""
    gamma = getattr(getattr(block, f"layer_scale{number}", None), "lambda1", None)
    return summed(x, branch, gamma, getattr(block, "drop_path", None))


def _run(block: AnyBlock, x: Tensor, attend: Callable[[nn.Module, Tensor], tuple[Tensor, Any]]) -> Tensor:
    """The tokens that the block makes, where `attend` calls its attention with the normalised ones."""
    norm1, attn, norm2, mlp_of = (block._modules[name] for name in block.names)
    _, normed = add_layer_norm(x, None, norm1.weight, norm1.bias, norm1.eps)
    x, normed = normed_sum(_sum_of(block, x, attend(attn, normed)[0], "1"), norm2)
    return _sum_of(block, x, mlp_of(normed), "2").sum()


class TransformersBlock(AnyBlock):
    """A layer of a model of transformers."""

    makes_pair = True

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the original computes; its own forward for what the op does not do."""
        if traced(hidden_states) or self.steps_aside(None):
            return super().forward(hidden_states, *args, **kwargs)
        return _run(self, hidden_states, lambda attention, normed: attention(normed, *args, **kwargs))


class ViTBlock(TransformersBlock):
    """`ViTLayer`, and what has its names."""

    names = Names("layernorm_before", "attention", "layernorm_after", "mlp")


class Dinov2Block(TransformersBlock):
    """`Dinov2Layer`, and what has its names."""

    names = Names("norm1", "attention", "norm2", "mlp")


class SiglipBlock(TransformersBlock):
    """`SiglipEncoderLayer`, and what has its names."""

    names = Names("layer_norm1", "self_attn", "layer_norm2", "mlp")
    arguments: Mapping[str, Any] = {"attention_mask": None}


class TorchvisionBlock(AnyBlock):
    """torchvision's `EncoderBlock`."""

    names = Names("ln_1", "self_attention", "ln_2", "mlp")
    makes_pair = True

    def forward(self, input: Tensor) -> Tensor:
        """What the original computes; its own forward for what the op does not do."""
        shape = None if traced(input) or input.dim() == 3 else "is given no tokens [B, N, C]"
        if traced(input) or self.steps_aside(shape):
            return super().forward(input)
        return _run(self, input, lambda attention, x: attention(x, x, x, need_weights=False))


# ---- MLPs ------------------------------------------------------------------------------------------------------------


class SequentialMlp(Accelerated):
    """An MLP that is a sequence of linear, GELU, dropout, linear and dropout: torchvision's."""

    op = "mlp"

    def forward(self, input: Tensor) -> Tensor:
        """What the original computes; its own forward for what the op does not do."""
        if traced(input) or self.steps_aside(None):
            return super().forward(input)
        first, second = self._modules["0"], self._modules["3"]
        return mlp(input, first.weight, first.bias, second.weight, second.bias)


# ---- what is swapped -------------------------------------------------------------------------------------------------


def _block(mixin: type[AnyBlock]) -> Kind:
    """The kind of a block whose children have the names of `mixin`."""
    norm1, attn, norm2, mlp_of = mixin.names
    children = {norm1: layer_norm, attn: called_as_it_is, norm2: layer_norm, mlp_of: called_as_it_is}
    children |= {"dropout": nothing, "drop_path": drop_path}
    children |= {"layer_scale1": _layer_scale, "layer_scale2": _layer_scale}
    structure = Structure(children, required=tuple(mixin.names))
    return Kind("block", structure, structure.misfit, mixin)


_MLP = Structure({"fc1": linear, "activation_fn": exact_gelu, "fc2": linear}, required=("fc1", "activation_fn", "fc2"))
_SEQUENCE = Structure(
    {"0": linear, "1": exact_gelu, "2": nothing, "3": linear, "4": nothing}, required=("0", "1", "2", "3", "4")
)
SEQUENCE = Kind("mlp", _SEQUENCE, _SEQUENCE.misfit, SequentialMlp)
"""Only where it is called `mlp`: any sequence has children of such names."""
KINDS = (
    *map(_block, (ViTBlock, Dinov2Block, SiglipBlock, TorchvisionBlock)),
    Kind("mlp", _MLP, _MLP.misfit, MlpMixin),
)
