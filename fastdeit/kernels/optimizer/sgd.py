"""SGD with momentum as in `torch.optim.SGD` (dampening 0), with what `_update` adds to every update.

    g = g + weight_decay p                      where the decay is coupled
    b = momentum b + g
    u = g + momentum b                          with Nesterov's momentum, else u = b
    p = (1 - lr weight_decay) p - lr u          where the decay is decoupled, else p = p - lr u

A buffer b starts at 0, so the first update has b = g, as torch's has. Decoupled decay is that of SGDW (Loshchilov &
Hutter, ICLR 2019), multiplied by lr as in timm's `sgdw`.

Bytes moved at best per float32 parameter: reads 12 and writes 8; EMA adds 4 and 4, a 16-bit copy 2. The Triton kernel
moves just these, in one pass.
"""

from collections.abc import Sequence
from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels import _op, _triton
from fastdeit.kernels.optimizer import _examples, _multi_tensor, _update

# ---- reference -------------------------------------------------------------------------------------------------------


def reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    lr: Tensor,
    momentum: float,
    nesterov: bool,
    decoupled: bool,
    weight_decay: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    ema: Sequence[Tensor],
    ema_decay: float,
    copies: Sequence[Tensor],
) -> None:
    """SGD as in the module's formula, tensor by tensor, in place."""
    skip = _update.skipped(found_inf)
    if skip is True:
        return
    kept = 1 - lr.double() * weight_decay if decoupled else 1.0
    coupled = 0.0 if decoupled else weight_decay
    for p, g, b in zip(params, _update.gradients(params, grads, grad_scale), momentum_buffers, strict=True):
        g = g.add(p, alpha=coupled)
        new_b = (momentum * b).add_(g)
        update = g.add_(new_b, alpha=momentum) if nesterov else new_b
        _update.write(skip, (p, b), (p * kept - update * lr, new_b))
    _update.follow(params, skip, ema, ema_decay, copies)


# ---- Triton ----------------------------------------------------------------------------------------------------------


@triton.jit
def _sgd_kernel(
    masters,
    grads,
    momentum_buffers,
    emas,
    copies,
    sizes,
    starts,
    found_inf,
    grad_scale,
    lr_tensor,
    lr,
    momentum,
    coupled,
    decoupled,
    ema_weight,
    NESTEROV: tl.constexpr,
    GRAD: tl.constexpr,
    COPY: tl.constexpr,
    TENSORS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, first, length = _multi_tensor.chunk(sizes, starts, found_inf, TENSORS, ALIGNED)
    p_at = _multi_tensor.pointer(masters, tensor, first, tl.float32, ALIGNED)
    g_at = _multi_tensor.pointer(grads, tensor, first, GRAD, ALIGNED)
    b_at = _multi_tensor.pointer(momentum_buffers, tensor, first, tl.float32, ALIGNED)
    if emas is not None:
        ema_at = _multi_tensor.pointer(emas, tensor, first, tl.float32, ALIGNED)
    if copies is not None:
        copy_at = _multi_tensor.pointer(copies, tensor, first, COPY, ALIGNED)
    factor = 1.0
    if grad_scale is not None:
        factor = tl.load(grad_scale).to(tl.float32)
    if lr_tensor is not None:
        lr = tl.load(lr_tensor).to(tl.float32)
    kept = 1.0 - lr * decoupled
    for start in range(0, length, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        inside = offset < length
        p = tl.load(p_at + offset, mask=inside, other=0.0)
        g = tl.load(g_at + offset, mask=inside, other=0.0).to(tl.float32) * factor
        b = tl.load(b_at + offset, mask=inside, other=0.0)
        if emas is not None:
            ema = tl.load(ema_at + offset, mask=inside, other=0.0)
        g += coupled * p
        b = momentum * b + g
        update = g + momentum * b if NESTEROV else b
        p = p * kept - update * lr
        tl.store(b_at + offset, b, mask=inside)
        tl.store(p_at + offset, p, mask=inside)
        if emas is not None:
            tl.store(ema_at + offset, _update.lerp(ema, p, ema_weight), mask=inside)
        if copies is not None:
            tl.store(copy_at + offset, p.to(COPY), mask=inside)


def triton_sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    lr: Tensor,
    momentum: float,
    nesterov: bool,
    decoupled: bool,
    weight_decay: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    ema: Sequence[Tensor],
    ema_decay: float,
    copies: Sequence[Tensor],
) -> None:
    """`reference` in one pass over the tensors."""
    grads = [grad.contiguous() for grad in grads]
    parts = _multi_tensor.split(params, grads, momentum_buffers, ema, copies)
    lr_tensor, lr_number = _update.rate_arguments(lr)
    decays = (0.0, weight_decay) if decoupled else (weight_decay, 0.0)
    # Whole numbers as floats, or Triton would compile a kernel of its own for them.
    numbers = list(map(float, (lr_number, momentum, *decays, 1 - ema_decay)))
    for part in parts:
        arguments = *part.rows, part.sizes, part.starts, found_inf, grad_scale, lr_tensor, *numbers
        constants = {"NESTEROV": nesterov, "GRAD": part.types[1], "COPY": part.types[4], **part.constants}
        constants |= {"BLOCK": _multi_tensor.BLOCK, "warps": _multi_tensor.WARPS}
        _triton.launch(_sgd_kernel, (part.chunks,), *arguments, **constants)


# ---- registration ----------------------------------------------------------------------------------------------------

_PLAIN = _examples.updates(_examples.decoupled_sgd_numbers, states=1, bytes_of_a_parameter=28)[0]

OP = _op.Op(
    "fused_sgd",
    reference,
    examples=[
        *_examples.updates(_examples.sgd_numbers, states=1, bytes_of_a_parameter=28),
        replace(_PLAIN, name="weights, decoupled decay, not Nesterov's", bytes=None),
    ],
    others=[_op.Backend("triton", _triton.capability, triton_sgd)],
    mutates=("params", "momentum_buffers", "ema", "copies"),
)
