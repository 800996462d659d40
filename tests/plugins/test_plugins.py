"""Methods and models of third parties, each one file: trained by `fastdeit train`, resumed exactly, the same on two
processes."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from fastdeit import models
from fastdeit.cli import main as cli
from fastdeit.engine.dist import World
from fastdeit.engine.groups import default_groups
from fastdeit.engine.optimizers import AdamW
from fastdeit.engine.step import Engine
from fastdeit.errors import Interrupted
from fastdeit.methods.teacher import Teacher
from fastdeit.recipe import resolve as recipes
from fastdeit.run import build
from fastdeit.training import train
from tests.plugins import adversarial, cached
from tests.small_runs import FSDP2_IS_THERE, StopAt, assert_same_weights, logged, stored, train_rank
from tests.toys import toy_batch, toy_context

RECIPE = """\
model: {name: MODEL, image_size: 32}
method: {METHOD}
data:
  {source: folder, flip: 0.0, mixup: 0, cutmix: 0, crop_scale: [0.8, 1.0], group_size: 16, repeats: 1, threads: 1,
   eval_crop_ratio: 1.0, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}
optim: {lr: 2e-3, warmup_epochs: 0.5, min_lr: 1e-5}
train: {epochs: EPOCHS, batch_size: 64, eval_every: EPOCHS}
engine: {device: cpu, log_every: 2}
"""
STEPS_PER_EPOCH = 6
VIT = "deit_digits_patch8_32"
METHODS = {
    "mae": (VIT, 'use: "tests.plugins.mae:MaskedAutoencoder"', 4),
    "adversarial": ("convnet_digits", 'use: "tests.plugins.adversarial:Adversarial", eps: 0.05, eta: 0.02', 3),
    "cached": (VIT, 'use: "tests.plugins.cached:CachedLogits", store: "STORE"', 3),
    "detection": (VIT, 'use: "tests.plugins.detection:Detection", window: 2, whole: [3]', 2),
    "dino": (
        VIT,
        'use: "tests.plugins.dino:Dino", crops: 2, teacher_temperature: [0.04, 0.04], momentum: [0.95, 0.95]',
        3,
    ),
    "incubation": (VIT, 'use: "tests.plugins.incubation:Incubation", depths: [3, 1], meta_epochs: 2', 9),
    "pruning": (
        VIT,
        f'use: "tests.plugins.pruning:Pruning", before: [1, 3], teacher: {{model: {VIT}, weights: WEIGHTS}}',
        2,
    ),
    "relations": (
        VIT,
        'use: "tests.plugins.relations:Relations", block: 2, teacher_block: 1, '
        f"teacher: {{model: {VIT}, weights: WEIGHTS}}",
        3,
    ),
    "levit": ("tests.plugins.levit:LeViT", "use: supervised", 2),
    "sret": ("tests.plugins.sret:SReT", "use: supervised", 2),
}
OF_MODELS = {
    "optim: {lr: 2e-3": "optim: {name: sgd, lr: 0.1, ema_decay: 0.8",
    "engine: {": "engine: {sync_batchnorm: true, ",
}
"""What is other in the recipes of models: averaged weights, and BatchNorm over the batches of all processes. SGD,
because a bias before a BatchNorm has no gradient but rounding, of which Adam makes whole updates."""
CPU = World(torch.device("cpu"))


@pytest.fixture(scope="module")
def store(few_digits, tmp_path_factory):
    """Logits of a network that was not trained, of three epochs."""
    folder = tmp_path_factory.mktemp("store")
    recipe = written(folder, VIT, "use: supervised", 3, few_digits)
    source, _ = build.sources(recipe)
    loader = build.train_loader(recipe, source, CPU, {}, print)
    cached.LogitStore(folder).write(loader, len(source), copies=1, epochs=3, teacher=teacher())
    return folder


def written(folder, model, method, epochs, data):
    """The recipe, which is in FOLDER/recipe.yaml now."""
    text = RECIPE.replace("MODEL", model).replace("METHOD", method).replace("EPOCHS", str(epochs))
    for old, new in OF_MODELS.items() if ":" in model else ():
        text = text.replace(old, new)
    if "detection" in method:
        text = text.replace("source: folder", 'source: "tests.plugins.detection:Annotations"').replace(
            "flip: 0.0", "flip: 0.5"
        )
        data = painted(folder / "shapes")
    (folder / "recipe.yaml").write_text(text.replace("data:\n  {", f'data:\n  {{root: "{data}", '))
    return recipes.load(str(folder / "recipe.yaml"))


def painted(root):
    """ROOT with 400 training and 100 held-out pictures of a disc or two and rectangles, and where these are."""
    root.mkdir()
    (root / "classes.json").write_text('["disc", "rectangle"]')
    generator = np.random.default_rng(0)
    for split, count in (("train", 400), ("val", 100)):
        known = {}
        for number in range(count):
            image, objects = Image.new("RGB", (48, 40), (20, 20, 20)), []
            for label in generator.integers(2, size=generator.integers(1, 3)).tolist():
                x, y, side = generator.integers((0, 0, 14), (30, 22, 19)).tolist()
                draw = ImageDraw.Draw(image)
                (draw.rectangle if label else draw.ellipse)((x, y, x + side - 1, y + side - 1), ("red", "blue")[label])
                objects.append((label, x, y, x + side, y + side))
            known[f"{split}_{number}.png"] = objects
            image.save(root / f"{split}_{number}.png")
        (root / f"{split}.json").write_text(json.dumps(known))
    return root


def teacher():
    torch.manual_seed(0)
    return Teacher(models.build("convnet_digits", num_classes=10))


LONG = {*METHODS} - {"cached"}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in METHODS],
)
def case(request, few_digits, store, tmp_path_factory):
    """(recipe, steps of the run, the run that was never interrupted)"""
    model, method, epochs = METHODS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    weights = folder / "teacher.safetensors"
    if "WEIGHTS" in method:
        torch.manual_seed(1)
        save_file(sharpened(models.build(VIT, num_classes=10)).state_dict(), weights)
    method = method.replace("STORE", str(store)).replace("WEIGHTS", str(weights))
    recipe = written(folder, model, method, epochs, few_digits)
    run = folder / "run"
    assert cli(["train", str(folder / "recipe.yaml"), "--run-dir", str(run)]) == 0
    return recipe, epochs * STEPS_PER_EPOCH, run


def sharpened(network):
    """A network with attention that is not uniform, as that of one that has learned something."""
    for block in network.blocks:
        block.attn.qkv.weight.data *= 8
    return network


def losses(run):
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["kind"] == "train"]


def test_the_loss_falls(case):
    *_, run = case
    found = losses(run)
    assert sum(found[-2:]) < 0.97 * sum(found[:2])


def test_an_interrupted_run_ends_with_the_same_weights(case, tmp_path):
    recipe, steps, run = case
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "run", StopAt(STEPS_PER_EPOCH + 1), resume=False)
    train(recipe, tmp_path / "run", CPU, resume=True)
    assert_same_weights(run, tmp_path / "run", steps)
    assert logged(run) == logged(tmp_path / "run")


def test_two_processes_equal_one(case, ranks, tmp_path):
    """Of whole models the two have the weights in parts. A block that is applied twice is gathered and reduced twice a
    step, and what a module makes for eval mode is made of whole weights."""
    recipe, steps, run = case
    in_parts = recipe.model.name in (METHODS["levit"][0], METHODS["sret"][0]) and FSDP2_IS_THERE
    overrides = ["engine.parallel=fsdp2"] if in_parts else []
    ranks(2, train_rank, run.parent / "recipe.yaml", overrides, tmp_path / "run")
    np.testing.assert_allclose(losses(run), losses(tmp_path / "run"), rtol=2e-3)
    judged, others = (logged(folder)[-1] for folder in (run, tmp_path / "run"))
    assert judged.keys() == others.keys()
    for name, value in judged.items():  # one image more or less is a per cent
        assert others[name] == (
            value if name in ("kind", "lower_is_better") else pytest.approx(value, rel=5e-3, abs=2.1 * ("top" in name))
        )
    one, two = (stored(folder, steps)["model.safetensors"] for folder in (run, tmp_path / "run"))
    difference = sum((one[n] - two[n]).abs().sum() for n in one) / sum(t.numel() for t in one.values())
    assert difference < 2e-4


NOT_MEASURED = "kind", "step", "epoch", "images", "bad_images", "lower_is_better"


def test_eval_finds_again_what_the_run_found(case, capsys):
    """Two heads are one answer in the log; `eval` calls it by how they are fused. Averaged weights are a set of their
    own."""
    recipe, _, run = case
    assert cli(["eval", str(run), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    found = {
        f"{name}{'_ema' * number}": value
        for number, each in enumerate(results)
        for name, value in each["metrics"].items()
    }
    known = {name.replace("fused", recipe.method.fuse): value for name, value in logged(run)[-1].items()}
    measured = {name: value for name, value in known.items() if name not in NOT_MEASURED}
    assert measured
    assert {name: found[name] for name in measured} == pytest.approx(measured)


# ---- what each of them is for ----------------------------------------------------------------------------------------


def test_stored_logits_are_those_of_a_teacher_that_runs_along(few_digits, store, tmp_path):
    """Because the student meets the images that the teacher judged."""
    recipe = written(tmp_path, VIT, f'use: "tests.plugins.cached:CachedLogits", store: "{store}"', 3, few_digits)
    source, _ = build.sources(recipe)
    judge = teacher()
    loader = build.train_loader(recipe, source, CPU, {}, print)
    for step, (batch,) in enumerate(loader.batches(4, 8), 4):
        torch.testing.assert_close(batch.extras["teacher"], judge(batch), rtol=1e-5, atol=1e-6)
        assert batch.step.epoch.item() == step // STEPS_PER_EPOCH


def test_a_sample_that_no_teacher_has_judged_is_an_error(store):
    unseen = np.isnan(np.load(store / "epoch_0.npy")[:, 0, 0]).nonzero()[0]
    assert len(unseen) == 400 % 64
    with pytest.raises(KeyError, match="has no logits"):
        cached.LogitStore(store).read(0, unseen[:1], *np.zeros((2, 1), np.int64))


def test_a_disturbance_stays_within_its_bound_and_climbs():
    delta, gradient = torch.zeros(3), torch.tensor([1.0, -2.0, 0.0])
    for _ in range(5):
        delta = adversarial.moved(delta, gradient, eta=0.02, eps=0.05)
    torch.testing.assert_close(delta, torch.tensor([0.05, -0.05, 0.0]))


ROUNDS = 3


def adversarial_step(rank, size, precision="fp32"):
    """Gradients by name of a step on two micro-batches, over processes or one after the other, and its means."""
    torch.manual_seed(0)
    config = adversarial.Adversarial.Config(use="here", rounds=ROUNDS, eps=0.05, eta=0.02, beta=0.5)
    method = adversarial.Adversarial(models.build("convnet_digits", num_classes=10), config, toy_context())
    optimizer = AdamW(default_groups(method.named_parameters(), 0.0))
    accumulate = 2 // size
    world = World(torch.device("cpu"), rank, size)
    engine = Engine(method, optimizer, world, precision=precision, accumulate=accumulate)
    method.on_phase(method.phases()[0])
    found = {}

    def keep(*arguments):
        found.update({name: p.grad.clone() / engine.guard.scale for name, p in method.named_parameters()})

    optimizer.step = keep
    engine.step(adversarial_batches()[rank::size], 1e-3)
    return {name: gradient.numpy() for name, gradient in found.items()}, engine.means()


def adversarial_batches():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return [toy_batch(part, torch.arange(4) + 4 * number) for number, part in enumerate(images)]


def adversarial_by_hand():
    """The same with its losses written out in float64."""
    torch.manual_seed(0)
    model = models.build("convnet_digits", num_classes=10).double()
    label_loss = 0.0
    for batch in adversarial_batches():
        x = batch.pixels().double()
        clean = model(x).log_softmax(-1).detach()
        delta = torch.zeros_like(x)
        for number in range(ROUNDS):
            disturbed = (x + delta).requires_grad_()
            z = model(disturbed).log_softmax(-1)
            label = F.cross_entropy(z, batch.targets.y1, label_smoothing=0.1)
            divergence = (F.kl_div(z, clean, log_target=True, reduction="batchmean") / 2) + (
                F.kl_div(clean, z, log_target=True, reduction="batchmean") / 2
            )
            loss = label + 0.5 * divergence if number == 0 else (3.0 * label + 0.5 * divergence) / (ROUNDS - 1)
            (loss / 2).backward()  # two micro-batches
            delta = (delta + 0.02 * disturbed.grad.sign()).clamp(-0.05, 0.05)
            label_loss += label.item() / 2 if number == 0 else 0.0
    return {f"model.{name}": p.grad for name, p in model.named_parameters()}, label_loss


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_rounds_of_an_inner_loop_add_up_to_the_gradient_of_their_losses(ranks, precision):
    expected, loss = adversarial_by_hand()
    alone, means = adversarial_step(0, 1, precision)
    (first, _), (second, means_of_two) = ranks(2, adversarial_step, precision)
    tolerance = 1e-3 if precision == "fp32" else 0.1
    for name, gradient in expected.items():
        for found in (alone, first, second):
            difference = torch.from_numpy(found[name]).double() - gradient
            assert difference.norm() < tolerance * gradient.norm(), name
    assert means["loss"] == pytest.approx(loss, rel=tolerance)
    assert means_of_two["loss"] == pytest.approx(loss, rel=tolerance)


def test_what_is_masked_does_not_reach_the_encoder():
    """Other pixels under the mask leave the prediction as it was."""
    from tests.plugins.mae import MaskedAutoencoder

    torch.manual_seed(0)
    model = models.build("deit_digits_patch8_32", num_classes=10)
    method = MaskedAutoencoder(model, MaskedAutoencoder.Config(use="mae"), toy_context()).eval()
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    batch = toy_batch(images, torch.arange(2), noise={"mask": torch.rand(2, 16), "drop_path": torch.zeros(2, 0)})
    order = batch.noise["mask"].argsort(1)
    predictions = []
    for value in (0, 200):
        cells = images.reshape(2, 4, 8, 4, 8, 3).permute(0, 1, 3, 2, 4, 5).reshape(2, 16, -1).clone()
        cells.scatter_(1, order[:, method.kept :, None].expand(-1, -1, cells.shape[2]), value)
        masked = cells.reshape(2, 4, 4, 8, 8, 3).permute(0, 1, 3, 2, 4, 5).reshape(2, 32, 32, 3)
        patches = replace(batch, images=(masked,)).patches(8)
        tokens = method.model.tokens(patches, keep=order[:, : method.kept])
        predictions.append(method.decoded(tokens[:, 1:], order))
    assert torch.equal(*predictions)


def test_a_patch_that_is_masked_counts_as_little_as_one_that_is_gone():
    """What training masks is what evaluation leaves out, and the label's loss reaches the predictor."""
    from tests.plugins.pruning import Pruning

    torch.manual_seed(0)
    model = models.build("deit_digits_patch8_32", num_classes=10)
    config = Pruning.Config(use="pruning", teacher={"model": VIT, "weights": "none"}, before=(1, 3), keep=0.5)
    method = Pruning(model, config, toy_context()).eval()
    x = torch.randn(3, 3, 32, 32)
    tokens, (first, second) = method.masked(x, {name: torch.rand(3, 32) for name in ("gumbel_0", "gumbel_1")})
    assert 0 < second.sum() < first.sum() < first.numel()

    def kept(stage, patches):
        order = (first, second)[stage][row].nonzero()[:, 0]
        before = order if stage == 0 else (first[row].nonzero() == order).nonzero()[:, 0]
        return torch.cat((patches[:, :1], patches[:, 1:][:, before]), 1)

    for row in range(3):
        at = {1: partial(kept, 0), 3: partial(kept, 1)}
        gathered = model.tokens(x[row : row + 1], at=at)
        left = torch.cat((tokens[row, :1], tokens[row, 1:][second[row] > 0]))
        torch.testing.assert_close(gathered[0], left, rtol=1e-4, atol=1e-5)
    loss = F.cross_entropy(model.classify(tokens), torch.arange(3))
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in method.predictors[0].parameters())
    assert method.gathered(x).shape[1] == 1 + 4  # a quarter of 16 patches


@pytest.mark.parametrize(
    ("detections", "precision"),
    [
        ([(0.9, 0, 0, 10, 9), (0.8, 0, 0, 10, 8), (0.7, 50, 50, 60, 60)], 1 / 2),  # one of two, once more, and nothing
        ([(0.9, 0, 0, 10, 5.5), (0.8, 0, 4.5, 10, 10)], 1 / 2),  # two that are apart, both of the first
        ([(0.9, 50, 50, 60, 60), (0.8, 0, 0, 10, 9), (0.7, 20, 20, 30, 30)], 2 / 3),  # both, behind a wrong one
        ([(0.9, 3, 3, 13, 13)], 0),  # too far off
    ],
)
def test_average_precision_is_the_area_under_precision_over_recall(detections, precision):
    from tests.plugins.detection import average_precision

    truth = torch.tensor([[[0.0, 0, 0, 10, 10], [0, 20, 20, 30, 30]]])
    other_class = (1.0, 0.95, 20, 20, 30, 30)
    found = torch.tensor([[other_class, *((0.0, *each) for each in detections)]])
    assert average_precision(found, truth, 0.0) == pytest.approx(precision)
