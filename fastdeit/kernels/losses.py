"""Label and distillation loss of one batch, with label and teacher terms in one op.

    base     "ce"    mean_B of -sum_k q_k log softmax(cls)_k,  q = s/K + (1 - s) (lam 1[y1] + (1 - lam) 1[y2])
             "bce"   mean_BK of softplus(cls) - t * cls,       t = 1 for y1 if lam > 0, for y2 if lam < 1 (DeiT III)
    distill  "hard"  mean_B of -log softmax(dist)[argmax teacher]
             "soft"  tau**2 / D * sum_BK of p_T (log p_T - log q_T),  p_T, q_T = softmax of teacher, dist over tau
                     D = B*K ("numel", facebookresearch/deit losses.py) or B ("batchmean", Hinton et al. 2015)
    total = (1 - alpha) * base + alpha * distill              base alone without distillation

Gradients of the means, times dtotal and the weights above:

    "ce" (softmax(cls) - q) / B                "bce" (sigmoid(cls) - t) / (B*K)
    "hard" (softmax(dist) - 1[argmax]) / B     "soft" tau / D * (q_T - p_T)

Everything is computed in float32 (float64 for float64), whatever the logits' dtype: (p - q) / B is subnormal in fp16.
Targets are gathered and scattered by label; a one-hot `[B, K]` never exists. Bytes moved at best: cls, dist and teacher
read once, gradients written once.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdeit.kernels import _op

_BASES = "ce", "bce"
_DISTILLATIONS = "none", "hard", "soft"
_REDUCTIONS = "numel", "batchmean"


class DistillationLoss(NamedTuple):
    """float32 scalars (float64 for float64). Only `total` carries a gradient; `distill` is 0 without distillation."""

    total: Tensor
    base: Tensor
    distill: Tensor


def _gather(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(1, index[:, None]).squeeze(1)


def _cross_entropy(logits: Tensor, y1: Tensor, y2: Tensor, lam: Tensor, smoothing: float) -> Tensor:
    logp = F.log_softmax(logits, 1)
    fit = lam * _gather(logp, y1) + (1 - lam) * _gather(logp, y2)
    return -((1 - smoothing) * fit + smoothing * logp.mean(1)).mean()


def _positives(y1: Tensor, y2: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """Which of y1, y2 are positive labels; of two equal ones only the first, so that none counts twice."""
    first = lam > 0
    return first, (lam < 1) & ~(first & (y1 == y2))


def _binary_cross_entropy(logits: Tensor, y1: Tensor, y2: Tensor, lam: Tensor) -> Tensor:
    first, second = _positives(y1, y2, lam)
    fit = torch.where(first, _gather(logits, y1), 0) + torch.where(second, _gather(logits, y2), 0)
    # logsigmoid, not softplus, which is cut off at 20.
    return -(F.logsigmoid(-logits).sum(1) + fit).mean() / logits.shape[1]


def _soft_divisor(logits: Tensor, reduction: str) -> int:
    return logits.numel() if reduction == "numel" else logits.shape[0]


def _distill(logits: Tensor, teacher: Tensor, distillation: str, tau: float, reduction: str) -> Tensor:
    if distillation == "hard":
        return -_gather(F.log_softmax(logits, 1), teacher.argmax(1)).mean()
    logq = F.log_softmax(logits / tau, 1)
    logp = F.log_softmax(teacher.to(logq.dtype) / tau, 1)
    return F.kl_div(logq, logp, reduction="sum", log_target=True) * (tau * tau / _soft_divisor(logits, reduction))


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
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, base, distill) as in the module's formulas."""
    for name, labels in (("y1", y1), ("y2", y2)):
        _op.check_index(f"targets: {name}", labels, cls.shape[1])
    compute = _op.statistics_dtype(cls.dtype)
    cls, lam = cls.to(compute), lam.to(compute)
    label = _cross_entropy(cls, y1, y2, lam, smoothing) if base == "ce" else _binary_cross_entropy(cls, y1, y2, lam)
    if distillation == "none":
        return label, label.clone(), torch.zeros_like(label)
    taught = _distill(dist.to(compute), teacher.detach(), distillation, tau, reduction)
    return (1 - alpha) * label + alpha * taught, label, taught


def reference_backward(
    grad: Tensor,
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
) -> tuple[Tensor, Tensor]:
    """Gradients of cls and dist (empty without distillation), in their dtypes, for the gradient of the total."""
    compute = _op.statistics_dtype(cls.dtype)
    label_grad, taught_grad = (grad, grad) if distillation == "none" else (grad * (1 - alpha), grad * alpha)
    logits, lam = cls.to(compute), lam.to(compute)
    if base == "ce":
        dcls = torch.softmax(logits, 1) - smoothing / logits.shape[1]
        dcls.scatter_add_(1, y1[:, None], ((smoothing - 1) * lam)[:, None])
        dcls.scatter_add_(1, y2[:, None], ((smoothing - 1) * (1 - lam))[:, None])
        dcls *= label_grad / logits.shape[0]
    else:
        first, second = _positives(y1, y2, lam)
        dcls = torch.sigmoid(logits)
        dcls.scatter_add_(1, y1[:, None], -first.to(compute)[:, None])
        dcls.scatter_add_(1, y2[:, None], -second.to(compute)[:, None])
        dcls *= label_grad / logits.numel()
    if distillation == "none":
        return dcls.to(cls.dtype), cls.new_empty(0)
    ddist = _distill_gradient(dist.to(compute), teacher, distillation, tau, reduction) * taught_grad
    return dcls.to(cls.dtype), ddist.to(dist.dtype)


