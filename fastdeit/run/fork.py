"""Forks: a run that goes on from a checkpoint of another, in a directory of its own, with other settings.

This module finds the checkpoint and says where the fork begins, and imports no torch. `carry` takes its state over.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdeit.errors import UsageError
from fastdeit.methods.config import TeacherConfig
from fastdeit.recipe import resolve as recipes
from fastdeit.recipe.length import Length
from fastdeit.recipe.resolve import Recipe
from fastdeit.run import address, directory, teachers
from fastdeit.run.chosen import chosen, place_of
from fastdeit.run.lock import NAME as LOCK
from fastdeit.run.state import checked


@dataclass(frozen=True)
class Origin:
    """Where a fork begins: the checkpoint at `path`, with its JSON `state`, of the `run`, and that run's recipe."""

    run: Path
    path: Path
    step: int
    state: dict[str, Any]
    recipe: Recipe

    def start(self, length: Length) -> int:
        """The step at which a fork of this length begins.

        It is the parent's, or that of the same epoch where the epochs have another number of steps. Raises UsageError
        where there is none, and where nothing is left to train.
        """
        step, before, now = self.step, self.state["steps_per_epoch"], length.steps_per_epoch
        if before != now:
            if step % before:
                raise UsageError(
                    f"{self.path} is in the middle of an epoch, and the fork's epochs have {now} steps instead of "
                    f"{before}; fork at the end of an epoch, or keep train.batch_size and the data"
                )
            step = step // before * now
        if step >= length.total:
            raise UsageError(
                f"{self.path} stands at epoch {step / now:g}, and the fork has {length.epochs:g}: nothing is left to "
                "train; give it more with train.epochs=N"
            )
        return step

    def lineage(self, recipe: Recipe) -> list[dict[str, Any]]:
        """What a fork by `recipe` is a fork of, the oldest first: {run, step, differences: {field: [old, new]}}."""
        changed = {field: [old, new] for field, old, new in recipes.changes(self.recipe, recipe)}
        entry = {"run": str(self.run), "step": self.step, "differences": changed}
        return [*self.state["lineage"], entry]

    def teachers(self, recipe: Recipe) -> dict[TeacherConfig, Path]:
        """The parent's teachers, trained there to their end, that a fork by `recipe` asks for as well."""
        theirs = teachers.trained(self.recipe, self.run)
        return {config: theirs[config] for config in teachers.folders(recipe.method) if config in theirs}

    def copy_teacher(self, teacher: Path, target: Path, say: Callable[[str], None]) -> None:
        """Copy a teacher of the parent into the fork, in one step. Call it on one process."""
        say(f"the teacher is that of {self.run}")
        temporary = target.with_name(f".tmp-{target.name}")
        shutil.copytree(teacher, temporary, ignore=_not_copied)
        os.rename(temporary, target)


def _not_copied(folder: str, names: list[str]) -> set[str]:
    """What is of a process, and what leads out of the run or is no file: somebody else may have made it."""

    def is_of_the_run(name: str) -> bool:
        path = Path(folder, name)
        leads_out = path.is_symlink() and name != directory.CHECKPOINTS
        return not leads_out and (path.is_file() or path.is_dir()) and name != LOCK and not name.startswith(".tmp-")

    return {name for name in names if not is_of_the_run(name)}


def opened(text: str, say: Callable[[str], None]) -> Origin:
    """The origin that `--from TEXT` names: RUN, RUN@best, RUN@step=N or a checkpoint directory.

    Raises UsageError for an address that has weights alone, and for what is damaged or not there.
    """
    where = address.parse(text)
    if where.kind not in ("run", "checkpoint") or where.ema:
        raise UsageError(
            f"--from {text} has weights alone, and a fork needs the optimizer's state too: give RUN, RUN@best, "
            f"RUN@step=1250 or a checkpoint directory. To start with these weights: `fastdeit train RECIPE "
            f"model.weights={text}`"
        )
    found, notes = chosen(where, tensors=False)
    for note in notes:
        say(note)
    known = checked(found.state, found.path)
    return Origin(place_of(found), found.path, found.step, known, directory.checked_recipe(known["recipe"], found.path))
