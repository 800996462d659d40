"""All that fine-tuning adds, in one run: it resumes bit for bit, shares out over processes, and leaves alone what is
frozen."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdeit import models
from fastdeit.engine.dist import World
from fastdeit.errors import Interrupted
from fastdeit.recipe import resolve as recipes
from fastdeit.training import train
from tests.small_runs import StopAt, assert_same_weights, logged, stored, train_rank

pytestmark = pytest.mark.slow
RECIPE = """\
model:
  {name: deit_digits_distilled_patch8_32, image_size: 32, weights: WEIGHTS, drop_path: 0.2, drop_path_mode: constant,
   dropout: 0.3, freeze: [embedding, blocks.0, blocks.*.mlp.fc1]}
method: {use: supervised, class_weights: balanced}
data: {source: synthetic, synthetic_samples: 64, synthetic_classes: 4, group_size: 4, repeats: 1, threads: 1}
optim:
  {name: muon, lr: 1e-3, layer_decay: 0.7, clip_mode: agc, clip_grad: 0.05, warmup_epochs: 0.5, min_lr: 1e-5,
   ema_decay: 0.9}
train: {steps: 7, batch_size: 16, accumulate: 2, eval_every_steps: 3}
engine: {device: cpu, checkpoint_every: 10, checkpoint_blocks: true, log_every: 1}
"""
TOTAL = 7
FROZEN = "cls_token", "dist_token", "pos_embed", "patch_embed.", "blocks.0."


def is_frozen(name):
    return name.startswith(FROZEN) or ".mlp.fc1." in name


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    torch.manual_seed(5)
    save_file(models.build("deit_digits_distilled_patch8_32", num_classes=10).state_dict(), folder / "w.safetensors")
    (folder / "r.yaml").write_text(RECIPE.replace("WEIGHTS", str(folder / "w.safetensors")))
    return folder / "r.yaml"


@pytest.fixture(scope="module")
def whole(path):
    train(recipes.load(str(path)), path.parent / "whole", World(torch.device("cpu")), resume=False)
    return path.parent / "whole"


def test_what_is_frozen_stands_still_and_the_rest_moves(path, whole):
    before = load_file(path.parent / "w.safetensors")
    found = stored(whole, TOTAL)
    after = found["model.safetensors"]
    heads = "head.", "head_dist."  # other classes: initialised anew
    moved = {name for name, tensor in after.items() if not name.startswith(heads) and not tensor.equal(before[name])}
    assert moved == {name for name in after if not is_frozen(name) and not name.startswith(heads)}
    kept = {name.split(".", 1)[1].removeprefix("model.") for name in found["optim.safetensors"]}
    averaged = {name.removeprefix("model.") for name in found["ema.safetensors"]}
    assert kept == averaged == {name for name in after if not is_frozen(name)}


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_an_interrupted_run_goes_on_bit_for_bit(path, whole, stop, tmp_path):
    with pytest.raises(Interrupted):
        train(recipes.load(str(path)), tmp_path / "run", StopAt(stop), resume=False)
    train(recipes.load(str(path)), tmp_path / "run", World(torch.device("cpu")), resume=True)
    assert_same_weights(whole, tmp_path / "run", TOTAL)
    assert logged(whole) == logged(tmp_path / "run")


def test_blocks_that_are_computed_again_give_the_same_run(path, whole, tmp_path):
    recipe = recipes.load(str(path), ["engine.checkpoint_blocks=false"])
    train(recipe, tmp_path / "run", World(torch.device("cpu")), resume=False)
    assert_same_weights(whole, tmp_path / "run", TOTAL)


def test_two_processes_reach_the_result_of_one(path, whole, ranks, tmp_path):
    ranks(2, train_rank, path, [], tmp_path / "run")
    one, two = (stored(run, TOTAL)["model.safetensors"] for run in (whole, tmp_path / "run"))
    difference = sum((one[n] - two[n]).abs().sum() for n in one) / sum(t.numel() for t in one.values())
    assert difference < 2e-4
