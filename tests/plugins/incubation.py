"""Training a deep transformer stage by stage (Ni et al., "Deep incubation: training large models by
divide-and-conquer", ICCV 2023).

A meta model with one block a stage is trained first. Then each stage of the deep model is trained in the place of the
meta model's, while the others stand still. At last the stages are put together and trained as one. The first stage owns
the embedding, the last one the norm and the head.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from fastdeit import kernels
from fastdeit.batch import Batch
from fastdeit.methods.base import Context, Method, Out, Phase
from fastdeit.methods.config import LabelConfig
from fastdeit.models.blocks import Stream
from fastdeit.models.vit import VisionTransformer


class Incubation(Method):
    """The student is the deep model; the meta model belongs to the method."""

    class Config(LabelConfig):
        """The recipe's `method:` section: blocks of each stage, and epochs of the meta model and of each stage."""

        use: str
        depths: tuple[int, ...]
        meta_epochs: int = 1
        stage_epochs: int = 1

    def __init__(self, model: VisionTransformer, config: Config, context: Context) -> None:
        super().__init__(model, config, context)
        if model.config.drop_path:
            raise ValueError("incubation runs blocks on their own, which have no drop-path: set model.drop_path to 0")
        names = {id(owner): f"model.{name}" for name, owner in self._owners()}
        # By name: parameters are others once processes share the networks.
        self.stages = [[names[id(owner)] for owner in stage] for stage in model.stages(config.depths)]
        self.meta = VisionTransformer(replace(model.config, depth=len(config.depths)))
        self.trained: int | None = None

    def phases(self):
        end, found = self.config.meta_epochs, [Phase("meta", self.config.meta_epochs, ["meta"])]
        for number, stage in enumerate(self.stages):
            end += self.config.stage_epochs
            found.append(Phase(f"stage {number}", end, stage))
        return [*found, Phase("together", trains=["model"])]

    def on_phase(self, phase: Phase) -> None:
        self.phase = phase.name

    def forward(self, batch: Batch) -> Out:
        patches = batch.patches(self.model.patch_size)
        if self.phase == "together":
            logits = self.model(patches)
        elif self.phase == "meta":
            logits = self.meta(patches)
        else:
            logits = self.hybrid(patches, int(self.phase.removeprefix("stage ")))
        loss = kernels.distillation_loss(logits, None, batch.targets, smoothing=self.config.smoothing)
        return Out(loss.total, logits, {"base": loss.base})

    def hybrid(self, patches: Tensor, stage: int) -> Tensor:
        """Logits of the meta model with one stage of the deep model in the place of its own."""
        start = sum(self.config.depths[:stage])
        blocks: list[nn.Module] = list(self.meta.blocks)
        blocks[stage : stage + 1] = self.model.blocks[start : start + self.config.depths[stage]]
        first, last = (self.model if stage == end else self.meta for end in (0, len(self.config.depths) - 1))
        return last.classify(last.norm(through(blocks, first.tokens(patches, stop=0))))

    def _owners(self) -> Sequence[tuple[str, nn.Module | nn.Parameter]]:
        return [*self.model.named_modules(), *self.model.named_parameters()]


def through(blocks: Sequence[nn.Module], tokens: Tensor) -> Tensor:
    """Tokens `[B, N, dim]` after these blocks of a `VisionTransformer`."""
    stream = Stream(tokens)
    for block in blocks:
        stream = block(stream)
    return stream.sum()
