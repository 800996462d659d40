"""The public functions of optimizers: updates of many tensors in place, and the global norm."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from operator import attrgetter, mul

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from fastdeit.kernels import _checks
from fastdeit.kernels.optimizer import adamw, lamb, norm, sgd


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """2-norm of all elements of all tensors together: a float32 scalar on their device, accumulated in float32.

    A norm of 1.8e19 and more, whose square is beyond float32, is infinite though every element is finite: a gradient of
    that size is as lost as one that overflowed itself. Elements below 1e-23, whose squares are 0, count for nothing.
    """
    if not tensors:
        raise ValueError("tensors is empty: the norm needs at least one tensor to know its device")
    for i, tensor in enumerate(tensors):
        _check_kind(f"tensors[{i}]", tensor, tensors[0])
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

    params                 float32 or float64 tensors of one dtype, each in memory of its own: one dense block, in any
                           order of the dimensions
    grads                  their gradients, of any floating dtype and layout; not changed
    exp_avgs, exp_avg_sqs  first and second moments, in the parameters' shape, dtype and layout
    step                   float32 scalar tensor: updates so far; incremented
    lr                     float, or floating scalar tensor. A CUDA graph repeats the float it was captured with, and
                           reads a tensor on the device again
    grad_scale             float32 scalar tensor that multiplies the gradients (unscaling, clipping); None is 1
    found_inf              bool or float scalar tensor: nonzero leaves every argument bit for bit as it is; None is 0
    ema, ema_decay         averages like params: ema = ema_decay * ema + (1 - ema_decay) * param, after the update
    copies                 tensors of any floating dtype that take the updated parameters

    step, grad_scale and found_inf are on the parameters' device. Nothing on a GPU is read by the host. ValueError or
    TypeError names the argument that is none of this.
    """
    states = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    *updated, ema, copies = _lists(params, grads, states, ema, copies)
    _check_adam(params, step, betas, eps)
    lr = _scalars(params, lr, weight_decay, grad_scale, found_inf, ema_decay)
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
    _check_adam(params, step, betas, eps)
    lr = _scalars(params, lr, weight_decay, grad_scale, found_inf, ema_decay)
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
    _checks.check_number("momentum", momentum, 0, 1, below=True)
    if nesterov and momentum == 0:
        raise ValueError("nesterov needs a momentum above 0")
    lr = _scalars(params, lr, weight_decay, grad_scale, found_inf, ema_decay)
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
    own = {"params": params, **states, "ema": ema or params}  # in the parameters' dtype
    compiling = torch.compiler.is_compiling()
    places = [] if compiling else list(map(_PLACE, params))
    for name, tensors in {**own, "grads": grads, "copies": copies or params}.items():
        if len(tensors) != len(params):
            raise ValueError(f"{name} has {len(tensors)} tensors, but params has {len(params)}")
        # There are hundreds of tensors a step: whole lists first, through C, tensor by tensor where anything differs.
        if compiling or list(map(_PLACE, tensors)) != places or not _of_sound_dtypes(tensors, dtype, name in own):
            for i, (p, tensor) in enumerate(zip(params, tensors, strict=True)):
                _checks.check_shape(f"{name}[{i}]", tensor, p.shape, f"like params[{i}]")
                if name in own:
                    _checks.check_dtype(f"{name}[{i}]", tensor, dtype)
                _check_kind(f"{name}[{i}]", tensor, params[0])
    written = {"params": params, **states, "ema": ema or (), "copies": copies or ()}
    _check_layouts(written)
    _check_own_memory(written)
    return tuple(map(list, (params, grads, *states.values(), ema or (), copies or ())))


_PLACE, _DTYPE, _ITEMSIZE = attrgetter("shape", "layout", "device"), attrgetter("dtype"), attrgetter("itemsize")


def _of_sound_dtypes(tensors: Sequence[Tensor], dtype: torch.dtype, own: bool) -> bool:
    dtypes = set(map(_DTYPE, tensors))
    return dtypes == {dtype} if own else all(kind.is_floating_point for kind in dtypes)


def _check_kind(name: str, tensor: Tensor, first: Tensor) -> None:
    """TypeError unless the tensor is floating and not sparse, ValueError unless it is where the first one is."""
    _checks.check_floating(name, tensor)
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} is {tensor.layout}, but must be a dense tensor, as of to_dense()")
    _checks.check_device(name, tensor, first, "the first of all tensors")


