"""The checkpoints of a run: what is in them, and how a run goes on from one."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdeit.data.logits import Cache
from fastdeit.data.sources.source import Source
from fastdeit.engine import checkpoint, shards
from fastdeit.engine.background import HostCopies, Worker
from fastdeit.engine.checkpoint import Checkpoint, CheckpointError
from fastdeit.engine.dist import World
from fastdeit.engine.ema import Ema
from fastdeit.engine.fit import FitError, check_fit
from fastdeit.engine.optim import Optimizer
from fastdeit.engine.step import Engine
from fastdeit.errors import UsageError
from fastdeit.methods.base import Method
from fastdeit.recipe import resolve as recipes
from fastdeit.recipe.length import Length
from fastdeit.recipe.resolve import Recipe
from fastdeit.run import agreement, directory, environment, state
from fastdeit.run.build import Report
from fastdeit.run.cached import differences
from fastdeit.run.identity import as_overrides, refuse_other_run
from fastdeit.run.phasing import PhaseSchedule
from fastdeit.run.record import Record


class PoisonedError(Exception):
    """What was to be saved has numbers that are not finite; the message names the first tensor."""


NUMERICS = frozenset(
    {"engine.device", "engine.threads", "engine.precision", "engine.capture", "engine.autotune", "engine.residual"}
    | {"engine.products"}
    | {"engine.checkpoint_blocks", "engine.keep_activations", "engine.parallel", "engine.reduce"}
    | {"engine.sync_batchnorm"}
)
"""Settings with which a run that goes on may get other numbers, if only by rounding."""


class Saver:
    """Writes and restores the checkpoints of one run.

    identity  fingerprints of the data and of the teacher's cached logits, and the names of the classes
    phases    what the run's training is in
    length    of the whole run
    lineage   the runs that this one is a fork of, the oldest first (`fork.Origin.lineage`)
    overrides settings of `engine:` and places of the data that the newest checkpoint does not have yet, as on a command
              line: a run that goes on from it needs to be given them again
    unheard   whether a checkpoint was begun in the background, and `heard` has not told yet what became of it
    changes   {step, fields: {what: [before, after]}} of each resume with other settings, processes or versions, which
              change the numbers of a run if only by rounding
    """

    def __init__(
        self,
        recipe: Recipe,
        identity: dict[str, Any],
        engine: Engine,
        world: World,
        phases: PhaseSchedule,
        length: Length,
    ) -> None:
        self.recipe, self.identity, self.engine, self.world, self.phases = recipe, identity, engine, world, phases
        self.length = length
        self.lineage: list[dict[str, Any]] = []
        self.overrides: list[str] = []
        self.changes: list[dict[str, Any]] = []
        self._copies, self._writer = HostCopies(), Worker()
        self.unheard = False
        # Such as a mask of minus infinity; by their names in the method, and in the student.
        buffers = set(_non_finite(dict(engine.method.named_buffers())))
        self._never_finite = buffers | {name.removeprefix("model.") for name in buffers}

    def save(self, run_dir: Path, step: int, record: Record, *, wait: bool = True) -> None:
        """Save everything a run needs to go on as if it had never stopped. Call it on every process.

        wait  False: with `engine.async_checkpoints` only the copy of the state is made before this returns, and
              `heard` tells what has become of the rest; it has to be asked, with `wait`, before the next save

        Raises PoisonedError where a tensor is not finite, DriftError where the processes have other weights, and
        CheckpointError where the main process could not write it, on every process: then nothing is saved, and the
        best of `record` is again that of the newest checkpoint, since a best that is not on the disk is lost.
        """
        record.phase = self.phases.phase.name
        engine_state = self.engine.state_dict()
        self._refuse_non_finite()
        self.unheard = self.recipe.engine.async_checkpoints and not wait
        problem, root, files = None, run_dir / directory.CHECKPOINTS, self._snapshot(engine_state)
        if self.world.main:
            write = partial(self._write, root, step, record.best_step, files, self._state(record))
            if self.unheard:
                self._writer.begin(write)
            else:
                problem = _problem_of(write)
        if not self.unheard:
            self._tell(root, record, problem)

    def _snapshot(self, engine_state: dict[str, Tensor]) -> Mapping[str, Mapping[str, Tensor]]:
        """The whole state of the run as it is now, by file and name; a copy, if the training goes on while it is
        written. Call it on every process; what the main process gets is to be written."""
        files = self.whole() | {"engine": engine_state}
        return self._copies.of(files) if self.unheard and self.world.main else files

    def heard(self, run_dir: Path, record: Record, *, wait: bool) -> None:
        """What has become of the checkpoint that is written in the background, if one is: raises CheckpointError as
        `save` does. Call it on every process.

        wait  until it is written; else nothing is told of one that is not
        """
        if not self.unheard:
            return
        done = self.world.same(wait or self._writer.done)
        if done:
            self.unheard = False
            problem = _problem_of(self._writer.result) if self.world.main else None
            self._tell(run_dir / directory.CHECKPOINTS, record, problem)

    @contextmanager
    def ending(self, say: Report) -> Iterator[None]:
        """Around the steps of a run: one that fails waits for the checkpoint that is being written, as its own message
        says where to go on from. Ctrl-C for the second time waits for nothing."""
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException:
            try:
                self._writer.result()
            except Exception as error:  # it must not take the place of what has ended the run
                say(f"warning: {error}")
            raise

    def settle(self) -> None:
        """Wait until nothing is written in the background, on this process alone; `heard` tells of it later."""
        self._writer.join()

    def _tell(self, root: Path, record: Record, problem: str | None) -> None:
        known = _newest_record(root) if problem is not None else {}
        problem, known = self.world.same((problem, known))
        if problem is not None:
            record.take_back_best(known)
            raise CheckpointError(problem)
        self.overrides = []

    def _write(
        self, root: Path, step: int, best_step: int, files: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]
    ) -> None:
        checkpoint.save(root, step, files, state)
        checkpoint.prune(root, self.recipe.engine.keep_checkpoints, [best_step] if best_step else [])

    def _state(self, record: Record) -> dict[str, Any]:
        return {
            "schema": state.SCHEMA,
            "recipe": self.recipe.model_dump(mode="json"),
            "identity": self.identity,
            "record": asdict(record),
            "steps": self.length.total,
            "steps_per_epoch": self.length.steps_per_epoch,
            "lineage": self.lineage,
            "world": self.world.size,
            "versions": environment.versions(),
            "changes": self.changes,
        }

    def _refuse_non_finite(self) -> None:
        """Every process looks at what it holds of what is about to be saved, and all hear of it."""
        found = self.world.first(self._first_non_finite())
        if found is not None:
            raise PoisonedError(f"{found} has numbers that are not finite")

    def _first_non_finite(self) -> str | None:
        """The first tensor with a number, among those that this process holds, which is not finite."""
        bad = ((name, file) for file, group in self.tensors().items() for name in _non_finite(group))
        return next((f"{name} of {file}" for name, file in bad if name not in self._never_finite), None)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds besides the engine's state, by the names of its files. A tensor that the processes
        share is in parts here."""
        return held(self.engine.method, self.engine.optimizer, self.engine.ema)

    def whole(self) -> dict[str, dict[str, Tensor]]:
        """`tensors` for the main process to save: what is in parts is put together on its CPU, one tensor after the
        other, so that no process holds all of them on its device. Other processes get their parts. A collective where
        something is in parts.
        """

        def gathered(tensor: Tensor) -> Tensor:
            if not shards.is_part(tensor):
                return tensor
            found = shards.whole(tensor)
            return found.cpu() if self.world.main else tensor

        return {file: {name: gathered(t) for name, t in group.items()} for file, group in self.tensors().items()}

    def size(self) -> int:
        """Bytes of a checkpoint."""
        return size(self.tensors())

    def restore(self, run_dir: Path, say: Report, ahead: agreement.Ahead | None = None) -> tuple[int, Record]:
        """(step, record) of the newest checkpoint that verifies, with everything loaded; (0, fresh) when there is none.
        `ahead` may have verified it already.

        All processes load it, or none: what one of them finds, all raise. Raises UsageError when the checkpoint is of
        another run (other model, method, data, optimizer, global batch or seed) or does not fit this code. Call it on
        every process.
        """
        found = agreement.newest(self.world, run_dir / directory.CHECKPOINTS, say, ahead)
        if found is None:
            say("nothing to resume yet: starting at step 0")
            return 0, Record()
        found = agreement.together(self.world, lambda: self._accepted(found, run_dir))
        agreement.together(self.world, lambda: self._load_own(found))
        self.engine.check_replicas()
        before = directory.checked_recipe(found.state["recipe"], found.path)
        self.lineage, self.changes = found.state["lineage"], found.state["changes"]
        self.overrides = as_overrides(recipes.changes(before, self.recipe))
        self._note_changes(found, before, say)
        return found.step, Record(**found.state["record"])

    def _accepted(self, found: Checkpoint, run_dir: Path) -> Checkpoint:
        """The checkpoint with its state in the present schema. Raises UsageError where it is not of this run."""
        found = present(found)
        before = directory.checked_recipe(found.state["recipe"], found.path)
        refuse_other_run(
            run_dir, recipes.difference(before, self.recipe), other_data(found.state["identity"], self.identity)
        )
        self._refuse_other_length(found)
        return found

    def _refuse_other_length(self, found: Checkpoint) -> None:
        """The schedule is a function of the step. With a recipe and data that are the same, only other code counts
        other steps."""
        theirs = found.state["steps"], found.state["steps_per_epoch"]
        if theirs != (self.length.total, self.length.steps_per_epoch) or found.step > self.length.total:
            raise UsageError(
                f"{found.path} was saved at step {found.step} of {theirs[0]}, {theirs[1]} an epoch, but this run has "
                f"{self.length.total}, {self.length.steps_per_epoch} an epoch; resume it with the version that wrote it"
            )

    def _load_own(self, found: Checkpoint) -> None:
        try:
            self.load(found)
        except UsageError as error:
            raise UsageError(
                f"{error}\nResume with the code that the run was started with, or start anew with another --run-dir"
            ) from error
        self.check_finite(found)

    def check_finite(self, found: Checkpoint) -> None:
        """Raise UsageError where what was loaded from `found` has a number that is not finite: no run goes on from it.
        Nothing like that is saved any more, but the first versions did."""
        if (bad := self._first_non_finite()) is not None:
            raise UsageError(
                f"{found.path} cannot be gone on with: {bad} has numbers that are not finite. Move it away, and the "
                "run goes on from the checkpoint before it, if there is one"
            )

    def _note_changes(self, found: Checkpoint, before: Recipe, say: Report) -> None:
        """Say and remember what may change the numbers of the run from here on."""
        there, here = found.state["versions"], environment.versions()
        changed = {field: [old, new] for field, old, new in recipes.changes(before, self.recipe) if field in NUMERICS}
        changed |= {name: [there[name], here.get(name)] for name in there if there[name] != here.get(name)}
        if found.state["world"] not in (None, self.world.size):
            changed["processes"] = [found.state["world"], self.world.size]
        if not changed:
            return
        self.changes = [*self.changes, {"step": found.step, "fields": changed}]
        listed = ", ".join(f"{name} {new} (before: {old})" for name, (old, new) in changed.items())
        say(f"from step {found.step} on the numbers of this run may differ, if only by rounding: {listed}")
        if self.engine.guard.scaled and "scale" not in found.tensors["engine"]:
            say(f"fp16 begins with a fresh loss scale of {self.engine.guard.scale.item():g}")

    def load(self, found: Checkpoint) -> None:
        """Put everything of a checkpoint into method, optimizer, guard and average.

        Raises UsageError where names, shapes or dtypes are not exactly those of this run.
        """
        self._load_weights(found)
        try:
            self.engine.load_state_dict(found.tensors["engine"])
        except FitError as error:
            raise self._misfit(found, error) from error

    def rewind(self, run_dir: Path, epoch: int, say: Report) -> int | None:
        """Go back to the weights, optimizer and average of the newest checkpoint, and say of which step it is; None
        where there is none.

        The phase of the run stays that of `epoch`, and the guard and the log go on. Call it on every process.
        """
        found = agreement.newest(self.world, run_dir / directory.CHECKPOINTS, say)
        if found is None:
            return None
        self._load_weights(found)
        self.phases.enter(epoch, self.engine)
        self.engine.record_anew()
        return found.step

    def _load_weights(self, found: Checkpoint) -> None:
        engine, tensors = self.engine, found.tensors
        self.phases.resume(found.state["record"]["phase"], engine)
        ours = self.tensors()
        missing = next((file for file in (*ours, "engine") if file not in tensors), None)
        if missing is not None:
            raise self._misfit(found, f"it has no {missing}.safetensors")
        try:
            for file in ours:
                check_fit(file, tensors[file], ours[file])
        except FitError as error:
            raise self._misfit(found, error) from error
        student = {f"model.{name}": tensor for name, tensor in tensors["model"].items()}
        mine, given = engine.method.state_dict(), student | tensors["method"]
        engine.method.load_state_dict({name: shards.placed(given[name], mine[name]) for name in given})
        engine.optimizer.load_state_dict(tensors["optim"])
        if engine.ema is not None:
            engine.ema.load(tensors["ema"])

    def _misfit(self, found: Checkpoint, why: FitError | str) -> UsageError:
        return does_not_fit(found, self.phases.phase.name, why)


