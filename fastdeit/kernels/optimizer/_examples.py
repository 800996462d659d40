"""Examples of the ops that update many tensors, and of their norm: the parameters of a DeiT."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdeit.kernels._example import BASE, HALVES, MANY_CLASSES, Example, Maker, Sizes

_FULL = ((BASE, torch.float32),)
_HALVES = [(BASE, dtype) for dtype in HALVES]
Shapes = Sequence[tuple[int, ...]]


def _tensors(make: Maker, shapes: Shapes, dtype: torch.dtype | None = None) -> list[Tensor]:
    """One tensor of each shape, float32 (float64 where all is) unless another dtype is given; none is negative, since
    second moments are not."""
    return [torch.rand(shape, device=make.device).to(dtype or make.full) for shape in shapes]


def adam_numbers(make: Maker) -> list[Any]:
    """step, lr, beta1, beta2 and eps. With this lr, thousands of measured updates change little."""
    return [make.scalar(0.0), make.scalar(1e-9), 0.9, 0.999, 1e-8]


def sgd_numbers(make: Maker) -> list[Any]:
    """lr, momentum, whether it is Nesterov's, whether the decay is decoupled."""
    return [make.scalar(1e-9), 0.9, True, False]


def decoupled_sgd_numbers(make: Maker) -> list[Any]:
    """As `sgd_numbers`: plain momentum, decoupled decay."""
    return [make.scalar(1e-9), 0.9, False, True]


def updates(numbers: Callable[[Maker], list[Any]], *, states: int, bytes_of_a_parameter: int) -> list[Example]:
    """Examples of `op(params, grads, *state lists, *numbers, weight_decay, grad_scale, found_inf, ema, ema_decay,
    copies)`, which moves so many bytes for each parameter that has an average."""

    def update(
        make: Maker,
        shapes: Callable[[Sizes], Shapes] = lambda sizes: sizes.matrices,
        decay: float = 0.05,
        grad: bool = False,
        follow: bool = True,
        copy: bool = False,
    ) -> list[Any]:
        """grad, copy: whether there are gradients, and copies of the parameters, in the dtype of the example; follow:
        whether there are guards and an average."""
        chosen = shapes(make.sizes)
        dtypes = None, make.dtype if grad else None, *[None] * states
        lists = [_tensors(make, chosen, dtype) for dtype in dtypes]
        guards = (make.scalar(1.0), make.scalar(0.0)) if follow else (None, None)
        ema = _tensors(make, chosen) if follow else []
        copies = _tensors(make, chosen, make.dtype) if copy else []
        return [*lists, *numbers(make), decay, *guards, ema, 0.9999, copies]

    return [
        Example(
            "weights",
            update,
            compiled=_FULL,
            bytes=lambda args: bytes_of_a_parameter * sum(p.numel() for p in args[0]),
        ),
        Example("vectors", partial(update, shapes=lambda sizes: sizes.vectors, decay=0.0), compiled=_FULL),
        Example("weights, 16-bit copy", partial(update, copy=True)),
        Example("weights, 16-bit gradients and copy", partial(update, grad=True, copy=True), compiled=_HALVES),
        Example("weights, nothing else", partial(update, follow=False), compiled=_FULL),
        Example(
            "one bias",
            partial(update, shapes=lambda sizes: [(sizes.classes,)], decay=0.0),
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
        compiled=_HALVES,
    ),
]
