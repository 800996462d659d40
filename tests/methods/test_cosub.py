"""Co-training of two submodels: the formula in float64, what is held constant, and whole runs."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdeit import methods, models
from fastdeit.cli import main as cli
from fastdeit.engine.dist import World
from fastdeit.errors import Interrupted
from fastdeit.estimate.gpus import GPUS
from fastdeit.estimate.report import Machine, report
from fastdeit.recipe import resolve as recipes
from fastdeit.training import train
from tests.recipe_texts import GOOD, refusal
from tests.small_runs import StopAt, assert_same_weights, logged, stored, train_rank
from tests.toys import toy_batch, toy_context

B, K, SIDE, COLUMNS = 4, 5, 8, 3


class Dropping(nn.Module):
    """The smallest student with submodels: a linear head on pixels, of which the noise drops whole colours."""

    noise_per_sample = COLUMNS

    def __init__(self, heads):
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(3 * SIDE * SIDE, K) for _ in range(heads)])
        self.logits = []

    def forward(self, x, noise=None):
        x = x * (noise >= 0.5)[:, :, None, None] / 0.5
        self.logits = [head(x.flatten(1)) for head in self.heads]
        for logits in self.logits:
            logits.retain_grad()
        return tuple(self.logits) if len(self.heads) > 1 else self.logits[0]


def build(heads=1, **options):
    torch.manual_seed(0)
    config = methods.config("cosub")(**options)
    return methods.find("cosub")(Dropping(heads), config, toy_context(K))


def noisy(first=None, second=None):
    """A mixed batch with the noise of both submodels; by default both are drawn, and differ."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (B, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)
    y1 = torch.randint(0, K, (B,), generator=generator)
    drawn = torch.rand(2, B, COLUMNS, generator=generator)
    first, second = drawn[0] if first is None else first, drawn[1] if second is None else second
    noise = {"drop_path": first, "drop_path_second": second}
    return toy_batch(images, y1, y2=y1.flip(0), lam=torch.tensor([0.3, 1.0, 0.0, 0.6]), noise=noise)


def targets64(batch, binarise, smoothing=0.0):
    y1, y2, lam = batch.targets
    mixed = torch.lerp(F.one_hot(y2, K).double(), F.one_hot(y1, K).double(), lam.double()[:, None])
    return (mixed > 0).double() if binarise else smoothing / K + (1 - smoothing) * mixed


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("options", [{}, {"binarise": False, "smoothing": 0.2}])
def test_the_loss_and_its_gradient_are_those_of_the_formula(heads, options):
    method, batch = build(heads, **options), noisy()
    out = method(batch)
    out.loss.backward()
    x, weights = batch.pixels().double(), [h.weight.detach().double().requires_grad_() for h in method.model.heads]

    def submodel(noise):
        pixels = (x * (noise >= 0.5)[:, :, None, None] / 0.5).flatten(1)
        logits = [F.linear(pixels, w, h.bias.double()) for w, h in zip(weights, method.model.heads, strict=True)]
        return sum(logits) / heads

    a, b = submodel(batch.noise["drop_path"]), submodel(batch.noise["drop_path_second"])
    bce, t = F.binary_cross_entropy_with_logits, targets64(batch, **{"binarise": True} | options)
    loss = (bce(a, t) + bce(b, t) + bce(a, b.sigmoid().detach()) + bce(b, a.sigmoid().detach())) / 4
    loss.backward()
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(out.logits.double(), a.detach(), rtol=1e-5, atol=1e-6)
    for head, weight in zip(method.model.heads, weights, strict=True):
        torch.testing.assert_close(head.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-8)


def test_equal_submodels_teach_each_other_exactly_nothing():
    """All of the gradient is that of the labels, by the bits: without the constants it would not be."""
    kept = torch.full((B, COLUMNS), 0.9)
    method, batch = build(), noisy(kept, kept)
    method(batch).loss.backward()
    (logits,) = method.model.logits
    first, second = logits.detach().chunk(2)
    assert torch.equal(first, second)
    alone = logits.detach().requires_grad_()
    learned = alone * targets64(batch, binarise=True).float().repeat(2, 1)
    ((-F.logsigmoid(-alone) - learned).sum() / (2 * logits.numel())).backward()
    assert torch.equal(logits.grad, alone.grad)


def test_exchanged_submodels_have_the_same_loss():
    batch = noisy()
    other = noisy(batch.noise["drop_path_second"], batch.noise["drop_path"])
    ours, theirs = build()(batch), build()(other)
    assert not torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)


def test_it_has_no_parameters_of_its_own():
    student = models.build("deit_digits_patch8_32", drop_path=0.1)
    method = methods.find("cosub")(student, methods.config("cosub")(), toy_context())
    assert method.state_dict().keys() == {f"model.{name}" for name in student.state_dict()}
    assert method.noise() == {"drop_path": 8, "drop_path_second": 8}


