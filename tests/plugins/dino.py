"""Self-distillation with many crops (Caron et al., "Emerging properties in self-supervised vision transformers", ICCV
2021).

The student sees two global and several local crops of an image, the teacher, a running average of the student, the
global ones. With p_t = softmax((t - c) / T_t) of the teacher, c the running mean of its outputs, and s the student's,

    L = mean over crops a != b, a global, of  - sum_k p_t(a)_k * log softmax(s(b) / T_s)_k
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeit.batch import Batch, Step
from fastdeit.methods.base import Context, Method, Out, Phase
from fastdeit.methods.config import MethodConfig
from fastdeit.methods.evaluators import Knn
from fastdeit.views import View


class Projection(nn.Module):
    """MLP, L2 normalisation, and cosine with `outputs` directions of unit length."""

    def __init__(self, dim: int, hidden: int, bottleneck: int, outputs: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, bottleneck))
        self.directions = nn.Parameter(torch.randn(outputs, bottleneck))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(self.mlp(x), dim=-1), F.normalize(self.directions, dim=-1))


class Branch(nn.Module):
    """Backbone and projection: outputs `[B, K]` of images `[B, 3, H, W]` of any size."""

    def __init__(self, backbone: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.backbone, self.projection = backbone, projection

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.projection(self.backbone.tokens(x, noise=noise)[:, 0])


class Dino(Method):
    """Two global crops and `crops` local ones. The directions stand still in the first epoch."""

    class Config(MethodConfig):
        """The recipe's `method:` section."""

        use: str
        crops: int = 4
        crop_size: int = 16
        outputs: int = 64
        momentum: tuple[float, float] = (0.996, 1.0)
        temperature: float = 0.1
        teacher_temperature: tuple[float, float] = (0.04, 0.07)

        def views(self) -> tuple[View, ...]:
            both = {"crop_scale": (0.4, 1.0)}
            local = {"size": self.crop_size, "crop_scale": (0.1, 0.4)}
            names = [f"local_{number}" for number in range(self.crops)]
            return View("global_0", **both), View("global_1", **both), *(View(name, **local) for name in names)

    def __init__(self, model: nn.Module, config: Config, context: Context) -> None:
        super().__init__(model, config, context)
        for head in model.head_names:  # nothing learns from labels here
            model.get_submodule(head).requires_grad_(False)
        self.projection = Projection(model.config.dim, 128, 128, config.outputs)
        self.teacher_branch = context.ema_teacher(Branch(model, self.projection), self.momentum)
        self.register_buffer("centre", torch.zeros(config.outputs))
        self.register_buffer("updates", torch.zeros(()))
        self._seen: list[Tensor] = []

    def momentum(self, step: Step) -> Tensor:
        """From the first value to the last by half a cosine."""
        first, last = self.config.momentum
        return last - (last - first) * (torch.cos(math.pi * step.progress) + 1) / 2

    def phases(self):
        return Phase("directions fixed", until=1, trains=["model", "projection.mlp"]), Phase("all")

    def forward(self, batch: Batch) -> Out:
        crops, noise = range(2, 2 + self.config.crops), batch.noise["drop_path"]
        globally = torch.cat([batch.pixels(0), batch.pixels(1)])
        student = Branch(self.model, self.projection)
        outputs = list(student(globally, noise.repeat(2, 1)).float().chunk(2))
        locally = torch.cat([batch.pixels(crop) for crop in crops])
        outputs += student(locally, noise.repeat(len(crops), 1)).float().chunk(len(crops))
        judged = self.teacher_branch(globally).float()
        low, high = self.config.teacher_temperature
        temperature = (low + (high - low) * (batch.step.progress / 0.3).clamp(max=1)).float()
        losses = []
        for a, target in enumerate(((judged - self.centre) / temperature).softmax(-1).chunk(2)):
            for b, output in enumerate(outputs):
                if a != b:
                    losses.append(-(target * (output / self.config.temperature).log_softmax(-1)).sum(-1).mean())
        return Out(torch.stack(losses).mean(), judged.mean(0))

    def step(self, batch: Batch, engine: Any) -> None:
        with engine.micro():
            out = engine.run(batch)
            engine.backward(out.loss)
        self._seen.append(out.logits)

    def after_step(self, engine: Any) -> None:
        mean = engine.world.sum(torch.stack(self._seen).mean(0)) / engine.world.size
        updates = self.updates + 1
        # The mean of what has been seen until that is ten batches: from zero, the first targets would all be alike.
        centre = self.centre.lerp(mean, (1 / updates).clamp(min=0.1))
        for buffer, new in ((self.updates, updates), (self.centre, centre)):
            buffer.copy_(torch.where(engine.skipped, buffer, new))
        self._seen.clear()

    def evaluators(self):
        return {"neighbours": Knn(neighbours=10)}
