"""Transformer blocks on `fastdeit.kernels`, whose residual additions wait for the LayerNorm that follows.

Addition, LayerScale, drop-path and LayerNorm are one kernel. Between two blocks the tokens therefore are a `Stream`:
what has been added, and the branches that have not.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeit import kernels
from fastdeit.kernels._op import autocast_dtype
from fastdeit.kernels.nn import LayerScale
from fastdeit.models.config import ViTConfig
from fastdeit.models.drop_path import Kept
from fastdeit.models.tokens import QKV, attended

_ALL = Kept()
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Branch(NamedTuple):
    """What a sublayer adds to the tokens: `kept.factor * gamma * value`, to those of `kept.samples`.

    value  `[B', N, dim]`, of any floating dtype, for the B' samples that are kept
    gamma  LayerScale `[dim]`; None is 1
    kept   what drop-path leaves of the branch; by default all
    bias   `[dim]`: a bias that value was made with, but without its gradient, which the LayerNorm behind the addition
           has as a by-product
    """

    value: Tensor
    gamma: Tensor | None = None
    kept: Kept = _ALL
    bias: Tensor | None = None


class Stream(NamedTuple):
    """Tokens `[B, N, dim]` as `residual` and the branches still to be added to it, in their order."""

    residual: Tensor
    branches: tuple[Branch, ...] = ()

    def sum(self) -> Tensor:
        """The tokens in residual's dtype, where no LayerNorm follows that could do the addition."""
        return _added(self.residual, self.branches)

    def normed(self, norm: nn.LayerNorm, kept: Kept = _ALL) -> tuple[Tensor, Tensor]:
        """(the tokens, their LayerNorm, of the samples that `kept` keeps). The last branch is added by LayerNorm's
        kernel. The LayerNorm is in the dtype of the products behind it: that of autocast or of the parameters, whatever
        that of the tokens is."""
        arguments = norm.weight, norm.bias, norm.eps
        options = {"norm_samples": kept.samples, "norm_places": kept.places}
        options["out_dtype"] = autocast_dtype(self.residual) or norm.weight.dtype
        if not self.branches:
            return kernels.add_layer_norm(self.residual, None, *arguments, **options)
        *others, last = self.branches
        options |= {"gamma": last.gamma, "keep": last.kept.factor, "branch_bias": last.bias}
        options |= {"branch_samples": last.kept.samples, "branch_places": last.kept.places}
        return kernels.add_layer_norm(_added(self.residual, others), last.value, *arguments, **options)


def _added(residual: Tensor, branches: Iterable[Branch]) -> Tensor:
    for value, gamma, kept, bias in branches:
        value = kernels.with_bias_gradient(value, bias)
        value = value if gamma is None else value * gamma
        value = value if kept.factor is None else value * kept.factor[:, None, None]
        value = value.to(residual.dtype)
        residual = residual + value if kept.samples is None else residual.index_add(0, kept.samples, value)
    return residual


class Attention(nn.Module):
    """Multi-head self-attention of normalised tokens `[B, N, dim]`.

    fp8  whether the products of training are of 8 bits (`kernels.fp8_linear`), but for queries apart from keys and
         values
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.fp8 = False

    def operands(self) -> list[Tensor]:
        """What the products multiply and add: weight and bias of qkv, then of proj. Kernels behind the products have
        the gradients of the biases, which are detached therefore."""
        return [self.qkv.weight, self.qkv.bias.detach(), self.proj.weight, self.proj.bias.detach()]

    def forward(self, x: Tensor, rows: int | None = None) -> Tensor:
        """`[B, N, dim]`, or `[B, rows, dim]`: the result of the first `rows` tokens, made from their queries alone."""
        branch = self.branch(x, kernels.autocast_copies(self.operands()), None, Kept(), rows)
        return kernels.with_bias_gradient(branch.value, branch.bias)

    def branch(
        self,
        x: Tensor,
        operands: Sequence[Tensor],
        gamma: Tensor | None,
        kept: Kept,
        rows: int | None = None,
        attend: Attend | None = None,
    ) -> Branch:
        """`forward` as the last branch in front of a LayerNorm, which has the gradient of `proj.bias`. `operands` has
        the module's, in the dtype of the products. `attend` stands in for softmax attention (`contract.Tokens`)."""
        weight, bias, *of_proj = operands
        linear = kernels.fp8_linear if self.fp8 and self.training else F.linear
        if attend is not None:
            qkv = kernels.with_bias_gradient(linear(x, weight, bias), self.qkv.bias)
            mixed = attended(attend, *qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4))
        elif rows is None:
            mixed = kernels.attention(linear(x, weight, bias), self.heads, bias=self.qkv.bias)
        else:
            mixed = kernels.query_attention(*kernels.queries_apart(x, weight, bias, self.qkv.bias, rows), self.heads)
        return Branch(linear(mixed, *of_proj), gamma, kept, self.proj.bias)

    def heads_of(self, x: Tensor) -> QKV:
        """Queries, keys and values `[B, heads, N, head_dim]` of `x`, for whoever compares them."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v


class Mlp(nn.Module):
    """Linear, GELU (exact), linear.

    recompute  whether backward makes the activation again instead of keeping it
    fp8        whether the products of training are of 8 bits (`kernels.fp8_mlp`), which always makes it again
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.recompute = True
        self.fp8 = False

    def operands(self) -> list[Tensor]:
        """What the products multiply and add: weight and bias of fc1, then of fc2, whose bias is detached: a kernel
        behind the product has its gradient."""
        return [self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias.detach()]

    def forward(self, x: Tensor, operands: Sequence[Tensor] | None = None) -> Tensor:
        """`[..., dim]` -> `[..., dim]`. `operands` has the module's, in the dtype of the products; who gives them sees
        to the gradient of `fc2.bias`."""
        if operands is not None:
            if self.fp8 and self.training:
                return kernels.fp8_mlp(x, *operands)
            return kernels.mlp(x, *operands, recompute=self.recompute)
        return kernels.with_bias_gradient(self(x, kernels.autocast_copies(self.operands())), self.fc2.bias)


