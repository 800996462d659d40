"""What autograd is told of an op, and what it cannot be asked: `torch.func`, forward-mode AD, second derivatives."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def function(name: str, save: Callable, differentiate: Callable) -> type[torch.autograd.Function]:
    """The `autograd.Function` of (backend, *arguments)."""

    # Without `setup_context`: with one, `apply` asks for the signature of `forward` in every call.
    def forward(ctx: Any, backend: Any, *args: Any) -> Any:
        ctx.backend = backend
        output = backend.forward(*args)
        save(ctx, args, output)
        return output

    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        result = differentiate(ctx, *grads)
        return (None, *result) if isinstance(result, tuple) else (None, result)

    body = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"fastdeit_{name}", (torch.autograd.Function,), body)


def check_first_order(name: str) -> None:
    """RuntimeError in a backward of which a graph is being made (`create_graph=True`), for what has no second
    derivative. To raise later, as `once_differentiable` does, is not safe: a gradient whose incoming gradient is a
    constant would be a constant, too, and so would one of which autograd is asked for the gradient of chosen inputs."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} has no second derivative, but create_graph=True asks for one. Inside torch.func, as in "
            "grad(grad(f)), the op runs on PyTorch's own operations, unless it is forced; they may have one"
        )


def transformed() -> bool:
    """Whether this runs inside `torch.func` or a level of forward-mode AD."""
    return torch.autograd.forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None


transformed._dynamo_marked_constant = True  # Dynamo itself guards both


class _BiasGradient(torch.autograd.Function):
    """x itself, and to the bias that it contains the gradient of x summed over all rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.dtype = bias.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        return grad, grad.reshape(-1, grad.shape[-1]).sum(0, dtype=ctx.dtype) if ctx.needs_input_grad[1] else None


def with_bias_gradient(x: Tensor, bias: Tensor | None) -> Tensor:
    """`x [..., C]`, made with `bias.detach()`, now with a gradient for `bias [C]`: what some kernels have for nothing,
    as native autograd has it at the usual price."""
    if bias is None:
        return x
    if transformed():
        return x + (bias - bias.detach()).to(x.dtype)  # plus 0, with a derivative of any kind and order
    return _BiasGradient.apply(x, bias)
