"""Loss of co-training two submodels (Touvron et al., "Co-training 2^L Submodels for Visual Recognition", 2022).

The batch goes twice through one model, whose stochastic depth makes two submodels of it. Each learns the label, and the
other's prediction, which is held constant (sg). With logits `[2B, K]`, a its first and b its second half:

    L = 1/4 [BCE(a, t) + BCE(b, t) + BCE(a, sg sigmoid(b)) + BCE(b, sg sigmoid(a))]
    BCE(z, t) = mean_BK of softplus(z) - t * z
    t = s/K + (1 - s) (lam 1[y1] + (1 - lam) 1[y2]),  or binarised 1 for y1 if lam > 0, for y2 if lam < 1

Unit gradient, that of L, which the backward scales by the incoming one:

    da = (2 sigmoid(a) - t - sigmoid(b)) / (4 B K)        db = (2 sigmoid(b) - t - sigmoid(a)) / (4 B K)

Everything is computed in float32 (float64 for float64), whatever the logits' dtype; so is the unit gradient. Bytes
moved at best per logit in 16 bit: forward reads 2 and writes 4, backward reads 4 and writes 2.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels import _loss, _op, _triton
from fastdeit.kernels._example import BASE, HALVES, MANY_CLASSES, Example, Maker

# ---- reference -------------------------------------------------------------------------------------------------------


def _fit(z: Tensor, y1: Tensor, y2: Tensor, lam: Tensor, smoothing: float, binarise: bool) -> Tensor:
    """sum_k t_k z_k of every row."""
    z1, z2 = _loss.gather(z, y1), _loss.gather(z, y2)
    if binarise:
        first, second = _loss.positives(y1, y2, lam)
        return torch.where(first, z1, 0) + torch.where(second, z2, 0)
    return (1 - smoothing) * (lam * z1 + (1 - lam) * z2) + smoothing * z.mean(1)


def _half(z: Tensor, other: Tensor, *targets: Tensor | float | bool) -> Tensor:
    """Sum of BCE of one half with the targets and with the other half."""
    # logsigmoid, not softplus, which is cut off at 20.
    label = -F.logsigmoid(-z).sum() - _fit(z, *targets).sum()
    return label + F.binary_cross_entropy_with_logits(z, torch.sigmoid(other).detach(), reduction="sum")


def native(
    logits: Tensor, y1: Tensor, y2: Tensor, lam: Tensor, smoothing: float, binarise: bool, gradients: bool
) -> tuple[Tensor]:
    """(L,) as in the module's formula, for autograd to differentiate."""
    _loss.check_labels(y1, y2, logits.shape[1])
    compute = _op.statistics_dtype(logits.dtype)
    a, b = logits.to(compute).chunk(2)
    targets = y1, y2, lam.to(compute), smoothing, binarise
    loss = (_half(a, b, *targets) + _half(b, a, *targets)) / (2 * logits.numel())
    return (loss * _loss.soundness(targets[2]),)


def reference(
    logits: Tensor, y1: Tensor, y2: Tensor, lam: Tensor, smoothing: float, binarise: bool, gradients: bool
) -> tuple[Tensor, Tensor]:
    """(L, unit gradient of the logits). The unit gradient, in the dtype of L, is for backward; it is empty unless
    `gradients`."""
    (loss,) = native(logits, y1, y2, lam, smoothing, binarise, gradients)
    if not gradients:
        return loss, loss.new_empty(0)
    # One half at a time: the CPU's sigmoid rounds by the place of an element, and equal halves must be equal.
    p, q = (torch.sigmoid(half) for half in logits.detach().to(loss.dtype).chunk(2))
    p, other, lam = torch.cat((p, q)), torch.cat((q, p)), lam.to(loss.dtype)
    shares = _loss.positives(y1, y2, lam) if binarise else ((1 - smoothing) * lam, (1 - smoothing) * (1 - lam))
    from_label = p - smoothing / logits.shape[1]
    for labels, share in zip((y1, y2), shares, strict=True):
        _loss.scatter_subtract_(from_label, labels.repeat(2), share.repeat(2))
    # The second term is exactly 0 where the halves are equal.
    return loss, (from_label + (p - other)) / (2 * logits.numel()) * _loss.soundness(lam)


def reference_backward(grad: Tensor, unit: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of the logits in their dtype, for the gradient of L."""
    return (grad * unit).to(dtype)


# ---- Triton ----------------------------------------------------------------------------------------------------------


@triton.jit
def _load(row, column, K: tl.constexpr):
    return tl.load(row + column, mask=column < K, other=0.0).to(tl.float32)


@triton.jit
def _soft_cross_entropy(tail, z, p):
    """`_loss.binary_cross_entropy` as PyTorch forms it, infinite or NaN for the same infinite logits."""
    return ((1.0 - p) * z + tl.maximum(-z, 0.0)) + tail


@triton.jit
def _forward_kernel(
    logits,
    y1,
    y2,
    lam,
    unit,
    loss,
    parts,
    ticket,
    smoothing,
    divisor,
    factor,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BINARY: tl.constexpr,
):
    """`divisor` is that of L, `factor` that of the gradient. parts, float64 `[B]`, receives the rows' losses."""
    row, batch = tl.program_id(0), tl.num_programs(0)
    at_a, at_b = row.to(tl.int64) * K, (row + batch).to(tl.int64) * K
    first, second, share, _, sound = _loss.load_targets(y1, y2, lam, row, K)
    terms = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)
        a, b = _load(logits + at_a, column, K), _load(logits + at_b, column, K)
        if BINARY:
            target = _loss.binary_target(column, first, second, share)
        else:
            target = _loss.soft_target(column, first, second, share, smoothing, K)
        a_tail, p = _loss.softplus_tail_and_sigmoid(a)
        b_tail, q = _loss.softplus_tail_and_sigmoid(b)
        from_a = _loss.binary_cross_entropy(a_tail, a, target, BINARY) + _soft_cross_entropy(a_tail, a, q)
        from_b = _loss.binary_cross_entropy(b_tail, b, target, BINARY) + _soft_cross_entropy(b_tail, b, p)
        terms += tl.where(column < K, from_a + from_b, 0.0)
        if unit is not None:
            scale = factor * sound
            tl.store(unit + at_a + column, ((p - target) + (p - q)) * scale, mask=column < K)
            tl.store(unit + at_b + column, ((q - target) + (q - p)) * scale, mask=column < K)
    tl.store(parts + row, tl.sum(terms, 0).to(tl.float64) * sound)
    if _loss.is_last(ticket):
        tl.store(loss, (_loss.sum_of_rows(parts, batch, ROWS) / divisor).to(tl.float32))