def _layer_scale(config: ViTConfig) -> LayerScale | None:
    return None if config.layer_scale is None else LayerScale(config.dim, config.layer_scale)


def _gamma(scale: LayerScale | None) -> Tensor | None:
    return None if scale is None else scale.gamma


def _first(tokens: Tensor, rows: int | None) -> Tensor:
    return tokens if rows is None else tokens[:, :rows]


class Block(nn.Module):
    """Pre-norm transformer block: attention, then an MLP. Names of the parameters are those of timm's `Block`."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=config.eps)
        self.attn = Attention(config.dim, config.heads)
        self.ls1 = _layer_scale(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.eps)
        self.mlp = Mlp(config.dim, int(config.dim * config.mlp_ratio))
        self.ls2 = _layer_scale(config)

    def forward(
        self,
        stream: Stream,
        keeps: Sequence[Kept] = (Kept(), Kept()),
        rows: int | None = None,
        attend: Attend | None = None,
    ) -> Stream:
        """The tokens after the block.

        keeps   what drop-path leaves of the attention and of the MLP
        rows    only that many of the first tokens come out, and only they are computed behind keys and values
        attend  as of `Attention.branch`, with all rows
        """
        of_attention, of_mlp = keeps
        operands = kernels.autocast_copies([*self.attn.operands(), *self.mlp.operands()])
        residual, normed = stream.normed(self.norm1, of_attention)
        attention = self.attn.branch(normed, operands[:4], _gamma(self.ls1), of_attention, rows, attend)
        residual, normed = Stream(_first(residual, rows), (attention,)).normed(self.norm2, of_mlp)
        value = self.mlp(normed, operands[4:])
        return Stream(residual, (Branch(value, _gamma(self.ls2), of_mlp, self.mlp.fc2.bias),))

    def qkv(self, tokens: Tensor) -> QKV:
        """Queries, keys and values `[B, heads, N, head_dim]` of the tokens `[B, N, dim]` before the block."""
        return self.attn.heads_of(Stream(tokens).normed(self.norm1)[1])


class _ParallelAttention(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, eps=config.eps)
        self.attn = Attention(config.dim, config.heads)
        self.ls = _layer_scale(config)


class _ParallelMlp(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, eps=config.eps)
        self.mlp = Mlp(config.dim, int(config.dim * config.mlp_ratio))
        self.ls = _layer_scale(config)


class ParallelBlock(nn.Module):
    """`config.parallel` attentions side by side, then as many MLPs (Touvron et al., "Three things everyone should know
    about vision transformers", ECCV 2022), each with a LayerNorm of its own:

        x = x + sum_j keep_j * gamma_j * attn_j(norm_j(x))        x = x + sum_j keep_j * gamma_j * mlp_j(norm_j(x))

    Names of the parameters are those of timm's `ParallelThingsBlock`.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.attns = nn.ModuleList(_ParallelAttention(config) for _ in range(config.parallel))
        self.ffns = nn.ModuleList(_ParallelMlp(config) for _ in range(config.parallel))

    def forward(self, stream: Stream, keeps: Sequence[Kept] = (), rows: int | None = None) -> Stream:
        """As `Block.forward`; `keeps` are those of all attentions, then those of all MLPs, or none for all."""
        count = len(self.attns)
        keeps = keeps or (Kept(),) * (2 * count)
        residual, inputs = _normed_by_each(stream, self.attns, keeps[:count])
        branches = [
            part.attn.branch(normed, kernels.autocast_copies(part.attn.operands()), _gamma(part.ls), kept, rows)
            for part, normed, kept in zip(self.attns, inputs, keeps[:count], strict=True)
        ]
        residual, inputs = _normed_by_each(Stream(_first(residual, rows), tuple(branches)), self.ffns, keeps[count:])
        branches = [
            Branch(
                part.mlp(normed, kernels.autocast_copies(part.mlp.operands())), _gamma(part.ls), kept, part.mlp.fc2.bias
            )
            for part, normed, kept in zip(self.ffns, inputs, keeps[count:], strict=True)
        ]
        return Stream(residual, tuple(branches))

    def qkv(self, tokens: Tensor) -> QKV:
        """As `Block.qkv`: the heads of the first attention, then those of the next."""
        _, inputs = _normed_by_each(Stream(tokens), self.attns, (Kept(),) * len(self.attns))
        each = [part.attn.heads_of(normed) for part, normed in zip(self.attns, inputs, strict=True)]
        q, k, v = (torch.cat(heads, 1) for heads in zip(*each, strict=True))
        return q, k, v


def _normed_by_each(stream: Stream, parts: nn.ModuleList, keeps: Sequence[Kept]) -> tuple[Tensor, list[Tensor]]:
    """(tokens, their LayerNorm by the norm of each part, of the samples that keep it). The additions are done once,
    with the first of them."""
    residual, first = stream.normed(parts[0].norm, keeps[0])
    others = zip(parts[1:], keeps[1:], strict=True)
    return residual, [first, *(Stream(residual).normed(part.norm, kept)[1] for part, kept in others)]