def identity_of(train: Source, held_out: Source, cache: Cache | None) -> dict[str, Any]:
    """What says in a checkpoint which data the run is of."""
    found = {"train": train.fingerprint, "val": held_out.fingerprint, "classes": list(train.classes)}
    return found if cache is None else found | {"cache": cache.fingerprint}


def other_data(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(what, of a run, asked for) of the data that differ, by two results of `identity_of`."""
    named = {"train": "data (training images)", "val": "data (held-out images)", "classes": "data (classes)"}
    data = [(name, theirs[key], ours[key]) for key, name in named.items() if theirs[key] != ours[key]]
    cache = differences(theirs.get("cache", {}), ours.get("cache", {}))
    return data + [(f"cache ({name})", *both) for name, *both in cache]


def does_not_fit(found: Checkpoint, phase: str, why: FitError | str) -> UsageError:
    """The refusal of a checkpoint for a reason."""
    return UsageError(f"{found.path} does not fit, in phase {phase!r}: {why}")


def held(method: Method, optimizer: Optimizer, ema: Ema | None) -> dict[str, dict[str, Tensor]]:
    """The tensors that a checkpoint holds of them, by the names of its files."""
    own = {name: tensor for name, tensor in method.state_dict().items() if not name.startswith("model.")}
    found = {"model": method.model.state_dict(), "method": own, "optim": optimizer.state_dict()}
    return found if ema is None else found | {"ema": ema.state()}


def size(files: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Bytes of such tensors."""
    return sum(t.numel() * t.element_size() for group in files.values() for t in group.values())


def _problem_of(write: Callable[[], None]) -> str | None:
    """Why the checkpoint could not be written by `write`; None where it was."""
    try:
        write()
    except CheckpointError as error:
        return str(error)
    return None


def _newest_record(root: Path) -> dict[str, Any]:
    """The record in the newest checkpoint under `root`; empty where there is none that can be read."""
    try:
        found = checkpoint.newest_state(root)
    except CheckpointError:
        return {}
    return {} if found is None else found["record"]


def present(found: Checkpoint) -> Checkpoint:
    """The checkpoint in the present schema. Raises UsageError where its state is none that this version knows."""
    tensors = dict(found.tensors)
    if "schema" not in found.state and "engine" in tensors:  # schema 0 knew of no spikes
        tensors["engine"] = dict.fromkeys(("spikes", "usual", "seen"), torch.zeros(1)) | tensors["engine"]
    return replace(found, tensors=tensors, state=state.checked(found.state, found.path))


def _non_finite(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """The names of those tensors that have, in this process, a number which is not finite. Reads the device once."""
    held = {name: shards.local(tensor.detach()) for name, tensor in tensors.items()}
    named = {name: tensor for name, tensor in held.items() if tensor.is_floating_point() and tensor.numel()}
    if not named:
        return iter(())
    # The largest absolute value of each in few launches; it is NaN where a number is.
    largest = torch.stack([norm.double() for norm in torch._foreach_norm(list(named.values()), torch.inf)])
    return (name for name, fine in zip(named, largest.isfinite().tolist(), strict=True) if not fine)
