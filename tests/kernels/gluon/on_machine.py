"""The backend `hopper` of attention on the CPU: its launches run on the machine."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastdeit import kernels
from fastdeit.kernels import _op, _triton
from fastdeit.kernels.attention.hopper import backend
from fastdeit.kernels.attention.op import reference
from tests.kernels import proof
from tests.kernels.gluon import machine


@contextmanager
def hopper_on_cpu() -> Iterator[None]:
    """Inside, attention is that of `hopper`, also for tensors of the CPU."""
    op = _op.OPS["attention"]
    backends = [b._replace(capability=lambda *_: (True, "")) if b.name == "hopper" else b for b in op.backends]
    with mock.patch.object(op, "backends", tuple(backends)), kernels.use(attention="hopper"):
        yield


@contextmanager
def on_machine(order: str = "forward") -> Iterator[list[str]]:
    """Inside, attention is that of `hopper`, whose programs run on the machine in this order. Gives the names of the
    kernels that were launched."""
    launched = []

    def launch(kernel: Any, grid: tuple[int], *args: Any, warps: int, stages: int = 1, **constants: Any) -> None:
        launched.append(kernel.fn.__name__)
        machine.run(kernel, grid, dict(zip(kernel.arg_names, args, strict=False)) | constants, order)

    with mock.patch.object(_triton, "launch", launch), hopper_on_cpu():
        yield launched


def packed(dtype: torch.dtype, batch: int, tokens: int, heads: int, size: float = 1.0, width: int = 64) -> Tensor:
    """Normal queries, keys and values that want a gradient."""
    values = proof.normal(batch, tokens, 3 * heads * width, dtype=torch.float32, device="cpu", seed=0)
    return (values * size).to(dtype).requires_grad_()


def far(dtype: torch.dtype, tokens: int, sign: int) -> Tensor:
    """All logits near +-6,400: the exponential of a missing key, whose logit is 0, would be 0 or infinite."""
    x = packed(torch.float32, 1, tokens, 1, 0.1).detach()
    x[..., :64] += 20.0
    x[..., 64:128] += sign * 40.0
    return x.to(dtype).requires_grad_()


def prove(
    qkv: Tensor,
    heads: int,
    *,
    bias: bool = True,
    scale: float | None = None,
    layout: str = "dense",
    within: Callable[[], AbstractContextManager] = on_machine,
) -> None:
    """Output, log-sum-exp and gradients are as good as PyTorch's: by the rule of a card, since products of bfloat16 are
    right on the machine, and nothing is cut off."""
    inputs = {"qkv": qkv, "num_heads": heads, "scale": scale}
    if bias:
        inputs["bias"] = torch.zeros(qkv.shape[2], dtype=qkv.dtype, requires_grad=True)
    with mock.patch.object(proof, "INTERPRETED", False):
        proof.prove(kernels.attention, inputs, layout, mine=within(), rounded_operands=True)
        x, scale = qkv.detach(), 0.125 if scale is None else scale
        (_, same), (_, exact) = (reference(values, heads, scale, None, None) for values in (x, x.double()))
        with within():
            _, lse = backend.forward(x, heads, scale, None, None)
        proof.assert_as_good(lse, same, exact, "lse")