def test_a_model_of_timm_draws_for_both_submodels():
    torch.manual_seed(0)
    student = models.build_timm("test_vit", image_size=32, num_classes=K, drop_path=0.5)
    method = methods.find("cosub")(student, methods.config("cosub")(), toy_context(K)).train()
    batch = toy_batch(torch.randint(0, 256, (B, 32, 32, 3), dtype=torch.uint8), torch.arange(B))
    batch = toy_batch(batch.images, batch.targets.y1, noise=dict.fromkeys(method.noise(), torch.empty(B, 0)))
    seen = []
    student.register_forward_hook(lambda module, args, out: seen.append(out))
    method(batch).loss.backward()
    first, second = seen[0].detach().chunk(2)
    assert first.shape == (B, K)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("make", [
    lambda: models.build("deit_digits_patch8_32"), lambda: models.build_timm("test_vit", image_size=32),
])  # fmt: skip
def test_a_model_without_drop_path_is_refused(make):
    with pytest.raises(ValueError, match="has no drop-path in training, so both submodels would be the same network"):
        methods.find("cosub")(make(), methods.config("cosub")(), toy_context())


COSUB = GOOD.replace("use: supervised", "use: cosub")


def test_a_recipe_without_drop_path_is_refused(write):
    (message,) = refusal(write(COSUB))
    assert "model.drop_path: must be above 0 for method cosub" in message
    assert message.endswith("add model.drop_path=0.1")
    assert recipes.load(write(COSUB), ["model.drop_path=0.1"]).method.binarise


@pytest.mark.parametrize(("words", "problem"), [
    (["method.smoothing=0.1"], "method.smoothing: must be 0 beside binarise true: a smoothed target makes every class"),
    (["method.teacher=runs/x"], "method.teacher: unknown field ('runs/x')"),
    (["method.alpha=0.5"], "method.alpha: unknown field (0.5)"),
])  # fmt: skip
def test_what_it_would_have_to_ignore_is_refused(write, words, problem):
    (message,) = refusal(write(COSUB), ["model.drop_path=0.1", *words])
    assert problem in message


def test_a_plan_reckons_with_two_passes(write):
    machine = Machine(GPUS["A100"], 1, 1)
    words = ["model.drop_path=0.1", "model.image_size=224", "train.batch_size=512"]
    one, two = (report(recipes.load(write(text), words), [machine])["plans"][0] for text in (GOOD, COSUB))
    assert two["batch_per_gpu"] == one["batch_per_gpu"] == 512
    assert two["memory"]["parts"]["logits"] == 2 * one["memory"]["parts"]["logits"]
    assert 0.4 * one["largest_batch"] < two["largest_batch"] < 0.6 * one["largest_batch"]
    assert 1.8 < two["step"]["seconds"] / one["step"]["seconds"] < 2.1


# ---- whole runs ------------------------------------------------------------------------------------------------------

RUN = """\
model: {name: deit_digits_distilled_patch8_32, image_size: 32, drop_path: 0.3, drop_path_mode: constant}
method: {use: cosub}
data: {source: synthetic, synthetic_samples: 40, synthetic_classes: 4, group_size: 4, repeats: 1}
optim: {lr: 1e-3, warmup_epochs: 0, min_lr: 1e-5}
train: {epochs: 1, batch_size: 8, eval_every: 2}
engine: {device: cpu, precision: fp32, threads: 1, log_every: 1}
"""
TOTAL = 5


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipes") / "cosub.yaml"
    path.write_text(RUN)
    return str(path)


@pytest.fixture(scope="module")
def whole(recipe_file, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    assert cli(["train", recipe_file, "--run-dir", str(run)]) == 0
    return run


def test_the_command_trains_and_judges_by_the_mean_of_logits(whole, capsys):
    losses = [record["loss"] for record in logged(whole) if record["kind"] == "train"]
    assert len(losses) == TOTAL
    assert losses[-1] < losses[0]
    assert cli(["eval", str(whole), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["results"][0]["metrics"]
    assert next(iter(metrics)) == "top1_logit"
    assert metrics["top1_logit"] == json.loads((whole / "summary.json").read_text())["top1_fused"]


def test_a_resumed_run_has_the_same_bits(whole, recipe_file, tmp_path):
    recipe = recipes.load(recipe_file)
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "run", StopAt(2), resume=False)
    train(recipe, tmp_path / "run", World(torch.device("cpu")), resume=True)
    assert_same_weights(whole, tmp_path / "run", TOTAL)


@pytest.mark.slow
def test_micro_batches_change_nothing_but_rounding(whole, recipe_file, tmp_path):
    recipe = recipes.load(recipe_file, ["train.accumulate=2"])
    train(recipe, tmp_path / "run", World(torch.device("cpu")), resume=False)
    agree(whole, tmp_path / "run")


@pytest.mark.slow
def test_two_processes_train_as_one(whole, recipe_file, tmp_path, ranks):
    ranks(2, train_rank, recipe_file, [], tmp_path / "run")
    agree(whole, tmp_path / "run")


def agree(run, other):
    """Weights are equal but for sums in another order, which AdamW's first steps magnify."""
    mine, theirs = (stored(each, TOTAL)["model.safetensors"] for each in (run, other))
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=2e-5)
