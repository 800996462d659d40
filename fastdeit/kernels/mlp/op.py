"""The MLP of a transformer block, alone and after a LayerNorm.

    pre = x w1^T + b1        act = gelu(pre) = pre * Phi(pre)        out = act w2^T + b2

with Phi the standard normal distribution function (exact GELU, by erf). Backward:

    dact = dout w2           dpre = dact * (Phi(pre) + pre * phi(pre))        dx = dpre w1
    dw2 = dout^T act         db2 = sum dout        dw1 = dpre^T x             db1 = sum dpre

x is [..., C], out [..., C']; w1 [F, C], b1 [F], w2 [C', F], b2 [C'], as of nn.Linear. With `recompute` only pre is
saved and act is made again; without, act is saved too: 2 more bytes of memory per element of pre in 16 bit, and 2 fewer
to write in backward. Bytes moved at best per element of pre in 16 bit, beside the operands of the matrix products:
forward writes 2, backward reads 2, since GELU, its derivative and the bias gradients fit into the products' epilogues.

Two backends in Triton. "triton" leaves the products to the vendor's library; between those of its backward stands one
kernel that makes dpre, db1 and, if need be, act in one pass (`gelu.py`): it reads 4 and writes 4, or 2 without act.
"epilogue" has products of its own that do all this on the way (`gelu_products.py`) and needs tensor cores; it is taken
where it was measured to be faster, or asked for. So are "epilogue_forward" and "epilogue_backward", which have them on
one of the two ways, and the vendor's on the other. "quack" (`quack.py`) has QuACK do what "epilogue" does, where it is
asked for.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdeit.kernels import _checks, _op, _triton
from fastdeit.kernels._example import BASE, DEITS, Example, Maker
from fastdeit.kernels.layer_norm import fused
from fastdeit.kernels.layer_norm.reference import normalize, normalize_backward
from fastdeit.kernels.mlp import gelu, gelu_products, quack


def reference(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, recompute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, pre, act) as in the module's formula, in the dtype of `F.linear`; pre and act are for backward, and act is
    empty, `[0]`, where that recomputes it."""
    pre = F.linear(x, w1, b1)
    act = F.gelu(pre)
    return F.linear(act, w2, b2), pre, _kept(act, recompute)


def native(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, recompute: bool) -> tuple[Tensor]:
    """(out,) of `reference`: native autograd keeps what it needs."""
    return (F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2),)


def _kept(act: Tensor, recompute: bool) -> Tensor:
    return act.new_empty(0) if recompute else act


