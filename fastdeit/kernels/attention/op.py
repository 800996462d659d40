"""Multi-head attention on packed queries, keys and values.

    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]      each [B, N, H, d] of qkv viewed as [B, N, 3, H, d]
    P = softmax(scale * q k^T)                              [B, H, N, N], never written to memory
    out = P v                                               [B, N, H*d]

Keys that a mask leaves out have no share in P. A sample without any key has out = 0, and no gradient.

Backward, with dP = dout v^T, D = rowsum(dout * out) and P = exp(scale * q k^T - lse), lse saved by the forward:

    dv = P^T dout      dS = scale * P * (dP - D)      dq = dS k      dk = dS^T q      dbias = sum_BN(dqkv)

`query_attention` is the same with queries of their own, `q [B, M, H*d]` and `kv [B, N, 2*H*d]`: M = 1 or 2 is what the
heads of a ViT read of its last block.

Logits are float32 and scaled there: q k^T in fp16 overflows beyond 65,504, the source of DeiT's NaN under AMP.

Bytes moved at best per element of out in 16 bit: forward reads 6 and writes 2; backward reads 8 and writes 6, since the
gradient is written packed, as the qkv projection's backward wants it. Forward (`forward.py`): up to 257 keys
are a few static chunks of powers of two, hence one pass without rescaling and little padding (198 keys are 128 + 64 +
16); more keys are a loop of online softmax (Milakov & Gimelshein, 2018).

Four backends are our own. Two are in Triton, and differ in the backward. "triton" has one kernel for dq and one for dk
and dv, for any number of tokens (`backward.py`); they read queries, keys and values again for each 64 of the others,
mostly from cache. "fused_backward" has one program for each head, for up to 208 tokens and without a mask
(`fused_backward.py`); it is taken where it was measured to be faster, or asked for. "hopper" is in Gluon, for sm_90 and
heads of 64: TMA and wgmma, products and softmax at once, and one program for each head in the backward, too, with five
products (`hopper/`). No card has measured it, and a trial or a name has to choose it. "native" has CUDA C++ of its
own, in fp16 and for heads of 32, 64, 96 or 128 channels, for the cards whose tensor cores Triton does not reach: sm_70
and sm_75 (`native/`, and the sources in the repository's `kernels/`). In these, each result is added up by one program,
so there are no atomics, and every run has the same bits. `libraries.py` has the attention of others.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdeit.kernels import _asked, _checks, _derivatives, _op, _triton
from fastdeit.kernels._example import BASE, BASE_FP16, DEITS, Example, Maker
from fastdeit.kernels.attention import backward, forward, fused_backward, libraries
from fastdeit.kernels.attention.hopper import backend as hopper
from fastdeit.kernels.attention.tiles import Operands
from fastdeit.kernels.native import attention as native_attention
from fastdeit.kernels.native import choice as native_choice

# ---- reference -------------------------------------------------------------------------------------------------------


def _heads(x: Tensor, parts: int, num_heads: int) -> list[Tensor]:
    """`[B, N, parts*H*d]` as `parts` tensors `[B, H, N, d]`."""
    # Split before transposing: the gradients of the parts are then packed by one copy instead of two.
    width = x.shape[2] // (parts * num_heads)
    return [part.transpose(1, 2) for part in x.reshape(*x.shape[:2], parts, num_heads, width).unbind(2)]


def _packed(*parts: Tensor) -> Tensor:
    """The inverse of `_heads`."""
    return torch.stack([part.transpose(1, 2) for part in parts], 2).flatten(2)


def native(qkv: Tensor, num_heads: int, scale: float, bias: Tensor | None, key_mask: Tensor | None) -> Tensor:
    """out `[B, N, H*d]` of qkv `[B, N, 3*H*d]`, in qkv's dtype, or the autocast dtype under autocast."""
    qkv = _derivatives.with_bias_gradient(qkv, bias)
    return _attended(*_heads(qkv, 3, num_heads), scale, key_mask)


def _attended(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None, logit_bias: Tensor | None = None
) -> Tensor:
    """out `[B, M, H*d]`, by PyTorch's own attention."""
    if key_mask is None:
        return _packed(F.scaled_dot_product_attention(q, k, v, attn_mask=logit_bias, scale=scale))
    # PyTorch makes 0 or NaN of a sample without keys, as its own backend wills. So it gets all keys, and then 0.
    none = ~key_mask.any(1)
    taken = (key_mask | none[:, None])[:, None, None]
    if logit_bias is not None:
        taken = torch.where(taken, logit_bias, float("-inf"))
    out = _packed(F.scaled_dot_product_attention(q, k, v, attn_mask=taken, scale=scale))
    return out.masked_fill(none[:, None, None], 0)


