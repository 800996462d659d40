"""SReT in small (Shen et al., "Sliced recursive transformer", ECCV 2022).

Every block is applied twice, each time followed by a small layer of its own, so that depth grows and parameters do
not. Attention runs in groups of tokens; before the second time the tokens are permuted, so that groups mix. Residuals
have learned coefficients.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeit.models.contract import counted_flops, split_decay

PATCH = 8


class Residual(nn.Module):
    """a x + b y."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a * x + self.b * y


class Mlp(nn.Module):
    """LayerNorm, two linear layers and the residual."""

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, ratio * dim), nn.GELU(), nn.Linear(ratio * dim, dim)
        )
        self.residual = Residual()

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x, self.layers(x))


class Block(nn.Module):
    """Attention in groups, and an MLP."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm, self.residual = heads, nn.LayerNorm(dim), Residual()
        self.qkv, self.proj, self.mlp = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), Mlp(dim, 3)

    def forward(self, x: Tensor, groups: int, order: Tensor | None = None) -> Tensor:
        """Tokens `[B, N, C]`; `order` `[B, N]` permutes them for attention, and is undone."""
        y = self.norm(x) if order is None else self.norm(x).gather(1, order[:, :, None].expand_as(x))
        q, k, v = self.qkv(y).unflatten(1, (groups, -1)).unflatten(3, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        y = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(3).flatten(1, 2))
        y = y if order is None else y.gather(1, order.argsort(1)[:, :, None].expand_as(y))
        return self.mlp(self.residual(x, y))


class SReT(nn.Module):
    """Logits of images `[B, 3, H, W]`. In training mode the permutations are those that the noise sorts into."""

    patch_size, head_names = None, ("head",)

    def __init__(self, image_size: tuple[int, int], num_classes: int, drop_path: float = 0.0) -> None:
        super().__init__()
        if drop_path:
            raise ValueError("this SReT has no drop-path: set model.drop_path to 0")
        dim, depth, heads = 32, 2, 2
        self.image_size, self.count = image_size, (image_size[0] // PATCH) * (image_size[1] // PATCH)
        self.noise_per_sample = depth * self.count
        self.stem = nn.Conv2d(3, dim, PATCH, PATCH)
        passes: list[nn.Module] = []
        for _ in range(depth):
            shared = Block(dim, heads)
            passes += [shared, Mlp(dim, 1), shared, Mlp(dim, 1)]
        self.blocks = nn.ModuleList(passes)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, num_classes)
        generator = torch.Generator().manual_seed(0)
        fixed = torch.rand(1, self.noise_per_sample, generator=generator, device="cpu")
        self.register_buffer("fixed", fixed, persistent=False)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        if self.training and noise is None:
            raise ValueError("SReT draws permutations from the noise of a training forward")
        x = self.stem(x).flatten(2).mT
        noise = noise if self.training else self.fixed.expand(x.shape[0], -1)
        for number, order in enumerate(noise.split(self.count, 1)):
            shared, mlp, _, second = self.blocks[4 * number : 4 * number + 4]
            x = mlp(shared(x, groups=4))
            x = second(shared(x, groups=2, order=order.argsort(1)))
        return self.head(self.norm(x.mean(1)))

    def decay_groups(self, decay_dist_token: bool = False) -> tuple[list[str], list[str]]:
        return split_decay(self, ())

    def flops(self, image_size: tuple[int, int] | None = None) -> int:
        return counted_flops(self, (1, 3, *(image_size or self.image_size)))
