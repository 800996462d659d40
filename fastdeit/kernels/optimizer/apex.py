"""NVIDIA apex's kernels for AdamW and LAMB, to compare with: they run where they are asked for by name.

apex keeps no averages, overwrites the gradients, and stops at an integer flag; so the gradients are copied, and EMA and
copies follow as they do for the reference. Its kernels that take lr, step and scale from the device are used, which
never make the host wait.
"""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastdeit.kernels import _triton
from fastdeit.kernels.optimizer import _update

_CHUNK = 2048 * 32
_DECOUPLED_DECAY = _BIAS_CORRECTION = _GRAD_AVERAGING = 1
_USE_NVLAMB = False
_KERNELS = "multi_tensor_adam_capturable", "multi_tensor_lamb_mp"


@cache
def _kernels() -> ModuleType | None:
    """apex's extension, None where it is missing or older than the kernels needed here."""
    try:
        module = import_module("amp_C")
    except ImportError:
        return None
    return module if all(hasattr(module, name) for name in _KERNELS) else None


def capability(device: torch.device, forced: bool) -> tuple[bool, str]:
    """Whether apex can run on `device`, and the reason; only where it is forced."""
    if not forced:
        return False, "apex is there to compare with: it runs where it is asked for by name"
    if _kernels() is None:
        return False, (
            "NVIDIA apex with its CUDA extensions (amp_C) is not installed; build it from github.com/NVIDIA/apex, "
            "for the package `apex` of PyPI is an unrelated project"
        )
    return device.type == "cuda", "NVIDIA apex" if device.type == "cuda" else "apex needs a CUDA device"


def adamw(*arguments: Any) -> None:
    """AdamW by `multi_tensor_adam_capturable`."""
    a = _update.AdamArguments(*arguments)
    lists, flag, scale, lr = _inputs(a)
    numbers = lr, a.beta1, a.beta2, a.eps, (a.step + 1).int(), _DECOUPLED_DECAY, _BIAS_CORRECTION, a.weight_decay
    _kernels().multi_tensor_adam_capturable(_CHUNK, flag, lists, *numbers, scale)
    _finish(a, flag)


def lamb(*arguments: Any) -> None:
    """LAMB by `multi_tensor_lamb_mp`."""
    a = _update.AdamArguments(*arguments)
    lists, flag, scale, lr = _inputs(a)
    norm, limit = torch.zeros_like(scale), torch.ones_like(scale)  # below the limit: clipping is in the scale already
    numbers = lr, a.beta1, a.beta2, a.eps, (a.step + 1).int(), _BIAS_CORRECTION, a.weight_decay
    modes = _GRAD_AVERAGING, _DECOUPLED_DECAY, norm, limit, _USE_NVLAMB
    _kernels().multi_tensor_lamb_mp(_CHUNK, flag, lists, *numbers, *modes, flag.float(), scale)
    _finish(a, flag)


def _inputs(a: _update.AdamArguments) -> tuple[list[Sequence[Tensor]], Tensor, Tensor, Tensor]:
    """apex's lists, its int32 flag to skip, and the factor of the gradients and lr as float32, all on the device."""
    _triton.require(a.params[0].dtype == torch.float32, f"apex does not update {a.params[0].dtype}")
    dense = all(t.is_contiguous() for tensors in (a.params, a.exp_avgs, a.exp_avg_sqs) for t in tensors)
    _triton.require(dense, "apex does not take tensors that are not contiguous")
    device = a.params[0].device
    flag = torch.zeros(1, device=device) if a.found_inf is None else a.found_inf.reshape(1)
    scale = torch.ones((), device=device) if a.grad_scale is None else a.grad_scale.float()
    # A host's lr is filled in by a kernel: copying it would make the host wait.
    lr = torch.full((), float(a.lr), device=device) if _update.host_may_look(a.lr) else a.lr.float()
    grads = [torch.empty_like(p).copy_(g) for p, g in zip(a.params, a.grads, strict=True)]
    return [grads, a.params, a.exp_avgs, a.exp_avg_sqs], (flag != 0).int(), scale, lr


def _finish(a: _update.AdamArguments, flag: Tensor) -> None:
    skip = flag[0] != 0
    _update.write(skip, [a.step], [a.step + 1])
    _update.follow(a.params, skip, a.ema, a.ema_decay, a.copies)
