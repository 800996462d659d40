"""QuACK's products with GELU in their epilogue (github.com/Dao-AILab/quack), to compare with those of `gelu_products`:
they run where they are asked for by name. Not yet run on a GPU; QuACK compiles them for sm_90, 100 and 120.

    product_gelu            `gemm_act`, which stores pre beside act
    product_gelu_backward   `gemm_dact`, which makes act again, and then one pass over dpre for db1; without act
                            `dact_dbias_mod`, which has db1 in the epilogue

The activation is ours (`cute_gelu.py`): fewer instructions than QuACK's own. As of QuACK 0.6.5, whose products for
sm_80 are not implemented. Its default tiles are used, because tuning would
compile and time many others within a training step.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from fastdeit.kernels import _triton
from fastdeit.kernels.mlp import cute_gelu, gelu, gelu_products

_ACTIVATION = cute_gelu.NAME
_ALIGNMENT = 16  # bytes: of the copies by TMA


class _Functions(NamedTuple):
    gemm_act: Callable
    gemm_dact: Callable
    dact_dbias_mod: Callable


@cache
def _quack() -> _Functions | None:
    """QuACK's functions, None where it is missing or older than the functions needed here."""
    try:
        activation, interface, library = (
            import_module(f"quack.{name}") for name in ("activation", "gemm_interface", "epilogue.library")
        )
    except ImportError:
        return None
    if "gelu_erf" not in activation.dact_fn_map or not hasattr(library, "dact_dbias_mod"):
        return None
    cute_gelu.register(activation)
    return _Functions(interface.gemm_act, interface.gemm_dact, library.dact_dbias_mod)


def capability(device: torch.device, forced: bool) -> tuple[bool, str]:
    """Whether QuACK can run on `device`, and the reason; only where it is forced."""
    if not forced:
        return False, "QuACK is there to compare with: it runs where it is asked for by name"
    able, reason = _triton.capability(device, forced=False, needs=90)
    if able and _quack() is None:
        return False, "QuACK 0.6.5 or newer is not installed: pip install 'fastdeit[quack]'"
    return able, "QuACK" if able else reason


def product_gelu(x: Tensor, w1: Tensor, b1: Tensor) -> tuple[Tensor, Tensor]:
    """(pre, act) as of `gelu_products.product_gelu`."""
    _check(x, w1, b1)
    with torch.cuda.device_of(x):
        return _quack().gemm_act(x, w1.mT, bias=b1, activation=_ACTIVATION, tuned=False)


def product_gelu_backward(dout: Tensor, w2: Tensor, pre: Tensor, *, act: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """(dpre, gelu(pre) if `act`, db1) as of `gelu_products.product_gelu_backward`."""
    w2 = w2.contiguous()
    _check(dout, w2, pre)
    with torch.cuda.device_of(dout):
        if act:
            dpre, value = _quack().gemm_dact(dout, w2, pre, activation=_ACTIVATION, tuned=False)
            return dpre, value, gelu.column_sums(dpre)
        results = _quack().dact_dbias_mod(_ACTIVATION)(dout, w2, pre, tuned=False)
        return results["D"], None, results["dwb"]


def _check(*tensors: Tensor) -> None:
    gelu_products.check(*tensors)
    for tensor in tensors:
        wide = tensor.shape[-1] * tensor.itemsize % _ALIGNMENT == 0 and tensor.data_ptr() % _ALIGNMENT == 0
        _triton.require(wide, f"QuACK wants rows of {_ALIGNMENT} bytes or a multiple, aligned to as many")
