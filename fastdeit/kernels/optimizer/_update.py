"""What one update of many tensors is, whichever optimizer makes it: unscaling, skipping, EMA and 16-bit copies.

With g = grad_scale * grad, t = step + 1, c_i = 1 - beta_i**t:

    m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g**2        where the optimizer has moments

    p = the optimizer's formula of p, g, m / c1, v / c2 and lr

    ema = ema_decay ema + (1 - ema_decay) p        copy = p in the copy's dtype

No update takes a norm of gradients: to clip, the caller puts the factor into grad_scale. So the norm is one over all
parameters, however many calls update them.

When found_inf is nonzero nothing changes, step included. On a GPU that is decided there: PyTorch's operations select
between old and new values, since multiplying by zero would let NaN through, and Triton's programs find no elements.

In Triton a first kernel, of one program, works out what all others need of the scalars and counts the step. They do not
read the step themselves, so the order of programs does not matter. SGD counts no steps and needs no such kernel.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels import _triton

MUTATED = "params", "exp_avgs", "exp_avg_sqs", "step", "ema", "copies"


class AdamArguments(NamedTuple):
    """The arguments of the ops `fused_adamw` and `fused_lamb`, as their references have them."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    step: Tensor
    lr: Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    grad_scale: Tensor | None
    found_inf: Tensor | None
    ema: Sequence[Tensor]
    ema_decay: float
    copies: Sequence[Tensor]


# ---- reference -------------------------------------------------------------------------------------------------------


def host_may_look(flag: Tensor) -> bool:
    """Whether reading `flag` stalls no device."""
    return flag.device.type == "cpu"


def skipped(found_inf: Tensor | None) -> Tensor | bool:
    """Whether to change nothing: True or False where that can be known at once, else a bool tensor on the device."""
    if found_inf is None:
        return False
    return bool(found_inf) if host_may_look(found_inf) else found_inf != 0


def write(skip: Tensor | bool, old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    """old <- new where not skipped. `torch.where` keeps the old bits and, unlike a product, ignores NaN in new."""
    if skip is not False:
        new = [torch.where(skip, before, after.to(before.dtype)) for before, after in zip(old, new, strict=True)]
    torch._foreach_copy_(old, new)


def gradients(params: Sequence[Tensor], grads: Sequence[Tensor], scale: Tensor | None) -> list[Tensor]:
    """`scale * grads` in the dtype and layout of the parameters; the gradients themselves stay as they are."""
    grads = [
        g if g.dtype == p.dtype and g.stride() == p.stride() else torch.empty_like(p).copy_(g)
        for p, g in zip(params, grads, strict=True)
    ]
    return grads if scale is None else torch._foreach_mul(grads, scale.to(grads[0].dtype))


def follow(
    params: Sequence[Tensor],
    skip: Tensor | bool,
    ema: Sequence[Tensor],
    ema_decay: float,
    copies: Sequence[Tensor],
) -> None:
    """EMA and copies take the new parameters, unless the step is skipped."""
    if ema and skip is False:
        torch._foreach_lerp_(ema, params, 1 - ema_decay)
    elif ema:
        write(skip, ema, torch._foreach_lerp(ema, params, 1 - ema_decay))
    if copies:
        write(skip, copies, params)


def corrections(now: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    """c1 and c2 of update number `now`, in float64."""
    now = now.double()
    return 1 - beta1**now, 1 - beta2**now


# ---- Triton ----------------------------------------------------------------------------------------------------------


@triton.jit
def _correction(log_beta, t):
    """1 - beta**t = -expm1(t log beta), as exact as float32 is; 1 - 0.999**t itself loses four of its seven digits."""
    x = t * log_beta
    near = tl.maximum(x, -1.0)
    series = 1.0
    for i in tl.static_range(12, 1, -1):  # expm1(x) = x (1 + x/2 (1 + x/3 (...))); the rest is below 2e-10
        series = 1.0 + series * near * (1.0 / i)
    return tl.where(x > -1.0, -near * series, 1.0 - tl.exp(x))


@triton.jit
def _schedule_kernel(step, lr_tensor, grad_scale, found_inf, schedule, lr, log_beta1, log_beta2):
    before = tl.load(step)
    after = before + 1.0
    factor = 1.0
    if grad_scale is not None:
        factor = tl.load(grad_scale).to(tl.float32)
    if lr_tensor is not None:
        lr = tl.load(lr_tensor).to(tl.float32)
    tl.store(schedule, factor)
    tl.store(schedule + 1, lr)
    tl.store(schedule + 2, _correction(log_beta1, after))
    tl.store(schedule + 3, _correction(log_beta2, after))
    if found_inf is not None:
        after = tl.where(tl.load(found_inf) != 0, before, after)
    tl.store(step, after)


_triton.expect(_schedule_kernel, loads=32, stores=32)  # scalars


def make_schedule(
    step: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> Tensor:
    """float32 [factor of the gradients, lr, c1, c2] of this update, on the device; counts the step."""
    schedule = torch.empty(4, dtype=torch.float32, device=step.device)
    lr_tensor, number = rate_arguments(lr)
    logs = (math.log(beta) if beta else -math.inf for beta in (beta1, beta2))
    tensors = step, lr_tensor, grad_scale, found_inf, schedule
    _triton.launch(_schedule_kernel, (1,), *tensors, number, *logs, warps=1)
    return schedule


def rate_arguments(lr: Tensor) -> tuple[Tensor | None, float]:
    """The learning rate as a kernel takes it: (a tensor on the device, unused) or (None, a number).

    A number is read here, and so becomes a constant of a CUDA graph; a tensor on the device is read by every replay.
    """
    return (None, float(lr)) if host_may_look(lr) else (lr, 0.0)


@triton.jit
def lerp(start, end, weight):
    """`torch.lerp`: exactly `end` at weight 1."""
    return tl.where(weight < 0.5, start + weight * (end - start), end - (end - start) * (1.0 - weight))


@triton.jit
def moments(g, m, v, beta2, weight1, weight2):
    """New moments; the weights are 1 - beta1 and 1 - beta2, rounded once."""
    return lerp(m, g, weight1), beta2 * v + weight2 * g * g
