"""Multi-head attention on packed queries, keys and values.

    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]      each [B, N, H, d] of qkv viewed as [B, N, 3, H, d]
    P = softmax(scale * q k^T)                              [B, H, N, N], never written in 16 bit
    out = P v                                               [B, N, H*d]

Backward, with dP = dout v^T and D = rowsum(P * dP):

    dv = P^T dout      dS = scale * P * (dP - D)      dq = dS k      dk = dS^T q

Bytes moved at best per element of out in 16 bit: forward reads 6 and writes 2; backward reads 8 and writes 6, since the
gradient is written packed, as the qkv projection's backward wants it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdeit.kernels import _op


def reference(qkv: Tensor, num_heads: int, scale: float) -> Tensor:
    """out `[B, N, H*d]` of qkv `[B, N, 3*H*d]`, in qkv's dtype, or the autocast dtype under autocast."""
    batch, tokens, width = qkv.shape
    # Split before transposing: the gradients of q, k and v are then packed by one copy instead of two.
    q, k, v = (part.transpose(1, 2) for part in qkv.reshape(batch, tokens, 3, num_heads, -1).unbind(2))
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).reshape(batch, tokens, width // 3)


def reference_backward(grad: Tensor, qkv: Tensor, num_heads: int, scale: float) -> Tensor:
    """Gradient of qkv, packed as qkv, computed in float32 (float64 for float64)."""
    batch, tokens, width = qkv.shape
    compute = _op.statistics_dtype(qkv.dtype)
    q, k, v = qkv.to(compute).reshape(batch, tokens, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    grad = grad.to(compute).reshape(batch, tokens, num_heads, -1).transpose(1, 2)
    p = torch.softmax(scale * q @ k.transpose(-1, -2), -1)
    dp = grad @ v.transpose(-1, -2)
    ds = scale * p * (dp - (p * dp).sum(-1, keepdim=True))
    packed = torch.stack((ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad), 2)
    return packed.permute(0, 3, 2, 1, 4).reshape(batch, tokens, width).to(qkv.dtype)


OP = _op.Op("attention", reference, reference_backward, cast={"qkv"})


@OP.registered.register_fake
def _(qkv, num_heads, scale):
    batch, tokens, width = qkv.shape
    return qkv.new_empty(batch, tokens, width // 3)


@OP.registered_backward.register_fake
def _(grad, qkv, num_heads, scale):
    return qkv.new_empty(qkv.shape)


def _save(ctx, inputs, output):
    qkv, ctx.num_heads, ctx.scale = inputs
    ctx.save_for_backward(qkv)


def _differentiate(ctx, grad):
    return OP.run_backward(ctx, grad, *ctx.saved_tensors, ctx.num_heads, ctx.scale), None, None


OP.differentiable(_save, _differentiate)


def attention(qkv: Tensor, num_heads: int, scale: float | None = None) -> Tensor:
    """Softmax attention of packed queries, keys and values.

    qkv        floating `[B, N, 3*H*d]`, packed as timm's `reshape(B, N, 3, H, d)`
    num_heads  H
    scale      factor on the logits; default d**-0.5

    Returns `[B, N, H*d]` in qkv's dtype (the autocast dtype under autocast). Logits and softmax are at least float32.
    """
    _op.check_floating("qkv", qkv)
    if qkv.dim() != 3:
        raise ValueError(f"qkv has shape {list(qkv.shape)}, but must be [B, N, 3*H*d]")
    if num_heads < 1 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(
            f"num_heads is {num_heads}, but must be positive, and 3 * num_heads must divide qkv's last dimension "
            f"{qkv.shape[2]}"
        )
    if scale is None:
        scale = (qkv.shape[2] // (3 * num_heads)) ** -0.5
    return OP(qkv, num_heads, scale)
