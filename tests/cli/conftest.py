"""A run, a file of its bare weights and its data, for the verbs that take weights."""

import pytest
import torch
from safetensors.torch import save_file

from fastdeit.engine.dist import World
from fastdeit.recipe import resolve as recipes
from fastdeit.training import train
from tests.painted_runs import RECIPE, paint
from tests.small_runs import stored


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return paint(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def run(data, tmp_path_factory):
    """A run of two steps of a distilled model on 2:1 images, with an average."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "small.yaml").write_text(RECIPE)
    recipe = recipes.load(str(folder / "small.yaml"), [f"data.root={data}", "train.epochs=2"])
    train(recipe, folder / "run", World(torch.device("cpu")), resume=False)
    return folder / "run"


@pytest.fixture(scope="session")
def bare(run, tmp_path_factory):
    """The weights of the run in a file of their own, which tells nothing else."""
    path = tmp_path_factory.mktemp("bare") / "weights.safetensors"
    save_file(stored(run, 2)["model.safetensors"], path)
    return path
