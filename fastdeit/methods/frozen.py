"""A network that will only ever answer, made ready for it: the same mathematics, less work in every call.

Three things that an ordinary forward pass does in every step are done once:

BatchNorm  goes into the convolution or linear layer before it: w' = w * s, b' = (b - mean) * s + beta with
           s = gamma / sqrt(var + eps), in float64. At inference it is this affine map and nothing else (Ioffe and
           Szegedy 2015, section 3.1; folded as in Jacob et al. 2018, section 3.2)
layout     weights of 2-D convolutions become channels_last; a convolution hands the layout of its weight on
precision  weights that autocast would cast to 16 bit in every call are stored in 16 bit, which rounds them alike

What may be changed is not guessed from classes: the network is run on one image, what is done with its tensors is
written down, and one is touched only if that is all its use and allows it. Transformer blocks run on the fused ops.
"""

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdeit import kernels

_PRODUCTS = {F.conv1d, F.conv2d, F.conv3d, F.linear}
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
# Questions that no element of a tensor is read for.
_GETTERS = (Tensor.shape, Tensor.ndim, Tensor.dtype, Tensor.device, Tensor.requires_grad, Tensor.is_cuda)
_QUESTIONS = {Tensor.size, Tensor.dim, Tensor.is_floating_point, *(getter.__get__ for getter in _GETTERS)}
# Of the largest logit. Rounding in float32 leaves 1e-7 to 1e-5 of it, a mistake per cents.
_AGREEMENT = 1e-3


def freeze(network: nn.Module, image_size: tuple[int, int], dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy of `network` in eval mode, without gradients and ready to be asked again and again.

    network     float32, on the CPU; takes images `[B, 3, H, W]`, and is not changed
    image_size  (H, W) in pixels of the image that it is tried out on
    dtype       that of the autocast under which it will be called: float16 or bfloat16, or float32 for none

    Warns, and leaves BatchNorm where it is, if folding would change the logits by more than rounding.
    """
    image = torch.randn(1, 3, *image_size, generator=torch.Generator().manual_seed(0))
    frozen = _folded(network, image)
    # Only timm's own module, not the adapter around it, shows which tokens its head reads.
    kernels.accelerate(getattr(frozen, "inner", frozen))
    for parameter in _read_by_conv2d_alone(frozen, image):
        parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    if dtype != torch.float32:
        for parameter in _read_by_casts_alone(frozen, image):
            parameter.data = parameter.data.to(dtype)
    return frozen


def _copy(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).eval().requires_grad_(False)


# ---- what is done with which tensor ----------------------------------------------------------------------------------


class _Call(NamedTuple):
    function: Callable
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any


class _Calls(TorchFunctionMode):
    """Writes down every call of a torch function; that keeps their tensors alive, and so their ids unique."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[_Call] = []
        self.uses: dict[int, list[_Call]] = defaultdict(list)
        """By the id of a tensor the calls that it was given to, once for each place that it had there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        call = _Call(func, args, kwargs or {}, func(*args, **(kwargs or {})))
        if func not in _QUESTIONS:
            self.made.append(call)
            for tensor in _tensors((args, kwargs)):
                self.uses[id(tensor)].append(call)
        return call.out

    def only(self, call: _Call, tensors: Sequence[Tensor]) -> bool:
        """Whether each of `tensors` was given to `call` once, and to no other."""
        return all(len(seen := self.uses[id(tensor)]) == 1 and seen[0] is call for tensor in tensors)


class _Casts(TorchDispatchMode):
    """The ids of what is cast to `dtype`, and of what anything else is done with."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.cast: set[int] = set()
        self.used: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        is_cast = func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == self.dtype
        if func is torch.ops.aten._foreach_copy_.default and all(copy.dtype == self.dtype for copy in args[0]):
            is_cast, given = True, args[1]  # many at once, as `kernels.autocast_copies` does it
        if func is torch.ops.aten.empty_like.default:  # reads no element
            given = []
        (self.cast if is_cast else self.used).update(map(id, given))
        return func(*args, **kwargs)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _run(network: nn.Module, image: Tensor) -> tuple[Any, _Calls]:
    with torch.no_grad(), torch.autocast("cpu", enabled=False), _Calls() as calls:
        return network(image), calls


def _read_by_conv2d_alone(network: nn.Module, image: Tensor) -> list[nn.Parameter]:
    """Weights `[O, I, kh, kw]` whose layout nothing but convolutions sees."""
    _, calls = _run(network, image)
    found = [(parameter, calls.uses[id(parameter)]) for parameter in network.parameters() if parameter.ndim == 4]
    return [parameter for parameter, uses in found if uses and all(call.function is F.conv2d for call in uses)]


def _read_by_casts_alone(network: nn.Module, image: Tensor) -> list[nn.Parameter]:
    """Parameters that a forward pass under autocast casts to 16 bit, and does nothing else with.

    In bfloat16, as the two 16-bit types are cast at the same places and a CPU may take minutes for float16.
    """
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), _Casts(torch.bfloat16) as casts:
        network(image)
    return [parameter for parameter in network.parameters() if id(parameter) in casts.cast - casts.used]


