"""How long a run is: by epochs, by steps, by the size of the data set; evaluations and warm-up in it."""

import pytest

from fastdeit.engine.schedule import learning_rate
from fastdeit.recipe import resolve as recipes
from fastdeit.recipe.length import LengthError, epochs_for, left_open, length, settled
from fastdeit.training import schedule_of
from tests.recipe_texts import GOOD, refusal

WEIGHTS = "model.weights=w.safetensors"
BY_SIZE = GOOD.replace("  epochs: 10\n", "").replace("  image_size: 64\n", "  image_size: 64\n  weights: w\n")


@pytest.fixture
def load(tmp_path):
    def load(*overrides, text=GOOD):
        path = tmp_path / "r.yaml"
        path.write_text(text)
        return recipes.load(str(path), overrides)

    return load


@pytest.mark.parametrize(
    ("overrides", "total", "every", "epochs", "evaluations"),
    [
        ([], 250, 25, 10, 10),
        (["train.steps=60", "optim.warmup_epochs=1"], 60, 25, 2.4, 3),
        (["train.epochs=7"], 175, 25, 7, 7),
        (["train.eval_every=3"], 250, 75, 10, 4),
        (["train.eval_every=0.5"], 250, 12, 10, 21),
        (["train.eval_every=0.001"], 250, 1, 10, 250),
        (["train.eval_every_steps=100"], 250, 100, 10, 3),
        (["train.eval_every_steps=100", "train.eval_every=2"], 250, 100, 10, 3),
        (["train.steps=1", "optim.warmup_epochs=0"], 1, 25, 0.04, 1),
    ],
)
def test_a_run_in_steps(load, overrides, total, every, epochs, evaluations):
    found = length(load(*overrides), 1600, 25)
    assert (found.total, found.eval_every, found.epochs, found.evaluations) == (total, every, epochs, evaluations)
    assert found.epochs_begun == -(-total // 25)


@pytest.mark.parametrize(
    ("images", "epochs"),
    [
        *((1, 100), (80, 100), (2560, 100), (5000, 52), (19_999, 13)),
        *((20_000, 100), (100_000, 52), (499_999, 11)),
        *((500_000, 21), (1_281_167, 8), (14_200_000, 1)),
    ],
)
def test_epochs_follow_the_size_of_the_data_set(load, images, epochs):
    assert epochs_for(images) == epochs
    recipe = load("optim.warmup_epochs=null", text=BY_SIZE)
    found = length(recipe, images, max(1, images // 64))
    assert found.epochs == epochs
    assert found.warmup_epochs == pytest.approx(epochs / 20)
    written = settled(recipe, found)
    assert (written.train.epochs, written.optim.warmup_epochs) == (epochs, found.warmup_epochs)
    assert length(written, images, max(1, images // 64)) == found
    assert left_open(recipe) == {"train.epochs", "optim.warmup_epochs"}
    assert left_open(written) == set()


def test_what_is_given_is_not_settled(load):
    recipe = load("train.steps=300")
    assert settled(recipe, length(recipe, 1600, 25)) == recipe
    assert left_open(recipe) == set()


def test_a_length_given_anew_takes_the_place_of_the_other(load):
    train = load("train.steps=60").train
    assert (train.epochs, train.steps) == (None, 60)
    child = "base: BASE\ntrain: {steps: 60}\n"
    assert load(text=child.replace("BASE", "digits")).train.epochs is None
    back = load("train.epochs=3", text=child.replace("BASE", "digits")).train
    assert (back.epochs, back.steps) == (3, None)


def test_a_length_is_required_where_training_starts_from_nothing(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(GOOD.replace("  epochs: 10\n", ""))
    (message,) = refusal(str(path))
    assert "train.epochs: is required, or train.steps; only a run that starts from model.weights" in message


@pytest.mark.parametrize("steps", [1, 124, 125])
def test_a_warm_up_as_long_as_the_run_is_refused(load, steps):
    with pytest.raises(LengthError, match=rf"optim.warmup_epochs is 5.0, but the run has {steps} steps, .* or null"):
        length(load(f"train.steps={steps}"), 1600, 25)
    assert length(load("train.steps=126"), 1600, 25).total == 126


def test_rates_of_a_run_in_steps_end_where_it_ends(load):
    """Half a run of epochs has the rates of the whole, squeezed: the last step is next to the smallest rate."""
    recipe = load("train.steps=60", "optim.warmup_epochs=1", "optim.min_lr=1e-5")
    rates = schedule_of(recipe, length(recipe, 1600, 25))
    assert learning_rate(25, **rates) == 1e-3
    assert learning_rate(59, **rates) == pytest.approx(1e-5, rel=0.3)
