"""The public functions of optimizers: updates of many tensors in place, and the global norm."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastdeit.kernels import _op
from fastdeit.kernels.optimizer import adamw, lamb, norm, sgd


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
    states = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    *updated, ema, copies = _lists(params, grads, states, ema, copies)
    _check_adam(params, step, betas)
    lr = _scalars(params, lr, grad_scale, found_inf, ema_decay)
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
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    ema: Sequence[Tensor] | None = None,
    ema_decay: float = 0.0,
    copies: Sequence[Tensor] | None = None,
) -> None:
    """One LAMB step in place, with the semantics of NVIDIA apex's FusedLAMB (`adam_w_mode`, `use_nvlamb=False`).

    The arguments are those of `fused_adamw`. The trust ratio applies where weight_decay is not 0, and to tensors whose
    norm and whose update's norm are not 0. FusedLAMB also clips the gradients to a norm over all of them,
    `max_grad_norm=1.0`; here that is a grad_scale of `1 / global_norm(all gradients).clamp(min=1)`.
    """
    states = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    *updated, ema, copies = _lists(params, grads, states, ema, copies)
    _check_adam(params, step, betas)
    lr = _scalars(params, lr, grad_scale, found_inf, ema_decay)
    with torch.no_grad():
        lamb.OP(*updated, step, lr, *betas, eps, weight_decay, grad_scale, found_inf, ema, ema_decay, copies)


def fused_sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    lr: float | Tensor,
    *,
    momentum: float,
    weight_decay: float,
    nesterov: bool = False,
    decoupled: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    ema: Sequence[Tensor] | None = None,
    ema_decay: float = 0.0,
    copies: Sequence[Tensor] | None = None,
) -> None:
    """One SGD step in place, with the result of `torch.optim.SGD` (dampening 0).

    momentum_buffers  in the parameters' shape and dtype, zeros before the first update
    momentum          in [0, 1)
    nesterov          look ahead by one momentum step; needs momentum
    decoupled         decay the parameters by lr * weight_decay, instead of adding weight_decay * param to the gradients
    others            as of `fused_adamw`
    """
    *updated, ema, copies = _lists(params, grads, {"momentum_buffers": momentum_buffers}, ema, copies)
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum}, but must be in [0, 1)")
    if nesterov and momentum == 0:
        raise ValueError("nesterov needs a momentum above 0")
    lr = _scalars(params, lr, grad_scale, found_inf, ema_decay)
    numbers = momentum, nesterov, decoupled, weight_decay
    with torch.no_grad():
        sgd.OP(*updated, lr, *numbers, grad_scale, found_inf, ema, ema_decay, copies)


def _lists(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Mapping[str, Sequence[Tensor]],
    ema: Sequence[Tensor] | None,
    copies: Sequence[Tensor] | None,
) -> tuple[list[Tensor], ...]:
    """(params, grads, states, ema, copies) as lists, an absent one empty, after checking lengths, shapes and dtypes."""
    if not params:
        raise ValueError("params is empty: there is nothing to update")
    dtype = params[0].dtype
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"params are {dtype}, but must be float32 or float64; keep 16-bit weights in `copies`")
    own = {**states, "ema": ema or params}  # in the parameters' dtype
    for name, tensors in {"grads": grads, **own, "copies": copies or params}.items():
        if len(tensors) != len(params):
            raise ValueError(f"{name} has {len(tensors)} tensors, but params has {len(params)}")
        for i, (p, tensor) in enumerate(zip(params, tensors, strict=True)):
            # The name is formatted only when the check fails: there are hundreds of tensors a step.
            if tensor.shape != p.shape:
                _op.check_shape(f"{name}[{i}]", tensor, p.shape, f"like params[{i}]")
            if tensor.dtype != dtype and name in own:
                _op.check_dtype(f"{name}[{i}]", tensor, dtype)
    return tuple(map(list, (params, grads, *states.values(), ema or (), copies or ())))


def _check_adam(params: Sequence[Tensor], step: Tensor, betas: tuple[float, float]) -> None:
    """Check the step and the betas of an optimizer with Adam's moments."""
    _op.check_dtype("step", step, torch.float32)
    _check_scalar("step", step, params[0].device)
    for name, value in (("betas[0]", betas[0]), ("betas[1]", betas[1])):
        if not 0 <= value < 1:
            raise ValueError(f"{name} is {value}, but must be in [0, 1)")


def _scalars(
    params: Sequence[Tensor],
    lr: float | Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    ema_decay: float,
) -> Tensor:
    """The learning rate as a tensor, after checking the scalars that all updates have."""
    for name, tensor in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if tensor is not None:
            _check_scalar(name, tensor, params[0].device)
    if not 0 <= ema_decay <= 1:
        raise ValueError(f"ema_decay is {ema_decay}, but must be in [0, 1]")
    return lr if isinstance(lr, Tensor) else torch.full((), lr, dtype=torch.float64)


def _check_scalar(name: str, tensor: Tensor, device: torch.device) -> None:
    _op.check_shape(name, tensor, (), "a scalar tensor, shape")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, but must be on {device} like the parameters")
