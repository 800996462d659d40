"""LAMB for parameters of which each process holds a part: the formula of `kernels.fused_lamb`, whose trust ratio needs
the norms of whole tensors.

One sum over the processes for each list of parameters brings them. Everything else is in PyTorch's operations, which
hold one more copy of this process's parts than the fused update does.
"""

import torch
from torch import Tensor

from fastdeit.engine.optim import Update


def lamb_update(lists: Update, betas: tuple[float, float], eps: float) -> None:
    """One LAMB step in place, where `lists.total` is there; `lists.state` are the first and second moments."""
    params, (first, second), (beta1, beta2) = lists.params, lists.state, betas
    dtype, now = params[0].dtype, lists.step.double() + 1
    correction1, correction2 = ((1 - beta**now).to(dtype) for beta in betas)
    grads = torch._foreach_mul([grad.to(dtype) for grad in lists.grads], lists.verdict.factor.to(dtype))
    new_first = torch._foreach_lerp(first, grads, 1 - beta1)
    new_second = torch._foreach_mul(second, beta2)
    torch._foreach_addcmul_(new_second, grads, grads, 1 - beta2)
    roots = torch._foreach_sqrt(torch._foreach_div(new_second, correction2))
    torch._foreach_add_(roots, eps)
    updates = torch._foreach_div(new_first, roots)
    torch._foreach_div_(updates, correction1)
    torch._foreach_add_(updates, params, alpha=lists.weight_decay)
    if lists.weight_decay:
        torch._foreach_mul_(updates, _trust_ratios(lists, updates))
    torch._foreach_mul_(updates, lists.lr)
    skip = lists.verdict.skip
    _write(skip, params, torch._foreach_sub(params, updates))
    _write(skip, first, new_first)
    _write(skip, second, new_second)
    _write(skip, [lists.step], [lists.step + 1])
    if lists.ema is not None:
        _write(skip, lists.ema, torch._foreach_lerp(lists.ema, params, 1 - lists.ema_decay))


def _trust_ratios(lists: Update, updates: list[Tensor]) -> list[Tensor]:
    """For each parameter its norm over that of its update; 1 where one of them is 0."""
    own = [torch.stack(torch._foreach_norm(tensors)) for tensors in (lists.params, updates)]
    length, step = lists.total(torch.stack(own).double().square()).sqrt().to(updates[0].dtype)
    return list(torch.where((length > 0) & (step > 0), length / step, 1.0).unbind())


def _write(skip: Tensor, old: list[Tensor], new: list[Tensor]) -> None:
    torch._foreach_copy_(old, [torch.where(skip, before, after) for before, after in zip(old, new, strict=True)])
