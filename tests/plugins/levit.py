"""LeViT in small (Graham et al., "LeViT: a vision transformer in ConvNet's clothing for faster inference", ICCV 2021).

Convolutions make few tokens, BatchNorm normalises everywhere, attention has a learned bias for each distance
(|dy|, |dx|) of two tokens, one attention with fewer queries than keys halves the grid, and two heads read the mean of
the tokens.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeit.models.contract import counted_flops, split_decay

Grid = tuple[int, int]


class LinearNorm(nn.Module):
    """A linear layer on tokens `[B, N, C]`, and BatchNorm over all of them; `scale` is what the norm begins with."""

    def __init__(self, dim: int, out: int, scale: float = 1.0) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(dim, out, bias=False), nn.BatchNorm1d(out)
        nn.init.constant_(self.norm.weight, scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x).mT).mT


class Attention(nn.Module):
    """Tokens of `grid` to those of every `stride`-th row and column. Values are twice as wide as keys."""

    def __init__(self, dim: int, out: int, heads: int, grid: Grid, stride: int = 1, width: int = 8) -> None:
        super().__init__()
        self.heads, self.width, self.stride, self.grid = heads, width, stride, grid
        self.query, self.key = LinearNorm(dim, heads * width), LinearNorm(dim, heads * width)
        self.value, self.out = LinearNorm(dim, 2 * heads * width), LinearNorm(2 * heads * width, out, float(stride > 1))
        self.biases = nn.Parameter(torch.zeros(heads, math.prod(grid)))
        rows, columns = torch.arange(grid[0]), torch.arange(grid[1])
        down, right = ((each[::stride, None] - each).abs() for each in (rows, columns))
        places = grid[1] * down[:, None, :, None] + right[None, :, None, :]
        self.register_buffer("places", places.flatten(2).flatten(0, 1), persistent=False)
        self.table: Tensor | None = None

    def train(self, mode: bool = True) -> "Attention":
        """In eval mode the biases of all pairs of tokens are looked up once."""
        super().train(mode)
        self.table = None if mode else self.biases.detach()[:, self.places]
        return self

    def forward(self, x: Tensor) -> Tensor:
        fewer = x.unflatten(1, self.grid)[:, :: self.stride, :: self.stride].flatten(1, 2)
        layers = (self.query, fewer), (self.key, x), (self.value, x)
        q, k, v = (layer(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer, tokens in layers)
        bias = self.biases[:, self.places] if self.table is None else self.table
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q))  # the network may have moved since
        return self.out(F.hardswish(mixed.transpose(1, 2).flatten(2)))


class Mlp(nn.Sequential):
    """Twice as wide inside; begins as zero."""

    def __init__(self, dim: int) -> None:
        super().__init__(LinearNorm(dim, 2 * dim), nn.Hardswish(), LinearNorm(2 * dim, dim, 0.0))


class LeViT(nn.Module):
    """(class, distillation) logits of images `[B, 3, H, W]`, H and W multiples of 8."""

    noise_per_sample, patch_size, head_names = 0, None, ("head.1", "head_dist.1")

    def __init__(self, image_size: Grid, num_classes: int, drop_path: float = 0.0, dims: Grid = (16, 32)) -> None:
        super().__init__()
        if drop_path:
            raise ValueError("this LeViT has no drop-path: set model.drop_path to 0")
        self.image_size, (dim, wide) = image_size, dims
        layers = [(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b)) for a, b in ((3, 8), (8, dim))]
        self.stem = nn.Sequential(*layers[0], nn.Hardswish(), *layers[1])
        grid = image_size[0] // 4, image_size[1] // 4
        fewer = image_size[0] // 8, image_size[1] // 8
        self.first, self.first_mlp = Attention(dim, dim, 2, grid), Mlp(dim)
        self.shrink, self.shrink_mlp = Attention(dim, wide, 4, grid, stride=2), Mlp(wide)
        self.last, self.last_mlp = Attention(wide, wide, 4, fewer), Mlp(wide)
        heads = (nn.Sequential(nn.BatchNorm1d(wide), nn.Linear(wide, num_classes)) for _ in range(2))
        self.head, self.head_dist = heads

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.stem(x).flatten(2).mT
        x = x + self.first(x)
        x = self.shrink(x + self.first_mlp(x))
        x = x + self.shrink_mlp(x)
        x = x + self.last(x)
        mean = (x + self.last_mlp(x)).mean(1)
        return self.head(mean), self.head_dist(mean)

    def resized_weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights with their biases interpolated to the distances of this model's grids, square ones of theirs."""
        made = dict(tensors)
        for name, attention in (("first", self.first), ("shrink", self.shrink), ("last", self.last)):
            biases = made[f"{name}.biases"]
            side = math.isqrt(biases.shape[1])
            if biases.shape != attention.biases.shape and side**2 == biases.shape[1]:
                square = biases.unflatten(1, (side, side))[None]
                made[f"{name}.biases"] = F.interpolate(square, attention.grid, mode="bicubic")[0].flatten(1)
        return made

    def decay_groups(self, decay_dist_token: bool = False) -> tuple[list[str], list[str]]:
        return split_decay(self, {name for name, _ in self.named_parameters() if name.endswith("biases")})

    def flops(self, image_size: Grid | None = None) -> int:
        return counted_flops(self, (1, 3, *(image_size or self.image_size)))
