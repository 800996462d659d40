"""Examples of the ops that update many tensors, and of their norm: the parameters of a DeiT."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdeit.kernels._example import BASE, BASE_FP16, HALVES, MANY_CLASSES, Example, Maker

_FULL = ((BASE, torch.float32),)
Shapes = Sequence[tuple[int, ...]]


def _tensors(make: Maker, shapes: Shapes, dtype: torch.dtype | None = None) -> list[Tensor]:
    """One tensor of each shape, float32 (float64 where all is) unless another dtype is given; none is negative, since
    second moments are not."""
    return [torch.rand(shape, device=make.device).to(dtype or make.full) for shape in shapes]


def _update(
    make: Maker,
    shapes: Shapes,
    between: Sequence[Any],
    *,
    decay: float,
    grad: torch.dtype | None = None,
    follow: bool = True,
    copy: torch.dtype | None = None,
) -> list[Any]:
    """Arguments of an update: with an average of the parameters and guards unless not `follow`, and with a copy of the
    parameters in the dtype `copy`. The learning rate is so small that thousands of measured updates change little."""
    lists = [_tensors(make, shapes, dtype) for dtype in (None, grad, None, None)]
    guards = (make.scalar(1.0), make.scalar(0.0)) if follow else (None, None)
    ema = _tensors(make, shapes) if follow else []
    copies = [] if copy is None else _tensors(make, shapes, copy)
    numbers = 0.9, 0.999, 1e-8, decay, *between
    return [*lists, make.scalar(0.0), make.scalar(1e-9), *numbers, *guards, ema, 0.9999, copies]


def updates(*between: Any, bytes_of_a_parameter: int) -> list[Example]:
    """Examples of `op(params, grads, exp_avgs, exp_avg_sqs, step, lr, beta1, beta2, eps, weight_decay, *between,
    grad_scale, found_inf, ema, ema_decay, copies)`, which moves so many bytes for a parameter that has an average."""
    halves = [(BASE, dtype) for dtype in HALVES]
    return [
        Example(
            "weights",
            lambda make: _update(make, make.sizes.matrices, between, decay=0.05),
            compiled=_FULL,
            bytes=lambda args: bytes_of_a_parameter * sum(p.numel() for p in args[0]),
        ),
        Example("vectors", lambda make: _update(make, make.sizes.vectors, between, decay=0.0), compiled=_FULL),
        Example(
            "weights, 16-bit copy",
            lambda make: _update(make, make.sizes.matrices, between, decay=0.05, copy=make.dtype),
            compiled=BASE_FP16,
        ),
        Example(
            "weights, 16-bit gradients and copy",
            lambda make: _update(make, make.sizes.matrices, between, decay=0.05, grad=make.dtype, copy=make.dtype),
            compiled=halves,
        ),
        Example(
            "weights, nothing else",
            lambda make: _update(make, make.sizes.matrices, between, decay=0.05, follow=False),
            compiled=_FULL,
        ),
        Example(
            "one bias",
            lambda make: _update(make, [(make.sizes.classes,)], between, decay=0.0),
            compiled=[(MANY_CLASSES, torch.float32)],
        ),
    ]


NORM = [
    Example(
        "weights",
        lambda make: [_tensors(make, make.sizes.matrices)],
        compiled=_FULL,
        bytes=lambda args: sum(tensor.nbytes for tensor in args[0]),
    ),
    Example(
        "16-bit weights",
        lambda make: [_tensors(make, make.sizes.matrices, make.dtype)],
        compiled=[(BASE, dtype) for dtype in HALVES],
    ),
]
