"""The public functions of optimizers: updates of many tensors in place, and the global norm."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdeit.kernels import _op, adamw, lamb, norm


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """2-norm of all elements of all tensors together: a float32 scalar on their device, accumulated in float32."""
    if not tensors:
        raise ValueError("tensors is empty: the norm needs at least one tensor to know its device")
    with torch.no_grad():
        return norm.OP(list(tensors))


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
    lr                     float, or float32 scalar tensor. A CUDA graph repeats the float it was captured with, and
                           reads a tensor on the device again
    grad_scale             float32 scalar tensor that multiplies the gradients (unscaling, clipping); None is 1
    found_inf              bool or float scalar tensor: nonzero leaves every argument bit for bit as it is; None is 0
    ema, ema_decay         averages like params: ema = ema_decay * ema + (1 - ema_decay) * param, after the update
    copies                 tensors of any floating dtype that take the updated parameters

    step, grad_scale and found_inf are on the parameters' device. Nothing on a GPU is read by the host.
    """
    *updated, ema, copies = _lists(params, grads, exp_avgs, exp_avg_sqs, ema, copies)
    lr = _scalars(params, step, lr, grad_scale, found_inf, betas, ema_decay)
    with torch.no_grad():
        adamw.OP(*updated, step, lr, *betas, eps, weight_decay, grad_scale, found_inf, ema, ema_decay, copies)


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
        lamb.OP(*updated, step, lr, *numbers, found_inf, ema, ema_decay, copies)


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
