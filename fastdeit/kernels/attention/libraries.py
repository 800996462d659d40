"""Attention of others as backends of the op: their forward and backward, called with views of packed qkv.

    flash      PyTorch's FlashAttention-2; on a CPU PyTorch's kernel of that name, where it is asked for
    efficient  PyTorch's memory-efficient attention
    cudnn      cuDNN's attention
    fa3        FlashAttention-3, the package `flash_attn_interface` of its authors, for sm_90
    fa4        FlashAttention-4, `pip install flash-attn-4`, for sm_90 and sm_100

`efficient`, `fa3` and `fa4` write the gradients of q, k and v into one packed tensor; those of the others are packed by
one copy. The gradient of the bias is a sum over the packed one. PyTorch's functions are called below autograd, by the
names and signatures of `torch.ops.aten`.

Every run has the same bits with `efficient`, which splits no row of keys, and with `fa3` and `fa4`, whose backward adds
in a fixed order on demand. PyTorch's FlashAttention adds so under `torch.use_deterministic_algorithms(True)`, cuDNN
never. What does not repeat its bits runs only where it is asked for by name; the rest is tried by a trial of the
kernels, after ours. None of this has run on a GPU yet.
"""

import importlib.util
import os
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from fastdeit.kernels import _op, _triton
from fastdeit.kernels._op import aligned
from fastdeit.kernels.dtypes import HALVES

_LSE_MULTIPLE = 32
"""The memory-efficient kernel wants rows of that many logarithms."""
_MOST_BATCH = 65_535
_RAGGED = "TORCH_CUDNN_SDPA_AVOID_RECOMPILE"
"""With this variable PyTorch wants the logarithms of cuDNN's forward in a layout that the op does not keep."""


class Flash(NamedTuple):
    """A release of FlashAttention beyond PyTorch's own: its package, and the major compute capabilities that it runs
    on (torch/nn/attention/_fa3.py and _fa4.py)."""

    package: str
    majors: tuple[int, ...]


FLASH = {"FA3": Flash("flash_attn_interface", (9,)), "FA4": Flash("flash_attn.cute", (9, 10))}


@cache
def installed(package: str) -> bool:
    """Whether there is such a package; it is not imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of what it lies in
        return False


class Library(NamedTuple):
    """Somebody's attention. q, k, v and out are `[B, N, H, d]`, qkv and its gradient `[B, N, 3, H, d]`.

    forward   (qkv, scale) -> (out, lse float32 `[B, H, N]`)
    backward  (grad of out, qkv, out, lse, scale) -> gradient of qkv, dense
    dtypes    what it computes in
    widest    the most channels of a head, of which `multiple` is a divisor
    """

    forward: Callable[[Tensor, float], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
    dtypes: tuple[torch.dtype, ...]
    widest: int
    multiple: int = 8


# ---- PyTorch's -------------------------------------------------------------------------------------------------------


def _heads(qkv: Tensor) -> list[Tensor]:
    """q, k and v, each `[B, H, N, d]`."""
    return [part.transpose(1, 2) for part in qkv.unbind(2)]


def _packed(gradients: tuple[Tensor, ...]) -> Tensor:
    """Those of q, k and v, `[B, H, N, d]`, as one of qkv, by one copy."""
    return torch.stack([gradient.transpose(1, 2) for gradient in gradients], 2)


def _no_dropout(like: Tensor, dtype: torch.dtype, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The state of the noise of dropout, which nobody reads."""
    return like.new_empty(size, dtype=dtype), like.new_empty((), dtype=dtype)


def _flash_forward(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*_heads(qkv), scale=scale)
    return out.transpose(1, 2), lse


def _flash_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    tensors, tokens = (grad.transpose(1, 2), *_heads(qkv), out.transpose(1, 2), lse), qkv.shape[1]
    run, noise = torch.ops.aten._scaled_dot_product_flash_attention_backward, _no_dropout(lse, torch.uint64, (2,))
    return _packed(run(*tensors, None, None, tokens, tokens, 0.0, False, *noise, scale=scale))


def _cpu_forward(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*_heads(qkv), scale=scale)
    return out.transpose(1, 2), lse


def _cpu_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return _packed(run(grad.transpose(1, 2), *_heads(qkv), out.transpose(1, 2), lse, 0.0, False, scale=scale))


