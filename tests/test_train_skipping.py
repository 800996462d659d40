"""Whole runs that skip the samples that drop a branch: exact under resume, one result for any share of the work."""

import pytest
import torch

from fastdeit.engine.dist import World
from fastdeit.errors import Interrupted
from fastdeit.recipe import resolve as recipes
from fastdeit.training import train
from tests.small_runs import StopAt, assert_close_weights, assert_same_weights, stored, train_rank

RECIPE = """\
model: {name: deit_digits_patch8_32, image_size: 32, drop_path: 0.5, drop_path_skip: true}
method: {use: supervised}
data:
  {source: synthetic, synthetic_samples: 64, synthetic_classes: 4, group_size: 8, repeats: 1, threads: 1}
optim: {name: sgd, lr: 1e-2, warmup_epochs: 0.5}
train: {epochs: 2, batch_size: 32, eval_every: 2}
engine: {device: cpu, log_every: 2}
"""
TOTAL = 4
CPU = World(torch.device("cpu"))
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "skipping.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def whole(path, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    train(recipes.load(str(path)), run, CPU)
    return run


def test_a_run_resumes_exactly(path, whole, tmp_path):
    with pytest.raises(Interrupted):
        train(recipes.load(str(path)), tmp_path / "run", StopAt(3))
    train(recipes.load(str(path)), tmp_path / "run", CPU, resume=True)
    assert_same_weights(tmp_path / "run", whole, TOTAL)


def test_micro_batches_and_processes_reach_the_result_of_one(path, whole, ranks, tmp_path):
    train(recipes.load(str(path), ["train.accumulate=4"]), tmp_path / "parts", CPU)
    assert_close_weights(tmp_path / "parts", whole, TOTAL)
    ranks(2, train_rank, path, [], tmp_path / "shared")
    assert_close_weights(tmp_path / "shared", whole, TOTAL)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_one_step_of_micro_batches_has_the_gradient_of_the_whole_batch(path, first_gradient, tmp_path, accumulate):
    found = gradient(path, tmp_path, accumulate)
    assert found.keys() == first_gradient.keys()
    for name, mine in found.items():
        whole = first_gradient[name]
        assert (mine - whole).abs().max() <= 16 * torch.finfo(torch.float32).eps * whole.abs().max(), name
        assert whole.abs().max() > 0


def gradient(path, folder, accumulate):
    """By parameter the first gradient of a run: after one step the momentum of SGD is that, and the weight decay."""
    with pytest.raises(Interrupted):
        train(recipes.load(str(path), [f"train.accumulate={accumulate}"]), folder / "run", StopAt(1))
    state = stored(folder / "run", 1)["optim.safetensors"]
    return {name: tensor for name, tensor in state.items() if name.startswith("momentum_buffer")}


@pytest.fixture(scope="module")
def first_gradient(path, tmp_path_factory):
    return gradient(path, tmp_path_factory.mktemp("first"), 1)


def test_another_draw_is_another_result(path, whole, tmp_path):
    """What the tests above would not see otherwise."""
    train(recipes.load(str(path), ["model.drop_path_skip=false"]), tmp_path / "drawn", CPU)
    with pytest.raises(AssertionError):
        assert_close_weights(tmp_path / "drawn", whole, TOTAL)
