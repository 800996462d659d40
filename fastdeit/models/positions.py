"""Positions of a grid of patches: fixed ones, and those of one grid for another."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def interpolated(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Positions `[1, rows * columns, dim]` of the grid `old` (rows, columns) as those of the grid `new`, same dtype.

    Bicubic (Keys 1981, a = -0.75; the border repeats), align_corners False, no antialias: what DeiT's public code does
    when it fine-tunes at another size. Differentiable.

    Rows and columns are interpolated one after the other, each as a matrix product. So the sums of the gradient have a
    fixed order, whereas the backward of `F.interpolate` adds with atomics on a GPU: the same run gives the same bits.
    The products are in float64, which neither autocast nor TF32 rounds; next to a block they cost nothing.
    """
    down, across = (_weights(before, after, positions.device) for before, after in zip(old, new, strict=True))
    cells = positions.double().unflatten(1, old)
    cells = torch.einsum("ar,bc,nrcd->nabd", down, across, cells)
    return cells.flatten(1, 2).to(positions.dtype)


@torch.no_grad()
def _weights(before: int, after: int, device: torch.device) -> Tensor:
    """The matrix `[after, before]`, float64, of the bicubic interpolation of `before` points to `after`."""
    points = torch.eye(before, dtype=torch.float64, device=device)
    return F.interpolate(points[None, :, :, None], size=(after, 1), mode="bicubic", align_corners=False)[0, :, :, 0].T


def sincos(grid: tuple[int, int], dim: int) -> Tensor:
    """Fixed positions `[1, rows * columns, dim]`, float32 on the CPU, of the patches of a grid (rows, columns), by row.

    sin(x w), cos(x w), sin(y w), cos(y w), a quarter of the channels each, with the wavelengths of big_vision and MoCo
    v3 (Chen et al., ICCV 2021): w_k = 10000 ** (-k / (dim / 4 - 1)) for k from 0, x the column and y the row of the
    patch. `dim` is a multiple of 4, and at least 8.
    """
    # On the CPU whatever the default device: to imitate these few numbers on the meta device costs seconds of imports.
    arange = partial(torch.arange, dtype=torch.float64, device="cpu")
    rows, columns = map(arange, grid)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    steps = arange(dim // 4) / (dim // 4 - 1)
    across, down = (place.flatten()[:, None] * 10_000**-steps for place in (x, y))
    return torch.cat((across.sin(), across.cos(), down.sin(), down.cos()), 1)[None].float()
