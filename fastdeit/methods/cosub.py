"""Co-training of two submodels (Touvron et al., "Co-training 2^L Submodels for Visual Recognition", CVPR 2023).

The images go twice through one model. Drop-path drops other branches in the second copy, so the two are different
submodels a and b. Each learns the label, and the other's answer, which is held constant (sg):

    L = 1/4 [BCE(a, t) + BCE(b, t) + BCE(a, sg sigmoid(b)) + BCE(b, sg sigmoid(a))]

`kernels.cosub_loss` has the details. The skipping of samples whose branches are dropped is not part of this.
"""

import torch
from torch import Tensor, nn

from fastdeit import kernels
from fastdeit.batch import Batch
from fastdeit.methods.base import Context, Method, Out
from fastdeit.methods.config import CosubConfig

_FIRST, _SECOND = "drop_path", "drop_path_second"


class Cosub(Method):
    """Two submodels in one forward of 2B images. A model with two heads is trained on the mean of their logits."""

    Config = CosubConfig

    def __init__(self, model: nn.Module, config: CosubConfig, context: Context) -> None:
        super().__init__(model, config, context)
        if not _drops_paths(model):
            raise ValueError(
                f"{type(model).__name__} has no drop-path in training, so both submodels would be the same network"
            )

    def noise(self) -> dict[str, int]:
        """One stream for each submodel: both depend on the place in the global batch, as all noise does.

        timm's models draw from torch's generator instead, and other numbers for each of the 2B images.
        """
        return dict.fromkeys((_FIRST, _SECOND), self.model.noise_per_sample)

    def forward(self, batch: Batch) -> Out:
        logits = self._submodels(batch)
        config = self.config
        loss = kernels.cosub_loss(logits, batch.targets, smoothing=config.smoothing, binarise=config.binarise)
        return Out(loss, logits[: len(batch)])

    def _submodels(self, batch: Batch) -> Tensor:
        """Logits `[2B, K]`: those of the batch by the first submodel, then by the second."""
        images = self.student_input(batch)
        noise = torch.cat((batch.noise[_FIRST], batch.noise[_SECOND]))
        logits = self.model(torch.cat((images, images)), noise=noise)
        return (logits[0] + logits[1]) / 2 if isinstance(logits, tuple) else logits


def _drops_paths(model: nn.Module) -> bool:
    """Whether two forwards of the model can differ: it reads noise, or has timm's modules that draw for themselves."""
    return model.noise_per_sample > 0 or any(getattr(module, "drop_prob", None) for module in model.modules())
