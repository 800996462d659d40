"""What LayerNorm and RMSNorm have in common: a branch's factors, and launches of programs that each take whole rows."""

from functools import cache

from torch import Tensor

from fastdeit.kernels import _op, _triton

ELEMENTS = 2048
"""Elements that a program of four warps works on at a time: 16 of each tensor in every thread."""
_WIDEST = 8192


def branch_scale(residual: Tensor, gamma: Tensor | None, keep: Tensor | None) -> Tensor | None:
    """`keep * gamma`, shaped to multiply the branch; None when both are None."""
    if keep is None:
        return gamma
    keep = keep.reshape(-1, *[1] * (residual.dim() - 1))
    return keep if gamma is None else keep * gamma


@cache
def tile(width: int) -> dict[str, int]:
    """Constants of a launch over rows of that width."""
    block = _triton.power_of_two(width)
    return {"C": width, "BLOCK": block, "ROWS": max(1, ELEMENTS // block), "warps": max(4, block // 512)}


def rows_and_tokens(x: Tensor) -> tuple[int, int]:
    """(rows of `[B, ..., C]`, rows of one of its samples)."""
    numel, shape = x.numel(), x.shape
    rows = numel // shape[-1] if numel else 0
    return rows, rows // shape[0] if rows else 1


def require(*tensors: Tensor | None) -> None:
    """Raise `Unsupported` for dtypes that the kernels do not take, and for rows that do not fit a program."""
    _triton.require_dtypes(*tensors)
    width = tensors[0].shape[-1]
    if width > _WIDEST:
        raise _op.Unsupported(f"rows of {width} elements do not fit its registers (at most {_WIDEST})")


def dense(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, contiguous."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]
