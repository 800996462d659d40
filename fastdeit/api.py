"""fastdeit in Python: `train`, `load`, `loader`, `stepper` and `Run` of `fastdeit`, as in a script or a notebook.

    run = fastdeit.train("digits", {"train.epochs": 3})
    run.metrics["top1_fused"]
    run.evaluate({"data.eval_crop_ratio": 0.9})
    run.model("best")(images)

Mistakes raise `fastdeit.errors.UsageError` and `fastdeit.recipe.resolve.RecipeError`, with the sentences of the command
line. docs/python.md shows more.
"""

import base64
import html
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from fastdeit import files, training
from fastdeit.engine.dist import world as join_world
from fastdeit.errors import UsageError
from fastdeit.feed import Loader
from fastdeit.recipe import resolve as recipes
from fastdeit.recipe.resolve import Recipe
from fastdeit.run import directory, overview
from fastdeit.stepping import Stepper

_LARGEST_PICTURE = 1 << 24  # bytes; ours have some hundred thousand
Overrides = Mapping[str, Any] | Sequence[str]
"""Fields that a recipe is changed by: {"train.epochs": 3, "data.augment": None}, or ["train.epochs=3"]."""


def train(
    recipe: str | os.PathLike[str] | Recipe = "digits",
    overrides: Overrides = (),
    *,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> "Run":
    """Train by a recipe in this process, and return the run.

    recipe     name of a shipped recipe, path of a YAML file, or a `Recipe`
    overrides  fields that are changed in it
    run_dir    where the run is kept; None: a new directory in runs/ with the date in its name
    resume     go on from the newest checkpoint in `run_dir`, if there is one

    For several processes use the command line. An interrupt (Ctrl-C, a notebook's stop button) saves and raises
    `fastdeit.errors.Interrupted`.
    """
    began = time.monotonic()
    chosen = _chosen(recipe, overrides)
    recipes.check_complete(chosen)
    path = None if run_dir is None else Path(run_dir).expanduser()
    if resume and path is None:
        raise UsageError("resume=True goes on with the run in run_dir; say which")
    return Run(training.alone(chosen, path, resume=resume, began=began)["run_dir"])


def stepper(recipe: str | os.PathLike[str] | Recipe, overrides: Overrides = (), *, steps: int) -> Stepper:
    """The training steps of a recipe, for batches of your own: `stepper(...).step(images, labels)`.

    recipe, overrides  as of `train`; `model.num_classes` says the classes, `train.batch_size` the images of a step
    steps              of the whole run, which the schedule is made for: a multiple of `train.epochs`
    """
    return Stepper(_chosen(recipe, overrides), steps=steps)


def loader(recipe: str | os.PathLike[str] | Recipe, overrides: Overrides = (), **options: Any) -> Loader:
    """The images of a recipe, for a training loop of your own: an iterable of batches, an epoch at a time.

    recipe, overrides  as of `train`; `data.root` says where the images are
    options            as of `fastdeit.feed.Loader`: train, rank, world, device, uint8
    """
    return Loader(_chosen(recipe, overrides), **options)


def _chosen(recipe: str | os.PathLike[str] | Recipe, overrides: Overrides) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipes.override(recipe, written(overrides))
    return recipes.load(os.fspath(recipe), written(overrides))


def load(address: str | os.PathLike[str], *, model: str | None = None, num_classes: int | None = None) -> nn.Module:
    """The network at an address, with its weights, in eval mode on the CPU.

    address      a run (`runs/x`, `runs/x@best`, `runs/x@ema`), a checkpoint, a file of weights, or `timm:NAME`
    model        of a bare file that does not tell: a model of ours, or `timm:NAME`
    num_classes  another number of classes: the head is made anew

    Raises UsageError where there is nothing, and where it does not say which network it is of.
    """
    from fastdeit.run.weights import network, open_weights

    purpose = "teacher" if num_classes is None else "student"
    return network(open_weights(os.fspath(address)), name=model, num_classes=num_classes, purpose=purpose)


def written(overrides: Overrides) -> list[str]:
    """Overrides as the command line has them: section.field=value, a value of Python's as JSON, which is YAML."""
    if not isinstance(overrides, Mapping):
        return list(overrides)
    return [f"{field}={_as_yaml(field, value)}" for field, value in overrides.items()]


def _as_yaml(field: str, value: Any) -> str:
    try:
        return json.dumps(value, default=os.fspath)
    except TypeError as error:
        raise UsageError(f"{field}: a recipe has no {type(value).__name__} such as {value!r}: {error}") from error


class History(list[dict[str, Any]]):
    """Records of a run, one dictionary each; a notebook shows them as a table. `pandas.DataFrame(history)` takes it."""

    @property
    def columns(self) -> list[str]:
        """Names that occur in any record, in the order of their first occurrence."""
        return list(dict.fromkeys(name for record in self for name in record))

    def _repr_html_(self) -> str:
        names = self.columns
        return _table(names, ([record.get(name, "") for name in names] for record in self))


class Run:
    """A run on the disk, finished or not: `fastdeit.Run("runs/x")`. What it says is read when it is asked."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises UsageError where there is no run. A bare name is looked for in runs/ as well."""
        self.path = overview.find(os.path.expanduser(path))

    @property
    def recipe(self) -> Recipe:
        """The recipe with every field, as it was trained by."""
        return directory.written_recipe(self.path)

    @property
    def state(self) -> overview.State:
        """finished, running or interrupted."""
        return self._read().state

    @property
    def summary(self) -> dict[str, Any]:
        """The results as of the last evaluation, as summary.json has them; empty before the first."""
        return dict(self._read().summary)

    @property
    def metrics(self) -> dict[str, float]:
        """What the last evaluation measured: accuracy in per cent, by name."""
        return self._read().metrics

    @property
    def history(self) -> History:
        """The evaluations of the run in their order: step, epoch and what was measured."""
        return self._records("eval")

    @property
    def training(self) -> History:
        """The log of training: step, epoch, loss, learning rate, images per second."""
        return self._records("train")

    def model(self, which: str = "") -> nn.Module:
        """The network in eval mode: of the newest checkpoint, or of `which`: "best", "ema", "best,ema", "step=1250"."""
        return load(f"{self.path}@{which}" if which else self.path)

    def evaluate(self, overrides: Overrides = (), *, which: str = "") -> dict[str, float]:
        """Metrics on the held-out images, by name; those of the averaged weights end in `_ema`.

        overrides  fields of the run's recipe that are changed: another data.root, model.image_size, crop
        which      the weights, as `model` has it
        """
        from fastdeit.run import build
        from fastdeit.run.settings import settings
        from fastdeit.run.weights import open_weights
        from fastdeit.verbs.evaluate import judge, known_classes

        weights = open_weights(f"{self.path}@{which}" if which else str(self.path))
        recipe = settings(weights, None, written(overrides))
        with join_world(recipe.engine.device) as world:
            found = judge(weights, recipe, known_classes(weights, build.held_out(recipe)), world)
        return {
            f"{name}{'_ema' if each.averaged and len(found) > 1 else ''}": value
            for each in found
            for name, value in each.result.metrics.items()
        }

    def _read(self) -> overview.Overview:
        return overview.read(self.path)

    def _records(self, kind: str) -> History:
        records = (record for record in self._read().records if record.get("kind") == kind)
        return History({name: value for name, value in record.items() if name != "kind"} for record in records)

    def __repr__(self) -> str:
        found = self._read()
        measured = ", ".join(f"{name} {value:.4g}" for name, value in found.metrics.items())
        return f"Run({str(self.path)!r}): {found.state}, step {found.step:,}{', ' if measured else ''}{measured}"

    def _repr_html_(self) -> str:
        """For notebooks: the state, what was measured last, and the curves."""
        found = self._read()
        rows = [("state", found.state), ("step", found.step), *found.metrics.items()]
        picture = self.path / "curves.png"
        image = ""
        with suppress(OSError, ValueError):  # there is none, or what is there is no picture of ours
            data = base64.b64encode(files.read(picture, _LARGEST_PICTURE)).decode()
            image = f'<img width="720" src="data:image/png;base64,{data}">'
        return f"<b>{html.escape(str(self.path))}</b>{_table((), rows)}{image}"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in HTML; numbers have five digits."""
    cells = [[f"{cell:.5g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    lines = [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in cells]
    titles = f"<tr>{''.join(f'<th>{html.escape(name)}</th>' for name in header)}</tr>" if header else ""
    return f"<table>{titles}{''.join(lines)}</table>"
