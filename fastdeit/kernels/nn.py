"""Modules on the fused ops, for a plain vision transformer of your own.

Parameters have the names, order, shapes and initialisation of timm's `Block`, `Attention`, `Mlp`, `LayerScale` and
`LayerNorm`, so state dicts are interchangeable and a seed gives the same weights. Pre-norm block with drop-path and
LayerScale (Touvron et al., "Going deeper with image transformers", 2021):

    x = x + keep1 * gamma1 * attn(norm1(x))        x = x + keep2 * gamma2 * mlp(norm2(x))

An addition waits for the LayerNorm that follows it, because both are then one pass over the tokens. Between two blocks
the tokens therefore are a `Tokens`: the two summands. Blocks, `LayerNorm` and `RMSNorm` take either form, so a model
stays `self.norm(self.blocks(x))` with `self.blocks = torch.nn.Sequential(...)`.

What later models add are `RMSNorm` and `SwiGlu`, normalised queries and keys, rotary embeddings, biases of relative
positions, registers and masks of keys: `Block` takes a norm, an attention and an MLP of another kind.
"""

from types import NoneType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdeit.kernels import _op
from fastdeit.kernels._hooks import hooks
from fastdeit.kernels._rows import branch_scale
from fastdeit.kernels.attention.op import attention
from fastdeit.kernels.layer_norm.op import add_layer_norm
from fastdeit.kernels.mlp.op import mlp
from fastdeit.kernels.positions import PrefixTokens, RelativePositionBias, Rope2d
from fastdeit.kernels.qk_norm_rope import qk_norm_rope
from fastdeit.kernels.rms_norm import add_rms_norm
from fastdeit.kernels.swiglu import swiglu

__all__ = [
    "Attention",
    "Block",
    "LayerNorm",
    "LayerScale",
    "Mlp",
    "PrefixTokens",
    "RMSNorm",
    "RelativePositionBias",
    "Rope2d",
    "SwiGlu",
    "Tokens",
]


class Tokens(NamedTuple):
    """Tokens as the sum `residual + keep * gamma * branch`, still to be added.

    residual, branch  floating `[B, N, C]`; branch may be of a lower precision
    gamma             LayerScale `[C]`; None is 1
    keep              drop-path factors, float32 `[B]`; None is 1
    """

    residual: Tensor
    branch: Tensor
    gamma: Tensor | None = None
    keep: Tensor | None = None

    def sum(self) -> Tensor:
        """The tokens `[B, N, C]` in residual's dtype, for what is neither a block nor a norm."""
        scale = branch_scale(self.residual, self.gamma, self.keep)
        total = self.residual + self.branch if scale is None else torch.addcmul(self.residual, self.branch, scale)
        return total.to(self.residual.dtype)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension, of plain tokens or `Tokens`; statistics in float32."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, x: Tensor | Tokens) -> Tensor:
        """Normalised tokens in the autocast dtype under autocast, else in the dtype of x."""
        return self.add(x)[1]

    def add(self, x: Tensor | Tokens) -> tuple[Tensor, Tensor]:
        """(tokens as one tensor, normalised tokens)."""
        residual, branch, gamma, keep = x if isinstance(x, Tokens) else (x, None, None, None)
        return add_layer_norm(residual, branch, self.weight, self.bias, self.eps, gamma=gamma, keep=keep)


