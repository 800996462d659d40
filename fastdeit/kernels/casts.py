"""Parameters in the dtype of autocast: many in one launch, and all their gradients in another.

Autocast casts each parameter by itself, and then each gradient back. The bytes are the same here, and so are the
numbers: 4 read and 2 written for an element of a float32 parameter, 2 read and 4 written for one of its gradient.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdeit.kernels import _derivatives, _op


def autocast_copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in the dtype that autocast gives each of them here; outside autocast, and in float64, they
    themselves.

    The gradients of the copies reach the tensors together: those of one call should be of one part of a model, since
    none is there before all are. A tensor that requires no gradient has a copy that requires none.
    """
    dtypes = [_op.autocast_dtype(tensor) or tensor.dtype for tensor in tensors]
    if torch.compiler.is_compiling() or _derivatives.transformed():  # each by itself, for the compiler to fuse
        return [tensor.to(dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
    # A frozen network is stored in 16 bit already.
    places = [place for place, tensor in enumerate(tensors) if tensor.dtype != dtypes[place]]
    result = list(tensors)
    if places:
        copies = _Copies.apply([dtypes[place] for place in places], *[tensors[place] for place in places])
        for place, copy in zip(places, copies, strict=True):
            result[place] = copy
    return result


class _Copies(torch.autograd.Function):
    """Copies of the tensors in these dtypes."""

    @staticmethod
    def forward(ctx: Any, dtypes: Sequence[torch.dtype], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.set_materialize_grads(False)
        copies = [torch.empty_like(tensor, dtype=dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
        torch._foreach_copy_(copies, list(tensors))
        pairs = zip(copies, tensors, strict=True)
        ctx.mark_non_differentiable(*[copy for copy, tensor in pairs if not tensor.requires_grad])
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        came = [place for place, grad in enumerate(grads) if grad is not None]
        if not came:
            return (None,) * (1 + len(grads))
        result: list[Tensor | None] = [None] * len(grads)
        cast = _Copies.apply([ctx.dtypes[place] for place in came], *[grads[place] for place in came])
        for place, grad in zip(came, cast, strict=True):
            result[place] = grad
        return (None, *result)
