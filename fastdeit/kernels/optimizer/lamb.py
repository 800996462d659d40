"""LAMB (You et al., ICLR 2020) as in NVIDIA apex's FusedLAMB, with what `_update` adds to every update.

    u = (m / c1) / (sqrt(v / c2) + eps) + weight_decay p
    p = p - lr r u                            r = |p| / |u| where weight_decay != 0 and neither norm is 0, else 1

FusedLAMB also clips the gradients, by default to the norm 1 over all of them. Here the caller does, who knows the norm
of all parameters: it is the factor in grad_scale.

Bytes moved at best per float32 parameter: reads 16 and writes 8 for the moments and the norms of p and u, and reads 12
and writes 4 for the update, which makes u again from the moments. EMA adds 4 and 4, a 16-bit copy 2. Without weight
decay there is no r, and the update is AdamW's single pass. In Triton each program adds up the squares of one chunk, and
one program a tensor adds the chunks' sums in a fixed order, so that every run has the same bits.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels import _op, _triton
from fastdeit.kernels.optimizer import _examples, _multi_tensor, _update, adamw, apex

# ---- reference -------------------------------------------------------------------------------------------------------


def reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    ema: Sequence[Tensor],
    ema_decay: float,
    copies: Sequence[Tensor],
) -> None:
    """LAMB as in the module's formula, in place."""
    skip = _update.skipped(found_inf)
    if skip is True:
        return
    grads = _update.gradients(params, grads, grad_scale)
    correction1, correction2 = _update.corrections(step + 1, beta1, beta2)
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        new_m = torch.lerp(m, g, 1 - beta1)
        new_v = (beta2 * v).addcmul_(g, g, value=1 - beta2)
        update = new_m / (new_v / correction2).sqrt_().add_(eps)
        update.div_(correction1).add_(p, alpha=weight_decay)
        rate = lr if weight_decay == 0 else lr * _trust_ratio(p, update)
        _update.write(skip, (p, m, v), (p - update.mul_(rate), new_m, new_v))
    _update.write(skip, [step], [step + 1])
    _update.follow(params, skip, ema, ema_decay, copies)


def _trust_ratio(p: Tensor, update: Tensor) -> Tensor:
    length, step = torch.linalg.vector_norm(p), torch.linalg.vector_norm(update)
    return torch.where((length > 0) & (step > 0), length / step, 1.0)


# ---- Triton ----------------------------------------------------------------------------------------------------------

_ADDED = 1024
"""Partial sums of a tensor that a program adds at a time."""


@triton.jit
def _update_of(p, m, v, correction1, correction2, eps, weight_decay):
    adam = tl.div_rn(m, tl.sqrt_rn(tl.div_rn(v, correction2)) + eps)
    return tl.div_rn(adam, correction1) + weight_decay * p