class RMSNorm(nn.RMSNorm):
    """RMSNorm over the last dimension, of plain tokens or `Tokens`; the mean square in float32. Parameters are those of
    torch's and timm's."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, x: Tensor | Tokens) -> Tensor:
        """Normalised tokens in the autocast dtype under autocast, else in the dtype of x."""
        return self.add(x)[1]

    def add(self, x: Tensor | Tokens) -> tuple[Tensor, Tensor]:
        """(tokens as one tensor, normalised tokens)."""
        residual, branch, gamma, keep = x if isinstance(x, Tokens) else (x, None, None, None)
        return add_rms_norm(residual, branch, self.weight, self.eps, gamma=gamma, keep=keep)


class Attention(nn.Module):
    """Multi-head self-attention of tokens `[B, N, dim]`; ValueError unless num_heads divides dim.

    qk_norm   class of a norm of the queries and of the keys of each head (Dehghani et al., "Scaling vision transformers
              to 22 billion parameters", 2023), `RMSNorm` or `LayerNorm`; None for none
    rope      turns queries and keys by their places, after qk_norm
    relative  makes a bias of the logits. No kernel adds it yet: PyTorch's own attention runs, and RuntimeError says so
              where a kernel is asked for by name

    RMSNorm of queries and keys and their rotation are one op, `qk_norm_rope`. With another norm, queries and keys are
    unpacked, and packed again by a copy, which no kernel saves yet.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        *,
        qk_norm: type[LayerNorm] | type[RMSNorm] | None = None,
        rope: Rope2d | None = None,
        relative: RelativePositionBias | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}, but must be positive and divide dim = {dim}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm, self.k_norm = (qk_norm(dim // num_heads) if qk_norm else nn.Identity() for _ in range(2))
        self.proj = nn.Linear(dim, dim)
        self.rope, self.relative = rope, relative
        self._packed = qk_norm is None and rope is None

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """`[B, N, dim]` to `[B, N, dim]`. key_mask: bool `[B, N]`, False for tokens that none attends to."""
        qkv = self.qkv(x)
        if not self._packed:
            qkv = self._with_positions(qkv)
        logit_bias = None if self.relative is None else self.relative()
        return self.proj(attention(qkv, self.num_heads, key_mask=key_mask, logit_bias=logit_bias))

    def _with_positions(self, qkv: Tensor) -> Tensor:
        norms, rope = (self.q_norm, self.k_norm), self.rope
        kinds, eps = {type(norm) for norm in norms}, {getattr(norm, "eps", 0.0) for norm in norms}
        seen = any(any(hooks(module)) for module in (*norms, rope) if module is not None)
        if not seen and kinds in ({RMSNorm}, {nn.Identity}) and len(eps) == 1 and type(rope) in (Rope2d, NoneType):
            weights = (getattr(norm, "weight", None) for norm in norms)
            turns = (None, None) if rope is None else rope.turns(qkv)
            return qk_norm_rope(qkv, self.num_heads, *weights, *eps, *turns)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            q, k = self.rope(q), self.rope(k)
        return torch.stack((q.to(v.dtype), k.to(v.dtype), v), 2).flatten(2)


class Mlp(nn.Module):
    """Linear, exact GELU, linear: `[..., dim]` to `[..., dim]` through `hidden` features.

    recompute  whether backward makes the activation again instead of keeping it, as of `mlp`
    """

    def __init__(self, dim: int, hidden: int, recompute: bool = True) -> None:
        super().__init__()
        self.recompute = recompute
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., dim]` to `[..., dim]`."""
        weights = self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias
        return mlp(x, *weights, recompute=self.recompute)


class SwiGlu(nn.Module):
    """Linear, SwiGLU, linear: `[..., dim]` to `[..., dim]` through `hidden` features, of which fc1 makes twice as many,
    the gate first. Parameters have the names and shapes of timm's `SwiGLUPacked`. The two products are PyTorch's."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., dim]` to `[..., dim]`."""
        return self.fc2(swiglu(self.fc1(x)))


class LayerScale(nn.Module):
    """Holds the factor `gamma [dim]` of a branch; the addition applies it."""

    def __init__(self, dim: int, init_values: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_values))


class Block(nn.Module):
    """Pre-norm transformer block.

    mlp_ratio    hidden features of the MLP = int(dim * mlp_ratio)
    init_values  LayerScale at the start; None for a block without
    drop_path    probability in [0, 1) that a sample skips a branch in training; the branch of the others is divided by
                 1 - drop_path. Drawn from torch's generator
    eps          of both norms
    norm         class of both norms, `LayerNorm` or `RMSNorm`
    attn         in place of `Attention(dim, num_heads, qkv_bias)`: an `Attention` with positions, or any module
                 from `[B, N, dim]` to `[B, N, dim]`
    mlp          in place of `Mlp`, such as `SwiGlu`
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        init_values: float | None = None,
        drop_path: float = 0.0,
        eps: float = 1e-6,
        *,
        norm: type[LayerNorm] | type[RMSNorm] = LayerNorm,
        attn: nn.Module | None = None,
        mlp: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path is {drop_path}, but must be in [0, 1)")
        self.drop_path = drop_path
        self.norm1 = norm(dim, eps)
        self.attn = Attention(dim, num_heads, qkv_bias) if attn is None else attn
        self.ls1 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.norm2 = norm(dim, eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio)) if mlp is None else mlp
        self.ls2 = nn.Identity() if init_values is None else LayerScale(dim, init_values)

    def forward(self, x: Tensor | Tokens, key_mask: Tensor | None = None) -> Tokens:
        """`[B, N, dim]` to `[B, N, dim]`. key_mask: bool `[B, N]`, False for tokens that none attends to."""
        x, normed = self.norm1.add(x)
        branch = self.attn(normed) if key_mask is None else self.attn(normed, key_mask=key_mask)
        x, normed = self.norm2.add(Tokens(x, branch, self._gamma(self.ls1), self._keep(x)))
        return Tokens(x, self.mlp(normed), self._gamma(self.ls2), self._keep(x))

    def _gamma(self, scale: nn.Module) -> Tensor | None:
        # A copy, because the next block reads it: under FSDP the parameter itself is freed when this block returns.
        return scale.gamma.clone() if isinstance(scale, LayerScale) else None

    def _keep(self, x: Tensor) -> Tensor | None:
        if not (self.training and self.drop_path):
            return None
        keep = 1 - self.drop_path
        return x.new_empty(len(x), dtype=_op.statistics_dtype(x.dtype)).bernoulli_(keep).div_(keep)