def _check_layouts(written: Mapping[str, Sequence[Tensor]]) -> None:
    """ValueError unless each tensor fills one block of memory, in the same order as its parameter: kernels go through
    memory and look at no strides, those of `torch.optim` as well as ours."""
    if all(all(map(Tensor.is_contiguous, tensors)) for tensors in written.values()):
        return
    for name, tensors in written.items():
        for i, (p, tensor) in enumerate(zip(written["params"], tensors, strict=False)):
            own = _order(tensor)
            if not _is_dense(own):
                raise ValueError(
                    f"{name}[{i}] has shape {list(tensor.shape)} and strides {list(tensor.stride())}, but must fill "
                    "one block of memory without gaps or repetitions, as a clone does"
                )
            if own != _order(p):
                raise ValueError(
                    f"{name}[{i}] has strides {list(tensor.stride())}, but must have {list(p.stride())} like "
                    f"params[{i}], as torch.zeros_like(params[{i}]) has"
                )


def _order(tensor: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the dimensions that matter: those of one element have any stride."""
    return [pair for pair in zip(tensor.shape, tensor.stride(), strict=True) if pair[0] != 1] if tensor.numel() else []


def _is_dense(order: list[tuple[int, int]]) -> bool:
    filled = 1
    for size, stride in sorted(order, key=lambda pair: pair[1]):
        if stride != filled:
            return False
        filled *= size
    return True


def _check_own_memory(written: Mapping[str, Sequence[Tensor]]) -> None:
    """ValueError where two tensors that are written share memory, such as one parameter under two names: which of two
    updates it keeps would be left to chance. Tensors without an address, such as fakes, are not looked at."""
    if torch.compiler.is_compiling() or written["params"][0].device.type == "meta":
        return
    tensors = [tensor for tensors in written.values() for tensor in tensors]
    if FakeTensor in set(map(type, tensors)):
        return
    lengths = map(mul, map(Tensor.numel, tensors), map(_ITEMSIZE, tensors))
    shared = _shared(tuple(map(Tensor.data_ptr, tensors)), tuple(lengths))
    if shared is not None:
        names = [f"{name}[{i}]" for name, tensors in written.items() for i in range(len(tensors))]
        one, other = (names[place] for place in shared)
        raise ValueError(
            f"{one} and {other} share memory, but each must have its own: pass a tensor that is in two places once"
        )


@lru_cache(64)
def _shared(addresses: tuple[int, ...], lengths: tuple[int, ...]) -> tuple[int, int] | None:
    """Places of the first two spans of memory that overlap. Tensors that are updated stay where they are, so that most
    steps find the answer here. Those without memory, such as a DTensor or an empty tensor, have address or length 0."""
    spans = sorted((a, a + n, i) for i, (a, n) in enumerate(zip(addresses, lengths, strict=True)) if a and n)
    pairs = ((one, other) for (_, end, one), (start, _, other) in pairwise(spans) if start < end)
    return next((tuple(sorted(pair)) for pair in pairs), None)


def _check_adam(params: Sequence[Tensor], step: Tensor, betas: tuple[float, float], eps: float) -> None:
    """Check the step and the numbers of an optimizer with Adam's moments."""
    _checks.check_dtype("step", step, torch.float32)
    _check_scalar("step", step, params[0].device)
    for i, beta in enumerate(betas):
        _checks.check_number(f"betas[{i}]", beta, 0, 1, below=True)
    _checks.check_number("eps", eps, 0)


def _scalars(
    params: Sequence[Tensor],
    lr: float | Tensor,
    weight_decay: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    ema_decay: float,
) -> Tensor:
    """The learning rate as a tensor, after checking the scalars that all updates have."""
    for name, tensor in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if tensor is not None:
            _check_scalar(name, tensor, params[0].device)
    if grad_scale is not None:
        _checks.check_floating("grad_scale", grad_scale)
    _checks.check_number("weight_decay", weight_decay, 0)
    _checks.check_number("ema_decay", ema_decay, 0, 1)
    if not isinstance(lr, Tensor):
        _checks.check_number("lr", lr, 0)
        return torch.full((), lr, dtype=torch.float64)
    _checks.check_floating("lr", lr)
    _checks.check_shape("lr", lr, (), "a float, or a scalar tensor, shape")
    if _checks.can_look_at(lr):
        _checks.check_number("lr", lr.item(), 0)
    return lr


def _check_scalar(name: str, tensor: Tensor, device: torch.device) -> None:
    _checks.check_shape(name, tensor, (), "a scalar tensor, shape")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, but must be on {device} like the parameters")