# ---- BatchNorm -------------------------------------------------------------------------------------------------------


def _folded(network: nn.Module, image: Tensor) -> nn.Module:
    """A copy of `network`, BatchNorm folded wherever that can be; a warning if the logits do not survive it."""
    folded = _copy(network)
    before, calls = _run(folded, image)
    pairs = list(_pairs(folded, calls, before))
    for layer, norm in pairs:
        _fold(layer, norm)
        _replace(folded, norm, _rest(norm))
    if not pairs or _agree(before, _run(folded, image)[0]):
        return folded
    warnings.warn("a teacher's BatchNorm is not folded into its convolutions, as its logits would change", stacklevel=3)
    return _copy(network)


def _pairs(network: nn.Module, calls: _Calls, result: Any) -> Iterator[tuple[nn.Module, _BatchNorm]]:
    """(layer, BatchNorm) wherever all that becomes of the layer's output is to be normalised."""
    owners = {
        id(tensor): module
        for module in network.modules()
        if isinstance(module, (*_LAYERS, _BatchNorm))
        for tensor in _own(module)
    }
    products = {id(call.out): call for call in calls.made if call.function in _PRODUCTS and len(call.args) > 1}
    for call in calls.made:
        if call.function is not F.batch_norm:
            continue
        given = signature(F.batch_norm).bind(*call.args, **call.kwargs).arguments
        product = products.get(id(given["input"]))
        if product is None:
            continue
        layer, norm = owners.get(id(product.args[1])), owners.get(id(given["running_mean"]))
        if not isinstance(layer, _LAYERS) or not isinstance(norm, _BatchNorm) or _rest(norm) is None:
            continue
        # What a linear layer puts out is the last dimension, what BatchNorm takes for channels the second.
        fits = product.function is not F.linear or product.out.ndim == 2
        alone = calls.only(product, _own(layer)) and calls.only(call, [product.out, *_own(norm)])
        if fits and alone and all(leaf is not product.out for leaf in tree_leaves(result)):
            yield layer, norm


def _own(module: nn.Module) -> list[Tensor]:
    """The tensors by which a layer or BatchNorm computes."""
    names = ("weight", "bias", "running_mean", "running_var")
    found = (module._parameters.get(name, module._buffers.get(name)) for name in names)
    return [tensor for tensor in found if tensor is not None]


def _rest(norm: _BatchNorm) -> nn.Module | None:
    """What a BatchNorm module does besides normalising; None where that is not known."""
    if type(norm).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        return nn.Identity()
    if {"drop", "act"} <= norm._modules.keys():  # timm's BatchNormAct2d
        return nn.Sequential(norm.drop, norm.act)
    return None


def _fold(layer: nn.Module, norm: _BatchNorm) -> None:
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -mean if layer.bias is None else layer.bias.double() - mean
    bias = shift * scale + (0 if norm.bias is None else norm.bias.double())
    weight = layer.weight.double() * scale.reshape(-1, *[1] * (layer.weight.ndim - 1))
    layer.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=False)


def _replace(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, new)


def _agree(before: Any, after: Any) -> bool:
    pairs = zip(_tensors(before), _tensors(after), strict=True)
    return all(((old - new).abs().max() <= _AGREEMENT * old.abs().max()).item() for old, new in pairs)
