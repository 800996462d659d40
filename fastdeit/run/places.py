"""What a recipe names on the disk, and whether it is there. No torch is imported, so a mistake is said at once."""

from pathlib import Path

from fastdeit.data.sources.datasets import advice, layout
from fastdeit.data.sources.kinds import GENERATED
from fastdeit.data.sources.source import DataError
from fastdeit.errors import UsageError, naming
from fastdeit.recipe.resolve import Recipe
from fastdeit.run.address import parse


def check(recipe: Recipe) -> None:
    """Raise UsageError or DataError where the data set or the weights that a new run begins with are not there."""
    check_root(recipe)
    named = [("model.weights", recipe.model.weights)]
    named += [("method.teacher.weights", config.weights) for config in recipe.method.teachers()]
    for field, text in named:
        if text is not None:
            with naming(field):
                parse(text)


def check_root(recipe: Recipe) -> None:
    """Raise UsageError where the recipe needs a folder of data and none is given, DataError where there is none."""
    data = recipe.data
    if data.source in GENERATED or (data.root is not None and Path(data.root).expanduser().is_dir()):
        return
    try:
        expected = layout(data.source, data.train, data.val)
    except DataError as error:
        raise DataError(f"data.source {data.source}: {error}") from error
    if data.root is None:
        raise UsageError(
            f"recipe {recipe.name} needs images: add --data ROOT, which sets data.root; data.source is {data.source}, "
            f"expected are {expected}"
        )
    known = advice(Path(data.root).expanduser())
    if known:
        raise DataError(f"data.source {data.source}: {known}")
    what = "not a directory" if Path(data.root).expanduser().exists() else "no such directory"
    raise DataError(f"data.source {data.source}: {data.root}: {what}; the expected layout is {expected}")