def _query_native(q: Tensor, kv: Tensor, num_heads: int, scale: float) -> Tensor:
    return _packed(F.scaled_dot_product_attention(*_heads(q, 1, num_heads), *_heads(kv, 2, num_heads), scale=scale))


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    lse = torch.logsumexp(_logits(q, k, scale, key_mask), -1)
    lse = lse.masked_fill(lse == -math.inf, math.inf)  # no key: all probabilities of the backward are then 0
    return _attended(q, k, v, scale, key_mask), lse


def _logits(q: Tensor, k: Tensor, scale: float, key_mask: Tensor | None) -> Tensor:
    compute = _op.statistics_dtype(q.dtype)
    logits = scale * q.to(compute) @ k.to(compute).mT
    return logits if key_mask is None else logits.masked_fill(~key_mask[:, None, None], -math.inf)


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, `[B, H, N, d]`, in the dtype of lse."""
    num_heads = q.shape[1]
    (grad,), (out,) = _heads(grad.to(lse.dtype), 1, num_heads), _heads(out.to(lse.dtype), 1, num_heads)
    q, k, v = (part.to(lse.dtype) for part in (q, k, v))
    p = torch.exp(_logits(q, k, scale, key_mask) - lse[..., None])
    ds = scale * p * (grad @ v.mT - (grad * out).sum(-1, keepdim=True))
    return ds @ k, ds.mT @ q, p.mT @ grad


def reference(
    qkv: Tensor, num_heads: int, scale: float, bias: Tensor | None, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(out, lse float32 `[B, H, N]`) as in the module's formula; lse is for backward, and infinite without a key."""
    return _forward(*_heads(qkv, 3, num_heads), scale, key_mask)


def reference_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    scale: float,
    with_bias: bool,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradient of qkv, packed as qkv, and its sum over all tokens, in the dtype of lse (empty unless `with_bias`)."""
    dqkv = _packed(*_backward(grad, *_heads(qkv, 3, num_heads), out, lse, scale, key_mask))
    return dqkv.to(qkv.dtype), dqkv.sum((0, 1)) if with_bias else dqkv.new_empty(0)


def query_reference(q: Tensor, kv: Tensor, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """(out `[B, M, H*d]`, lse float32 `[B, H, M]`)."""
    return _forward(*_heads(q, 1, num_heads), *_heads(kv, 2, num_heads), scale)


def query_reference_backward(
    grad: Tensor, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, num_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of q and kv."""
    dq, dk, dv = _backward(grad, *_heads(q, 1, num_heads), *_heads(kv, 2, num_heads), out, lse, scale)
    return _packed(dq).to(q.dtype), _packed(dk, dv).to(kv.dtype)


# ---- Triton ----------------------------------------------------------------------------------------------------------


