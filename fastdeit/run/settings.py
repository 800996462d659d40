"""The recipe by which weights are evaluated: that of their run, or one made of what else is known of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fastdeit import methods, plugins
from fastdeit.data.sources.datasets import kinds_of_held_out
from fastdeit.data.sources.kinds import GENERATED
from fastdeit.errors import UsageError
from fastdeit.methods.base import Method
from fastdeit.recipe import resolve as recipes
from fastdeit.run import bare, precision
from fastdeit.run.directory import checked_recipe
from fastdeit.run.weights import Weights, likely_models


def settings(weights: Weights, model: str | None, overrides: Sequence[str], root: str | None = None) -> recipes.Recipe:
    """The recipe of an evaluation of `weights`: model, method, input and precision.

    model      which model they are of, as `run.weights.network` takes it; None where they tell it themselves
    overrides  `section.field=value`, which come last
    root       the data set's folder, where it is given by itself: then its kind is detected

    Raises UsageError where nothing tells which model they are of, and RecipeError for overrides that do not fit.
    """
    if weights.checkpoint is not None:
        if model is not None:
            raise UsageError(f"--model {model}: {weights.origin} says itself which model its weights are of")
        recipe = checked_recipe(weights.checkpoint.state["recipe"], weights.checkpoint.path)
        # The checkpoint holds the weights; the file that training started from need not exist any more.
        recipe = recipes.to_evaluate(recipes.without_weights(recipe))
    else:
        try:
            recipe = _recipe(weights, model)
        except ValidationError as error:
            wrong = (f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
            raise UsageError(f"{weights.origin}: its model cannot be evaluated: {'; '.join(wrong)}") from error
    return precision.fixed(recipes.override(recipe, [*kind_of_data(recipe, overrides, root), *overrides]))


def doubt(weights: Weights) -> str | None:
    """What is to be said before the answers of the network's heads are taken for those of its training method."""
    if weights.known.method is None:
        return None
    try:
        kind = methods.find(weights.known.method)
    except ValueError:  # of another project, whose code is not here
        return None
    except plugins.Untrusted:
        unasked = f"trained by {weights.known.method}, whose code is not asked without --trust"
        return f"{unasked}: the heads may have learned nothing"
    if kind.predict is Method.predict and kind.evaluators is Method.evaluators:
        return None
    return f"trained by {kind.__name__}, which is judged in its own way: the heads may have learned nothing"


def _recipe(weights: Weights, model: str | None) -> recipes.Recipe:
    """The recipe of weights that are of no run; ValueError where what is known of them makes none."""
    known = weights.known
    name, timm = (known.name, known.timm) if model is None else bare.split(model)
    if name is None and timm is None:
        why = "nothing tells which model these weights are of"
        raise UsageError(f"{weights.origin}: {why}; add --model NAME{likely_models(weights)}")
    data = {"mean": known.mean, "std": known.std, "eval_crop_ratio": known.crop_ratio}
    if known.mean is None and timm is not None:
        data = _timm_data(timm)
    size = known.image_size or weights.square(name) or bare.IMAGENET_SIZE
    return bare.recipe(name, timm, size=size, data={key: value for key, value in data.items() if value is not None})


def _timm_data(name: str) -> dict[str, Any]:
    """The input that timm's weights of this model were made for."""
    import timm

    config = timm.get_pretrained_cfg(name)
    if config is None:
        return {}
    return {"mean": config.mean, "std": config.std, "eval_crop_ratio": config.crop_pct}


def kind_of_data(recipe: recipes.Recipe, overrides: Sequence[str], root: str | None) -> list[str]:
    """An override for the kind of the data set at `root`, where it is not the recipe's and none is given."""
    if root is None or any(word.startswith("data.source=") for word in overrides):
        return []
    val = next((word.partition("=")[2] for word in overrides if word.startswith("data.val=")), recipe.data.val)
    found = kinds_of_held_out(Path(root).expanduser(), recipe.data.train, val)
    if recipe.data.source in found:
        return []
    if found:
        return [f"data.source={found[0]}"]
    # The error of a folder is told with what it should look like; that of generated data would not fit.
    return ["data.source=folder"] if recipe.data.source in GENERATED else []
