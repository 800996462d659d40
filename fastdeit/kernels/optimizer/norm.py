"""The 2-norm of all elements of many tensors together, for clipping and for the decision to skip a step.

    norm = sqrt(sum over tensors of sum(x**2))          sums in float32

Bytes moved at best: every element once. In Triton each program adds up the squares of one chunk, and one program adds
the chunks' sums in a fixed order, so that every run has the same bits.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels import _op, _triton
from fastdeit.kernels.optimizer import _examples, _multi_tensor

# ---- reference -------------------------------------------------------------------------------------------------------


def reference(tensors: Sequence[Tensor]) -> Tensor:
    """2-norm of all elements of all tensors as a float32 scalar."""
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    norms = torch._foreach_norm(tensors, 2, dtype=torch.float64 if double else torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms)).float()


# ---- Triton ----------------------------------------------------------------------------------------------------------

_READ = 2048
"""Elements at a time: 64 bytes in flight in each of 128 threads."""
_ADDED = 4096
"""Partial sums that the last program, of eight warps, adds at a time."""


@triton.jit
def _squares_kernel(
    tensors,
    sizes,
    starts,
    partial,
    TYPE: tl.constexpr,
    TENSORS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, first, length = _multi_tensor.chunk(sizes, starts, None, TENSORS, ALIGNED)
    x_at = _multi_tensor.pointer(tensors, tensor, first, TYPE, ALIGNED)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, length, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        x = tl.load(x_at + offset, mask=offset < length, other=0.0).to(tl.float32)
        total += x * x
    tl.store(partial + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _root_kernel(partial, norm, count, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        total += tl.load(partial + offset, mask=offset < count, other=0.0)
    tl.store(norm, tl.sqrt_rn(tl.sum(total, 0)))


def triton_norm(tensors: Sequence[Tensor]) -> Tensor:
    """`reference` in one launch for the tensors of a dtype, and one for the sum."""
    tensors = [tensor.contiguous() for tensor in tensors]
    parts = _multi_tensor.split(tensors)
    device = tensors[0].device
    partials = torch.empty(sum(part.chunks for part in parts), dtype=torch.float32, device=device)
    norm = torch.empty((), dtype=torch.float32, device=device)
    for part, partial in zip(parts, partials.split([part.chunks for part in parts]), strict=True):
        constants = {"TYPE": part.types[0], "BLOCK": _READ, **part.constants}
        arguments = *part.rows, part.sizes, part.starts, partial
        _triton.launch(_squares_kernel, (part.chunks,), *arguments, warps=_multi_tensor.WARPS, **constants)
    _triton.launch(_root_kernel, (1,), partials, norm, len(partials), warps=8, BLOCK=_ADDED)
    return norm


# ---- registration ----------------------------------------------------------------------------------------------------

OP = _op.Op(
    "global_norm",
    reference,
    examples=_examples.NORM,
    others=[_op.Backend("triton", _triton.capability, triton_norm)],
)
_triton.expect(_squares_kernel, stores=32)  # one sum
_triton.expect(_root_kernel, loads=32, stores=32)  # sums, of any number


@OP.registered.register_fake
def _(tensors):
    return tensors[0].new_empty((), dtype=torch.float32)
