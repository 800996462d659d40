"""Methods against float64 formulas written out here, and the promises around teachers."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from fastdeit import methods
from fastdeit.methods.base import scores
from fastdeit.methods.config import TeacherConfig
from fastdeit.methods.teacher import Teacher
from tests.toys import toy_batch, toy_context

B, K, SIDE = 6, 5, 8
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


class TwoHeads(nn.Module):
    """The smallest student with the model contract: linear heads on pixels."""

    noise_per_sample = 0

    def __init__(self, heads: int):
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(3 * SIDE * SIDE, K) for _ in range(heads)])

    def forward(self, x, noise=None):
        out = tuple(head(x.flatten(1)) for head in self.heads)
        return out if len(out) > 1 else out[0]


class Listener(nn.Module):
    """A teacher network that remembers what it was shown."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * SIDE * SIDE, K)
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return 4 * self.linear(x.flatten(1))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (B, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)
    y1 = torch.randint(0, K, (B,), generator=generator)
    box = torch.zeros(B, 4, dtype=torch.int32)
    box[1] = torch.tensor([2, 1, 6, 5])
    return toy_batch(
        images, y1, y2=y1.flip(0), lam=torch.tensor([0.3, 0.75, 1.0, 1.0, 0.5, 0.3]), partner=torch.arange(B).flip(0),
        pixel_lam=torch.tensor([0.3, 1.0, 1.0, 1.0, 0.5, 0.3]), box=box[None], mean=MEAN, std=STD,
    )  # fmt: skip


def pixels64(batch, mean=MEAN, std=STD):
    """Normalised, mixed images by loops over samples, in float64."""
    x = batch.images[0].double().permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(3, 1, 1)
    out = []
    for i in range(B):
        lam, other = batch.pixel_lam[i].double(), x[batch.partner[i]]
        image = lam * x[i] + (1 - lam) * other
        y0, x0, y1, x1 = batch.box[0, i].tolist()
        image[:, y0:y1, x0:x1] = other[:, y0:y1, x0:x1]
        out.append(image)
    return torch.stack(out)


def targets64(batch, smoothing):
    y1, y2, lam = batch.targets
    hot = lam.double()[:, None] * F.one_hot(y1, K) + (1 - lam.double()[:, None]) * F.one_hot(y2, K)
    return smoothing / K + (1 - smoothing) * hot


def build(use, heads, network=None, **options):
    torch.manual_seed(0)
    config = methods.config(use)(**options)
    return methods.find(use)(TwoHeads(heads), config, toy_context(K, network))


def make_distill(heads, network, **options):
    return build("distill", heads, network, teacher=TeacherConfig(recipe="digits_teacher"), **options)


def heads64(method, batch):
    """Logits in float64 from a copy of the student's heads, with gradients of their own."""
    x = pixels64(batch).flatten(1)
    weights = [(h.weight.detach().double().requires_grad_(), h.bias.detach().double()) for h in method.model.heads]
    return [F.linear(x, w, b) for w, b in weights], [w for w, _ in weights]


def check(method, batch, expected, weights64):
    out = method(batch)
    out.loss.backward()
    expected.backward()
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for head, weight in zip(method.model.heads, weights64, strict=True):
        torch.testing.assert_close(head.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-6)
    return out


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_supervised_is_cross_entropy_with_mixed_targets(batch, smoothing):
    method = build("supervised", 1, smoothing=smoothing)
    (logits,), weights = heads64(method, batch)
    expected = -(targets64(batch, smoothing) * logits.log_softmax(-1)).sum(-1).mean()
    check(method, batch, expected, weights)


def test_supervised_bce_marks_both_mixed_labels(batch):
    method = build("supervised", 1, loss="bce", smoothing=0.0)
    (logits,), weights = heads64(method, batch)
    expected = F.binary_cross_entropy_with_logits(logits, (targets64(batch, 0.0) > 0).double())
    check(method, batch, expected, weights)


def test_supervised_trains_two_heads_on_the_mean_of_their_logits(batch):
    method = build("supervised", 2, smoothing=0.1)
    (first, second), weights = heads64(method, batch)
    expected = -(targets64(batch, 0.1) * ((first + second) / 2).log_softmax(-1)).sum(-1).mean()
    check(method, batch, expected, weights)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(("kind", "reduction"), [("hard", "numel"), ("soft", "numel"), ("soft", "batchmean")])
