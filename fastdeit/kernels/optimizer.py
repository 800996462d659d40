"""One update of many tensors: AdamW and LAMB with unscaling, skipping, EMA and 16-bit copies; and the global norm.

With g = grad_scale * grad, t = step + 1, c_i = 1 - beta_i**t:

    m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g**2

    AdamW (Loshchilov & Hutter, ICLR 2019)
        p = (1 - lr weight_decay) p - lr (m / c1) / (sqrt(v / c2) + eps)

    LAMB (You et al., ICLR 2020) as in NVIDIA apex's FusedLAMB, on g / max(1, |g| / max_grad_norm), |g| over all tensors
        u = (m / c1) / (sqrt(v / c2) + eps) + weight_decay p
        p = p - lr r u,  r = |p| / |u| where weight_decay != 0 and neither norm is 0, else 1

    ema = ema_decay ema + (1 - ema_decay) p        copy = p in the copy's dtype

When found_inf is nonzero nothing changes, step included. On a GPU that is decided there, by selecting between old and
new values; multiplying by zero would let NaN through. Bytes moved at best per float32 parameter: AdamW reads 16 and
writes 12, EMA adds 4 and 4, a copy 2; LAMB needs the norm of u first and so reads everything twice.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdeit.kernels import _op


def reference_norm(tensors: Sequence[Tensor]) -> Tensor:
    """2-norm of all elements of all tensors as a float32 scalar."""
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    norms = torch._foreach_norm(tensors, 2, dtype=torch.float64 if double else torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms)).float()


def _host_may_look(flag: Tensor) -> bool:
    """Whether reading `flag` stalls no device."""
    return flag.device.type == "cpu"


def _skip(found_inf: Tensor | None) -> Tensor | bool:
    """Whether to change nothing: True or False where that can be known at once, else a bool tensor on the device."""
    if found_inf is None:
        return False
    return bool(found_inf) if _host_may_look(found_inf) else found_inf != 0


def _write(skip: Tensor | bool, old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    """old <- new where not skipped. `torch.where` keeps the old bits and, unlike a product, ignores NaN in new."""
    if skip is not False:
        new = [torch.where(skip, before, after.to(before.dtype)) for before, after in zip(old, new, strict=True)]
    torch._foreach_copy_(old, new)


def _gradients(params: Sequence[Tensor], grads: Sequence[Tensor], scale: Tensor | None) -> list[Tensor]:
    """`scale * grads` in the dtype and layout of the parameters; the gradients themselves stay as they are."""
    grads = [
        g if g.dtype == p.dtype and g.stride() == p.stride() else torch.empty_like(p).copy_(g)
        for p, g in zip(params, grads, strict=True)
    ]
    return grads if scale is None else torch._foreach_mul(grads, scale.to(grads[0].dtype))


def _follow(
    params: Sequence[Tensor],
    skip: Tensor | bool,
    ema: Sequence[Tensor],
    ema_decay: float,
    copies: Sequence[Tensor],
) -> None:
    if ema and skip is False:
        torch._foreach_lerp_(ema, params, 1 - ema_decay)
    elif ema:
        _write(skip, ema, torch._foreach_lerp(ema, params, 1 - ema_decay))
    if copies:
        _write(skip, copies, params)


def _corrections(now: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    now = now.double()
    return 1 - beta1**now, 1 - beta2**now


def reference_adamw(
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
    skip = _skip(found_inf)
    if skip is True:
        return
    correction1, correction2 = _corrections(step + 1, beta1, beta2)
    rate, root, decay = lr / correction1, torch.sqrt(correction2), 1 - lr.double() * weight_decay
    for p, g, m, v in zip(params, _gradients(params, grads, grad_scale), exp_avgs, exp_avg_sqs, strict=True):
        new_m = torch.lerp(m, g, 1 - beta1)
        new_v = (beta2 * v).addcmul_(g, g, value=1 - beta2)
        update = new_m / (new_v.sqrt().div_(root).add_(eps))
        new_p = (p * decay).sub_(update.mul_(rate))
        _write(skip, (p, m, v), (new_p, new_m, new_v))
    _write(skip, [step], [step + 1])
    _follow(params, skip, ema, ema_decay, copies)


def aten_adamw(
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
    """The same by the kernel of `torch.optim.AdamW(fused=True)`: one pass over the tensors, which skips by itself."""
    skip = _skip(found_inf)
    if skip is True:
        return
    torch._fused_adamw_(
        params,
        # Scaled out of place: the kernel's own grad_scale divides, and overwrites the gradients.
        _gradients(params, grads, grad_scale),
        exp_avgs,
        exp_avg_sqs,
        [],
        [step + 1] * len(params),
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        found_inf=None if skip is False else skip.float(),
    )
    _write(skip, [step], [step + 1])
    _follow(params, skip, ema, ema_decay, copies)


def reference_lamb(
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
    max_grad_norm: float,
    grad_norm: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    ema: Sequence[Tensor],
    ema_decay: float,
    copies: Sequence[Tensor],
) -> None:
    """LAMB as in the module's formula, in place."""
    skip = _skip(found_inf)
    if skip is True:
        return
    norm = reference_norm(grads) if grad_norm is None else grad_norm
    scale = torch.ones_like(norm) if grad_scale is None else grad_scale
    scale = scale / (norm * scale / max_grad_norm).clamp(min=1)
    grads = _gradients(params, grads, scale)
    correction1, correction2 = _corrections(step + 1, beta1, beta2)
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        new_m = torch.lerp(m, g, 1 - beta1)
        new_v = (beta2 * v).addcmul_(g, g, value=1 - beta2)
        update = new_m / (new_v / correction2).sqrt_().add_(eps)
        update.div_(correction1).add_(p, alpha=weight_decay)
        rate = lr if weight_decay == 0 else lr * _trust_ratio(p, update)
        _write(skip, (p, m, v), (p - update.mul_(rate), new_m, new_v))
    _write(skip, [step], [step + 1])
    _follow(params, skip, ema, ema_decay, copies)