def _distill_gradient(logits: Tensor, teacher: Tensor, distillation: str, tau: float, reduction: str) -> Tensor:
    if distillation == "hard":
        gradient = torch.softmax(logits, 1)
        labels = teacher.argmax(1)[:, None]
        return gradient.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=logits.dtype)) / logits.shape[0]
    q, p = torch.softmax(logits / tau, 1), torch.softmax(teacher.to(logits.dtype) / tau, 1)
    return (q - p) * (tau / _soft_divisor(logits, reduction))


OP = _op.Op("distillation_loss", reference, reference_backward)


@OP.registered.register_fake
def _(cls, *_):
    return tuple(cls.new_empty((), dtype=_op.statistics_dtype(cls.dtype)) for _ in DistillationLoss._fields)


@OP.registered_backward.register_fake
def _(grad, cls, dist, y1, y2, lam, teacher, smoothing, base, distillation, *_):
    return cls.new_empty(cls.shape), cls.new_empty(0) if distillation == "none" else dist.new_empty(dist.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.settings = inputs[6:]
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, grad, *_):
    dcls, ddist = OP.run_backward(ctx, grad, *ctx.saved_tensors, *ctx.settings)
    return dcls, None if ctx.saved_tensors[1] is None else ddist, *[None] * 10


OP.differentiable(_save, _differentiate)


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

    cls, dist     floating logits `[B, K]` of the class and the distillation head. Without a distillation head ("usual
                  distillation") pass `dist=cls`; without distillation, `dist=None`
    targets       (y1, y2, lam): int64 `[B]` twice and float32 `[B]`, for lam * onehot(y1) + (1 - lam) * onehot(y2)
    teacher       logits `[B, K]`, of which no gradient is taken; None without distillation
    smoothing     label smoothing in [0, 1), of "ce" only
    base          "ce", or "bce" against binarised targets (DeiT III)
    distillation  "none", "hard" (unsmoothed cross-entropy with the teacher's argmax) or "soft" (tau**2 * KL)
    alpha         weight of distillation: total = (1 - alpha) * base + alpha * distill
    tau           temperature of "soft"
    reduction     of "soft": "numel" divides by B*K, as the public DeiT code does; "batchmean" by B

    Labels outside [0, K) raise IndexError on the CPU; on a GPU the gather asserts on the device.
    """
    _check_settings(smoothing, base, distillation, tau, reduction)
    _check_tensors(cls, dist, targets, teacher, distillation)
    total, label, taught = OP(cls, dist, *targets, teacher, smoothing, base, distillation, alpha, tau, reduction)
    return DistillationLoss(total, label.detach(), taught.detach())


def _check_settings(smoothing: float, base: str, distillation: str, tau: float, reduction: str) -> None:
    _op.check_choice("base", base, _BASES)
    _op.check_choice("distillation", distillation, _DISTILLATIONS)
    _op.check_choice("reduction", reduction, _REDUCTIONS)
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing is {smoothing}, but must be in [0, 1)")
    if base == "bce" and smoothing > 0:
        raise ValueError(
            f"smoothing is {smoothing}, but must be 0 with base 'bce': a smoothed target is above 0 for every "
            "class, so that binarising it would make every class positive"
        )
    if tau <= 0:
        raise ValueError(f"tau is {tau}, but must be positive")


def _check_tensors(
    cls: Tensor,
    dist: Tensor | None,
    targets: tuple[Tensor, Tensor, Tensor],
    teacher: Tensor | None,
    distillation: str,
) -> None:
    _op.check_floating("cls", cls)
    if cls.dim() != 2 or 0 in cls.shape:
        raise ValueError(f"cls has shape {list(cls.shape)}, but must be [B, K] and not empty")
    for name, tensor in (("dist", dist), ("teacher", teacher)):
        if distillation == "none" and tensor is not None:
            raise ValueError(f"{name} is given, but distillation is 'none': pass None, or choose 'hard' or 'soft'")
        if distillation != "none":
            if tensor is None:
                hint = "; without a distillation head pass dist=cls" if name == "dist" else ""
                raise ValueError(f"{name} is None, but distillation {distillation!r} needs logits [B, K]{hint}")
            _op.check_floating(name, tensor)
            _op.check_shape(name, tensor, cls.shape, "[B, K] like cls")
    for name, tensor in zip(("y1", "y2", "lam"), targets, strict=True):
        _op.check_shape(f"targets: {name}", tensor, cls.shape[:1], "[B], B of cls,")
        if name != "lam":
            _op.check_dtype(f"targets: {name}", tensor, torch.int64)
