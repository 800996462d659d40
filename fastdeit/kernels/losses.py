"""Label and distillation loss of one batch, with label and teacher terms in one op.

    base     "ce"    mean_B of -sum_k q_k log softmax(cls)_k,  q = s/K + (1 - s) (lam 1[y1] + (1 - lam) 1[y2])
             "bce"   mean_BK of softplus(cls) - t * cls,       t = 1 for y1 if lam > 0, for y2 if lam < 1 (DeiT III)
    distill  "hard"  mean_B of -log softmax(dist)[argmax teacher]
             "soft"  tau**2 / D * sum_BK of p_T (log p_T - log q_T),  p_T, q_T = softmax of teacher, dist over tau
                     D = B*K ("numel", facebookresearch/deit losses.py) or B ("batchmean", Hinton et al. 2015)
    total = (1 - alpha) * base + alpha * distill              base alone without distillation

Unit gradients, those of the total, are the following times 1 - alpha and alpha; the backward scales them by dtotal:

    "ce" (softmax(cls) - q) / B                "bce" (sigmoid(cls) - t) / (B*K)
    "hard" (softmax(dist) - 1[argmax]) / B     "soft" tau / D * (q_T - p_T)

Everything is computed in float32 (float64 for float64), whatever the logits' dtype; so are the unit gradients.

Bytes moved at best per class of a head in 16 bit: forward reads 2 (4 with the teacher) and writes 4, backward reads 4
and writes 2. The Triton forward takes a row in chunks of classes: a pass of online softmax (Milakov & Gimelshein,
2018), and one for losses and gradients; where the row is one chunk, it is read once.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels import _checks, _loss, _op, _triton
from fastdeit.kernels._example import BASE, HALVES, MANY_CLASSES, Example, Maker

_BASES = "ce", "bce"
_DISTILLATIONS = "none", "hard", "soft"
_REDUCTIONS = "numel", "batchmean"


class DistillationLoss(NamedTuple):
    """float32 scalars (float64 for float64). Only `total` carries a gradient; `distill` is 0 without distillation."""

    total: Tensor
    base: Tensor
    distill: Tensor


# ---- reference -------------------------------------------------------------------------------------------------------


def _cross_entropy(logits: Tensor, y1: Tensor, y2: Tensor, lam: Tensor, smoothing: float) -> Tensor:
    logp = F.log_softmax(logits, 1)
    fit = lam * _loss.gather(logp, y1) + (1 - lam) * _loss.gather(logp, y2)
    return -((1 - smoothing) * fit + smoothing * logp.mean(1)).mean()


def _binary_cross_entropy(logits: Tensor, y1: Tensor, y2: Tensor, lam: Tensor) -> Tensor:
    first, second = _loss.positives(y1, y2, lam)
    fit = torch.where(first, _loss.gather(logits, y1), 0) + torch.where(second, _loss.gather(logits, y2), 0)
    # logsigmoid, not softplus, which is cut off at 20.
    return -(F.logsigmoid(-logits).sum(1) + fit).mean() / logits.shape[1]


def _soft_divisor(logits: Tensor, reduction: str) -> int:
    return logits.numel() if reduction == "numel" else logits.shape[0]


def _distill(logits: Tensor, teacher: Tensor, distillation: str, tau: float, reduction: str) -> Tensor:
    if distillation == "hard":
        return -_loss.gather(F.log_softmax(logits, 1), teacher.argmax(1)).mean()
    logq = F.log_softmax(logits / tau, 1)
    logp = F.log_softmax(teacher.to(logq.dtype) / tau, 1)
    return F.kl_div(logq, logp, reduction="sum", log_target=True) * (tau * tau / _soft_divisor(logits, reduction))


def native(
    cls: Tensor,
    dist: Tensor | None,
    y1: Tensor,
    y2: Tensor,
    lam: Tensor,
    teacher: Tensor | None,
    smoothing: float,
    base: str,
    distillation: str,
    alpha: float,
    tau: float,
    reduction: str,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, base, distill) as in the module's formulas, for autograd to differentiate."""
    _loss.check_labels(y1, y2, cls.shape[1])
    compute = _op.statistics_dtype(cls.dtype)
    cls, lam = cls.to(compute), lam.to(compute)
    label = _cross_entropy(cls, y1, y2, lam, smoothing) if base == "ce" else _binary_cross_entropy(cls, y1, y2, lam)
    label = label * _loss.soundness(lam)
    if distillation == "none":
        return label, label.clone(), torch.zeros_like(label)
    taught = _distill(dist.to(compute), teacher.detach(), distillation, tau, reduction)
    return (1 - alpha) * label + alpha * taught, label, taught


