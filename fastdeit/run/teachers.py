"""Teachers with recipes of their own: they are trained first, each in a run inside the run of the student.

RUN/teacher     the first teacher of `method.teacher`
RUN/teacher_2   the second, and so on; a teacher without a recipe has no run here

Importing this module imports no torch.
"""

from collections.abc import Container, Mapping
from pathlib import Path

from fastdeit import plugins
from fastdeit.methods.config import MethodConfig, TeacherConfig
from fastdeit.recipe import resolve as recipes
from fastdeit.recipe.config import DataSplits
from fastdeit.recipe.resolve import Recipe
from fastdeit.run import directory

Known = Mapping[TeacherConfig, Path | Recipe]
"""Of each teacher with a recipe of its own: its run, or that recipe while it is not trained yet."""

_WHICH_DATA = (*DataSplits.model_fields, "synthetic_samples", "synthetic_classes")
_OF_ITS_NETWORK = "checkpoint_blocks", "keep_activations", "residual", "products"
"""Fields of `engine:` that say how a network is computed, and that not every network knows."""


def folders(method: MethodConfig) -> dict[TeacherConfig, str]:
    """The name of the folder of each teacher that has a recipe of its own."""
    named = enumerate(method.teachers(), 1)
    return {config: directory.teacher_name(number) for number, config in named if config.recipe is not None}


def trained(recipe: Recipe, run: Path | None) -> dict[TeacherConfig, Path]:
    """The runs of the teachers that were trained to their end in the run `run`."""
    if run is None:
        return {}
    return {config: run / name for config, name in folders(recipe.method).items() if directory.finished(run / name)}


def to_train(
    recipe: Recipe, run: Path | None = None, done: Container[TeacherConfig] = ()
) -> dict[TeacherConfig, Recipe]:
    """The recipes by which the teachers that are not `done` are to be trained, on the student's data and engine.

    What the engine does with the student's network alone (`_OF_ITS_NETWORK`) is as in the teacher's own recipe. A
    teacher that was begun in the run `run` goes on by the recipe there.
    """
    wanted = {config: name for config, name in folders(recipe.method).items() if config not in done}
    return {config: _recipe(recipe, config, run and run / name) for config, name in wanted.items()}


def _recipe(recipe: Recipe, config: TeacherConfig, begun: Path | None) -> Recipe:
    has_begun = begun is not None and directory.has_checkpoint(begun)
    own = directory.recipe_of(begun) if has_begun else recipes.load(config.recipe, own=plugins.is_own(config.recipe))
    data = own.data.model_copy(update={name: getattr(recipe.data, name) for name in _WHICH_DATA})
    its = {name: getattr(own.engine, name) for name in _OF_ITS_NETWORK}
    if its["residual"] not in ("fp32", recipe.engine.precision):
        its["residual"] = "fp32"  # one in 16 bit goes with products in 16 bit alone
    if recipe.engine.precision not in ("bf16", "auto"):
        its["products"] = "precision"
    engine = recipe.engine.model_copy(update=its)
    return own.model_copy(update={"data": data, "engine": engine})