def _trust_ratio(p: Tensor, update: Tensor) -> Tensor:
    length, step = torch.linalg.vector_norm(p), torch.linalg.vector_norm(update)
    return torch.where((length > 0) & (step > 0), length / step, 1.0)


def _aten_capability(device: torch.device, forced: bool) -> tuple[bool, str]:
    if device.type in ("cpu", "cuda"):
        return True, "the kernel of torch.optim.AdamW(fused=True)"
    return False, f"torch's fused AdamW is used on CPU and CUDA only, not on {device.type}"


_MUTATED = "params", "exp_avgs", "exp_avg_sqs", "step", "ema", "copies"
NORM = _op.Op("global_norm", reference_norm)
ADAMW = _op.Op(
    "fused_adamw", reference_adamw, others=[_op.Backend("aten", _aten_capability, aten_adamw)], mutates=_MUTATED
)
LAMB = _op.Op("fused_lamb", reference_lamb, mutates=_MUTATED)


@NORM.registered.register_fake
def _(tensors):
    return tensors[0].new_empty((), dtype=torch.float32)


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """2-norm of all elements of all tensors together: a float32 scalar on their device, accumulated in float32."""
    if not tensors:
        raise ValueError("tensors is empty: the norm needs at least one tensor to know its device")
    with torch.no_grad():
        return NORM(list(tensors))


def fused_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: Tensor,
    lr: float | Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    ema: Sequence[Tensor] | None = None,
    ema_decay: float = 0.0,
    copies: Sequence[Tensor] | None = None,
) -> None:
    """One AdamW step in place, with the result of `torch.optim.AdamW`.

    params                 float32 or float64 tensors of one dtype
    grads                  their gradients, of any floating dtype; not changed
    exp_avgs, exp_avg_sqs  first and second moments, in the parameters' shape and dtype
    step                   float32 scalar tensor: updates so far; incremented
    lr                     float, or float32 scalar tensor
    grad_scale             float32 scalar tensor that multiplies the gradients (unscaling, clipping); None is 1
    found_inf              bool or float scalar tensor: nonzero leaves every argument bit for bit as it is; None is 0
    ema, ema_decay         averages like params: ema = ema_decay * ema + (1 - ema_decay) * param, after the update
    copies                 tensors of any floating dtype that take the updated parameters

    step, grad_scale and found_inf are on the parameters' device. Nothing on a GPU is read by the host.
    """
    *updated, ema, copies = _lists(params, grads, exp_avgs, exp_avg_sqs, ema, copies)
    lr = _scalars(params, step, lr, grad_scale, found_inf, betas, ema_decay)
    with torch.no_grad():
        ADAMW(*updated, step, lr, *betas, eps, weight_decay, grad_scale, found_inf, ema, ema_decay, copies)


