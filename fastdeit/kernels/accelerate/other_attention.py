"""Attention of other libraries than timm on `attention`: that of transformers with queries, keys and values of three
linear layers, and PyTorch's `MultiheadAttention`, which torchvision has.

The three weights of transformers are put together at every call, and one product makes the packed queries, keys and
values. Nothing is kept between calls: versions of tensors do not count what is written to `weight.data`, so that a copy
could be old. The copy moves 6 C^2 elements for C channels. It saves two of the three times that products read the M
tokens, 2 M C: the forward moves fewer bytes from 3 C tokens on, which are 12 images of 197 tokens for C = 768. In the
backward one product makes the gradient of the tokens, where there were three and two sums. Three products and a copy
that packs their results would move more, 6 M C.
"""

import inspect
import sys
from collections.abc import Mapping
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastdeit.kernels.accelerate.identity import PLAIN
from fastdeit.kernels.accelerate.modules import (
    Accelerated,
    Kind,
    Structure,
    called_as_it_is,
    given,
    linear,
    not_taken,
    not_tokens,
    passed_by,
    traced,
)
from fastdeit.kernels.attention.op import attention

# ---- transformers ----------------------------------------------------------------------------------------------------

_SDPA = "transformers.integrations.sdpa_attention"


def _plain(module: nn.Module) -> str | None:
    return linear(module, "weight") if getattr(module, "bias", None) is None else linear(module)


def _setting(module: nn.Module, *names: str) -> Any:
    """The first of these attributes that a module of transformers has; None without any."""
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


@cache
def _table_of(cls: type[nn.Module]) -> Mapping[str, Any]:
    """transformers' attention functions by the names of `attn_implementation`, as the code of `cls` sees them."""
    return getattr(inspect.unwrap(cls.forward), "__globals__", {}).get("ALL_ATTENTION_FUNCTIONS", {})


def _has_sdpa(cls: type[nn.Module]) -> bool:
    """Whether `sdpa` is transformers' own attention by `F.scaled_dot_product_attention` for the code of `cls`."""
    own = getattr(sys.modules.get(_SDPA), "sdpa_attention_forward", None)
    return own is not None and _table_of(cls).get("sdpa") is own


def _sdpa(cls: type[nn.Module]) -> tuple[FunctionType, ...]:
    """The function that the op stands for, beside the methods of `cls`."""
    return (_table_of(cls)["sdpa"],)


class SplitAttention(Accelerated):
    """An attention of transformers with a linear layer each for queries, keys and values.

    out  name of the layer behind the attention, which is called, whatever it is
    """

    op = "attention"
    out: str

    @classmethod
    def replaced(cls) -> str | None:
        return None if _has_sdpa(cls.original) else "the attention function named sdpa has been replaced"

    @classmethod
    def on_tokens(cls, module: nn.Module, x: Tensor) -> Tensor:
        result, weights = module.forward(x)
        if weights is not None:
            raise TypeError("it returns the weights of the attention")
        return result

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """What the original computes; its own forward for what the op does not do."""
        if traced(hidden_states) or self.steps_aside(not_taken(given(args, kwargs)) or not_tokens(hidden_states)):
            return super().forward(hidden_states, *args, **kwargs)
        layers = self.q_proj, self.k_proj, self.v_proj
        weight = torch.cat([layer.weight for layer in layers])
        bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
        heads = layers[0].out_features // self.head_dim
        out = attention(F.linear(hidden_states, weight, bias), heads, _setting(self, "scaling", "scale"))
        return self._modules[self.out](out), None


class OProjAttention(SplitAttention):
    """`ViTAttention`, `Dinov2Attention`, and what has their names."""

    out = "o_proj"


class OutProjAttention(SplitAttention):
    """`SiglipAttention`, `CLIPAttention`, and what has their names."""

    out = "out_proj"


