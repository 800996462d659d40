"""Distillation of attention's relations between two transformers (Ren et al., "TinyMIM", CVPR 2023, section 3).

Of one block of each, with q, k, v `[B, heads, N, head_dim]`, the student learns softmax(q k' / sqrt(d)) and
softmax(v v' / sqrt(d)) of the teacher:

    L = KL(R_qk teacher || R_qk student) + KL(R_vv teacher || R_vv student), a mean over samples, heads and queries

The two blocks have equally many heads; their widths may differ. What comes after the student's block learns nothing.
"""

from torch import Tensor, nn

from fastdeit.batch import Batch
from fastdeit.methods.base import Context, Method, Out
from fastdeit.methods.config import FeatureTeacherConfig, MethodConfig
from fastdeit.methods.evaluators import HeldOutLoss
from fastdeit.models.tokens import QKV, taps


class Relations(Method):
    """The relations of the teacher's block `teacher_block` become those of the student's block `block`."""

    class Config(MethodConfig):
        """The recipe's `method:` section; blocks count from 0."""

        use: str
        teacher: FeatureTeacherConfig
        block: int
        teacher_block: int

    def __init__(self, model: nn.Module, config: Config, context: Context) -> None:
        super().__init__(model, config, context)
        self.teacher = context.teacher(config.teacher)
        attention = f"blocks.{config.block}.attn.qkv", f"blocks.{config.block}.norm1"
        later = tuple(f"blocks.{number}." for number in range(config.block, len(model.blocks)))
        for name, parameter in model.named_parameters():
            unused = name.startswith((*later, "norm.", *model.head_names)) and not name.startswith(attention)
            parameter.requires_grad_(not unused)

    def forward(self, batch: Batch) -> Out:
        config = self.config
        theirs = self.teacher.taps(self.teacher.pixels(batch), qkv=[config.teacher_block]).qkv[config.teacher_block]
        noise = batch.noise["drop_path"]
        ours = taps(self.model, batch.pixels(), qkv=[config.block], noise=noise).qkv[config.block]
        between, within = (
            divergence(relations(theirs, 0, 1), relations(ours, 0, 1)),
            divergence(relations(theirs, 2, 2), relations(ours, 2, 2)),
        )
        return Out(between + within, parts={"qk": between.detach(), "vv": within.detach()})

    def evaluators(self):
        return {"relations": HeldOutLoss()}


def relations(qkv: QKV, a: int, b: int) -> Tensor:
    """log softmax of the scaled products `[B, heads, N, N]` of two of q, k and v, in float32."""
    x, y = qkv[a].float(), qkv[b].float()
    return (x @ y.mT / x.shape[-1] ** 0.5).log_softmax(-1)


def divergence(target: Tensor, log_probabilities: Tensor) -> Tensor:
    """KL(exp(target) || exp(log_probabilities)) over the last dimension, a mean over the others."""
    return (target.exp() * (target - log_probabilities)).sum(-1).mean()
