"""Patches with their positions, behind the prefix tokens, written once.

To add positions and then put the sum behind the prefix would write all tokens twice and read them once more: 8 bytes
an element of a float32 stream.
"""

from typing import Any

import torch
from torch import Tensor

from fastdeit import kernels


def joined(prefix: Tensor, patches: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Tokens `[B, K + P, C]` in `dtype`: `prefix`, and `patches + positions`, added in the wider of their dtypes.

    prefix     floating `[1, K, C]`
    patches    floating `[B, P, C]`
    positions  floating `[1, P, C]`, or `[B, P, C]`
    """
    if torch.compiler.is_compiling() or kernels.transformed():
        parts = prefix.expand(len(patches), -1, -1), patches + positions
        return torch.cat([part.to(dtype) for part in parts], 1)
    return _Joined.apply(prefix, patches, positions, dtype)


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, prefix: Tensor, patches: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtypes = prefix.dtype, patches.dtype, positions.dtype
        ctx.shared = len(positions) == 1
        batch, count, width = patches.shape
        ctx.first = prefix.shape[1]
        tokens = patches.new_empty(batch, ctx.first + count, width, dtype=dtype)
        tokens[:, : ctx.first].copy_(prefix)
        torch.add(patches, positions, out=tokens[:, ctx.first :])
        return tokens

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_prefix, of_patches, of_positions = ctx.dtypes
        first, rest = grad[:, : ctx.first], grad[:, ctx.first :]
        dprefix = dpatches = dpositions = None
        if ctx.needs_input_grad[0]:
            dprefix = first.sum(0, keepdim=True, dtype=of_prefix)
        if ctx.needs_input_grad[1]:
            dpatches = rest.to(of_patches)
        if ctx.needs_input_grad[2]:
            dpositions = rest.sum(0, keepdim=True, dtype=of_positions) if ctx.shared else rest.to(of_positions)
        return dprefix, dpatches, dpositions, None
