"""Every combination of base loss, distillation and heads against a plain restatement of DeiT's losses.py."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from fastdeit import methods
from fastdeit.methods.config import TeacherConfig
from tests.toys import toy_batch, toy_context

B, K = 6, 7
SMOOTHING = 0.1


def soft_target_cross_entropy(x, target):
    """timm's, which DeiT takes where samples are mixed."""
    return torch.sum(-target * F.log_softmax(x, dim=-1), dim=-1).mean()


def losses_py(outputs, labels, teacher, base, kind, alpha, tau):
    """`DistillationLoss.forward`; without a second head the first is distilled (usual distillation)."""
    outputs, outputs_kd = outputs if isinstance(outputs, tuple) else (outputs, outputs)
    if base == "bce":
        base_loss = F.binary_cross_entropy_with_logits(outputs, labels.gt(0.0).type(outputs.dtype))
    else:
        base_loss = soft_target_cross_entropy(outputs, labels)
    if kind == "none":
        return base_loss
    if kind == "soft":
        student, told = F.log_softmax(outputs_kd / tau, dim=1), F.log_softmax(teacher / tau, dim=1)
        distillation = F.kl_div(student, told, reduction="sum", log_target=True) * (tau * tau) / outputs_kd.numel()
    else:
        distillation = F.cross_entropy(outputs_kd, teacher.argmax(dim=1))
    return base_loss * (1 - alpha) + distillation * alpha


class Logits(torch.nn.Module):
    """A student whose parameters are its logits."""

    noise_per_sample = 0

    def __init__(self, heads):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.heads = torch.nn.ParameterList(3 * torch.randn(B, K, generator=generator) for _ in range(heads))

    def forward(self, x, noise=None):
        return tuple(self.heads) if len(self.heads) > 1 else self.heads[0]


@pytest.mark.parametrize(
    ("base", "kind", "heads", "weights"),
    list(product(["ce", "bce"], ["none", "soft", "hard"], [1, 2], [(0.5, 1.0), (0.1, 3.0)])),
)
def test_a_combination_is_that_of_the_public_code(base, kind, heads, weights):
    alpha, tau = weights
    generator = torch.Generator().manual_seed(1)
    told = 3 * torch.randn(B, K, generator=generator)
    y1 = torch.randint(0, K, (B,), generator=generator)
    batch = toy_batch(
        torch.zeros(B, 2, 2, 3, dtype=torch.uint8), y1, y2=y1.flip(0), lam=torch.tensor([0.3, 1.0, 0.0, 0.6, 1.0, 0.7])
    )
    smoothing = 0.0 if base == "bce" else SMOOTHING
    options = {"loss": base, "smoothing": smoothing}
    if kind != "none":
        options |= {"distillation": kind, "alpha": alpha, "tau": tau, "teacher": TeacherConfig(timm="x")}
    use = "supervised" if kind == "none" else "distill"
    method = methods.find(use)(Logits(heads), methods.config(use)(**options), toy_context(K, lambda batch: told))
    loss = method(batch).loss
    loss.backward()

    heads64 = [head.detach().double().requires_grad_() for head in method.model.heads]
    # The public code leaves the second head untrained where nothing is distilled; here the mean of both is trained.
    outputs = sum(heads64) / heads if kind == "none" or heads == 1 else tuple(heads64)
    mixed = torch.lerp(
        F.one_hot(batch.targets.y2, K).double(), F.one_hot(y1, K).double(), batch.targets.lam[:, None].double()
    )
    labels = smoothing / K + (1 - smoothing) * mixed
    expected = losses_py(outputs, labels, told.double(), base, kind, alpha, tau)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for head, exact in zip(method.model.heads, heads64, strict=True):
        torch.testing.assert_close(head.grad.double(), exact.grad, rtol=1e-4, atol=1e-8)
