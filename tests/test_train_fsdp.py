"""Whole runs whose processes share the network in parts (`engine.parallel: fsdp2`): their results are those of DDP, and
their checkpoints those of any number of processes."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from fastdeit import models, plugins
from fastdeit.cli import main as cli
from fastdeit.data.sources.synthetic import SyntheticSource
from fastdeit.engine import checkpoint
from fastdeit.engine.dist import World
from fastdeit.errors import Interrupted, UsageError
from fastdeit.methods.evaluators import Classify, HeldOutLoss
from fastdeit.models.config import ViTConfig
from fastdeit.models.vit import VisionTransformer
from fastdeit.recipe import resolve as recipes
from fastdeit.run import build
from fastdeit.training import Parts, train
from tests.small_runs import StopAt, fsdp2_is_there, logged, stored

pytestmark = fsdp2_is_there

RECIPE = """\
model: {name: "tests.test_train_fsdp:small_vit", image_size: 16, drop_path: 0.2}
method: {use: supervised}
data:
  {source: synthetic, synthetic_samples: 64, synthetic_classes: 5, group_size: 4, repeats: 1, threads: 1}
optim: {name: sgd, lr: 0.1, warmup_epochs: 0.5, ema_decay: 0.9}
train: {epochs: 2, batch_size: 16, eval_every: 2}
engine: {device: cpu, log_every: 2}
"""
STEPS_PER_EPOCH, TOTAL = 4, 8
CPU = torch.device("cpu")


def small_vit(image_size, num_classes, drop_path=0.0, distilled=False):
    """Numbers of rows that two and four processes cannot divide, and fewer rows than processes."""
    shape = {"dim": 12, "depth": 2, "heads": 2, "mlp_ratio": 1.25, "layer_scale": 0.5, "distilled": distilled}
    return VisionTransformer(ViTConfig(image_size, 8, num_classes=num_classes, drop_path=drop_path, **shape))


distilled_vit = partial(small_vit, distilled=True)


class Stop(World):
    """Processes that are asked to stop once `step` steps are done."""

    step, asked = STEPS_PER_EPOCH, 0

    def stop_requested(self):
        self.asked += 1
        return self.asked == self.step


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "shared.yaml"
    path.write_text(RECIPE)
    return str(path)


def apart(run, other, step):
    """By "file name" how far the tensors of two checkpoints are apart, of the norm of each; those that have the same
    bits are not listed."""
    found, ours, theirs = {}, stored(run, step), stored(other, step)
    assert ours.keys() == theirs.keys()
    for file in ours:
        assert ours[file].keys() == theirs[file].keys(), file
        for name, tensor in ours[file].items():
            one, two = tensor.double(), theirs[file][name].double()
            assert one.shape == two.shape, f"{file} {name}"
            if not torch.equal(one, two):
                found[f"{file} {name}"] = ((one - two).norm() / two.norm()).item()
    return found


NORM = "engine.safetensors usual"
"""The norm of the gradients, of which parts are summed in another order."""


def without_norm(lines):
    return [{key: value for key, value in line.items() if key != "grad_norm"} for line in lines]


# ---- the same results ------------------------------------------------------------------------------------------------


def shared_and_whole(rank, size, path, folder):
    """A run of each kind, and one that goes on in parts after it was stopped with whole networks."""
    ddp, fsdp = (recipes.load(path, [f"engine.parallel={kind}"]) for kind in ("ddp", "fsdp2"))
    train(ddp, folder / "ddp", World(CPU, rank, size))
    beside = recipes.override(fsdp, ["engine.async_checkpoints=true"])
    train(beside, folder / "fsdp2", World(CPU, rank, size))
    with pytest.raises(Interrupted):
        train(ddp, folder / "both", Stop(CPU, rank, size))
    train(fsdp, folder / "both", World(CPU, rank, size), resume=True)


@pytest.mark.slow
def test_a_run_in_parts_has_the_bits_of_one_with_whole_networks_also_from_the_middle_on(path, ranks, tmp_path, capfd):
    ranks(2, shared_and_whole, path, tmp_path)
    for run in ("fsdp2", "both"):
        found = apart(tmp_path / run, tmp_path / "ddp", TOTAL)
        assert set(found) <= {NORM}
        assert max(found.values(), default=0) < 1e-6
        assert without_norm(logged(tmp_path / run)) == without_norm(logged(tmp_path / "ddp"))
    changes = checkpoint.newest_state(tmp_path / "both" / "checkpoints")["changes"]
    assert changes == [{"step": STEPS_PER_EPOCH, "fields": {"engine.parallel": ["ddp", "fsdp2"]}}]
    plugins.trust("tests.test_train_fsdp:small_vit")
    capfd.readouterr()  # what the processes have said
    assert cli(["eval", str(tmp_path / "fsdp2"), "--json"]) == 0
    printed = [each["metrics"]["top1_class"] for each in json.loads(capfd.readouterr().out)["results"]]
    summary = json.loads((tmp_path / "fsdp2" / "summary.json").read_text())
    assert printed == [summary["top1_class"], summary["top1_class_ema"]]


def evaluated(rank, size, path, counts):
    """For each number of held-out images what an evaluation finds, before the first step and after it."""
    world, found = World(CPU, rank, size), []
    parts = Parts.of(recipes.load(path, ["engine.parallel=fsdp2", "train.batch_size=8"]), world, True, {})

    def look():
        parts.method.eval()
        for count in counts:
            source = SyntheticSource(count, 5, (16, 16))
            loader = build.eval_loader(parts.recipe, source, world, {}, print)
            result = replace(parts, val_loader=loader).held_out({"loss": HeldOutLoss(), "class": Classify()}, 0)
            found.append((result.images, result.metrics))
        parts.method.train()

    look()
    (batch,) = next(parts.loader.batches(0, 1))
    parts.engine.step([batch], 0.1)
    look()
    return found


def test_an_evaluation_in_parts_takes_any_number_of_images(path, ranks):
    """Of 9 images two processes have two batches and one, of 1 image one batch and none."""
    counts = 9, 1
    expected = evaluated(0, 1, path, counts)
    assert [images for images, _ in expected] == [*counts, *counts]
    for found in ranks(2, evaluated, path, counts):
        for (images, metrics), (wanted, its) in zip(found, expected, strict=True):
            assert images == wanted
            assert metrics == pytest.approx(its, rel=1e-5)
    assert expected[0] != expected[2]


# ---- any number of processes -----------------------------------------------------------------------------------------

KINDS = ("ddp", "fsdp2")
BOUND = 1e-5


def on(rank, size, path, run, kind, step=None, resume=True):
    """Train `run` in parts or with whole networks, to the end or until it is stopped after `step` steps."""
    world = World(CPU, rank, size)
    recipe = recipes.load(path, [f"engine.parallel={kind}"])
    if step is None:
        train(recipe, run, world, resume=resume)
        return
    world = Stop(CPU, rank, size)
    world.step = step
    with pytest.raises(Interrupted):
        train(recipe, run, world, resume=resume)


@pytest.mark.slow
def test_a_run_may_change_its_processes_as_often_as_it_likes(path, ranks, tmp_path):
    """One process, two in parts, four with whole networks, four in parts, one: each two steps or so."""
    train(recipes.load(path), tmp_path / "one", World(CPU))
    with pytest.raises(Interrupted):
        train(recipes.load(path), tmp_path / "many", StopAt(2))
    ranks(2, on, path, tmp_path / "many", "fsdp2", 2)
    ranks(4, on, path, tmp_path / "many", "ddp", 1)
    ranks(4, on, path, tmp_path / "many", "fsdp2", 1)
    train(recipes.load(path), tmp_path / "many", World(CPU), resume=True)
    found = apart(tmp_path / "many", tmp_path / "one", TOTAL)
    assert found
    assert max(found.values()) < BOUND
    losses = [[line["loss"] for line in logged(tmp_path / run) if "loss" in line] for run in ("many", "one")]
    assert len(losses[0]) == TOTAL / 2
    assert losses[0] == pytest.approx(losses[1], rel=BOUND)


def restored(rank, size, path, runs, kind):
    """For each run {what differs between its checkpoint and what was made of it, the loss of the next step}."""
    world = World(CPU, rank, size)
    parts = Parts.of(recipes.load(path, [f"engine.parallel={kind}"]), world, False, {})
    found = {}
    for run in runs:
        step, _ = parts.saver.restore(run, lambda text: None)
        kept, whole = stored(run, step), parts.saver.whole()
        differ = [
            f"{file} {name}"
            for file, tensors in whole.items()
            for name, tensor in tensors.items()
            if world.main and not torch.equal(tensor, kept[f"{file}.safetensors"][name])
        ]
        parts.engine.means()
        (batch,) = next(parts.loader.batches(step, step + 1))
        parts.engine.step([batch], 0.1)
        found[run.name] = differ, parts.engine.means()["loss"]
    return found


@pytest.mark.slow
def test_every_checkpoint_loads_into_every_number_of_processes_bit_for_bit(path, ranks, tmp_path):
    worlds = [(1, "ddp"), *((size, kind) for size in (2, 4) for kind in KINDS)]
    runs = [tmp_path / f"{size}_{kind}" for size, kind in worlds]
    for (size, kind), run in zip(worlds, runs, strict=True):
        ranks(size, on, path, run, kind, STEPS_PER_EPOCH, False)
    losses = []
    for size, kind in worlds:
        found = ranks(size, restored, path, runs, kind)[0]
        assert found.keys() == {run.name for run in runs}
        assert not [differ for differ, _ in found.values() if differ]
        losses += [loss for _, loss in found.values()]
    assert len(losses) == 25
    assert max(losses) - min(losses) < BOUND * min(losses)


# ---- every method ----------------------------------------------------------------------------------------------------

DISTILLED = [
    "method.use=distill",
    "model.name=tests.test_train_fsdp:distilled_vit",
    "method.teacher={model: convnet_digits, weights: WEIGHTS}",
]
METHODS = {
    "bce, frozen": ["method.loss=bce", "method.smoothing=0", "model.freeze=[blocks.0, patch_embed]"],
    "lamb": ["optim.name=lamb", "optim.lr=0.1", "optim.eps=1e-3"],
    "hard": DISTILLED,
    "soft, agc": [*DISTILLED, "method.distillation=soft", "optim.clip_mode=agc", "optim.clip_grad=0.01"],
    "cosub": ["method.use=cosub"],
    "no blocks": ["model.name=convnet_digits", "model.drop_path=0"],
    "timm": ["model.timm=vit_tiny_patch16_224", "model.name=null", "model.drop_path=0", "optim.lr=0.01"],
    "mae": ["method.use=tests.plugins.mae:MaskedAutoencoder"],
    "dino": ["method.use=tests.plugins.dino:Dino", "method.crops=2", "method.crop_size=8"],
    "adversarial": ["method.use=tests.plugins.adversarial:Adversarial"],
    "incubation": [
        "method.use=tests.plugins.incubation:Incubation",
        "method.depths=[1, 1]",
        "model.drop_path=0",
        "train.epochs=4",
    ],
}
NEAR = {"lamb", "soft, agc"}
"""Their norms are summed in another order."""


def of_each_kind(rank, size, path, overrides, folder):
    for kind in KINDS:
        recipe = recipes.load(path, [*overrides, f"engine.parallel={kind}"])
        train(recipe, folder / kind, World(CPU, rank, size))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_in_parts_as_with_whole_networks(path, ranks, tmp_path, name):
    torch.manual_seed(0)
    save_file(models.build("convnet_digits", num_classes=5, image_size=16).state_dict(), tmp_path / "t.safetensors")
    overrides = [word.replace("WEIGHTS", str(tmp_path / "t.safetensors")) for word in METHODS[name]]
    ranks(2, of_each_kind, path, overrides, tmp_path)
    (step,) = checkpoint.steps(tmp_path / "ddp" / "checkpoints")[-1:]
    found = apart(tmp_path / "fsdp2", tmp_path / "ddp", step)
    assert max(found.values(), default=0) < BOUND
    assert name in NEAR or set(found) <= {NORM}


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["optim.name=muon", "optim.lr=0.1"],
            "an update of optim.name muon needs whole tensors; use adamw, lamb or sgd",
        ),
        (["engine.reduce=bf16", "train.accumulate=2"], "with engine.reduce bf16 it would add up the 2 micro-batches"),
    ],
)
def test_what_parts_cannot_do_is_refused_with_the_way_out(path, overrides, words, tmp_path):
    recipe = recipes.load(path, [*overrides, "engine.parallel=fsdp2"])
    with pytest.raises(UsageError, match=rf"^engine.parallel fsdp2: {words}.*, or engine.parallel=ddp$"):
        train(recipe, tmp_path / "run", World(CPU))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("capture", ["compile", "graph"])
def test_a_captured_step_is_refused_at_once(path, capture):
    with pytest.raises(recipes.RecipeError, match=f"fsdp2 gathers .* engine.capture {capture} cannot"):
        recipes.load(path, ["engine.parallel=fsdp2", f"engine.capture={capture}", "engine.device=cuda"])