def fused_lamb(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: Tensor,
    lr: float | Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    max_grad_norm: float = 1.0,
    grad_norm: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    ema: Sequence[Tensor] | None = None,
    ema_decay: float = 0.0,
    copies: Sequence[Tensor] | None = None,
) -> None:
    """One LAMB step in place, with the semantics of NVIDIA apex's FusedLAMB (`adam_w_mode`, `use_nvlamb=False`).

    max_grad_norm  the gradients are clipped to this global norm; `math.inf` does not clip
    grad_norm      float32 scalar tensor: norm of the gradients as given, before grad_scale. Pass `global_norm` of them
                   all when the parameters are spread over several calls; None takes the norm of `grads` alone
    others         as of `fused_adamw`

    The trust ratio applies where weight_decay is not 0, and to tensors whose norm and whose update's norm are not 0.
    """
    if not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm is {max_grad_norm}, but must be positive (math.inf for no clipping)")
    *updated, ema, copies = _lists(params, grads, exp_avgs, exp_avg_sqs, ema, copies)
    lr = _scalars(params, step, lr, grad_scale, found_inf, betas, ema_decay)
    numbers = *betas, eps, weight_decay, max_grad_norm, grad_norm, grad_scale
    with torch.no_grad():
        LAMB(*updated, step, lr, *numbers, found_inf, ema, ema_decay, copies)


def _lists(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    ema: Sequence[Tensor] | None,
    copies: Sequence[Tensor] | None,
) -> tuple[list[Tensor], ...]:
    """The arguments as lists, an absent one empty, after checking lengths, shapes and dtypes."""
    if not params:
        raise ValueError("params is empty: there is nothing to update")
    dtype = params[0].dtype
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"params are {dtype}, but must be float32 or float64; keep 16-bit weights in `copies`")
    lists = [list(params)]
    for name, tensors, moment in (
        ("grads", grads, False),
        ("exp_avgs", exp_avgs, True),
        ("exp_avg_sqs", exp_avg_sqs, True),
        ("ema", ema or params, True),
        ("copies", copies or params, False),
    ):
        if len(tensors) != len(params):
            raise ValueError(f"{name} has {len(tensors)} tensors, but params has {len(params)}")
        for i, (p, tensor) in enumerate(zip(params, tensors, strict=True)):
            # The name is formatted only when the check fails: there are hundreds of tensors a step.
            if tensor.shape != p.shape:
                _op.check_shape(f"{name}[{i}]", tensor, p.shape, f"like params[{i}]")
            if tensor.dtype != dtype and moment:
                _op.check_dtype(f"{name}[{i}]", tensor, dtype)
        lists.append(list(tensors))
    lists[4:] = list(ema or ()), list(copies or ())
    return tuple(lists)


def _scalars(
    params: Sequence[Tensor],
    step: Tensor,
    lr: float | Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    betas: tuple[float, float],
    ema_decay: float,
) -> Tensor:
    """The learning rate as a tensor, after checking all scalars."""
    _op.check_dtype("step", step, torch.float32)
    for name, tensor in (("step", step), ("grad_scale", grad_scale), ("found_inf", found_inf)):
        if tensor is not None:
            _op.check_shape(name, tensor, (), "a scalar tensor, shape")
            if tensor.device != params[0].device:
                raise ValueError(f"{name} is on {tensor.device}, but must be on {params[0].device} like the parameters")
    for name, value in (("betas[0]", betas[0]), ("betas[1]", betas[1])):
        if not 0 <= value < 1:
            raise ValueError(f"{name} is {value}, but must be in [0, 1)")
    if not 0 <= ema_decay <= 1:
        raise ValueError(f"ema_decay is {ema_decay}, but must be in [0, 1]")
    return lr if isinstance(lr, Tensor) else torch.full((), lr, dtype=torch.float64)
