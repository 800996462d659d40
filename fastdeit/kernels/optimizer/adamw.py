"""AdamW (Loshchilov & Hutter, ICLR 2019) with what `_update` adds to every update.

    p = (1 - lr weight_decay) p - lr (m / c1) / (sqrt(v / c2) + eps)

Bytes moved at best per float32 parameter: reads 16 and writes 12; EMA adds 4 and 4, a 16-bit copy 2. The Triton kernel
moves just these, in one pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels import _op, _triton
from fastdeit.kernels.optimizer import _examples, _multi_tensor, _update, apex

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
    """AdamW as in the module's formula, tensor by tensor, in place."""
    skip = _update.skipped(found_inf)
    if skip is True:
        return
    correction1, correction2 = _update.corrections(step + 1, beta1, beta2)
    rate, root, decay = lr / correction1, torch.sqrt(correction2), 1 - lr.double() * weight_decay
    for p, g, m, v in zip(params, _update.gradients(params, grads, grad_scale), exp_avgs, exp_avg_sqs, strict=True):
        new_m = torch.lerp(m, g, 1 - beta1)
        new_v = (beta2 * v).addcmul_(g, g, value=1 - beta2)
        update = new_m / (new_v.sqrt().div_(root).add_(eps))
        new_p = (p * decay).sub_(update.mul_(rate))
        _update.write(skip, (p, m, v), (new_p, new_m, new_v))
    _update.write(skip, [step], [step + 1])
    _update.follow(params, skip, ema, ema_decay, copies)


def aten(*arguments: Any) -> None:
    """The same by the kernel of `torch.optim.AdamW(fused=True)`: one pass over the tensors, which skips by itself."""
    a = _update.AdamArguments(*arguments)
    skip = _update.skipped(a.found_inf)
    if skip is True:
        return
    torch._fused_adamw_(
        a.params,
        # Scaled out of place: the kernel's own grad_scale divides, and overwrites the gradients.
        _update.gradients(a.params, a.grads, a.grad_scale),
        a.exp_avgs,
        a.exp_avg_sqs,
        [],
        [a.step + 1] * len(a.params),
        lr=a.lr,
        beta1=a.beta1,
        beta2=a.beta2,
        weight_decay=a.weight_decay,
        eps=a.eps,
        amsgrad=False,
        maximize=False,
        found_inf=None if skip is False else skip.float(),
    )
    _update.write(skip, [a.step], [a.step + 1])
    _update.follow(a.params, skip, a.ema, a.ema_decay, a.copies)


def _aten_capability(device: torch.device, forced: bool) -> tuple[bool, str]:
    if device.type in ("cpu", "cuda"):
        return True, "the kernel of torch.optim.AdamW(fused=True)"
    return False, f"torch's fused AdamW is used on CPU and CUDA only, not on {device.type}"


# ---- Triton ----------------------------------------------------------------------------------------------------------


@triton.jit
def _adamw_kernel(
    masters,
    grads,
    exp_avgs,
    exp_avg_sqs,
    emas,
    copies,
    sizes,
    starts,
    found_inf,
    schedule,
    beta2,
    weight1,
    weight2,
    eps,
    weight_decay,
    ema_weight,
    GRAD: tl.constexpr,
    COPY: tl.constexpr,
    TENSORS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, first, length = _multi_tensor.chunk(sizes, starts, found_inf, TENSORS, ALIGNED)
    p_at = _multi_tensor.pointer(masters, tensor, first, tl.float32, ALIGNED)
    g_at = _multi_tensor.pointer(grads, tensor, first, GRAD, ALIGNED)
    m_at = _multi_tensor.pointer(exp_avgs, tensor, first, tl.float32, ALIGNED)
    v_at = _multi_tensor.pointer(exp_avg_sqs, tensor, first, tl.float32, ALIGNED)
    if emas is not None:
        ema_at = _multi_tensor.pointer(emas, tensor, first, tl.float32, ALIGNED)
    if copies is not None:
        copy_at = _multi_tensor.pointer(copies, tensor, first, COPY, ALIGNED)
    factor, lr = tl.load(schedule), tl.load(schedule + 1)
    rate, root = tl.div_rn(lr, tl.load(schedule + 2)), tl.sqrt_rn(tl.load(schedule + 3))
    for start in range(0, length, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        inside = offset < length
        p = tl.load(p_at + offset, mask=inside, other=0.0)
        g = tl.load(g_at + offset, mask=inside, other=0.0).to(tl.float32) * factor
        m = tl.load(m_at + offset, mask=inside, other=0.0)
        v = tl.load(v_at + offset, mask=inside, other=1.0)  # not 0: no division by it beyond the end
        if emas is not None:
            ema = tl.load(ema_at + offset, mask=inside, other=0.0)
        m, v = _update.moments(g, m, v, beta2, weight1, weight2)
        update = tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
        p = p * (1.0 - lr * weight_decay) - update * rate
        tl.store(m_at + offset, m, mask=inside)
        tl.store(v_at + offset, v, mask=inside)
        tl.store(p_at + offset, p, mask=inside)
        if emas is not None:
            tl.store(ema_at + offset, _update.lerp(ema, p, ema_weight), mask=inside)
        if copies is not None:
            tl.store(copy_at + offset, p.to(COPY), mask=inside)


def triton_adamw(*arguments: Any) -> None:
    """`reference` in one pass over the tensors, with a launch for each of their parts."""
    a = _update.AdamArguments(*arguments)
    grads = [grad.contiguous() for grad in a.grads]
    parts = _multi_tensor.split(a.params, grads, a.exp_avgs, a.exp_avg_sqs, a.ema, a.copies)
    schedule = _update.make_schedule(a.step, a.lr, a.beta1, a.beta2, a.grad_scale, a.found_inf)
    # Whole numbers as floats, or Triton would compile a kernel of its own for them.
    numbers = list(map(float, (a.beta2, 1 - a.beta1, 1 - a.beta2, a.eps, a.weight_decay, 1 - a.ema_decay)))
    for part in parts:
        arguments = *part.rows, part.sizes, part.starts, a.found_inf, schedule, *numbers
        constants = {"GRAD": part.types[1], "COPY": part.types[5], "BLOCK": _multi_tensor.BLOCK, **part.constants}
        _triton.launch(_adamw_kernel, (part.chunks,), *arguments, warps=_multi_tensor.WARPS, **constants)


# ---- registration ----------------------------------------------------------------------------------------------------

OP = _op.Op(
    "fused_adamw",
    reference,
    examples=_examples.updates(_examples.adam_numbers, states=2, bytes_of_a_parameter=36),
    others=[
        _op.Backend("triton", _triton.capability, triton_adamw),
        _op.Backend("aten", _aten_capability, aten),
        _op.Backend("apex", apex.capability, apex.adamw),
    ],
    mutates=_update.MUTATED,
)
