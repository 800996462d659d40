"""Modules on the fused ops, for a plain vision transformer of your own.

Parameters have the names, order, shapes and initialisation of timm's `Block`, `Attention`, `Mlp`, `LayerScale` and
`LayerNorm`, so state dicts are interchangeable and a seed gives the same weights. Pre-norm block with drop-path and
LayerScale (Touvron et al., "Going deeper with image transformers", 2021):

    x = x + keep1 * gamma1 * attn(norm1(x))        x = x + keep2 * gamma2 * mlp(norm2(x))

An addition waits for the LayerNorm that follows it, because both are then one pass over the tokens. Between two blocks
the tokens therefore are a `Tokens`: the two summands. Blocks and `LayerNorm` take either form, so a model stays
`self.norm(self.blocks(x))` with `self.blocks = torch.nn.Sequential(...)`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdeit.kernels import _op
from fastdeit.kernels.attention.op import attention
from fastdeit.kernels.layer_norm import add_layer_norm, branch_scale
from fastdeit.kernels.mlp.op import mlp


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
        """The tokens `[B, N, C]` in residual's dtype, for what is neither a block nor a `LayerNorm`."""
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


class Attention(nn.Module):
    """Multi-head self-attention of tokens `[B, N, dim]`; ValueError unless num_heads divides dim."""

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = True) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}, but must be positive and divide dim = {dim}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, dim]` to `[B, N, dim]`."""
        return self.proj(attention(self.qkv(x), self.num_heads))


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
    eps          of both LayerNorms
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
    ) -> None:
        super().__init__()
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path is {drop_path}, but must be in [0, 1)")
        self.drop_path = drop_path
        self.norm1 = LayerNorm(dim, eps)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.ls1 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.norm2 = LayerNorm(dim, eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = nn.Identity() if init_values is None else LayerScale(dim, init_values)

    def forward(self, x: Tensor | Tokens) -> Tokens:
        """`[B, N, dim]` to `[B, N, dim]`."""
        x, normed = self.norm1.add(x)
        x, normed = self.norm2.add(Tokens(x, self.attn(normed), self._gamma(self.ls1), self._keep(x)))
        return Tokens(x, self.mlp(normed), self._gamma(self.ls2), self._keep(x))

    def _gamma(self, scale: nn.Module) -> Tensor | None:
        # A copy, because the next block reads it: under FSDP the parameter itself is freed when this block returns.
        return scale.gamma.clone() if isinstance(scale, LayerScale) else None

    def _keep(self, x: Tensor) -> Tensor | None:
        if not (self.training and self.drop_path):
            return None
        keep = 1 - self.drop_path
        return x.new_empty(len(x), dtype=_op.statistics_dtype(x.dtype)).bernoulli_(keep).div_(keep)