@triton.jit
def _moments_kernel(
    masters,
    grads,
    exp_avgs,
    exp_avg_sqs,
    sizes,
    starts,
    found_inf,
    schedule,
    squares_p,
    squares_u,
    beta2,
    weight1,
    weight2,
    eps,
    weight_decay,
    GRAD: tl.constexpr,
    TENSORS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, first, length = _multi_tensor.chunk(sizes, starts, found_inf, TENSORS, ALIGNED)
    p_at = _multi_tensor.pointer(masters, tensor, first, tl.float32, ALIGNED)
    g_at = _multi_tensor.pointer(grads, tensor, first, GRAD, ALIGNED)
    m_at = _multi_tensor.pointer(exp_avgs, tensor, first, tl.float32, ALIGNED)
    v_at = _multi_tensor.pointer(exp_avg_sqs, tensor, first, tl.float32, ALIGNED)
    factor, correction1, correction2 = tl.load(schedule), tl.load(schedule + 2), tl.load(schedule + 3)
    sum_p = tl.zeros((BLOCK,), tl.float32)
    sum_u = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, length, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        inside = offset < length
        p = tl.load(p_at + offset, mask=inside, other=0.0)
        g = tl.load(g_at + offset, mask=inside, other=0.0).to(tl.float32) * factor
        m = tl.load(m_at + offset, mask=inside, other=0.0)
        v = tl.load(v_at + offset, mask=inside, other=1.0)  # not 0: no division by it beyond the end
        m, v = _update.moments(g, m, v, beta2, weight1, weight2)
        u = _update_of(p, m, v, correction1, correction2, eps, weight_decay)
        tl.store(m_at + offset, m, mask=inside)
        tl.store(v_at + offset, v, mask=inside)
        sum_p += p * p
        sum_u += u * u
    tl.store(squares_p + tl.program_id(0), tl.sum(sum_p, 0))
    tl.store(squares_u + tl.program_id(0), tl.sum(sum_u, 0))


@triton.jit
def _ratio_kernel(squares_p, squares_u, sizes, starts, ratios, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    tensor = tl.program_id(0)
    first = tl.load(starts + tensor)
    count = ((tl.load(sizes + tensor) + CHUNK - 1) // CHUNK).to(tl.int32)
    sum_p = tl.zeros((BLOCK,), tl.float32)
    sum_u = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        sum_p += tl.load(squares_p + first + offset, mask=offset < count, other=0.0)
        sum_u += tl.load(squares_u + first + offset, mask=offset < count, other=0.0)
    length, step = tl.sqrt_rn(tl.sum(sum_p, 0)), tl.sqrt_rn(tl.sum(sum_u, 0))
    trusted = (length > 0.0) & (step > 0.0)
    tl.store(ratios + tensor, tl.where(trusted, tl.div_rn(length, tl.where(trusted, step, 1.0)), 1.0))


@triton.jit
def _apply_kernel(
    masters,
    exp_avgs,
    exp_avg_sqs,
    emas,
    copies,
    sizes,
    starts,
    found_inf,
    schedule,
    ratios,
    eps,
    weight_decay,
    ema_weight,
    COPY: tl.constexpr,
    TENSORS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, first, length = _multi_tensor.chunk(sizes, starts, found_inf, TENSORS, ALIGNED)
    p_at = _multi_tensor.pointer(masters, tensor, first, tl.float32, ALIGNED)
    m_at = _multi_tensor.pointer(exp_avgs, tensor, first, tl.float32, ALIGNED)
    v_at = _multi_tensor.pointer(exp_avg_sqs, tensor, first, tl.float32, ALIGNED)
    if emas is not None:
        ema_at = _multi_tensor.pointer(emas, tensor, first, tl.float32, ALIGNED)
    if copies is not None:
        copy_at = _multi_tensor.pointer(copies, tensor, first, COPY, ALIGNED)
    correction1, correction2 = tl.load(schedule + 2), tl.load(schedule + 3)
    rate = tl.load(schedule + 1) * tl.load(ratios + tensor)
    for start in range(0, length, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        inside = offset < length
        p = tl.load(p_at + offset, mask=inside, other=0.0)
        m = tl.load(m_at + offset, mask=inside, other=0.0)
        v = tl.load(v_at + offset, mask=inside, other=1.0)
        if emas is not None:
            ema = tl.load(ema_at + offset, mask=inside, other=0.0)
        p -= rate * _update_of(p, m, v, correction1, correction2, eps, weight_decay)
        tl.store(p_at + offset, p, mask=inside)
        if emas is not None:
            tl.store(ema_at + offset, _update.lerp(ema, p, ema_weight), mask=inside)
        if copies is not None:
            tl.store(copy_at + offset, p.to(COPY), mask=inside)


def _trusting_update(part: _multi_tensor.Lists, schedule: Tensor, a: _update.AdamArguments) -> None:
    """The launches of one part: moments and squares, the ratio of each tensor, parameters."""
    params, grads, exp_avgs, exp_avg_sqs, emas, copies = part.rows
    shape = part.sizes, part.starts
    squares = torch.empty(2, part.chunks, dtype=torch.float32, device=schedule.device).unbind()
    ratios = torch.empty(part.tensors, dtype=torch.float32, device=schedule.device)
    constants = {"BLOCK": _multi_tensor.BLOCK, "warps": _multi_tensor.WARPS, **part.constants}
    moments = params, grads, exp_avgs, exp_avg_sqs, *shape, a.found_inf, schedule, *squares
    numbers = map(float, (a.beta2, 1 - a.beta1, 1 - a.beta2, a.eps, a.weight_decay))
    _triton.launch(_moments_kernel, (part.chunks,), *moments, *numbers, GRAD=part.types[1], **constants)
    sizes = {"CHUNK": _multi_tensor.CHUNK, "BLOCK": _ADDED}
    _triton.launch(_ratio_kernel, (part.tensors,), *squares, *shape, ratios, warps=4, **sizes)
    applied = params, exp_avgs, exp_avg_sqs, emas, copies, *shape, a.found_inf, schedule, ratios
    numbers = map(float, (a.eps, a.weight_decay, 1 - a.ema_decay))
    _triton.launch(_apply_kernel, (part.chunks,), *applied, *numbers, COPY=part.types[5], **constants)


def triton_lamb(*arguments: Any) -> None:
    """`reference` in two passes over the tensors; without decay there is no r, and the update is AdamW's."""
    a = _update.AdamArguments(*arguments)
    if a.weight_decay == 0:
        adamw.triton_adamw(*arguments)
        return
    grads = [grad.contiguous() for grad in a.grads]
    parts = _multi_tensor.split(a.params, grads, a.exp_avgs, a.exp_avg_sqs, a.ema, a.copies)
    schedule = _update.make_schedule(a.step, a.lr, a.beta1, a.beta2, a.grad_scale, a.found_inf)
    for part in parts:
        _trusting_update(part, schedule, a)


# ---- registration ----------------------------------------------------------------------------------------------------

OP = _op.Op(
    "fused_lamb",
    reference,
    examples=_examples.updates(_examples.adam_numbers, states=2, bytes_of_a_parameter=52),
    others=[
        _op.Backend("triton", _triton.capability, triton_lamb),
        _op.Backend("apex", apex.capability, apex.lamb),
    ],
    mutates=_update.MUTATED,
)
_triton.expect(_ratio_kernel, loads=32, stores=32)  # sums, of any number
