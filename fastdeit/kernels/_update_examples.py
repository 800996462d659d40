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


def _adam(make: Maker) -> list[Any]:
    """Count of updates, learning rate, betas and eps. The learning rate is so small that thousands of measured updates
    change little."""
    return [make.scalar(0.0), make.scalar(1e-9), 0.9, 0.999, 1e-8]


def _sgd(make: Maker) -> list[Any]:
    """Learning rate, momentum, whether it is Nesterov's, whether the decay is decoupled."""
    return [make.scalar(1e-9), 0.9, True, False]


_NUMBERS = {2: _adam, 1: _sgd}
"""What stands between the lists and the weight decay, by how many lists of state the op takes."""


def _update(
    make: Maker,
    shapes: Shapes,
    states: int,
    *,
    decay: float,
    grad: torch.dtype | None = None,
    follow: bool = True,
    copy: torch.dtype | None = None,
) -> list[Any]:
    """Arguments of an update: with an average of the parameters and guards unless not `follow`, and with a copy of the
    parameters in the dtype `copy`."""
    lists = [_tensors(make, shapes, dtype) for dtype in (None, grad, *[None] * states)]
    guards = (make.scalar(1.0), make.scalar(0.0)) if follow else (None, None)
    ema = _tensors(make, shapes) if follow else []
    copies = [] if copy is None else _tensors(make, shapes, copy)
    return [*lists, *_NUMBERS[states](make), decay, *guards, ema, 0.9999, copies]


def updates(states: int, bytes_of_a_parameter: int) -> list[Example]:
    """Examples of `op(params, grads, *lists of state, *numbers, weight_decay, grad_scale, found_inf, ema, ema_decay,
    copies)`, which moves so many bytes for a parameter that has an average."""
    halves = [(BASE, dtype) for dtype in HALVES]
    return [
        Example(
            "weights",
            lambda make: _update(make, make.sizes.matrices, states, decay=0.05),
            compiled=_FULL,
            bytes=lambda args: bytes_of_a_parameter * sum(p.numel() for p in args[0]),
        ),
        Example("vectors", lambda make: _update(make, make.sizes.vectors, states, decay=0.0), compiled=_FULL),
        Example(
            "weights, 16-bit copy",
            lambda make: _update(make, make.sizes.matrices, states, decay=0.05, copy=make.dtype),
            compiled=BASE_FP16,
        ),
        Example(
            "weights, 16-bit gradients and copy",
            lambda make: _update(make, make.sizes.matrices, states, decay=0.05, grad=make.dtype, copy=make.dtype),
            compiled=halves,
        ),
        Example(
            "weights, nothing else",
            lambda make: _update(make, make.sizes.matrices, states, decay=0.05, follow=False),
            compiled=_FULL,
        ),
        Example(
            "one bias",
            lambda make: _update(make, [(make.sizes.classes,)], states, decay=0.0),
            compiled=[(MANY_CLASSES, torch.float32)],
        ),
    ]


def _decoupled(make: Maker) -> list[Any]:
    args = _update(make, make.sizes.matrices, 1, decay=0.05)
    args[5:7] = [False, True]
    return args


DECOUPLED_SGD = Example("weights, decoupled decay, not Nesterov's", _decoupled, compiled=_FULL)

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