def reference_backward(
    grad: Tensor, x: Tensor, w1: Tensor, w2: Tensor, pre: Tensor, act: Tensor | None, with_b2: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w1, b1, w2, b2 (empty unless `with_b2`); act is recomputed if it is None. The derivative of GELU
    and the sums over tokens are at least float32."""
    compute = _op.statistics_dtype(pre.dtype)
    rows, grads, pres = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (x, grad, pre))
    exact = pres.to(compute)
    cdf = 0.5 * (1 + torch.erf(exact * math.sqrt(0.5)))
    density = torch.exp(-0.5 * exact * exact) * (1 / math.sqrt(2 * math.pi))
    dpre = ((grads @ w2).to(compute) * (cdf + exact * density)).to(pre.dtype)
    acts = (exact * cdf).to(pre.dtype) if act is None else act.reshape(pres.shape)
    return (
        (dpre @ w1).reshape(x.shape),
        dpre.T @ rows,
        dpre.sum(0, dtype=compute).to(w1.dtype),
        grads.T @ acts,
        grads.sum(0, dtype=compute).to(w2.dtype) if with_b2 else w2.new_empty(0),
    )


def layer_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, pre, act, mean, rstd): `reference` of the LayerNorm of x, and the statistics for backward."""
    normed, mean, rstd = normalize(x, weight, bias, eps, _op.autocast_dtype(x) or w1.dtype)
    return *reference(normed, w1, b1, w2, b2, recompute), mean, rstd


def _normed_native(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *others: Any) -> tuple[Tensor]:
    normed, _, _ = normalize(x, weight, bias, eps, _op.autocast_dtype(x) or others[0].dtype)
    return native(normed, *others)


def layer_norm_reference_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    w1: Tensor,
    w2: Tensor,
    pre: Tensor,
    act: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    with_b2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, w1, b1, w2, b2, the last as of `reference_backward`; the normalised tokens are
    recomputed."""
    normed = ((x - mean) * rstd * weight + bias).to(pre.dtype)
    dnormed, *grads = reference_backward(grad, normed, w1, w2, pre, act, with_b2)
    dx, dweight, dbias = normalize_backward(dnormed, x, weight, mean, rstd)
    return dx.to(x.dtype), dweight, dbias, *grads


def triton_forward(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, recompute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference`, whose products carry the biases; only the backward is fused."""
    _triton.require_dtypes(x, w1, b1, w2, b2)
    return reference(x, w1, b1, w2, b2, recompute)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _products_forward(
    product_gelu: Callable, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, recompute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference` with GELU in the first product: `product_gelu`, as of `gelu_products`."""
    pre, act = (t.reshape(*x.shape[:-1], -1) for t in product_gelu(_rows(x), w1.contiguous(), b1.contiguous()))
    return F.linear(act, w2, b2), pre, _kept(act, recompute)


def _backward(
    product_gelu_backward: Callable,
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    pre: Tensor,
    act: Tensor | None,
    with_b2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`reference_backward` with the first product and all that stands behind it by `product_gelu_backward`, as of
    `gelu_products`."""
    rows, grads, pres = (_rows(tensor) for tensor in (x, grad, pre))
    dpre, again, db1 = product_gelu_backward(grads, w2, pres, act=act is None)
    acts = again if act is None else _rows(act)
    return (
        (dpre @ w1).reshape(x.shape),
        dpre.T @ rows,
        db1.to(w1.dtype),
        grads.T @ acts,
        gelu.column_sums(grads).to(w2.dtype) if with_b2 else w2.new_empty(0),
    )


def _library_product(dout: Tensor, w2: Tensor, pre: Tensor, *, act: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """The product is the vendor's, and all that stands behind it one pass."""
    _triton.require_dtypes(dout, w2, pre)
    return gelu.backward(dout @ w2, pre, act=act)


triton_backward = partial(_backward, _library_product)


def _forward_before_products(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, recompute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`triton_forward` of what the backward of `gelu_products` takes: refusing there would be too late."""
    gelu_products.check(x, w1, w2)
    return triton_forward(x, w1, b1, w2, b2, recompute)


def _normed_forward(mlp_forward: Callable, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`layer_norm_reference` with the LayerNorm in one launch."""
    weight, bias, eps, w1, *others = args
    normed, mean, rstd = fused.plain_triton_forward(x, weight, bias, eps, w1.dtype)
    return *mlp_forward(normed, w1, *others), mean, rstd


def _normed_backward(
    mlp_backward: Callable,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    w1: Tensor,
    w2: Tensor,
    pre: Tensor,
    act: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    with_b2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`layer_norm_reference_backward`; the normalised tokens are recomputed in one launch."""
    normed = fused.triton_apply(x, weight, bias, mean, rstd, pre.dtype)
    dnormed, *grads = mlp_backward(grad, normed, w1, w2, pre, act, with_b2)
    return *fused.plain_triton_backward(dnormed, x, weight, mean, rstd), *grads


def _mixed_capability(device: torch.device, forced: bool) -> tuple[bool, str]:
    """That of "epilogue". The kernels are those of "triton" and "epilogue", so the lint compiles none for it."""
    return _triton.capability(device, forced, needs=80)


_epilogue, _quack = (
    _op.Backend(
        name,
        capability,
        partial(_products_forward, products.product_gelu),
        partial(_backward, products.product_gelu_backward),
    )
    for name, capability, products in (
        ("epilogue", partial(_triton.capability, needs=80), gelu_products),
        ("quack", quack.capability, quack),
    )
)
_PLAIN = [
    _op.Backend("triton", _triton.capability, triton_forward, triton_backward),
    _epilogue,
    _op.Backend("epilogue_forward", _mixed_capability, _epilogue.forward, triton_backward),
    _op.Backend("epilogue_backward", _mixed_capability, _forward_before_products, _epilogue.backward),
    _quack,
]
_AFTER_NORM = [
    backend._replace(
        forward=partial(_normed_forward, backend.forward), backward=partial(_normed_backward, backend.backward)
    )
    for backend in _PLAIN
]


def _example(make: Maker, recompute: bool) -> list[Any]:
    return [make.activations(), *make.mlp_weights(), recompute]


def _normed_example(make: Maker, recompute: bool) -> list[Any]:
    tokens = make.activations(dtype=make.full)
    return [tokens, make.vector(), make.vector(), 1e-6, *make.mlp_weights(), recompute]


def _bytes(args: Sequence[Any]) -> float:
    """Operands of the six products, each once: x, pre, act, out and their gradients, and the weights."""
    x, w1, *_ = args
    hidden, width = w1.shape
    return w1.itemsize * (x.numel() // width * (5 * width + 6 * hidden) + 6 * width * hidden)


def _normed_bytes(args: Sequence[Any]) -> float:
    x, *_, w1, _, _, _, _ = args
    return _bytes([x, w1]) + x.numel() * 12


_EXAMPLES = [
    Example("", partial(_example, recompute=True), compiled=[*DEITS, (BASE, torch.float32)], bytes=_bytes),
    Example("act kept", partial(_example, recompute=False)),
]
_NORMED_EXAMPLES = [
    Example("", partial(_normed_example, recompute=True), compiled=DEITS, bytes=_normed_bytes),
    Example("act kept", partial(_normed_example, recompute=False)),
]
_PRODUCTS = {"w1", "b1", "w2", "b2"}
OP = _op.Op(
    "mlp",
    reference,
    reference_backward,
    examples=_EXAMPLES,
    others=_PLAIN,
    native=native,
    cast={"x", *_PRODUCTS},
)
NORMED = _op.Op(
    "layer_norm_mlp",
    layer_norm_reference,
    layer_norm_reference_backward,
    examples=_NORMED_EXAMPLES,
    others=_AFTER_NORM,
    native=_normed_native,
    cast=_PRODUCTS,
)


def _fake_weight_gradients(w1: Tensor, w2: Tensor, with_b2: bool) -> tuple[Tensor, ...]:
    biases = w1.new_empty(w1.shape[:1]), w2.new_empty(w2.shape[:1] if with_b2 else 0)
    return w1.new_empty(w1.shape), biases[0], w2.new_empty(w2.shape), biases[1]


def _fake_results(rows: torch.Size, w1: Tensor, w2: Tensor, recompute: bool) -> tuple[Tensor, Tensor, Tensor]:
    out, pre, act = (w.new_empty(*rows, w.shape[0]) for w in (w2, w1, w1))
    return out, pre, _kept(act, recompute)


@OP.registered.register_fake
def _(x, w1, b1, w2, b2, recompute):
    return _fake_results(x.shape[:-1], w1, w2, recompute)


@OP.registered_backward.register_fake
def _(grad, x, w1, w2, pre, act, with_b2):
    return x.new_empty(x.shape), *_fake_weight_gradients(w1, w2, with_b2)


@NORMED.registered.register_fake
def _(x, weight, bias, eps, w1, b1, w2, b2, recompute):
    rows = x.shape[:-1]
    mean, rstd = (x.new_empty(*rows, 1, dtype=_op.statistics_dtype(x.dtype)) for _ in range(2))
    return *_fake_results(rows, w1, w2, recompute), mean, rstd


@NORMED.registered_backward.register_fake
def _(grad, x, weight, bias, w1, w2, pre, act, mean, rstd, with_b2):
    return *(like.new_empty(like.shape) for like in (x, weight, weight)), *_fake_weight_gradients(w1, w2, with_b2)


_B2 = -2
"""Place of b2 among the arguments, from the end: in eager mode the backend stands in front of them."""


def _save(ctx, inputs, output):
    x, w1, _, w2, _, recompute = inputs
    _, pre, act = output
    ctx.mark_non_differentiable(pre, act)
    ctx.save_for_backward(x, w1, w2, pre, None if recompute else act)


def _differentiate(ctx, grad, *_):
    with_b2 = ctx.needs_input_grad[_B2]
    *grads, db2 = OP.run_backward(ctx, grad, *ctx.saved_tensors, with_b2)
    return *grads, db2 if with_b2 else None, None


def _save_normed(ctx, inputs, output):
    x, weight, bias, _, w1, _, w2, _, recompute = inputs
    _, pre, act, mean, rstd = output
    ctx.mark_non_differentiable(pre, act, mean, rstd)
    ctx.save_for_backward(x, weight, bias, w1, w2, pre, None if recompute else act, mean, rstd)


def _differentiate_normed(ctx, grad, *_):
    with_b2 = ctx.needs_input_grad[_B2]
    dx, dweight, dbias, *grads, db2 = NORMED.run_backward(ctx, grad, *ctx.saved_tensors, with_b2)
    return dx, dweight, dbias, None, *grads, db2 if with_b2 else None, None


OP.differentiable(_save, _differentiate)
NORMED.differentiable(_save_normed, _differentiate_normed)


def mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, recompute: bool = True) -> Tensor:
    """Linear, exact GELU, linear.

    x          floating `[..., C]`
    w1, b1     `[F, C]`, `[F]`
    w2, b2     `[C', F]`, `[C']`. The gradient of b2 is a pass over that of the result, which a b2 that requires none
               saves: `add_layer_norm` has it as a by-product (`branch_bias`)
    recompute  whether backward makes the activation `[..., F]` again, instead of keeping it from forward. Keeping it
               takes its bytes of memory and saves the time to write it. Native autograd, which is the reference in
               eager mode, always keeps it

    Returns `[..., C']`. All tensors have one dtype, or autocast gives them one.
    """
    _check(x, w1, b1, w2, b2)
    return OP(x, w1, b1, w2, b2, recompute)[0]


def layer_norm_mlp(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    recompute: bool = True,
) -> Tensor:
    """`mlp` of the LayerNorm of x.

    weight, bias  `[C]` of the LayerNorm, whose statistics are float32 (float64 for float64)
    eps           added to the variance
    others        as of `mlp`; the normalised tokens take w1's dtype (the autocast dtype under autocast)
    """
    _checks.check_number("eps", eps, 0)
    for name, vector in (("weight", weight), ("bias", bias)):
        _checks.check_shape(name, vector, x.shape[-1:], "[C], C the last dimension of x,")
    _check(x, w1, b1, w2, b2)
    return NORMED(x, weight, bias, eps, w1, b1, w2, b2, recompute)[0]


def _check(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> None:
    _checks.check_floating("x", x)
    for name, matrix, width in (("w1", w1, x.shape[-1]), ("w2", w2, w1.shape[0])):
        if matrix.dim() != 2 or matrix.shape[1] != width:
            raise ValueError(
                f"{name} has shape {list(matrix.shape)}, but must be [outputs, inputs] with {width} inputs"
            )
    for name, vector, matrix in (("b1", b1, w1), ("b2", b2, w2)):
        _checks.check_shape(name, vector, matrix.shape[:1], "[outputs] of its matrix")
