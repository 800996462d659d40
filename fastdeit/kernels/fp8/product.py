"""Products of two matrices of e4m3, each row with its scale, added up in float32.

    out[m, n] = scale_a[m] * scale_b[n] * sum_k a[m, k] * b[n, k] + bias[n]

The reference multiplies in float32, in which the product of two e4m3 is exact. On a GPU it is `torch._scaled_mm` with
row-wise scales (cuBLAS or CUTLASS, by PyTorch's choice) and `use_fast_accum=False`: tensor cores add up with fewer bits
than float32 has, and their sums are then carried over to float32 every 128 elements.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdeit.kernels import _op, _triton
from fastdeit.kernels._example import Example, Maker
from fastdeit.kernels.fp8 import cast

MULTIPLE = 16
"""What the rows of b and the elements that are added up have to be multiples of: 16 bytes of the operands."""


def reference(
    a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`[M, N]` in `dtype` of e4m3 `a [M, K]` and `b [N, K]`, float32 `scale_a [M, 1]` and `scale_b [N, 1]` and
    `bias [N]`, as in the module's formula."""
    compute = _op.statistics_dtype(dtype)
    device = "cpu" if a.is_meta else a.device.type  # there is no autocast for the meta device
    with torch.autocast(device, enabled=False):
        out = F.linear(a.to(compute), b.to(compute)) * scale_a * scale_b.t()
    return (out if bias is None else out + bias.to(compute)).to(dtype)


def capability(device: torch.device, forced: bool) -> tuple[bool, str]:
    """Whether `torch._scaled_mm` multiplies e4m3 with row-wise scales on `device`, and the reason."""
    able, reason = _triton.capability(device, False, needs=cast.NEEDS)
    if device.type != "cuda":
        return False, "no CUDA device"
    return able, f"torch._scaled_mm of PyTorch {torch.__version__}" if able else reason


def scaled_mm(
    a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`reference` by `torch._scaled_mm`."""
    _triton.require(dtype == torch.bfloat16, f"its results are bfloat16, not {dtype}")
    depth, width = a.shape[1], len(b)
    fits = depth % MULTIPLE == 0 and width % MULTIPLE == 0
    _triton.require(fits, f"{depth} elements a row and {width} rows are not both multiples of {MULTIPLE}")
    bias = None if bias is None else bias.to(dtype)
    return torch._scaled_mm(a, b.t(), scale_a, scale_b.t(), bias=bias, out_dtype=dtype, use_fast_accum=False)


def _example(make: Maker, bias: bool) -> list[Any]:
    sizes = make.sizes
    tokens = make.normal(sizes.batch * sizes.tokens, sizes.dim, grad=False)
    weight, of_bias, *_ = (tensor.detach() for tensor in make.mlp_weights())
    cast_by = cast.ROWS.registered if tokens.device.type == "meta" else cast.reference
    return [*cast_by(tokens), *cast_by(weight), of_bias if bias else None, make.dtype]


def _bytes(args: Any) -> float:
    a, _, b, *_, dtype = args
    return a.nbytes + b.nbytes + len(a) * len(b) * dtype.itemsize


OP = _op.Op(
    "fp8_product",
    reference,
    examples=[
        Example("", lambda make: _example(make, True), compiled=cast.COMPILED, bytes=_bytes),
        Example("no bias", lambda make: _example(make, False), compiled=cast.COMPILED),
    ],
    others=[_op.Backend("scaled_mm", capability, scaled_mm)],
)


@OP.registered.register_fake
def _(a, scale_a, b, scale_b, bias, dtype):
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)