def test_distillation_formula(batch, heads, kind, reduction):
    torch.manual_seed(3)
    network = Listener()
    method = make_distill(heads, Teacher(network), distillation=kind, reduction=reduction, alpha=0.3, tau=2.0)
    logits, weights = heads64(method, batch)
    first, second = logits if heads == 2 else (logits[0], logits[0])
    taught = (
        4 * F.linear(pixels64(batch).flatten(1), network.linear.weight.double(), network.linear.bias.double()).detach()
    )
    base = -(targets64(batch, 0.1) * first.log_softmax(-1)).sum(-1).mean()
    if kind == "hard":
        distill = F.cross_entropy(second, taught.argmax(-1))
    else:
        p, q = (taught / 2).log_softmax(-1), (second / 2).log_softmax(-1)
        distill = (p.exp() * (p - q)).sum() * 4 / (B * K if reduction == "numel" else B)
    out = check(method, batch, 0.7 * base + 0.3 * distill, weights)
    assert out.parts["base"].item() == pytest.approx(base.item(), rel=1e-5)
    assert out.parts["distill"].item() == pytest.approx(distill.item(), rel=1e-4)


def test_teacher_is_shown_the_student_image_in_its_own_normalisation(batch):
    network = Listener()
    method = make_distill(2, Teacher(network, mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.3)))
    method(batch)
    expected = pixels64(batch, (0.1, 0.2, 0.3), (0.5, 0.4, 0.3))
    torch.testing.assert_close(network.seen[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_teacher_is_resized_to_its_resolution(batch):
    sizes = []

    class Sizes(nn.Module):
        def forward(self, x):
            sizes.append(tuple(x.shape))
            return torch.zeros(len(x), K)

    Teacher(Sizes(), image_size=12)(batch)
    assert sizes == [(B, 3, 12, 12)]


def test_teacher_answers_before_the_student_keeps_anything(batch):
    """So that what it needs is not on top of the student's activations."""
    network = Listener()
    method = make_distill(2, Teacher(network))
    seen_by_then = []
    method.model.register_forward_pre_hook(lambda *_: seen_by_then.append(len(network.seen)))
    method(batch)
    assert seen_by_then == [1]


def test_teacher_is_frozen_and_not_part_of_the_method(batch):
    network = Listener().train()
    method = make_distill(2, Teacher(network))
    method(batch).loss.backward()
    assert not network.training
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    assert {name.split(".")[0] for name in method.state_dict()} == {"model"}
    own = {id(p) for p in method.parameters()}
    assert not own & {id(p) for p in network.parameters()}


def test_fusing_two_heads():
    first, second = torch.tensor([[4.0, 0.0, 3.9]]), torch.tensor([[0.0, 0.1, 0.0]])
    fused = {how: scores((first, second), how)["fused"] for how in ("softmax", "logit", "class", "distillation")}
    torch.testing.assert_close(fused["softmax"], first.softmax(-1) + second.softmax(-1))
    torch.testing.assert_close(fused["logit"], (first + second) / 2)
    torch.testing.assert_close(fused["class"], first)
    torch.testing.assert_close(fused["distillation"], second)
    assert list(scores(first, "softmax")) == ["class"]


def test_configuration_is_checked():
    with pytest.raises(ValidationError, match="every class positive"):
        methods.config("supervised")(loss="bce", smoothing=0.1)
    with pytest.raises(ValidationError, match="one of recipe, timm and model"):
        TeacherConfig(recipe="a", timm="b")
    with pytest.raises(ValidationError, match="or by weights alone"):
        TeacherConfig()
    assert TeacherConfig.model_validate("runs/x@best") == TeacherConfig(weights="runs/x@best")
    with pytest.raises(ValidationError, match="needs weights"):
        TeacherConfig(model="deit_tiny_patch16_224")
    with pytest.raises(ValidationError, match="mean and std together"):
        TeacherConfig(timm="b", mean=(0.0, 0.0, 0.0))


@pytest.mark.parametrize("name", methods.METHODS)
def test_the_table_names_the_sections_of_the_methods(name):
    assert methods.METHODS[name].config is methods.find(name).Config is methods.config(name)
    assert methods.METHODS[name].config.model_fields["use"].default == name


def test_methods_are_found_by_name_and_import_path():
    assert methods.find("fastdeit.methods.supervised:Supervised") is methods.find("supervised")
    with pytest.raises(ValueError, match="no method named 'distil'; there are supervised, distill"):
        methods.find("distil")
    with pytest.raises(ValueError, match="cannot be imported"):
        methods.find("no_such_package:Method")
