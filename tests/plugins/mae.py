"""Masked autoencoding (He et al., "Masked autoencoders are scalable vision learners", CVPR 2022).

The encoder sees a random quarter of the patches. A small decoder, which belongs to the method, predicts the pixels of
the others. The loss is the squared error of the masked patches, each normalised by its own mean and variance.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

from fastdeit.batch import Batch
from fastdeit.kernels import nn as fused
from fastdeit.methods.base import Context, Method, Out
from fastdeit.methods.config import MethodConfig
from fastdeit.methods.evaluators import HeldOutLoss, Knn


class MaskedAutoencoder(Method):
    """Learns without labels, so that it is judged by its reconstruction and by neighbours of its features."""

    class Config(MethodConfig):
        """The recipe's `method:` section."""

        use: str
        mask: float = Field(0.75, gt=0, lt=1)
        dim: int = 64
        depth: int = 1
        heads: int = 4

    def __init__(self, model: nn.Module, config: Config, context: Context) -> None:
        super().__init__(model, config, context)
        for head in model.head_names:  # nothing learns from labels here
            model.get_submodule(head).requires_grad_(False)
        rows, columns = model.grid
        self.patches, dim = rows * columns, config.dim
        self.kept = max(1, round(self.patches * (1 - config.mask)))
        self.embed = nn.Linear(model.config.dim, dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, self.patches, dim))
        self.blocks = nn.Sequential(*(fused.Block(dim, config.heads) for _ in range(config.depth)))
        self.norm = fused.LayerNorm(dim)
        self.pixels = nn.Linear(dim, 3 * model.patch_size**2)

    def noise(self) -> dict[str, int]:
        return super().noise() | {"mask": self.patches}

    def forward(self, batch: Batch) -> Out:
        patches = batch.patches(self.model.patch_size)
        order = batch.noise["mask"].argsort(1)
        tokens = self.model.tokens(patches, keep=order[:, : self.kept], noise=batch.noise["drop_path"])
        predicted = self.decoded(tokens[:, self.model.prefix_tokens :], order)
        target = patches.float()
        mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        error = (predicted.float() - (target - mean) / (variance + 1e-6).sqrt()).square().mean(-1)
        loss = error.gather(1, order[:, self.kept :]).mean()
        return Out(loss, parts={"reconstruction": loss.detach()})

    def decoded(self, tokens: Tensor, order: Tensor) -> Tensor:
        """Pixels of all patches `[B, P, 3*p*p]` from the tokens of the first `kept` of them in `order` `[B, P]`."""
        masked = self.mask_token.expand(len(tokens), self.patches - self.kept, -1)
        x = torch.cat((self.embed(tokens), masked.to(tokens.dtype)), 1)
        back = order.argsort(1)[:, :, None].expand(-1, -1, x.shape[2])
        return self.pixels(self.norm(self.blocks(x.gather(1, back) + self.positions)))

    def evaluators(self):
        return {"reconstruction": HeldOutLoss(), "neighbours": Knn(neighbours=10)}