def _query_operands(q: Tensor, kv: Tensor, num_heads: int, scale: float) -> Operands:
    return Operands(q, *kv.split(kv.shape[2] // 2, 2), num_heads, scale)


def _bytes_of(key_mask: Tensor | None) -> Tensor | None:
    """A mask as the kernels read it."""
    return None if key_mask is None else key_mask.contiguous().view(torch.uint8)


def triton_forward(
    qkv: Tensor, num_heads: int, scale: float, bias: Tensor | None, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`reference` in one launch."""
    return forward.forward(Operands.of_packed(qkv.contiguous(), num_heads, scale), _bytes_of(key_mask))


def triton_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    scale: float,
    with_bias: bool,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`reference_backward` in two launches, and a small sum for the bias."""
    qkv = qkv.contiguous()
    dqkv = torch.empty_like(qkv)
    operands, gradients = (Operands.of_packed(packed, num_heads, scale) for packed in (qkv, dqkv))
    sums = backward.backward(grad, operands, out, lse, gradients, _bytes_of(key_mask), sums=with_bias)
    return dqkv, lse.new_empty(0) if sums is None else sums


def query_triton_forward(q: Tensor, kv: Tensor, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """`query_reference` in one launch."""
    return forward.forward(_query_operands(q.contiguous(), kv.contiguous(), num_heads, scale))


def query_triton_backward(
    grad: Tensor, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, num_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    """`query_reference_backward` in two launches."""
    q, kv = q.contiguous(), kv.contiguous()
    dq, dkv = torch.empty_like(q), torch.empty_like(kv)
    operands, gradients = (_query_operands(a, b, num_heads, scale) for a, b in ((q, kv), (dq, dkv)))
    backward.backward(grad, operands, out, lse, gradients, sums=False)
    return dq, dkv


# ---- examples --------------------------------------------------------------------------------------------------------


def _packed_example(make: Maker, with_bias: bool, masked: bool = False) -> list[Any]:
    """`masked`: every third key of a sample takes no part, nor does any of the second sample."""
    sizes = make.sizes
    scale = (sizes.dim // sizes.heads) ** -0.5
    sample, key = (torch.arange(n, device=make.device) for n in (sizes.batch, sizes.tokens))
    key_mask = ((sample[:, None] + key) % 3 > 0) & (sample[:, None] != 1)
    bias = make.vector(3) if with_bias else None
    return [make.activations(3), sizes.heads, scale, bias, key_mask if masked else None]


def _query_example(make: Maker) -> list[Any]:
    q = make.normal(make.sizes.batch, 2, make.sizes.dim)
    return [q, make.activations(2), make.sizes.heads, (make.sizes.dim // make.sizes.heads) ** -0.5]


def _bytes(args: Sequence[Any]) -> float:
    return args[0].nbytes / 3 * 11  # of an element of out: 8 + 14 in 16 bit


def _query_bytes(args: Sequence[Any]) -> float:
    return args[1].nbytes * 3  # keys and values twice, their gradient once


def _of_tokens(tokens: int) -> tuple:
    return replace(BASE, name=f"deit_base {tokens} tokens", tokens=tokens), torch.float16


_EXAMPLES = [
    Example(
        "",
        partial(_packed_example, with_bias=True),
        compiled=[*DEITS, _of_tokens(65), _of_tokens(145), _of_tokens(578), (BASE, torch.float32)],
        bytes=_bytes,
    ),
    Example("no bias", partial(_packed_example, with_bias=False), compiled=[_of_tokens(197)]),
    Example(
        "key mask", partial(_packed_example, with_bias=True, masked=True), compiled=[*BASE_FP16, (BASE, torch.float32)]
    ),
]

# ---- registration ----------------------------------------------------------------------------------------------------

_capability = partial(_triton.capability, needs=80)
_fused_capability = partial(_triton.capability, needs=80, compiler=fused_backward.COMPILER)
OP = _op.Op(
    "attention",
    reference,
    reference_backward,
    examples=_EXAMPLES,
    others=[
        _op.Backend("triton", _capability, triton_forward, triton_backward),
        _op.Backend("fused_backward", _fused_capability, fused_backward.forward, fused_backward.backward),
        _op.Backend("hopper", hopper.capability, hopper.forward, hopper.backward),
        _op.Backend("native", native_choice.capability, native_attention.forward, native_attention.backward),
        *libraries.BACKENDS,
    ],
    native=native,
    cast={"qkv"},
)
QUERY = _op.Op(
    "query_attention",
    query_reference,
    query_reference_backward,
    examples=[Example("", _query_example, compiled=DEITS, bytes=_query_bytes)],
    others=[_op.Backend("triton", _capability, query_triton_forward, query_triton_backward)],
    native=_query_native,
    cast={"q", "kv"},
)


def _fake_lse(q: Tensor, num_heads: int) -> Tensor:
    return q.new_empty(q.shape[0], num_heads, q.shape[1], dtype=_op.statistics_dtype(q.dtype))


@OP.registered.register_fake
def _(qkv, num_heads, scale, bias, key_mask):
    batch, tokens, width = qkv.shape
    return qkv.new_empty(batch, tokens, width // 3), _fake_lse(qkv, num_heads)


@OP.registered_backward.register_fake
def _(grad, qkv, out, lse, num_heads, scale, with_bias, key_mask):
    return qkv.new_empty(qkv.shape), lse.new_empty(qkv.shape[2] if with_bias else 0)


@QUERY.registered.register_fake
def _(q, kv, num_heads, scale):
    return q.new_empty(q.shape), _fake_lse(q, num_heads)


@QUERY.registered_backward.register_fake
def _(grad, q, kv, out, lse, num_heads, scale):
    return q.new_empty(q.shape), kv.new_empty(kv.shape)


def _save(ctx, inputs, output):
    qkv, ctx.num_heads, ctx.scale, bias, key_mask = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(key_mask, qkv, *output)


def _differentiate(ctx, grad, *_):
    wanted = ctx.bias_dtype is not None
    key_mask, *saved = ctx.saved_tensors
    dqkv, dbias = OP.run_backward(ctx, grad, *saved, ctx.num_heads, ctx.scale, wanted, key_mask)
    return dqkv, None, None, dbias.to(ctx.bias_dtype) if wanted else None, None


def _save_query(ctx, inputs, output):
    q, kv, ctx.num_heads, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, kv, *output)


def _differentiate_query(ctx, grad, *_):
    return *QUERY.run_backward(ctx, grad, *ctx.saved_tensors, ctx.num_heads, ctx.scale), None, None


OP.differentiable(_save, _differentiate)
QUERY.differentiable(_save_query, _differentiate_query)


# ---- public ----------------------------------------------------------------------------------------------------------


def attention(
    qkv: Tensor,
    num_heads: int,
    scale: float | None = None,
    *,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    logit_bias: Tensor | None = None,
) -> Tensor:
    """Softmax attention of packed queries, keys and values.

    qkv        floating `[B, N, 3*H*d]`, packed as timm's `reshape(B, N, 3, H, d)`
    num_heads  H
    scale      factor on the logits; default d**-0.5
    bias       `[3*H*d]`, the bias that qkv already contains. It changes nothing but its own gradient, which is a
               by-product of qkv's here: make qkv with the detached bias
    key_mask   bool `[B, N]`, False for keys that take no part, such as padding: the rows of these tokens, as queries,
               are computed nevertheless. A sample without any key gives 0
    logit_bias floating `[H, N, N]`, added to the scaled logits, such as a bias of relative positions; it has a
               gradient. No kernel adds it yet: PyTorch's own attention runs, and where a kernel is asked for by
               name, RuntimeError says so

    Returns `[B, N, H*d]` in qkv's dtype (the autocast dtype under autocast). Logits and softmax are at least float32.
    """
    _check("qkv", qkv, 3, num_heads)
    if bias is not None:
        _checks.check_shape("bias", bias, qkv.shape[2:], "[3*H*d], like the last dimension of qkv,")
        _checks.check_device("bias", bias, qkv, "qkv")
    if scale is None:
        scale = (qkv.shape[2] // (3 * num_heads)) ** -0.5
    _checks.check_number("scale", scale, -math.inf)
    if key_mask is not None:
        _checks.check_dtype("key_mask", key_mask, torch.bool)
        _checks.check_shape("key_mask", key_mask, qkv.shape[:2], "[B, N] of qkv [B, N, 3*H*d]")
        _checks.check_device("key_mask", key_mask, qkv, "qkv")
    if logit_bias is not None:
        return _with_logit_bias(qkv, num_heads, scale, bias, key_mask, logit_bias)
    return _first(OP(qkv, num_heads, scale, bias, key_mask))


def _with_logit_bias(
    qkv: Tensor, num_heads: int, scale: float, bias: Tensor | None, key_mask: Tensor | None, logit_bias: Tensor
) -> Tensor:
    _checks.check_floating("logit_bias", logit_bias)
    _checks.check_shape("logit_bias", logit_bias, (num_heads, *qkv.shape[1:2] * 2), "[H, N, N] of qkv [B, N, 3*H*d]")
    _checks.check_device("logit_bias", logit_bias, qkv, "qkv")
    wanted = _asked.choice(OP.name)
    if wanted not in (_asked.AUTO, _op.REFERENCE):
        raise _op.ChoiceError(f"{OP.name}={wanted} is asked for, which does not add logit_bias yet: leave it out there")
    qkv = _derivatives.with_bias_gradient(qkv, bias)
    return _attended(*_heads(qkv, 3, num_heads), scale, key_mask, logit_bias.to(qkv.dtype))


def query_attention(q: Tensor, kv: Tensor, num_heads: int, scale: float | None = None) -> Tensor:
    """Softmax attention of some queries to packed keys and values.

    q          floating `[B, M, H*d]`
    kv         `[B, N, 2*H*d]` of the same dtype, packed as `reshape(B, N, 2, H, d)`
    num_heads  H
    scale      factor on the logits; default d**-0.5

    Returns `[B, M, H*d]`; the rest as of `attention`.
    """
    _check("q", q, 1, num_heads)
    _check("kv", kv, 2, num_heads)
    _checks.check_shape("kv", kv, (q.shape[0], kv.shape[1], 2 * q.shape[2]), "[B, N, 2*H*d] for q [B, M, H*d]")
    _checks.check_device("kv", kv, q, "q")
    if scale is None:
        scale = (q.shape[2] // num_heads) ** -0.5
    _checks.check_number("scale", scale, -math.inf)
    return _first(QUERY(q, kv, num_heads, scale))


def _first(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """The output: native autograd makes no statistics."""
    return result if isinstance(result, Tensor) else result[0]


def _check(name: str, x: Tensor, parts: int, num_heads: int) -> None:
    _checks.check_floating(name, x)
    packed = f"{parts}*H*d" if parts > 1 else "H*d"
    if x.dim() != 3:
        raise ValueError(f"{name} has shape {list(x.shape)}, but must be [B, N, {packed}]")
    if num_heads < 1 or x.shape[2] % (parts * num_heads):
        raise ValueError(
            f"num_heads is {num_heads}, but must be positive, and {parts} * num_heads must divide {name}'s last "
            f"dimension {x.shape[2]}"
        )
