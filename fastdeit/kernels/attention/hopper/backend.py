"""The backend `hopper` of attention: where it runs, what it takes, and its two launches."""

from functools import partial
from importlib import import_module
from typing import Any

import torch
import triton
from torch import Tensor

from fastdeit.kernels import _triton
from fastdeit.kernels._op import Unsupported, aligned

ARCH = 90
"""The one architecture with wgmma."""
COMPILER = 3, 8
"""The oldest Triton whose Gluon the kernels were compiled by. Gluon is experimental, and changes between versions."""
MOST_TOKENS, HEAD_WIDTH = 208, 64
"""Keys whose dk and dv fit the registers of 256 threads; and rows of a wgmma, which are the channels of dk and dv."""
MOST_PROGRAMS = 2**31 - 1
capability = partial(_triton.gluon_capability, needs=ARCH, compiler=COMPILER)


def forward(
    qkv: Tensor, num_heads: int, scale: float, bias: Tensor | None, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(out, lse) as of the op's reference, in one launch. `Unsupported` for what forward or backward do not take."""
    _check(qkv, num_heads, scale, key_mask)
    return _kernels("forward").forward(aligned(qkv), num_heads, scale)


def backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    scale: float,
    with_bias: bool,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(dqkv, dbias) as of the op's backward, in one launch, and a small sum for the bias."""
    _check(qkv, num_heads, scale, key_mask)
    tensors = *map(aligned, (grad, qkv, out)), lse.contiguous()
    return _kernels("backward").backward(*tensors, num_heads, scale, sums=with_bias)


def _check(qkv: Tensor, num_heads: int, scale: float, key_mask: Tensor | None) -> None:
    (batch, tokens, packed), require = qkv.shape, _triton.require
    width = packed // (3 * num_heads)
    require(key_mask is None, "it does not take a mask of keys")
    require(qkv.dtype in (torch.float16, torch.bfloat16), f"it computes in 16 bit, not in {qkv.dtype}")
    require(width == HEAD_WIDTH, f"heads are {width} wide, not {HEAD_WIDTH}")
    require(tokens <= MOST_TOKENS, f"{tokens} tokens, at most {MOST_TOKENS} fit one program")
    require(scale > 0, f"the scale is {scale:g}, not positive")
    require(qkv.numel() > 0, f"qkv {list(qkv.shape)} is empty")
    programs = batch * num_heads
    require(programs <= MOST_PROGRAMS, f"{programs} programs, at most {MOST_PROGRAMS} fit a launch")


def _kernels(name: str) -> Any:
    """The module of the kernels; `Unsupported` where this Triton's Gluon is another one than they are written in."""
    try:
        return import_module(f"fastdeit.kernels.attention.hopper.{name}")
    except (ImportError, AttributeError, TypeError) as error:
        raise Unsupported(f"Gluon of Triton {triton.__version__} is not as it was: {error}") from error
