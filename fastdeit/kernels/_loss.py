"""What all losses share: targets as two labels and a weight, the sum over the batch, and the backward.

A loss is one launch forward and one backward. Forward, a program takes one row, stores its loss, and the last program
to finish adds up all rows in a fixed order, so that every run has the same bits. It also writes the unit gradients,
those of the loss itself, in float32: (p - q) / B is subnormal in fp16. Backward multiplies them by the incoming
gradient, loss scale included, before they are rounded to the dtype of the logits.

Targets are (y1, y2, lam): lam * onehot(y1) + (1 - lam) * onehot(y2), of which nothing `[B, K]` ever exists.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels import _checks, _triton

# ---- reference -------------------------------------------------------------------------------------------------------


def gather(values: Tensor, index: Tensor) -> Tensor:
    """values[b, index[b]], `[B]`."""
    return values.gather(1, index[:, None]).squeeze(1)


def scatter_subtract_(values: Tensor, index: Tensor, amount: Tensor) -> None:
    """values[b, index[b]] -= amount[b]."""
    values.scatter_add_(1, index[:, None], -amount.to(values.dtype)[:, None])


def positives(y1: Tensor, y2: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """Which of y1, y2 are positive labels; of two equal ones only the first, so that none counts twice."""
    first = lam > 0
    return first, (lam < 1) & ~(first & (y1 == y2))


def soundness(lam: Tensor) -> Tensor:
    """1 where every share is in [0, 1], else NaN, a scalar of lam's dtype: the factor of a loss. A share that is NaN
    counts for no label where targets are binary, so that the loss would be finite, and wrong."""
    return torch.where((lam >= 0) & (lam <= 1), 1.0, torch.nan).to(lam.dtype).mean()


def check_labels(y1: Tensor, y2: Tensor, classes: int) -> None:
    """IndexError for CPU labels outside [0, classes)."""
    for name, labels in (("y1", y1), ("y2", y2)):
        _checks.check_index(f"targets: {name}", labels, classes)


# ---- Triton: targets and terms ---------------------------------------------------------------------------------------

_WIDEST = 4096
"""Most classes at a time: 16 warps. A whole row of 21,841 classes would spill kilobytes."""
_WARP = 256
"""Elements of each tensor that a warp holds: 8 in a thread, 128 bits of 16-bit logits."""
_ELEMENTS = 1024
"""Elements of a program of the backward, and rows that are added up at a time."""


@triton.jit
def load_targets(y1, y2, lam, row, K: tl.constexpr):
    """(y1, y2, lam, inside, sound) of a row: whether both labels are in [0, K), and 1 if they are and lam is in [0, 1],
    else NaN."""
    first, second = tl.load(y1 + row), tl.load(y2 + row)
    inside = (first >= 0) & (first < K) & (second >= 0) & (second < K)
    share = tl.load(lam + row).to(tl.float32)
    sound = tl.where(inside & (share >= 0.0) & (share <= 1.0), 1.0, float("nan"))
    return first.to(tl.int32), second.to(tl.int32), share, inside, sound


@triton.jit
def soft_target(column, y1, y2, lam, smoothing, K: tl.constexpr):
    """Smoothed target of every class of `column`."""
    mixed = tl.where(column == y1, lam, 0.0) + tl.where(column == y2, 1.0 - lam, 0.0)
    return smoothing / K + (1.0 - smoothing) * mixed


@triton.jit
def binary_target(column, y1, y2, lam):
    """1 for the labels that have a share, 0 for all other classes."""
    first, second = tl.where(lam > 0.0, 1.0, 0.0), tl.where(lam < 1.0, 1.0, 0.0)
    return tl.maximum(tl.where(column == y1, first, 0.0), tl.where(column == y2, second, 0.0))


@triton.jit
def softplus_tail_and_sigmoid(z):
    """(tail, sigmoid(z)) where softplus(z) = max(z, 0) + tail, both to a few units in the last place. The tail,
    log(1 + exp(-|z|)), is 2 artanh(e / (2 + e)) of an argument of at most 1/3: seven terms give float32's precision."""
    e = tl.exp(-tl.abs(z))
    w = e / (2.0 + e)
    u = w * w
    series = 1.0 + u * (1 / 3 + u * (1 / 5 + u * (1 / 7 + u * (1 / 9 + u * (1 / 11 + u * (1 / 13))))))
    return 2.0 * w * series, tl.where(z >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def binary_cross_entropy(tail, z, target, BINARY: tl.constexpr):
    """softplus(z) - target * z; a target that is 0 or 1 selects, because 0 times infinity would be NaN."""
    fit = tl.where(target > 0.0, z, 0.0) if BINARY else target * z
    return (tl.maximum(z, 0.0) - fit) + tail


def tile(classes: int) -> dict[str, int]:
    """Classes of a row and how many of them at a time, rows that are added up at a time, and warps."""
    block = min(_WIDEST, max(16, _triton.power_of_two(classes)))
    return {"K": classes, "BLOCK": block, "ROWS": _ELEMENTS, "warps": max(4, block // _WARP)}


# ---- Triton: the sum over the batch ----------------------------------------------------------------------------------


@triton.jit
def is_last(ticket):
    """Whether all other programs of the launch, a grid of one dimension, have come here before; their stores are then
    visible. Every program but one adds 1 to the ticket, that one the negative of the sum of the others: the ticket is
    0 again after the last, and never between the first and the last."""
    tl.debug_barrier()
    share = tl.where(tl.program_id(0) == 0, 1 - tl.num_programs(0), 1)
    return tl.atomic_add(ticket, share, sem="acq_rel") + share == 0


@triton.jit
def sum_of_rows(parts, rows, ROWS: tl.constexpr):
    """Sum of float64 `[rows]` in an order that depends on nothing else."""
    total = tl.zeros((ROWS,), tl.float64)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        total += tl.load(parts + row, mask=row < rows, other=0.0)
    return tl.sum(total, 0)


def ticket(device: torch.device) -> Tensor:
    """An int32 0 on `device` for one launch, for `is_last`. It is made anew each time, a launch of a microsecond or
    two: one that was kept could be allocated in the memory pool of a CUDA graph, where others would write to it, or be
    used by two streams, or by two graphs, at once."""
    return torch.zeros(1, dtype=torch.int32, device=device)


# ---- Triton: backward ------------------------------------------------------------------------------------------------


@triton.jit
def _scale_kernel(grad, first_unit, second_unit, first, second, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = at < count
    factor = tl.load(grad)
    tl.store(first + at, (tl.load(first_unit + at, mask=real) * factor).to(first.dtype.element_ty), mask=real)
    if second is not None:
        tl.store(second + at, (tl.load(second_unit + at, mask=real) * factor).to(second.dtype.element_ty), mask=real)


def scaled(
    grad: Tensor,
    first_unit: Tensor,
    first_dtype: torch.dtype,
    second_unit: Tensor | None = None,
    second_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """grad * unit in the dtype given, of one or two contiguous float32 tensors of one size, in one launch."""
    _triton.require_dtypes(grad, first_unit)
    first = torch.empty_like(first_unit, dtype=first_dtype)
    second = None if second_unit is None else torch.empty_like(second_unit, dtype=second_dtype)
    count = first.numel()
    tensors = grad, first_unit, second_unit, first, second
    _triton.launch(
        _scale_kernel, (_triton.cdiv(count, _ELEMENTS),), *tensors, count, BLOCK=_ELEMENTS, warps=_ELEMENTS // _WARP
    )
    return first, second


# ---- public functions ------------------------------------------------------------------------------------------------


def wants_gradients(*logits: Tensor | None) -> bool:
    """Whether a backward may follow, so that the forward has to write unit gradients."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in logits)


def check_smoothing(smoothing: float, binary: bool, setting: str) -> None:
    """ValueError for a smoothing outside [0, 1), or above 0 where `setting` makes targets binary."""
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing is {smoothing}, but must be in [0, 1)")
    if binary and smoothing > 0:
        raise ValueError(
            f"smoothing is {smoothing}, but must be 0 with {setting}: a smoothed target is above 0 for every class, so "
            "that binarising it would make every class positive"
        )


def check_logits(name: str, logits: Tensor, shape: str) -> None:
    """TypeError or ValueError unless `logits` are floating, of two dimensions and not empty."""
    _checks.check_floating(name, logits)
    if logits.dim() != 2 or 0 in logits.shape:
        raise ValueError(f"{name} has shape {list(logits.shape)}, but must be {shape} and not empty")


def check_targets(targets: tuple[Tensor, Tensor, Tensor], batch: int, meaning: str, logits: Tensor, name: str) -> None:
    """Shapes, dtypes and device of (y1, y2, lam) for the `logits` of that name, and whether lam is in [0, 1] where that
    can be looked at; `meaning` says what `[B]` is."""
    for target, tensor in zip(("y1", "y2", "lam"), targets, strict=True):
        _checks.check_shape(f"targets: {target}", tensor, (batch,), meaning)
        _checks.check_device(f"targets: {target}", tensor, logits, name)
        if target != "lam":
            _checks.check_dtype(f"targets: {target}", tensor, torch.int64)
    lam = targets[2]
    _checks.check_floating("targets: lam", lam)
    if _checks.can_look_at(lam):
        for value in lam.aminmax():  # both are NaN where any is
            _checks.check_number("targets: lam", value.item(), 0, 1)
