"""Whole runs with products of 8 bits: exact under resume, and one result for any share of the work."""

import math

import pytest
import torch

from fastdeit.engine.dist import World
from fastdeit.errors import Interrupted
from fastdeit.recipe import resolve as recipes
from fastdeit.training import train
from tests.small_runs import StopAt, assert_same_weights, stored, train_rank

RECIPE = """\
model: {name: deit_digits_patch8_32, image_size: 32}
method: {use: supervised}
data:
  {source: synthetic, synthetic_samples: 64, synthetic_classes: 4, group_size: 8, repeats: 1, threads: 1}
optim: {name: sgd, lr: 1e-1, warmup_epochs: 0.5}
train: {epochs: 2, batch_size: 32, eval_every: 2}
engine: {device: cpu, log_every: 2, precision: bf16, products: fp8}
"""
TOTAL = 4
CPU = World(torch.device("cpu"))
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "fp8.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def whole(path, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    train(recipes.load(str(path)), run, CPU)
    return run


@pytest.fixture(scope="module")
def in_bf16(path, tmp_path_factory):
    """The run without products of 8 bits."""
    run = tmp_path_factory.mktemp("bf16") / "run"
    train(recipes.load(str(path), ["engine.products=precision"]), run, CPU)
    return run


def apart(run, other):
    """How far the weights of two runs are from each other, as the norm of all."""
    mine, theirs = (stored(each, TOTAL)["model.safetensors"] for each in (run, other))
    return math.sqrt(
        sum((mine[name].double() - tensor.double()).square().sum().item() for name, tensor in theirs.items())
    )


def test_a_run_resumes_exactly(path, whole, tmp_path):
    with pytest.raises(Interrupted):
        train(recipes.load(str(path)), tmp_path / "run", StopAt(3))
    train(recipes.load(str(path)), tmp_path / "run", CPU, resume=True)
    assert_same_weights(tmp_path / "run", whole, TOTAL)


def test_micro_batches_and_processes_reach_the_result_of_one(path, whole, in_bf16, ranks, tmp_path):
    """A token has its own scale, whatever it shares a batch with. Sums in bf16 have another order; that is little
    beside what 8 bits change. The processes of FSDP2 gather the weights that they cast."""
    train(recipes.load(str(path), ["train.accumulate=4"]), tmp_path / "parts", CPU)
    ranks(2, train_rank, path, ["engine.parallel=fsdp2"], tmp_path / "shared")
    changed = apart(in_bf16, whole)
    for run in ("parts", "shared"):
        assert apart(tmp_path / run, whole) < 0.3 * changed


def test_blocks_that_are_computed_again_have_the_same_bits(path, whole, tmp_path):
    train(recipes.load(str(path), ["engine.checkpoint_blocks=true"]), tmp_path / "again", CPU)
    assert_same_weights(tmp_path / "again", whole, TOTAL)