def _split_misfit(structure: Structure, module: nn.Module) -> str | None:
    if reason := structure.misfit(module):
        return reason
    q, k, v = module.q_proj, module.k_proj, module.v_proj
    if len({(layer.in_features, layer.out_features, layer.bias is None) for layer in (q, k, v)}) > 1:
        return "makes queries, keys and values of different sizes, or only some with a bias"
    if not isinstance(getattr(module, "head_dim", None), int) or q.out_features % module.head_dim:
        return "has no head_dim that divides its queries"
    if getattr(module, "is_causal", False):
        return "is causal, which the op is not"
    if rate := _setting(module, "attention_dropout", "dropout"):
        return f"drops {rate} of the attention, which the op does not do"
    original = module.original if isinstance(module, Accelerated) else type(module)
    if "position_embeddings" in inspect.signature(original.forward).parameters:
        return "is given rotary position embeddings, which the op does not apply"
    chosen = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if chosen != "sdpa":
        return f"has attn_implementation={chosen!r}, and the op stands for 'sdpa' alone"
    return None if _has_sdpa(original) else "has another attention function named sdpa than transformers' own"


def _split(mixin: type[SplitAttention]) -> Kind:
    layers = "q_proj", "k_proj", "v_proj"
    children = {**dict.fromkeys(layers, _plain), mixin.out: called_as_it_is}
    structure = Structure(children, required=(*layers, mixin.out), functions=_sdpa)
    return Kind("attn", structure, partial(_split_misfit, structure), mixin)


# ---- PyTorch ---------------------------------------------------------------------------------------------------------

_ARGUMENTS = "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal"
"""What `torch.nn.MultiheadAttention` can be given beside query, key and value."""


class PackedAttention(Accelerated):
    """`torch.nn.MultiheadAttention` of tokens to themselves."""

    op = "attention"

    @classmethod
    def on_tokens(cls, module: nn.Module, x: Tensor) -> Tensor:
        return module.forward(x, x, x, need_weights=False)[0]

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """What the original computes; its own forward for what the op does not do."""
        asked = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
        if traced(query) or self.steps_aside(_refused(query, key, value, asked)):
            return super().forward(query, key, value, *args, **kwargs)
        out = attention(F.linear(query, self.in_proj_weight, self.in_proj_bias), self.num_heads)
        return F.linear(out, self.out_proj.weight, self.out_proj.bias), None


def _refused(query: Tensor, key: Tensor, value: Tensor, asked: Mapping[str, Any]) -> str | None:
    if asked.get("need_weights", True):
        return "is asked for the weights of the attention"
    if query is not key or key is not value:
        return "is given keys or values that are not the queries"
    if query.is_nested:
        return "is given nested tensors"
    return not_taken(given((), asked).keys() - {"average_attn_weights"}) or not_tokens(query)


def _out_proj(module: nn.Module) -> str | None:
    """As `linear`: MultiheadAttention has a class of its own for it, which computes the same."""
    if type(module) is not NonDynamicallyQuantizableLinear:
        return linear(module, "weight")
    return passed_by(module, "weight")


def _torchs(cls: type[nn.Module]) -> tuple[FunctionType, ...]:
    return (F.multi_head_attention_forward,)


_PACKED = Structure(
    {"out_proj": _out_proj},
    required=("out_proj",),
    tensors=("in_proj_weight", "in_proj_bias"),
    functions=_torchs,
)


def _packed_misfit(module: nn.Module) -> str | None:
    if reason := _PACKED.misfit(module):
        return reason
    for name in ("in_proj_weight", "in_proj_bias"):
        tensor = getattr(module, name)
        if tensor is not None and type(tensor) not in PLAIN:
            return f"has a {type(tensor).__name__} as {name}"
    if not module.batch_first:
        return "takes tokens as [N, B, C]: batch_first is False"
    if module.dropout:
        return f"drops {module.dropout} of the attention, which the op does not do"
    return None if not module.add_zero_attn else "attends to a zero, which the op does not"


PACKED = Kind("attn", _PACKED, _packed_misfit, PackedAttention)
NAMES = "self_attention", "self_attn", "attn"
"""What a `torch.nn.MultiheadAttention` is called that is given the same tokens three times and is asked for no weights.
A head that pools by attention, such as SigLIP's, does neither."""
KINDS = tuple(map(_split, (OProjAttention, OutProjAttention)))
