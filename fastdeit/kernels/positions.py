"""Where tokens stand: rotary embeddings, biases of relative positions, and the tokens before the patches. PyTorch's
own operations; the op `qk_norm_rope` turns packed queries and keys by the angles of a `Rope2d`.

Tokens of an image are `prefix` tokens without a place, such as the class token and registers, and then the patches of a
grid, row by row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PrefixTokens(nn.Module):
    """Learned tokens before the patches: a class token, and registers (Darcet et al., "Vision transformers need
    registers", 2024), which heads do not read.

    dim    channels of a token
    count  of tokens, at least 1
    """

    def __init__(self, dim: int, count: int = 1) -> None:
        super().__init__()
        if count < 1:
            raise ValueError(f"count is {count}, but must be at least 1")
        self.tokens = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, count, dim), std=0.02))

    def forward(self, patches: Tensor) -> Tensor:
        """`[B, N, dim]` to `[B, count + N, dim]`."""
        return torch.cat((self.tokens.expand(len(patches), -1, -1).to(patches.dtype), patches), 1)


class Rope2d(nn.Module):
    """Axial rotary embedding of a grid (RoPE-Axial of Heo et al., "Rotary position embedding for vision transformer",
    2024).

    Pair t of the first d/4 neighbouring pairs of channels is turned by x * base**(-4t/d), and that of the others by y
    in the same way, where x and y are the patch's column and row. So q k^T depends on differences of positions alone.

    grid    rows and columns of patches
    width   d, channels of a head; ValueError unless 4 divides it
    prefix  tokens before the patches, which are not turned
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, grid: tuple[int, int], width: int, prefix: int = 1, base: float = 100.0) -> None:
        super().__init__()
        if width % 4:
            raise ValueError(f"width is {width}, but 4 must divide it: two axes of pairs of channels")
        self.prefix = prefix
        speeds = base ** (-4 * torch.arange(width // 4, dtype=torch.float64) / width)
        y, x = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in grid), indexing="ij")
        angles = torch.cat([place.flatten()[:, None] * speeds for place in (x, y)], 1)
        angles = F.pad(angles, (0, 0, prefix, 0))[:, None]  # [N, 1, d/2]
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Queries or keys `[B, N, H, d]` with their pairs turned, in the same dtype; the arithmetic is float32 at
        least."""
        self._check(x)
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = even * self.cos - odd * self.sin, even * self.sin + odd * self.cos
        return torch.stack(turned, -1).flatten(-2).to(x.dtype)

    def turns(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine `[N, d/2]` of the angles, for tokens `[B, N, ...]`."""
        self._check(x)
        return self.cos[:, 0], self.sin[:, 0]

    def _check(self, x: Tensor) -> None:
        if x.shape[1] != len(self.cos):
            raise ValueError(f"x has {x.shape[1]} tokens, but prefix and grid have {len(self.cos)}")


class RelativePositionBias(nn.Module):
    """A learned bias of the logits for each head and each difference of positions in a grid (Bao et al., "BEiT", 2022,
    after Raffel et al., 2020); 0 at the start, and with one table entry each for from, to and among the prefix tokens.

    Parameter and order of its entries are timm's, of BEiT.

    grid    rows and columns of patches
    prefix  tokens before the patches
    """

    index: Tensor

    def __init__(self, grid: tuple[int, int], num_heads: int, prefix: int = 1) -> None:
        super().__init__()
        rows, columns = grid
        differences = (2 * rows - 1) * (2 * columns - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(differences + 3, num_heads))
        y, x = (place.flatten() for place in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
        down, right = y[:, None] - y + rows - 1, x[:, None] - x + columns - 1
        index = F.pad(down * (2 * columns - 1) + right, (prefix, 0, prefix, 0))
        index[:prefix], index[:, :prefix], index[:prefix, :prefix] = differences, differences + 1, differences + 2
        self.register_buffer("index", index, persistent=False)

    def forward(self) -> Tensor:
        """`[H, N, N]`: queries by rows."""
        return self.relative_position_bias_table[self.index].permute(2, 0, 1)