def _cudnn_forward(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(*_heads(qkv), None, True, scale=scale)
    return out.transpose(1, 2), lse.reshape(lse.shape[:3])


def _cudnn_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    tensors, tokens = (grad.transpose(1, 2), *_heads(qkv), out.transpose(1, 2)), qkv.shape[1]
    lse = lse.contiguous().reshape(*lse.shape, *[1] * (_cudnn_lse_dimensions() - 3))
    run, noise = torch.ops.aten._scaled_dot_product_cudnn_attention_backward, _no_dropout(lse, torch.int64, ())
    return _packed(run(*tensors, lse, *noise, None, None, None, tokens, tokens, 0.0, False, scale=scale))


@cache
def _cudnn_lse_dimensions() -> int:
    """How many dimensions this PyTorch gives the logarithms of cuDNN's forward: `[B, H, N]` or `[B, H, N, 1]`."""
    q = torch.empty(1, 1, 2, 8, dtype=torch.float16, device="meta")
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, q, q, None, True)[1].dim()


def _efficient_forward(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    run = torch.ops.aten._scaled_dot_product_efficient_attention
    out, lse, *_ = run(*_heads(qkv), None, True, scale=scale)
    return out.transpose(1, 2), lse[:, :, : qkv.shape[1]]


def _efficient_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    tokens = qkv.shape[1]
    lse = torch.nn.functional.pad(lse, (0, ceil(tokens / _LSE_MULTIPLE) * _LSE_MULTIPLE - tokens))
    noise = _no_dropout(lse, torch.int64, ())
    dq, *_ = torch.ops.aten._efficient_attention_backward(
        *(grad, *qkv.unbind(2), None, out, None, None, tokens, tokens, lse, 0.0, *noise, 0, False),
        scale=scale,
        num_splits_key=1,
        shared_storage_dqdkdv=True,
    )
    # dq is a view of a dense tensor of all three.
    return dq.as_strided(qkv.shape, qkv.stride())


# ---- FlashAttention's authors' ---------------------------------------------------------------------------------------


def _fa3_forward(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = import_module(FLASH["FA3"].package)._flash_attn_forward(*qkv.unbind(2), softmax_scale=scale)
    return out, lse


def _fa3_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    dqkv = torch.empty_like(qkv)
    written = dict(zip(("dq", "dk", "dv"), dqkv.unbind(2), strict=True))
    run = import_module(FLASH["FA3"].package)._flash_attn_backward
    run(grad, *qkv.unbind(2), out, lse.contiguous(), **written, softmax_scale=scale, deterministic=True)
    return dqkv


def _fa4_forward(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    run = import_module(f"{FLASH['FA4'].package}.interface")._flash_attn_fwd
    out, lse, *_ = run(*qkv.unbind(2), softmax_scale=scale, return_lse=True)
    return out, lse


def _fa4_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    dqkv = torch.empty_like(qkv)
    written = dict(zip(("dq", "dk", "dv"), dqkv.unbind(2), strict=True))
    run = import_module(f"{FLASH['FA4'].package}.interface")._flash_attn_bwd
    run(*qkv.unbind(2), out, grad, lse.contiguous(), **written, softmax_scale=scale, deterministic=True)
    return dqkv


# ---- as backends -----------------------------------------------------------------------------------------------------


def _forward(
    library: Library, qkv: Tensor, num_heads: int, scale: float, bias: Tensor | None, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(out, lse) as of the op's reference. `Unsupported` where the library does not take this call."""
    library = _checked(library, qkv, num_heads, key_mask)
    with torch.cuda.device_of(qkv):
        out, lse = library.forward(_five(qkv, num_heads), scale)
    return out.flatten(2), lse


def _backward(
    library: Library,
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    scale: float,
    with_bias: bool,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(dqkv, dbias) as of the op's backward. `Unsupported` for what `_forward` refuses: a registered op chooses anew in
    its backward, and then the forward was another backend's."""
    library = _checked(library, qkv, num_heads, key_mask)
    grad, out = (aligned(x).unflatten(2, (num_heads, -1)) for x in (grad.to(qkv.dtype), out))
    with torch.cuda.device_of(qkv):
        dqkv = library.backward(grad, _five(qkv, num_heads), out, lse, scale).flatten(2)
    return dqkv, dqkv.sum((0, 1), dtype=lse.dtype) if with_bias else lse.new_empty(0)


def _five(qkv: Tensor, num_heads: int) -> Tensor:
    """`[B, N, 3*H*d]` as `[B, N, 3, H, d]`, dense."""
    return aligned(qkv).unflatten(2, (3, num_heads, -1))


def _checked(library: Library, qkv: Tensor, num_heads: int, key_mask: Tensor | None) -> Library:
    """The library, or what takes its place on a CPU. `Unsupported` where it does not take this call."""
    library = _ON_CPU if library is FLASH_2 and qkv.device.type == "cpu" else library
    batch, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // (3 * num_heads)
    _triton.require(key_mask is None, "it does not take a mask of keys here")
    _triton.require(0 not in qkv.shape, f"qkv {list(qkv.shape)} is empty")
    _triton.require(qkv.dtype in library.dtypes, f"it does not compute in {qkv.dtype}")
    fits = width % library.multiple == 0 and width <= library.widest
    _triton.require(fits, f"heads are {width} wide, not a multiple of {library.multiple} up to {library.widest}")
    _triton.require(batch <= _MOST_BATCH, f"a batch of {batch} is more than {_MOST_BATCH}")
    _triton.require(tokens > 1 or library is not CUDNN, "its backward wants more than one token")
    return library


FLASH_2 = Library(_flash_forward, _flash_backward, HALVES, 128)
_ON_CPU = Library(_cpu_forward, _cpu_backward, (*HALVES, torch.float32, torch.float64), 2**16, multiple=1)
EFFICIENT = Library(_efficient_forward, _efficient_backward, (*HALVES, torch.float32), 128)
CUDNN = Library(_cudnn_forward, _cudnn_backward, HALVES, 128)
FA3 = Library(_fa3_forward, _fa3_backward, HALVES, 128)
FA4 = Library(_fa4_forward, _fa4_backward, HALVES, 128)


# ---- where they run --------------------------------------------------------------------------------------------------

_NO_ORDER = "its backward adds in no fixed order, so it runs where it is asked for by name"


def _on_card(name: str, device: torch.device, oldest: int) -> tuple[bool, str]:
    if device.type != "cuda":
        return False, "no CUDA device"
    card = _triton.arch(device)
    if card < oldest:
        return False, f"{name} needs sm_{oldest} or newer, not sm_{card}"
    return True, f"{name} on sm_{card}"


def _repeats() -> bool:
    """Whether PyTorch is asked to add in a fixed order: FlashAttention does, cuDNN cannot."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def _flash_capability(device: torch.device, forced: bool) -> tuple[bool, str]:
    if device.type == "cpu" and forced:
        return True, "PyTorch's FlashAttention for CPUs"
    if not forced and not _repeats():
        return False, f"{_NO_ORDER}, or under torch.use_deterministic_algorithms(True)"
    return _on_card("PyTorch's FlashAttention", device, 80)


def _efficient_capability(device: torch.device, forced: bool) -> tuple[bool, str]:
    able, reason = _on_card("PyTorch's memory-efficient attention", device, _triton.OLDEST)
    if able and not forced and _triton.arch(device) < 80:  # there it would come first, untried
        return False, "on cards before sm_80 it runs where it is asked for by name"
    return able, reason


def _cudnn_capability(device: torch.device, forced: bool) -> tuple[bool, str]:
    if not forced:
        return False, _NO_ORDER
    if _repeats():
        return False, "its backward adds in no fixed order, and torch.use_deterministic_algorithms(True) is on"
    if os.environ.get(_RAGGED) == "1":
        return False, f"it does not run with {_RAGGED}=1: unset it"
    return _on_card("cuDNN's attention", device, 80)


def _package_capability(name: str, device: torch.device, forced: bool) -> tuple[bool, str]:
    package, majors = FLASH[name]
    if device.type != "cuda":
        return False, "no CUDA device"
    if not installed(package):
        return False, f"{name} is not installed: there is no package {package}"
    card = _triton.arch(device)
    if card // 10 not in majors:
        return False, f"{name} needs {' or '.join(f'sm_{major}0' for major in majors)}, not sm_{card}"
    return True, f"{name} on sm_{card}"


def _backend(name: str, capability: Callable[..., tuple[bool, str]], library: Library) -> _op.Backend:
    return _op.Backend(name, capability, partial(_forward, library), partial(_backward, library))


BACKENDS = [
    _backend("fa3", partial(_package_capability, "FA3"), FA3),
    _backend("fa4", partial(_package_capability, "FA4"), FA4),
    _backend("efficient", _efficient_capability, EFFICIENT),
    _backend("flash", _flash_capability, FLASH_2),
    _backend("cudnn", _cudnn_capability, CUDNN),
]
