"""Forks: a run that goes on from a checkpoint of another, in a directory of its own, with other settings.

Taken over are the weights, the method's state, the optimizer's, the guard's, the average, and the place in the
schedule. Of the record nothing is: what the parent measured stays with the parent. Any field of the recipe may
differ as long as those still fit; what cannot be carried over is refused in a sentence.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdeit.engine import checkpoint
from fastdeit.engine.checkpoint import Checkpoint
from fastdeit.errors import UsageError
from fastdeit.methods.config import TeacherConfig
from fastdeit.recipe import resolve as recipes
from fastdeit.recipe.length import Length
from fastdeit.run import address, directory, teachers
from fastdeit.run.build import Report
from fastdeit.run.lock import NAME as LOCK
from fastdeit.run.record import Record
from fastdeit.run.saver import Saver
from fastdeit.run.weights import open_weights

if TYPE_CHECKING:
    from fastdeit.recipe.resolve import Recipe


@dataclass(frozen=True)
class Origin:
    """Where a fork begins: the checkpoint at `path`, with its JSON `state`, of the `run`, and that run's recipe."""

    run: Path
    path: Path
    step: int
    state: dict[str, Any]
    recipe: "Recipe"

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

    def lineage(self, recipe: "Recipe") -> list[dict[str, Any]]:
        """What a fork by `recipe` is a fork of, the oldest first: {run, step, differences: {field: [old, new]}}."""
        changed = {field: [old, new] for field, old, new in recipes.changes(self.recipe, recipe)}
        entry = {"run": str(self.run), "step": self.step, "differences": changed}
        return [*self.state["lineage"], entry]

    def load(self, saver: Saver, say: Report) -> Record:
        """Put the checkpoint into the parts of the fork; returns the fork's record, which is empty but for the phase.

        Raises UsageError, with what to do instead, for what cannot be carried over.
        """
        recipe, theirs, ours = saver.recipe, self.state["identity"]["classes"], saver.identity["classes"]
        if recipe.optim.name != self.recipe.optim.name:
            raise self._refusal(
                f"optim.name is {self.recipe.optim.name} there and {recipe.optim.name} here, and one optimizer cannot "
                "go on with the state of another"
            )
        if recipe.model.weights != self.recipe.model.weights:
            raise UsageError(f"model.weights says what a run begins with; a fork begins with the weights of {self.run}")
        if theirs != ours:
            raise self._refusal(f"the data there has {len(theirs)} classes, and other ones than the {len(ours)} here")
        found, ema = checkpoint.load(self.path), saver.engine.ema
        if ema is None and "ema" in found.tensors:
            say(f"the average of the weights stays with {self.run}: optim.ema_decay is null now")
        elif ema is not None and "ema" not in found.tensors:
            say(f"the average of the weights begins with the weights: {self.run} has none")
            held = {f"model.{name}": tensor for name, tensor in found.tensors["model"].items()}
            held |= found.tensors["method"]
            averages = {name: held[name] for name in ema.average if name in held}
            found = Checkpoint(found.path, found.step, found.tensors | {"ema": averages}, found.state)
        try:
            saver.load(found)
        except UsageError as error:
            changed = ", ".join(field for field, _, _ in recipes.difference(self.recipe, recipe))
            raise self._refusal(f"{error} (changed: {changed or 'nothing'})") from error
        saver.lineage = self.lineage(recipe)
        return Record(phase=found.state["record"]["phase"])

    def teachers(self, recipe: "Recipe") -> dict[TeacherConfig, Path]:
        """The parent's teachers, trained there to their end, that a fork by `recipe` asks for as well."""
        theirs = teachers.trained(self.recipe, self.run)
        return {config: theirs[config] for config in teachers.folders(recipe.method) if config in theirs}

    def copy_teacher(self, teacher: Path, target: Path, say: Report) -> None:
        """Copy a teacher of the parent into the fork, in one step. Call it on one process."""
        say(f"the teacher is that of {self.run}")
        temporary = target.with_name(f".tmp-{target.name}")
        ignored = shutil.ignore_patterns(LOCK, ".tmp-*")
        shutil.copytree(teacher, temporary, ignore=ignored)
        os.rename(temporary, target)

    def _refusal(self, why: str) -> UsageError:
        return UsageError(
            f"{self.run} cannot be forked so: {why}\nA fork goes on with the network and the optimizer of its parent. "
            f"For its weights alone, start a new run: `fastdeit train RECIPE model.weights={self.run}`"
        )


def opened(text: str, say: Report) -> Origin:
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
    weights = open_weights(text)
    for note in weights.notes:
        say(note)
    found = weights.checkpoint
    recipe = directory.checked_recipe(found.state["recipe"], found.path)
    return Origin(found.path.parent.parent, found.path, found.step, found.state, recipe)