def reference(
    cls: Tensor,
    dist: Tensor | None,
    y1: Tensor,
    y2: Tensor,
    lam: Tensor,
    teacher: Tensor | None,
    smoothing: float,
    base: str,
    distillation: str,
    alpha: float,
    tau: float,
    reduction: str,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(total, base, distill, unit gradients of cls and of dist). The unit gradients, in the dtype of the losses, are
    for backward; they are empty unless `gradients`, and that of dist is without distillation."""
    losses = native(cls, dist, y1, y2, lam, teacher, smoothing, base, distillation, alpha, tau, reduction, gradients)
    nothing = losses[0].new_empty(0)
    if not gradients:
        return *losses, nothing, nothing.clone()
    compute = _op.statistics_dtype(cls.dtype)
    lam = lam.to(compute)
    dcls = _label_gradient(cls.detach().to(compute), y1, y2, lam, smoothing, base) * _loss.soundness(lam)
    if distillation == "none":
        return *losses, dcls, nothing
    ddist = _distill_gradient(dist.detach().to(compute), teacher, distillation, tau, reduction)
    return *losses, dcls * (1 - alpha), ddist * alpha


def _label_gradient(logits: Tensor, y1: Tensor, y2: Tensor, lam: Tensor, smoothing: float, base: str) -> Tensor:
    if base == "ce":
        gradient = torch.softmax(logits, 1) - smoothing / logits.shape[1]
        shares, divisor = ((1 - smoothing) * lam, (1 - smoothing) * (1 - lam)), logits.shape[0]
    else:
        gradient = torch.sigmoid(logits)
        shares, divisor = _loss.positives(y1, y2, lam), logits.numel()
    for labels, share in zip((y1, y2), shares, strict=True):
        _loss.scatter_subtract_(gradient, labels, share)
    return gradient / divisor


def _distill_gradient(logits: Tensor, teacher: Tensor, distillation: str, tau: float, reduction: str) -> Tensor:
    if distillation == "hard":
        gradient = torch.softmax(logits, 1)
        labels = teacher.argmax(1)[:, None]
        return gradient.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=logits.dtype)) / logits.shape[0]
    q, p = torch.softmax(logits / tau, 1), torch.softmax(teacher.to(logits.dtype) / tau, 1)
    return (q - p) * (tau / _soft_divisor(logits, reduction))


def reference_backward(
    grad: Tensor, dcls: Tensor, ddist: Tensor, cls_dtype: torch.dtype, dist_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients of cls and dist (empty without distillation), in their dtypes, for the gradient of the total."""
    return (grad * dcls).to(cls_dtype), (grad * ddist).to(dist_dtype)


# ---- Triton ----------------------------------------------------------------------------------------------------------


@triton.jit
def _load(row, column, K: tl.constexpr):
    return tl.load(row + column, mask=column < K, other=float("-inf")).to(tl.float32)


@triton.jit
def _centred(z, m, column, K: tl.constexpr):
    """z - m; 0 beyond the last class, where z is -infinity, of which a product with 0 would be NaN."""
    return tl.where(column < K, z - m, 0.0)


@triton.jit
def _exact_difference(row, label, inside, m):
    """logit of the label - m in float64; 0 where the label is not inside."""
    return tl.load(row + label, mask=inside, other=0.0).to(tl.float64) - m


@triton.jit
def _finite_shift(top):
    """A chunk that is all -infinity must not make NaN of the chunks after it."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _softmax_statistics(row, scale, K: tl.constexpr, BLOCK: tl.constexpr):
    """(m, sum of exp(scale * logit - m)) of a row, m the maximum of scale * logit, or 0 where that is -infinity."""
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, K, BLOCK):
        z = _load(row, start + tl.arange(0, BLOCK), K) * scale
        before = top
        top = tl.maximum(top, tl.max(z, 0))
        shift = _finite_shift(top)
        total = total * tl.exp(before - shift) + tl.sum(tl.exp(z - shift), 0)
    return _finite_shift(top), total


@triton.jit
def _argmax(row, K: tl.constexpr, BLOCK: tl.constexpr):
    """The first of the largest, NaN being larger than all: `torch.argmax`."""
    column = tl.arange(0, BLOCK)
    best, at = _load(row, column, K), column
    for start in range(BLOCK, K, BLOCK):
        t = _load(row, start + column, K)
        better = (t > best) | ((t != t) & (best == best))
        best, at = tl.where(better, t, best), tl.where(better, start + column, at)
    nan = best != best
    first_nan = tl.min(tl.where(nan, at, K), 0)
    top = tl.max(tl.where(nan, float("-inf"), best), 0)
    return tl.where(first_nan < K, first_nan, tl.min(tl.where(best == top, at, K), 0))


@triton.jit
def _label_row(
    cls, dcls, y1, y2, lam, inside, smoothing, factor, K: tl.constexpr, BLOCK: tl.constexpr, BINARY: tl.constexpr
):
    """Label loss of one row in float64, before it is divided; its gradient times `factor` into dcls."""
    m, total = 0.0, 1.0
    if not BINARY:
        m, total = _softmax_statistics(cls, 1.0, K, BLOCK)
    terms = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = _load(cls, column, K)
        if BINARY:
            target = _loss.binary_target(column, y1, y2, lam)
            tail, p = _loss.softplus_tail_and_sigmoid(z)
            terms += tl.where(column < K, _loss.binary_cross_entropy(tail, z, target, BINARY), 0.0)
        else:
            target = _loss.soft_target(column, y1, y2, lam, smoothing, K)
            centred = _centred(z, m, column, K)
            p = tl.exp(centred) / total
            terms += centred
        if dcls is not None:
            tl.store(dcls + column, (p - target) * factor, mask=column < K)
    loss = tl.sum(terms, 0).to(tl.float64)
    if not BINARY:
        share = lam.to(tl.float64)
        fit = share * _exact_difference(cls, y1, inside, m) + (1.0 - share) * _exact_difference(cls, y2, inside, m)
        loss = tl.log(total) - ((1.0 - smoothing) * fit + smoothing * (loss / K))
    return loss


@triton.jit
def _taught_row(dist, teacher, ddist, scale, factor, K: tl.constexpr, BLOCK: tl.constexpr, HARD: tl.constexpr):
    """Distillation loss of one row in float64, before it is divided; its gradient times `factor` into ddist."""
    m, total = _softmax_statistics(dist, scale, K, BLOCK)
    if HARD:
        label = _argmax(teacher, K, BLOCK)
    else:
        t_m, t_total = _softmax_statistics(teacher, scale, K, BLOCK)
    terms = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)
        centred = _centred(_load(dist, column, K) * scale, m, column, K)
        if HARD:
            target = tl.where(column == label, 1.0, 0.0)
        else:
            t_centred = _centred(_load(teacher, column, K) * scale, t_m, column, K)
            target = tl.exp(t_centred) / t_total
            divergence = target * ((t_centred - tl.log(t_total)) - (centred - tl.log(total)))
            terms += tl.where(column < K, divergence, 0.0)
        if ddist is not None:
            tl.store(ddist + column, (tl.exp(centred) / total - target) * factor, mask=column < K)
    loss = tl.sum(terms, 0).to(tl.float64)
    if HARD:
        loss = tl.log(total) - _exact_difference(dist, label, label < K, m)
    return loss


@triton.jit
def _forward_kernel(
    cls,
    dist,
    teacher,
    y1,
    y2,
    lam,
    dcls,
    ddist,
    total,
    base,
    distill,
    parts,
    ticket,
    smoothing,
    label_weight,
    label_divisor,
    label_scale,
    taught_weight,
    taught_divisor,
    taught_scale,
    scale,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BINARY: tl.constexpr,
    HARD: tl.constexpr,
):
    """`scale` is 1 / tau, label_scale and taught_scale are those of gradients. parts, float64 `[2, B]`, receives the
    rows' losses before they are divided. What is done once a row is done in float64, at no cost: the loss, one number,
    is then off by little more than its rounding to float32."""
    row, batch = tl.program_id(0), tl.num_programs(0)
    offset = row.to(tl.int64) * K
    first, second, share, inside, sound = _loss.load_targets(y1, y2, lam, row, K)
    unit = None if dcls is None else dcls + offset
    factor = label_scale * sound
    label = _label_row(cls + offset, unit, first, second, share, inside, smoothing, factor, K, BLOCK, BINARY)
    tl.store(parts + row, label * sound)
    if dist is not None:
        unit = None if ddist is None else ddist + offset
        factor = taught_scale * sound
        tl.store(parts + batch + row, _taught_row(dist + offset, teacher + offset, unit, scale, factor, K, BLOCK, HARD))
    if _loss.is_last(ticket):
        label_mean = _loss.sum_of_rows(parts, batch, ROWS) / label_divisor
        taught_mean = tl.full((), 0.0, tl.float64)
        if dist is not None:
            taught_mean = _loss.sum_of_rows(parts + batch, batch, ROWS) / taught_divisor
        tl.store(base, label_mean.to(tl.float32))
        tl.store(distill, taught_mean.to(tl.float32))
        tl.store(total, (label_weight * label_mean + taught_weight * taught_mean).to(tl.float32))


def triton_forward(
    cls: Tensor,
    dist: Tensor | None,
    y1: Tensor,
    y2: Tensor,
    lam: Tensor,
    teacher: Tensor | None,
    smoothing: float,
    base: str,
    distillation: str,
    alpha: float,
    tau: float,
    reduction: str,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`reference` in one launch, but that the row of a label outside [0, K) has NaN for its losses and gradients."""
    _triton.require_dtypes(cls, dist, lam, teacher)
    tensors = [None if tensor is None else tensor.contiguous() for tensor in (cls, dist, teacher, y1, y2, lam)]
    batch, classes = cls.shape
    losses = [torch.empty((), dtype=torch.float32, device=cls.device) for _ in range(3)]
    units = [
        torch.empty_like(tensor, dtype=torch.float32) if gradients and tensor is not None else None
        for tensor in tensors[:2]
    ]
    parts = torch.empty(2, batch, dtype=torch.float64, device=cls.device)
    numbers = smoothing, *_divisors(cls, base, distillation, alpha, tau, reduction)
    tile = {**_loss.tile(classes), "BINARY": base == "bce", "HARD": distillation == "hard"}
    results = *units, *losses, parts, _loss.ticket(cls.device)
    _triton.launch(_forward_kernel, (batch,), *tensors, *results, *numbers, **tile)
    return *losses, *(losses[0].new_empty(0) if unit is None else unit for unit in units)


def _divisors(cls: Tensor, base: str, distillation: str, alpha: float, tau: float, reduction: str) -> tuple[float, ...]:
    """Weight and divisor of the label loss and factor of its gradient, the same of the distillation loss, 1 / tau."""
    batch, numel = cls.shape[0], cls.numel()
    label_weight, taught_weight = (1.0, 0.0) if distillation == "none" else (1 - alpha, alpha)
    label_divisor = float(batch if base == "ce" else numel)
    taught_divisor, scale = float(batch), 1.0
    if distillation == "soft":
        taught_divisor, scale = _soft_divisor(cls, reduction) / tau**2, 1 / tau
    taught_scale = taught_weight / taught_divisor * scale
    label = label_weight, label_divisor, label_weight / label_divisor
    return *label, taught_weight, taught_divisor, taught_scale, scale


def triton_backward(
    grad: Tensor, dcls: Tensor, ddist: Tensor, cls_dtype: torch.dtype, dist_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`reference_backward` in one launch."""
    if ddist.numel() == 0:
        return _loss.scaled(grad, dcls, cls_dtype)[0], ddist.new_empty(0, dtype=dist_dtype)
    return _loss.scaled(grad, dcls, cls_dtype, ddist, dist_dtype)


# ---- registration ----------------------------------------------------------------------------------------------------

_TRITON = _op.Backend("triton", _triton.capability, triton_forward, triton_backward)


def _example(
    make: Maker,
    base: str = "ce",
    distillation: str = "none",
    smoothing: float = 0.0,
    tau: float = 3.0,
    reduction: str = "numel",
) -> list[Any]:
    distilled = distillation != "none"
    cls, dist = make.logits(), make.logits() if distilled else None
    teacher = make.logits(grad=False) if distilled else None
    return [cls, dist, *make.targets(), teacher, smoothing, base, distillation, 0.3, tau, reduction, True]


_HALVES = [(BASE, dtype) for dtype in HALVES]
_EXAMPLES = [
    Example(
        "hard",
        partial(_example, distillation="hard", smoothing=0.1),
        compiled=_HALVES,
        bytes=lambda args: args[0].numel() * (5 * args[0].itemsize + 16),
    ),
    Example("none", partial(_example, smoothing=0.1), compiled=_HALVES),
    Example("bce", partial(_example, base="bce")),
    Example(
        "soft",
        partial(_example, distillation="soft"),
        compiled=[*_HALVES, (MANY_CLASSES, torch.float16)],
    ),
    Example("soft batchmean", partial(_example, distillation="soft", reduction="batchmean")),
    Example("bce soft", partial(_example, base="bce", distillation="soft")),
]
OP = _op.Op("distillation_loss", reference, reference_backward, examples=_EXAMPLES, others=[_TRITON], native=native)


@OP.registered.register_fake
def _(cls, dist, *others):
    *_, gradients = others
    compute = _op.statistics_dtype(cls.dtype)
    losses = (cls.new_empty((), dtype=compute) for _ in DistillationLoss._fields)
    units = (cls.new_empty(0 if not gradients or x is None else x.shape, dtype=compute) for x in (cls, dist))
    return *losses, *units


@OP.registered_backward.register_fake
def _(grad, dcls, ddist, cls_dtype, dist_dtype):
    return dcls.new_empty(dcls.shape, dtype=cls_dtype), ddist.new_empty(ddist.shape, dtype=dist_dtype)


def _save(ctx, inputs, output):
    cls, dist, *_ = inputs
    *_, dcls, ddist = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(dcls, ddist)
    ctx.dtypes = [cls.dtype, cls.dtype if dist is None else dist.dtype]
    ctx.one_head = dist is None


def _differentiate(ctx, grad, *_):
    dcls, ddist = OP.run_backward(ctx, grad, *ctx.saved_tensors, *ctx.dtypes)
    return dcls, None if ctx.one_head else ddist, *[None] * 11


OP.differentiable(_save, _differentiate)


# ---- public ----------------------------------------------------------------------------------------------------------


def distillation_loss(
    cls: Tensor,
    dist: Tensor | None,
    targets: tuple[Tensor, Tensor, Tensor],
    teacher: Tensor | None = None,
    *,
    smoothing: float = 0.0,
    base: str = "ce",
    distillation: str = "none",
    alpha: float = 0.5,
    tau: float = 1.0,
    reduction: str = "numel",
) -> DistillationLoss:
    """Loss of the label and, with a teacher, of distillation (Touvron et al. 2021, section 4).

    `total` is to be trained on. `base` and `distill` are for the log: they carry no gradient.

    cls, dist     floating logits `[B, K]` of the class and the distillation head. Without a distillation head ("usual
                  distillation") pass `dist=cls`; without distillation, `dist=None`
    targets       (y1, y2, lam): int64 `[B]` twice and floating `[B]` in [0, 1], for
                  lam * onehot(y1) + (1 - lam) * onehot(y2)
    teacher       logits `[B, K]`, of which no gradient is taken; None without distillation
    smoothing     label smoothing in [0, 1), of "ce" only
    base          "ce", or "bce" against binarised targets (DeiT III)
    distillation  "none", "hard" (unsmoothed cross-entropy with the teacher's argmax) or "soft" (tau**2 * KL)
    alpha         weight of distillation, in [0, 1]: total = (1 - alpha) * base + alpha * distill
    tau           temperature of "soft", above 0
    reduction     of "soft": "numel" divides by B*K, as the public DeiT code does; "batchmean" by B

    Labels outside [0, K) raise IndexError on the CPU, RuntimeError in a compiled graph there. On a GPU nothing is read
    out of bounds: the loss is NaN, and so are the gradients of that row; the reference's gather asserts on the device
    instead. So it is for a lam outside [0, 1], which raises ValueError on the CPU, except that the reference's loss and
    gradients are NaN.
    """
    _check_settings(smoothing, base, distillation, alpha, tau, reduction)
    _check_tensors(cls, dist, targets, teacher, distillation)
    settings = smoothing, base, distillation, alpha, tau, reduction
    total, label, taught, *_ = OP(cls, dist, *targets, teacher, *settings, _loss.wants_gradients(cls, dist))
    return DistillationLoss(total, label.detach(), taught.detach())


def _check_settings(smoothing: float, base: str, distillation: str, alpha: float, tau: float, reduction: str) -> None:
    _checks.check_choice("base", base, _BASES)
    _checks.check_choice("distillation", distillation, _DISTILLATIONS)
    _checks.check_choice("reduction", reduction, _REDUCTIONS)
    _loss.check_smoothing(smoothing, base == "bce", "base 'bce'")
    _checks.check_number("alpha", alpha, 0, 1)
    _checks.check_positive("tau", tau)


def _check_tensors(
    cls: Tensor,
    dist: Tensor | None,
    targets: tuple[Tensor, Tensor, Tensor],
    teacher: Tensor | None,
    distillation: str,
) -> None:
    _loss.check_logits("cls", cls, "[B, K]")
    for name, tensor in (("dist", dist), ("teacher", teacher)):
        if distillation == "none" and tensor is not None:
            raise ValueError(f"{name} is given, but distillation is 'none': pass None, or choose 'hard' or 'soft'")
        if distillation != "none":
            if tensor is None:
                hint = "; without a distillation head pass dist=cls" if name == "dist" else ""
                raise ValueError(f"{name} is None, but distillation {distillation!r} needs logits [B, K]{hint}")
            _checks.check_floating(name, tensor)
            _checks.check_shape(name, tensor, cls.shape, "[B, K] like cls")
            _checks.check_device(name, tensor, cls, "cls")
    _loss.check_targets(targets, len(cls), "[B], B of cls,", cls, "cls")
