"""Adversarial training with a high-frequency bias (Bai et al., "Improving vision transformers by revisiting
high-frequency components", ECCV 2022).

A step goes backward `rounds` times on disturbed images x + delta. Each time the weights' gradients add up, and delta
moves by the sign of its own gradient: delta = clip(delta + eta * sign(grad), -eps, eps). With z0 the logits of the
clean image and z those of the disturbed one, KL(z0, z) the symmetric divergence and CE the loss of the label,

    L_0 = CE + beta * KL,    L_k = (alpha * CE + beta * KL) / (rounds - 1)  for k > 0
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdeit.batch import Batch
from fastdeit.methods.base import Out, Phase
from fastdeit.methods.config import LabelConfig
from fastdeit.methods.supervised import Supervised


class Adversarial(Supervised):
    """`rounds` disturbances a step until epoch `until`, then none: training on labels."""

    class Config(LabelConfig):
        """The recipe's `method:` section; `eps` and `eta` are in units of the normalised image."""

        use: str
        rounds: int = 3
        until: int = 1
        eps: float = 2 / 255
        eta: float = 1 / 255
        alpha: float = 3.0
        beta: float = 0.01

    def phases(self):
        return Phase("adversarial", until=self.config.until), Phase("plain")

    def on_phase(self, phase: Phase) -> None:
        self.disturbs = phase.name == "adversarial"

    def forward(self, batch: Batch) -> Out:
        out = super().forward(batch)
        if "clean" not in batch.extras:
            return out
        clean, z = (logits.float().log_softmax(-1) for logits in (batch.extras["clean"], out.logits))
        divergence = ((clean.exp() - z.exp()) * (clean - z)).sum(-1).mean() / 2
        loss = batch.extras["weight"] * out.loss + self.config.beta * divergence
        return Out(loss, out.logits, {"divergence": divergence.detach()})

    def step(self, batch: Batch, engine: Any) -> None:
        if not self.disturbs:
            return super().step(batch, engine)
        config, x = self.config, batch.pixels().float()
        with torch.no_grad(), engine.micro(last=False):
            clean = engine.run(batch.rendered_as(x), log=False).logits
        delta = torch.zeros_like(x)
        for number in range(config.rounds):
            disturbed = (x + delta).requires_grad_()
            weight, share = (1.0, 1) if number == 0 else (config.alpha, config.rounds - 1)
            extras = {"clean": clean, "weight": torch.full((), weight, device=x.device)}
            with engine.micro(last=number == config.rounds - 1):
                out = engine.run(replace(batch.rendered_as(disturbed), extras=extras), log=number == 0)
                gradient = engine.backward(out.loss / share, wrt=disturbed)
            delta = moved(delta, gradient, config.eta, config.eps)
        return None


def moved(delta: Tensor, gradient: Tensor, eta: float, eps: float) -> Tensor:
    """The disturbance after one step up its gradient, inside [-eps, eps]."""
    return (delta + eta * gradient.sign()).clamp(-eps, eps)
