"""The checkpoints of a run: what is in them, and how a run goes on from one."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from fastdeit.engine import checkpoint
from fastdeit.engine.checkpoint import Checkpoint, CheckpointError
from fastdeit.engine.dist import World
from fastdeit.engine.step import Engine
from fastdeit.errors import UsageError
from fastdeit.recipe import resolve as recipes
from fastdeit.recipe.length import Length
from fastdeit.run import directory
from fastdeit.run.build import Report
from fastdeit.run.cached import differences
from fastdeit.run.identity import as_overrides, refuse_other_run
from fastdeit.run.record import Record

if TYPE_CHECKING:
    from fastdeit.recipe.resolve import Recipe


class Phases(Protocol):
    """The phase that training is in."""

    @property
    def phase(self) -> Any: ...

    def resume(self, name: str, engine: Engine) -> None: ...


class Saver:
    """Writes and restores the checkpoints of one run.

    identity  fingerprints of the data and of the teacher's cached logits, and the names of the classes
    phases    what the run's training is in (`PhaseSchedule`)
    length    of the whole run
    lineage   the runs that this one is a fork of, the oldest first (`fork.Origin.lineage`)
    overrides settings of `engine:` and places of the data that the newest checkpoint does not have yet, as on a command
              line: a run that goes on from it needs to be given them again
    """

    def __init__(
        self, recipe: "Recipe", identity: dict[str, Any], engine: Engine, world: World, phases: Phases, length: Length
    ) -> None:
        self.recipe, self.identity, self.engine, self.world, self.phases = recipe, identity, engine, world, phases
        self.length = length
        self.lineage: list[dict[str, Any]] = []
        self.overrides: list[str] = []

    def save(self, run_dir: Path, step: int, record: Record) -> None:
        """Save everything a run needs to go on as if it had never stopped. Call it on every process.

        Raises CheckpointError, on every process, where the main process could not write it.
        """
        record.phase = self.phases.phase.name
        engine_state = self.engine.state_dict()
        problem = None
        if self.world.main:
            try:
                self._write(run_dir / directory.CHECKPOINTS, step, record, engine_state)
            except CheckpointError as error:
                problem = str(error)
        if (problem := self.world.same(problem)) is not None:
            raise CheckpointError(problem)
        self.overrides = []

    def _write(self, root: Path, step: int, record: Record, engine_state: dict[str, Tensor]) -> None:
        tensors = self.tensors() | {"engine": engine_state}
        state = {"recipe": self.recipe.model_dump(mode="json"), "identity": self.identity, "record": asdict(record)}
        state |= {"steps": self.length.total, "steps_per_epoch": self.length.steps_per_epoch}
        checkpoint.save(root, step, tensors, state | {"lineage": self.lineage})
        keep = [record.best_step] if record.best_step else []
        checkpoint.prune(root, self.recipe.engine.keep_checkpoints, keep)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds besides the engine's state, by the names of its files."""
        method, ema = self.engine.method, self.engine.ema
        own = {name: tensor for name, tensor in method.state_dict().items() if not name.startswith("model.")}
        held = {"model": method.model.state_dict(), "method": own, "optim": self.engine.optimizer.state_dict()}
        return held if ema is None else held | {"ema": ema.average}

    def size(self) -> int:
        """Bytes of a checkpoint."""
        return sum(t.numel() * t.element_size() for group in self.tensors().values() for t in group.values())

    def restore(self, run_dir: Path, say: Report) -> tuple[int, Record]:
        """(step, record) of the newest checkpoint that verifies, with everything loaded; (0, fresh) when there is none.

        Every process reads the files itself. Raises UsageError when the checkpoint is of another run: other model,
        method, data, optimizer, global batch or seed.
        """
        root = run_dir / directory.CHECKPOINTS
        found = checkpoint.newest(root, lambda path, why: say(f"checkpoint {path} is damaged ({why}); skipped"))
        if found is None:
            say("nothing to resume yet: starting at step 0")
            return 0, Record()
        before = directory.checked_recipe(found.state["recipe"], found.path)
        refuse_other_run(run_dir, recipes.difference(before, self.recipe), self._other_data(found))
        try:
            self.load(found)
        except UsageError as error:
            raise UsageError(
                f"{error}\nResume with the code that the run was started with, or start anew with another --run-dir"
            ) from error
        self.lineage = found.state["lineage"]
        self.overrides = as_overrides(recipes.changes(before, self.recipe))
        return found.step, Record(**found.state["record"])

    def load(self, found: Checkpoint) -> None:
        """Put everything of a checkpoint into method, optimizer, guard and average.

        Raises UsageError where names or shapes are not exactly those of this run.
        """
        engine, tensors, phase = self.engine, found.tensors, found.state["record"]["phase"]
        self.phases.resume(phase, engine)
        misfit = first_misfit(tensors, self.tensors())
        if misfit is not None:
            raise UsageError(f"{found.path} does not fit, in phase {phase!r}: {misfit}")
        student = {f"model.{name}": tensor for name, tensor in tensors["model"].items()}
        engine.method.load_state_dict(student | tensors["method"])
        engine.optimizer.load_state_dict(tensors["optim"])
        engine.load_state_dict(tensors["engine"])
        if engine.ema is not None:
            engine.ema.load(tensors["ema"])

    def _other_data(self, found: Checkpoint) -> list[tuple[str, Any, Any]]:
        named = {"train": "data (training images)", "val": "data (held-out images)", "classes": "data (classes)"}
        theirs, ours = found.state["identity"], self.identity
        data = [(name, theirs[key], ours[key]) for key, name in named.items() if theirs[key] != ours[key]]
        cache = differences(theirs.get("cache", {}), ours.get("cache", {}))
        return data + [(f"cache ({name})", *both) for name, *both in cache]


Tensors = Mapping[str, Mapping[str, Tensor]]
"""Tensors by file and name."""


def first_misfit(theirs: Tensors, ours: Tensors) -> str | None:
    """What is wrong with the first tensor of a checkpoint that is not as it is here; None if all are."""
    for file, mine in ours.items():
        found = theirs.get(file, {})
        for name in dict.fromkeys([*mine, *found]):
            shapes = [list(group[name].shape) if name in group else None for group in (found, mine)]
            if shapes[0] != shapes[1]:
                there, here = ("there is none" if shape is None else f"it has the shape {shape}" for shape in shapes)
                return f"of {file}, {name}: in the checkpoint {there}, here {here}"
    return None
