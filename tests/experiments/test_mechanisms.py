"""Claims of the paper that follow from the code: what reads what, what costs what, and who learns from whom."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from fastdeit import api, methods
from fastdeit.models.positions import interpolated
from fastdeit.models.vit import VisionTransformer, ViTConfig
from tests.toys import toy_batch, toy_context

TWO = "fastdeit.experiments.two_tokens:TwoClassTokens"
SMALL = ViTConfig(image_size=16, patch_size=8, dim=32, depth=3, heads=2, num_classes=5, distilled=True)


def model(**options):
    torch.manual_seed(0)
    built = VisionTransformer(ViTConfig(**(vars(SMALL) | options)))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return built.eval()


def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("head", "other"), [(0, "dist_token"), (1, "cls_token")])
def test_the_tokens_read_each_other_through_attention(head, other):
    vit = model()
    vit(images())[head].sum().backward()
    assert getattr(vit, other).grad.abs().max() > 1e-3
    vit.zero_grad()
    with torch.no_grad():
        for block in vit.blocks:
            block.attn.proj.weight.zero_()
    vit(images())[head].sum().backward()
    assert getattr(vit, other).grad.abs().max() == 0


def test_only_the_prefix_tokens_reach_the_heads():
    vit = model()
    tokens = vit.tokens(images()).detach().requires_grad_()
    before = vit.classify(tokens)
    sum(logits.sum() for logits in before).backward()
    assert tokens.grad[:, :2].abs().min() > 0
    assert tokens.grad[:, 2:].abs().max() == 0
    other = torch.cat((tokens[:, :2], torch.randn_like(tokens[:, 2:])), 1)
    assert all(torch.equal(a, b) for a, b in zip(before, vit.classify(other), strict=True))


def test_the_distillation_token_costs_a_token_a_position_and_a_head():
    distilled, plain = (sum(p.numel() for p in model(distilled=flag).parameters()) for flag in (True, False))
    assert distilled - plain == SMALL.dim + SMALL.dim + (SMALL.dim + 1) * SMALL.num_classes


def test_bicubic_interpolation_keeps_more_of_the_norm_than_bilinear():
    """From 14x14 to 24x24 patches, as DeiT goes from 224 to 384 pixels."""
    learned = torch.randn(1, 14 * 14, 192, generator=torch.Generator().manual_seed(0))
    cells = learned.unflatten(1, (14, 14)).permute(0, 3, 1, 2)
    bilinear = F.interpolate(cells, size=(24, 24), mode="bilinear", align_corners=False).flatten(2).mT
    ours = interpolated(learned, (14, 14), (24, 24))
    kept, lost = (each.norm(dim=-1).mean() / learned.norm(dim=-1).mean() for each in (ours, bilinear))
    assert kept.item() == pytest.approx(0.86, abs=0.01)
    assert lost.item() == pytest.approx(0.68, abs=0.01)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_two_class_tokens_both_learn_the_label(smoothing):
    config = methods.config(TWO)(smoothing=smoothing)
    method = methods.find(TWO)(model(), config, toy_context(5)).eval()
    labels, others = torch.tensor([0, 3, 4]), torch.tensor([1, 3, 2])
    pixels = torch.randint(256, (3, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    batch = toy_batch(pixels, labels, y2=others, lam=torch.tensor([1.0, 0.3, 0.6]), pixel_lam=torch.ones(3))
    out = method(batch)
    expected = sum(
        lam * F.cross_entropy(logits[i], label[i], label_smoothing=smoothing) / (2 * 3)
        for logits in method.model(batch.pixels(0))
        for i in range(3)
        for label, lam in ((labels, batch.targets.lam[i]), (others, 1 - batch.targets.lam[i]))
    )
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    out.loss.backward()
    assert all(head.weight.grad.abs().max() > 0 for head in (method.model.head, method.model.head_dist))
    with pytest.raises(ValueError, match="need a model with two heads"):
        methods.find(TWO)(model(distilled=False), config, toy_context(5)).eval()(batch)


SWAPPED = torch.tensor([1, 0, 3, 2, *range(4, 10)])
"""What the teacher says of a picture of each class."""
RUN = {"train.batch_size": 64, "engine.device": "cpu", "optim.warmup_epochs": 1, "train.eval_every": 100}


@pytest.mark.slow
def test_each_head_learns_from_its_own_teacher_where_the_teacher_swaps_classes(tmp_path):
    """Where teacher and label contradict each other, the class head says the label and the distillation head what the
    teacher says. No other loss, and no exchange of the heads, does that."""
    taught = api.train("digits_teacher", {**RUN, "train.epochs": 6}, run_dir=tmp_path / "teacher").model()
    weights = taught.state_dict() | {name: taught.state_dict()[name][SWAPPED] for name in ("head.weight", "head.bias")}
    save_file({name: each.contiguous() for name, each in weights.items()}, tmp_path / "swapped.safetensors")
    teacher = {"model": "convnet_digits", "weights": str(tmp_path / "swapped.safetensors")}
    run = api.train(
        "digits",
        {**RUN, "train.epochs": 16, "optim.lr": 1.5e-3, "method": {"use": "distill", "teacher": teacher}},
        run_dir=tmp_path / "student",
    )
    confused = held_out(run, classes=4)
    said = run.model()
    with torch.no_grad():
        by_class, by_distillation = (logits.argmax(-1) for logits in said(confused[0]))
    label = confused[1]
    share = {
        "class head says the label": (by_class == label).float().mean().item(),
        "distillation head says the teacher's": (by_distillation == SWAPPED[label]).float().mean().item(),
        "class head says the teacher's": (by_class == SWAPPED[label]).float().mean().item(),
        "distillation head says the label": (by_distillation == label).float().mean().item(),
    }
    assert share["class head says the label"] > 0.7, share
    assert share["distillation head says the teacher's"] > 0.7, share
    assert share["class head says the teacher's"] < 0.1, share
    assert share["distillation head says the label"] < 0.1, share


def held_out(run, classes):
    """(normalised images, labels) of the held-out digits below `classes`."""
    from fastdeit.experiments.probes import Trained

    trained = Trained(run.recipe, run.path, {})
    chosen = trained.labels < classes
    return trained.images[chosen], trained.labels[chosen]
