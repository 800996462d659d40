"""Tokens of a transformer: read at blocks and at the q/k/v of a block, and what models need to offer that."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdeit.models.contract import Attends, Owner, TokenMaps, Tokens

QKV = tuple[Tensor, Tensor, Tensor]


class Taps(NamedTuple):
    """What `taps` read.

    tokens  by block the tokens `[B, N, dim]` after it, without the final norm
    qkv     by block its queries, keys and values `[B, heads, N, head_dim]`
    """

    tokens: dict[int, Tensor]
    qkv: dict[int, QKV]


def taps(model: Tokens, x: Tensor, *, blocks: Collection[int] = (), qkv: Collection[int] = (), **options: Any) -> Taps:
    """Tokens after `blocks` and q/k/v of the blocks `qkv`, in one pass that ends where the last of them is known.

    For q/k/v of block i that is before the attention of block i: of that block only norm and projection run. Later
    blocks, the final norm and the heads do not run at all. `options` are those of `model.tokens`: keep, noise, ...

    Raises ValueError for a block that the model does not have, and where nothing is asked for.
    """
    depth = len(model.blocks)
    if not blocks and not qkv:
        raise ValueError("taps needs blocks=(...) or qkv=(...): the numbers of the blocks to read")
    for index in (*blocks, *qkv):
        if not 0 <= index < depth:
            raise ValueError(f"there is no block {index}; the model has blocks 0 to {depth - 1}")
    wanted = {index + 1 for index in blocks} | set(qkv)
    end = max(wanted)
    before: dict[int, Tensor] = {}

    def reader(index: int) -> Any:
        def read(tokens: Tensor) -> Tensor:
            before[index] = tokens
            return tokens

        return read

    at = {index: reader(index) for index in wanted if index < end}
    before[end] = model.tokens(x, at=at, stop=end, **options)
    return Taps({i: before[i + 1] for i in blocks}, {i: model.qkv(i, before[i]) for i in qkv})


# ---- for models ------------------------------------------------------------------------------------------------------


def last_block(depth: int, at: TokenMaps, attend: Attends, stop: int | None) -> int:
    """How many blocks run; raises ValueError for arguments that do not fit a model of `depth` blocks."""
    end = depth if stop is None else stop
    if not 0 <= end <= depth:
        raise ValueError(f"stop is {stop}, but the model has {depth} blocks")
    for name, blocks in (("at", at), ("attend", attend)):
        for index in blocks:
            if not 0 <= index < end:
                raise ValueError(f"{name} has block {index}, but only blocks 0 to {end - 1} run")
    return end


def attended(attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`[B, N, heads * head_dim]`: the values that `attend` mixes, heads side by side; ValueError if they are none."""
    result = attend(q, k, v)
    if not isinstance(result, Tensor) or result.shape != v.shape:
        got = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else repr(result)
        raise ValueError(f"attend must return mixed values {list(v.shape)}, not {got}")
    return result.transpose(1, 2).flatten(2)


def mapped(at: TokenMaps, index: int, tokens: Tensor) -> Tensor:
    """The tokens `[B, N, dim]` that `at[index]` puts in the place of `tokens`; ValueError if they are none."""
    result = at[index](tokens)
    if not isinstance(result, Tensor) or result.ndim != 3 or result.shape[::2] != tokens.shape[::2]:
        got = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else repr(result)
        raise ValueError(f"at[{index}] must return tokens [{len(tokens)}, N, {tokens.shape[2]}], not {got}")
    return result


def kept(patches: Tensor, keep: Tensor) -> Tensor:
    """The patches `[B, M, C]` of `[B, P, C]` that `keep` (int64 `[B, M]`) names, in its order."""
    if keep.ndim != 2 or len(keep) != len(patches) or keep.dtype != torch.int64:
        raise ValueError(f"keep must be int64 [B, M] with B = {len(patches)}, but is {keep.dtype} {tuple(keep.shape)}")
    return patches.gather(1, keep[:, :, None].expand(-1, -1, patches.shape[2]))


def block_stages(model: nn.Module, depths: Sequence[int]) -> list[list[Owner]]:
    """`Tokens.stages` of a model whose children are registered in the order of the computation, the blocks as
    `blocks`."""
    if sum(depths) != len(model.blocks) or min(depths, default=0) < 1:
        raise ValueError(f"depths {list(depths)} must be positive and add up to the {len(model.blocks)} blocks")
    blocks = iter(model.blocks)
    stages: list[list[Owner]] = [[next(blocks) for _ in range(depth)] for depth in depths]
    names, children = zip(*model.named_children(), strict=True)
    at = names.index("blocks")
    stages[0][:0] = [*model.parameters(recurse=False), *children[:at]]
    stages[-1] += children[at + 1 :]
    return stages
