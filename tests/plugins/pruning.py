"""Token pruning (Rao et al., "DynamicViT: efficient vision transformers with dynamic token sparsification", NeurIPS
2021).

Before some blocks a predictor decides of every patch whether it takes part from there on. In training the decision is
drawn by the Gumbel trick, with a straight-through gradient, and no patch leaves: attention to a patch that is out is
masked, but for that of the patch to itself. In evaluation the best patches are gathered, and the others are gone. With
p the student's and t the teacher's answer, m_s the share of patches after stage s and r_s the one that is wanted,

    L = CE(label) + KL(t || p) + 0.5 MSE of the tokens that are left + ratio * mean over stages of (m_s - r_s)^2

r_s falls from 1 to keep^(s + 1) in the first `ramp` of the run.
"""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fastdeit import kernels
from fastdeit.batch import Batch, Step
from fastdeit.methods.base import Context, Method, Out, scores
from fastdeit.methods.config import LabelConfig, TeacherConfig
from fastdeit.methods.evaluators import Classify, HeldOutLoss


class Predictor(nn.Module):
    """log (out, in) `[B, P, 2]` of patches `[B, P, dim]`, from each and the mean of those that are still in."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.own = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.decide = nn.Sequential(nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, 2))

    def forward(self, patches: Tensor, policy: Tensor) -> Tensor:
        own, shared = self.own(patches).chunk(2, -1)
        mean = (shared * policy[..., None]).sum(1, keepdim=True) / policy.sum(1).clamp(min=1)[:, None, None]
        return self.decide(torch.cat((own, mean.expand_as(own)), -1)).float().log_softmax(-1)


class Pruning(Method):
    """The student learns with its predictors, from labels and from the network that it was before."""

    class Config(LabelConfig):
        """The recipe's `method:` section: `before` are the blocks, of whose patches each keeps the share `keep`."""

        use: str
        teacher: TeacherConfig
        before: tuple[int, ...]
        keep: float = Field(0.7, gt=0, le=1)
        ramp: float = Field(0.5, gt=0, le=1)
        ratio: float = 2.0
        model_lr: float = 0.01

    def __init__(self, model: nn.Module, config: Config, context: Context) -> None:
        super().__init__(model, config, context)
        self.teacher = context.teacher(config.teacher)
        self.predictors = nn.ModuleList(Predictor(model.config.dim) for _ in config.before)
        self.patches = model.grid[0] * model.grid[1]

    def noise(self) -> dict[str, int]:
        return super().noise() | {f"gumbel_{stage}": 2 * self.patches for stage in range(len(self.config.before))}

    def param_groups(self, base: list) -> list:
        """What is trained already learns slowly, the predictors fast."""
        found = []
        for group in base:
            model = {name: p for name, p in group.params.items() if name.startswith("model.")}
            others = {name: p for name, p in group.params.items() if name not in model}
            slow = group.lr_scale * self.config.model_lr
            found += [replace(group, params=model, lr_scale=slow), replace(group, params=others)]
        return found

    def wanted(self, stage: int, step: Step) -> Tensor:
        """The share of patches after a stage, float64, at this step."""
        ramp = (step.progress / self.config.ramp).clamp(max=1)
        return 1 - (1 - self.config.keep ** (stage + 1)) * ramp

    def forward(self, batch: Batch) -> Out:
        tokens, policies = self.masked(self.student_input(batch), batch.noise)
        theirs = self.teacher.tokens(self.teacher.pixels(batch))
        logits = self.model.classify(tokens)
        answers = kernels.distillation_loss(
            *(logits, logits, batch.targets, self.teacher.classify(theirs)),
            smoothing=self.config.smoothing,
            distillation="soft",
            reduction="batchmean",
        )
        error = (tokens.float() - theirs.float())[:, self.model.prefix_tokens :].square().mean(-1)
        features = (error * policies[-1]).sum(1) / policies[-1].sum(1).clamp(min=1)
        off = [policy.mean(1) - self.wanted(stage, batch.step) for stage, policy in enumerate(policies)]
        ratio = torch.stack(off).square().mean()
        loss = 2 * answers.total + 0.5 * features.mean() + self.config.ratio * ratio
        kept = policies[-1].mean().detach()
        return Out(loss, logits, {"base": answers.base, "ratio": ratio.detach(), "kept": kept})

    def masked(self, x: Tensor, noise: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """(all tokens, of each stage which patches are in as 0 or 1 `[B, P]`): the form that has gradients."""
        policies = [torch.ones(len(x), self.patches, device=x.device)]

        def decide(stage: int, tokens: Tensor) -> Tensor:
            log_p = self.predictors[stage](tokens[:, self.model.prefix_tokens :], policies[-1])
            uniforms = noise[f"gumbel_{stage}"].view_as(log_p).clamp(1e-6, 1 - 1e-6)
            soft = (log_p - (-uniforms.log()).log()).softmax(-1)[..., 1]
            drawn = soft + ((soft > 0.5).float() - soft).detach()
            policies.append(policies[-1] * drawn)
            return tokens

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return policy_attention(q, k, v, F.pad(policies[-1], (self.model.prefix_tokens, 0), value=1.0))

        at = {block: partial(decide, stage) for stage, block in enumerate(self.config.before)}
        masked = dict.fromkeys(range(min(self.config.before), len(self.model.blocks)), attend)
        tokens = self.model.tokens(x, at=at, attend=masked, noise=noise.get("drop_path"))
        return tokens, policies[1:]

    def predict(self, x: Tensor) -> dict[str, Tensor]:
        """The pruned network."""
        return scores(self.model.classify(self.gathered(x)), self.config.fuse)

    def gathered(self, x: Tensor) -> Tensor:
        """Tokens of the patches that are left."""
        prefix = self.model.prefix_tokens

        def prune(stage: int, tokens: Tensor) -> Tensor:
            first, patches = tokens[:, :prefix], tokens[:, prefix:]
            log_p = self.predictors[stage](patches, patches.new_ones(patches.shape[:2]))
            count = max(1, round(self.patches * self.config.keep ** (stage + 1)))
            best = log_p[..., 1].topk(count).indices[..., None].expand(-1, -1, patches.shape[2])
            return torch.cat((first, patches.gather(1, best)), 1)

        return self.model.tokens(x, at={block: partial(prune, s) for s, block in enumerate(self.config.before)})

    def evaluators(self):
        return {"pruned": Classify(), "masked": HeldOutLoss()}


def policy_attention(q: Tensor, k: Tensor, v: Tensor, policy: Tensor) -> Tensor:
    """Softmax attention `[B, heads, N, d]` to the tokens that are in by `policy` `[B, N]`, and to oneself."""
    logits = (q @ k.mT).float() / q.shape[-1] ** 0.5
    seen = policy[:, None, None, :]
    seen = seen + (1 - seen) * torch.eye(q.shape[2], device=q.device)
    weights = (logits - logits.amax(-1, keepdim=True)).exp() * seen
    return (weights / weights.sum(-1, keepdim=True)).to(v.dtype) @ v