def triton_forward(
    logits: Tensor, y1: Tensor, y2: Tensor, lam: Tensor, smoothing: float, binarise: bool, gradients: bool
) -> tuple[Tensor, Tensor]:
    """`reference` in one launch, but that the rows of a label outside [0, K) have NaN for their loss and gradients."""
    _triton.require_dtypes(logits, lam)
    tensors = [tensor.contiguous() for tensor in (logits, y1, y2, lam)]
    batch, classes = len(y1), logits.shape[1]
    unit = torch.empty_like(tensors[0], dtype=torch.float32) if gradients else None
    loss = torch.empty((), dtype=torch.float32, device=logits.device)
    parts = torch.empty(batch, dtype=torch.float64, device=logits.device)
    divisor = 4.0 * batch * classes
    tensors += [unit, loss, parts, _loss.ticket(logits.device)]
    tile = {**_loss.tile(classes), "BINARY": binarise}
    _triton.launch(_forward_kernel, (batch,), *tensors, smoothing, divisor, 1 / divisor, **tile)
    return loss, loss.new_empty(0) if unit is None else unit


def triton_backward(grad: Tensor, unit: Tensor, dtype: torch.dtype) -> Tensor:
    """`reference_backward` in one launch."""
    return _loss.scaled(grad, unit, dtype)[0]


# ---- registration ----------------------------------------------------------------------------------------------------

_TRITON = _op.Backend("triton", _triton.capability, triton_forward, triton_backward)


def _example(make: Maker, smoothing: float, binarise: bool) -> list[Any]:
    return [make.logits(copies=2), *make.targets(), smoothing, binarise, True]


_EXAMPLES = [
    Example(
        "",
        partial(_example, smoothing=0.1, binarise=False),
        compiled=[(BASE, dtype) for dtype in HALVES],
        bytes=lambda args: args[0].numel() * (2 * args[0].itemsize + 8),
    ),
    Example("binarised", partial(_example, smoothing=0.0, binarise=True), compiled=[(MANY_CLASSES, torch.float16)]),
]
OP = _op.Op("cosub_loss", reference, reference_backward, examples=_EXAMPLES, others=[_TRITON], native=native)


@OP.registered.register_fake
def _(logits, y1, y2, lam, smoothing, binarise, gradients):
    compute = _op.statistics_dtype(logits.dtype)
    return logits.new_empty((), dtype=compute), logits.new_empty(logits.shape if gradients else 0, dtype=compute)


@OP.registered_backward.register_fake
def _(grad, unit, dtype):
    return unit.new_empty(unit.shape, dtype=dtype)


def _save(ctx, inputs, output):
    _, unit = output
    ctx.mark_non_differentiable(unit)
    ctx.save_for_backward(unit)
    ctx.dtype = inputs[0].dtype


def _differentiate(ctx, grad, _):
    return OP.run_backward(ctx, grad, *ctx.saved_tensors, ctx.dtype), *[None] * 6


OP.differentiable(_save, _differentiate)


# ---- public ----------------------------------------------------------------------------------------------------------


def cosub_loss(
    logits: Tensor,
    targets: tuple[Tensor, Tensor, Tensor],
    *,
    smoothing: float = 0.0,
    binarise: bool = False,
) -> Tensor:
    """Co-training loss of two submodels (Touvron et al. 2022), as facebookresearch/deit computes it for `--cosub`.

    logits     floating `[2B, K]`: those of the batch by one submodel, then those of the same batch by the other
    targets    (y1, y2, lam): int64 `[B]` twice and floating `[B]` in [0, 1], for
               lam * onehot(y1) + (1 - lam) * onehot(y2)
    smoothing  label smoothing in [0, 1)
    binarise   whether labels with any share count in full, as with `--bce-loss` there

    Returns L, a float32 scalar (float64 for float64). Labels outside [0, K) raise IndexError on the CPU, RuntimeError
    in a compiled graph there. On a GPU nothing is read out of bounds: the loss is NaN, and so are the gradients of that
    sample; the reference's gather asserts on the device instead. So it is for a lam outside [0, 1], which raises
    ValueError on the CPU, except that the reference's loss and gradients are NaN.
    """
    _loss.check_smoothing(smoothing, binarise, "binarise")
    _loss.check_logits("logits", logits, "[2B, K]")
    if len(logits) % 2:
        raise ValueError(f"logits has {len(logits)} rows, but must have an even number: the batch by two submodels")
    _loss.check_targets(targets, len(logits) // 2, "[B], half the rows of logits,", logits, "logits")
    return OP(logits, *targets, smoothing, binarise, _loss.wants_gradients(logits))[0]
