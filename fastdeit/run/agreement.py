"""All processes see the same run before any of them loads anything of it.

Every process reads the checkpoint by itself. One whose directory is not shared, or that runs other versions, would
train other weights beside the others', and the main process would save its own as if they were those of all.
"""

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fastdeit.data.sources.source import DataError
from fastdeit.engine import checkpoint
from fastdeit.engine.checkpoint import Checkpoint, CheckpointError
from fastdeit.engine.dist import World
from fastdeit.errors import UsageError
from fastdeit.recipe import resolve as recipes
from fastdeit.recipe.resolve import Recipe
from fastdeit.run import directory, environment
from fastdeit.run.fork import Origin
from fastdeit.text import shorten

Result = TypeVar("Result")
View = dict[str, Any]
"""What a process sees, by what a person calls it."""
_VERSIONS = "the versions of what they run"
_SEEN = (_VERSIONS, "the checkpoint")
"""What begins like this has a hash or a version for each of its parts."""
_DATA = {
    "train": "the training images",
    "val": "the held-out images",
    "classes": "the names of the classes",
    "cache": "the teacher's cached logits",
}


def same_view(world: World, recipe: Recipe, run_dir: Path | None, origin: Origin | None) -> None:
    """Raise UsageError, on every process, unless all have the same recipe, see the same checkpoints and run the same
    versions.

    run_dir  the run that is to be gone on with; None for a new one
    origin   the checkpoint that a fork begins with
    """
    if world.size > 1:
        _compare(world, _view(run_dir, origin) | recipes.fields(recipe))


def same_data(world: World, identity: Mapping[str, Any]) -> None:
    """Raise UsageError, on every process, unless all have the same data, by the `identity` of a run."""
    _compare(world, {name: identity.get(key) for key, name in _DATA.items()})


def _compare(world: World, view: View) -> None:
    views = world.all((socket.gethostname(), view))
    _, ours = views[0]
    for rank, (host, theirs) in enumerate(views):
        for what in dict.fromkeys([*ours, *theirs]):
            if theirs.get(what) != ours.get(what):
                told, known = (_told(what, view.get(what)) for view in (theirs, ours))
                raise UsageError(
                    f"process {rank} on {host} and process 0 on {views[0][0]} differ in {what}: {told}, and {known}; "
                    f"nothing was loaded, {_way_out(what)}"
                )


class Ahead:
    """The newest checkpoint under `root`, whose hashes a thread compares while the parts of the run are built.

    The hash is most of the time of a restore, and what builds a run leaves cores and disk idle. `root` is None where
    there is nothing to verify.
    """

    def __init__(self, world: World, root: Path | None) -> None:
        self._digest: str | None = None
        steps = checkpoint.steps(root) if root is not None and first_of_its_machine(world) else []
        path = checkpoint.path_of(root, steps[-1]) if steps else None
        self._thread = threading.Thread(target=self._verify, args=[path], daemon=True, name="fastdeit-verify")
        self._thread.start()

    def holds(self, path: Path) -> bool:
        """Whether the checkpoint at `path` is the one that was verified, and is sound. Waits until that is known."""
        self._thread.join()
        return checkpoint.digest(path) == self._digest

    def _verify(self, path: Path | None) -> None:
        if path is not None:
            # What is wrong `newest` finds once more, and says. Where the start has failed and the interpreter shuts
            # down meanwhile, no thread can be begun any more.
            with contextlib.suppress(CheckpointError, RuntimeError):
                self._digest = checkpoint.open_step(path, tensors=False).digest


def newest(world: World, root: Path, say: Callable[[str], None], ahead: Ahead | None = None) -> Checkpoint | None:
    """The newest checkpoint under `root` that verifies on every machine, mapped; None where there is none.

    One process a machine reads the files and compares their hashes, unless it has done so `ahead`; the others rely on
    it. Damaged checkpoints are said and skipped, on every process. Raises CheckpointError if none verifies. Call it on
    every process, after `same_view`.
    """
    verifies = first_of_its_machine(world)

    def opened_by_all(path: Path) -> Checkpoint:
        found = why = None
        try:
            found = checkpoint.open_step(path, verify=verifies and not (ahead is not None and ahead.holds(path)))
        except CheckpointError as error:
            why = str(error)
        problem = next((each for each in world.all(why) if each is not None), None)
        if problem is not None:
            raise CheckpointError(problem)
        return found

    def damaged(path: Path, why: str) -> None:
        say(f"checkpoint {path} is damaged ({why}); skipped")

    return checkpoint.newest_by(root, opened_by_all, damaged)


def together(world: World, action: Callable[[], Result]) -> Result:
    """`action()`; where it fails on one process it fails on all, there with its error, elsewhere with UsageError."""
    result = failure = None
    try:
        result = action()
    except Exception as error:
        failure = error
    known = isinstance(failure, (UsageError, DataError))
    told = world.all(None if failure is None else f"{failure}" if known else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for rank, problem in enumerate(told):
        if problem is not None:
            raise UsageError(f"process {rank}: {problem}")
    return result


def _view(run_dir: Path | None, origin: Origin | None) -> View:
    view: View = {_VERSIONS: environment.versions()}
    if run_dir is not None:
        for run in (run_dir, *sorted(directory.teachers_in(run_dir))):
            root = run / directory.CHECKPOINTS
            found = {step: checkpoint.digest(checkpoint.path_of(root, step)) for step in checkpoint.steps(root)}
            view[f"the checkpoints of {run}"] = found
    if origin is not None:
        view[f"the checkpoint {origin.path}"] = checkpoint.digest(origin.path)
    return view


def _told(what: str, value: Any) -> str:
    if not what.startswith(_SEEN):
        return shorten(json.dumps(value), 60)
    if not value:
        return "none there"
    if isinstance(value, dict):
        return ", ".join(f"{key} {str(found)[:12]}" for key, found in value.items())
    return str(value)[:12]


def _way_out(what: str) -> str:
    if what == _VERSIONS:
        return "install the same on all machines"
    if what.startswith(_SEEN):
        return "all machines must share the run"
    if what in _DATA.values():
        return "all machines must have the same data"
    return "give all processes the same recipe and the same command"


def first_of_its_machine(world: World) -> bool:
    """Whether this process is the one of its machine that verifies files for all."""
    # Of a process alone the variable is left over from another launch, and nobody else would compare the hashes.
    return world.size == 1 or int(os.environ.get("LOCAL_RANK", 0)) == 0
