"""The directory of a run: how it is named, made, owned, found again, and removed when nothing came of it.

RUN/recipe.yaml, environment.json     what is run, and on what
RUN/metrics.jsonl                     what was measured
RUN/checkpoints/step_00001250/        what the run goes on from; its recipe is the one that counts
RUN/curves.png, summary.json          the run so far, as of its last evaluation
RUN/teacher/, RUN/teacher_2/          the runs of teachers that were trained here
RUN/bad_images.jsonl                  images that cannot be used, if any
RUN/lock.json                         while a process trains here: which one
"""

import errno
import os
import re
import shlex
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from fastdeit import plugins
from fastdeit.engine import checkpoint, disk, metrics
from fastdeit.errors import FastdeitError, UsageError
from fastdeit.recipe import resolve as recipes
from fastdeit.recipe.resolve import Recipe
from fastdeit.run.lock import NAME as LOCK
from fastdeit.run.lock import locked, refuse_owned
from fastdeit.run.state import checked

if TYPE_CHECKING:
    from fastdeit.engine.dist import World

RUNS = Path("runs")
CHECKPOINTS, RECIPE, METRICS = "checkpoints", "recipe.yaml", "metrics.jsonl"

_WRITTEN = frozenset(
    {LOCK, RECIPE, METRICS, "environment.json", "summary.json", "bad_images.jsonl", "curves.png", "wandb_id"}
)
_TEACHER = re.compile(r"teacher(_[2-9]|_[1-9]\d+)?")
_FOLDERS = re.compile(rf"{_TEACHER.pattern}|tensorboard|wandb")
"""Folders of a run that it writes into, besides its checkpoints."""
_DATED = re.compile(r"(?P<stamp>\d{4}-\d\d-\d\d_\d{6})(-(?P<number>\d+))?_(?P<recipe>.+)")
_TITLE = "# The recipe {name}, with every field written out. The run goes on by the recipe in its checkpoints.\n"


# ---- names -----------------------------------------------------------------------------------------------------------


def has_checkpoint(run: Path) -> bool:
    """Whether the directory `run` has a checkpoint."""
    return bool(checkpoint.steps(run / CHECKPOINTS))


def can_go_on(run: Path) -> bool:
    """Whether there is something to go on from: a checkpoint of the run, or of the teacher that it trains first."""
    return has_checkpoint(run) or (_has_teacher(run) and (run / RECIPE).is_file())


def teacher_name(number: int) -> str:
    """The folder in a run of its teacher `number`, counted from 1."""
    return "teacher" if number == 1 else f"teacher_{number}"


def teachers_in(run: Path) -> list[Path]:
    """The folders of teachers in the directory `run`."""
    return [path for path in run.iterdir() if _TEACHER.fullmatch(path.name)] if run.is_dir() else []


def _has_teacher(run: Path) -> bool:
    """Whether a teacher in the run has a checkpoint."""
    return any(map(has_checkpoint, teachers_in(run)))


def finished(run: Path | None) -> Path | None:
    """`run`, if it has been trained to its end."""
    state = None if run is None else _newest_state(run)
    if state is None:
        return None
    limit = state["recipe"]["train"]["stop_after"]
    early = limit is not None and state["record"]["evaluations_since_best"] >= limit
    return run if early or state["steps"] == checkpoint.steps(run / CHECKPOINTS)[-1] else None


def newest(name: str) -> Path:
    """The newest run of the recipe `name` under runs/ that has a checkpoint. Raises UsageError where there is none."""
    found = []
    for path in RUNS.iterdir() if RUNS.is_dir() else ():
        match = _DATED.fullmatch(path.name)
        if match and match["recipe"] == name and can_go_on(path):
            found.append((match["stamp"], int(match["number"] or 1), path))
    if not found:
        raise UsageError(
            f"--resume: there is no run of recipe {name} with a checkpoint under {RUNS}/; name it with --resume RUN"
        )
    return max(found)[-1]


def recipe_of(run: Path) -> Recipe:
    """The recipe that the run goes on by: that of its newest checkpoint, whose hash is known.

    While its teacher is trained a run has no checkpoint; then it is the one in recipe.yaml. Raises UsageError where
    there is nothing to go on from, and for a recipe of another version of fastdeit.
    """
    state = _newest_state(run)
    if state is None:
        if not can_go_on(run):
            way = "; it is a fork that trained its teacher: give its first command again" if _has_teacher(run) else ""
            way = f"; begin it again with {command(run)}" if (run / RECIPE).is_file() else way
            raise UsageError(f"{run} has no checkpoint to go on from{way}")
        return written_recipe(run)
    return checked_recipe(state["recipe"], run / CHECKPOINTS)


def _newest_state(run: Path) -> dict[str, Any] | None:
    root = run / CHECKPOINTS
    plain = checkpoint.newest_state(root)
    return None if plain is None else checked(plain, root)


def written_recipe(run: Path) -> Recipe:
    """The recipe in recipe.yaml of the run, under its own name.

    Raises RecipeError where it cannot be read, `plugins.Untrusted` for code that only the run names.
    """
    return as_it_was_called(run, recipes.load(str(run / RECIPE), own=False))


def as_it_was_called(run: Path, recipe: Recipe) -> Recipe:
    """`recipe`, read from recipe.yaml of the run, under the name that the run began with."""
    title = re.match(r"# The recipe (\S+),", (run / RECIPE).read_text())
    return recipe.model_copy(update={"name": title[1] if title else run.name})


def checked_recipe(plain: Mapping[str, Any], where: Path) -> Recipe:
    """The recipe in the state of a checkpoint at `where`.

    Raises UsageError if this version of fastdeit has no such, `plugins.Untrusted` for code that only the checkpoint
    names.
    """
    plugins.read_from(where, plain)
    try:
        return recipes.Recipe.model_validate(plain)
    except ValidationError as error:
        first = error.errors()[0]
        what = ": ".join([*filter(None, [".".join(map(str, first["loc"]))]), first["msg"]])
        raise UsageError(
            f"the recipe in {where} is not one of this version of fastdeit: {what}; go on with the version that wrote "
            "it"
        ) from error


def names_code(recipe: Recipe) -> bool:
    """Whether the recipe names code of somebody else, so that a run of it goes on with `--trust` alone."""
    named = [recipe.model.name, recipe.method.use, recipe.optim.name, recipe.data.source]
    named += [teacher.model for teacher in recipe.method.teachers()]
    files = [teacher.recipe for teacher in recipe.method.teachers() if teacher.recipe not in (None, *recipes.names())]
    return bool(files) or any(name is not None and ":" in name for name in named)


def command(
    run: Path, *overrides: str, verb: str = "--resume", world: "World | None" = None, trust: bool = False
) -> str:
    """The command that goes on with `run`, on as many processes as `world` has; `trust` as of `names_code`.

    A run that has a recipe and no checkpoint begins again, in its directory and by the recipe there, which the user
    names: so it needs no trust.
    """
    words = ["fastdeit", "train", verb, str(run), *overrides, *(["--trust"] if trust else [])]
    if verb == "--resume" and (run / RECIPE).is_file() and not can_go_on(run):
        words = ["fastdeit", "train", str(run / RECIPE), *overrides, "--run-dir", str(run), "--resume"]
    size = 1 if world is None else world.size
    if size > 1 and os.environ.get("LOCAL_WORLD_SIZE", str(size)) == str(size):
        words += ["--nproc", str(size)]
    elsewhere = size > 1 and "--nproc" not in words
    return f"`{shlex.join(words)}`" + (" under the launcher of this run" if elsewhere else "")


@dataclass(frozen=True)
class Again:
    """`again(*overrides)` is the `command` that goes on with `run` on the processes of `world`."""

    run: Path
    world: "World"
    trust: bool

    def __call__(self, *overrides: str) -> str:
        return command(self.run, *overrides, world=self.world, trust=self.trust)

    def way(self, *overrides: str) -> str:
        """What to do after a failure, in words."""
        if can_go_on(self.run):
            return f"go on with {self(*overrides)}"
        there = f"begin it again with {self(*overrides)}" if _is_worth_keeping(self.run) else "start it again"
        return f"{there}: there is no checkpoint yet"


def write_recipe(run: Path, recipe: Recipe) -> None:
    """Write recipe.yaml for people to read."""
    disk.replace_text(run / RECIPE, _TITLE.format(name=recipe.name) + recipes.dump(recipe))


def set_aside(path: Path) -> Path | None:
    """Rename a file out of the way, metrics.jsonl to metrics-1.jsonl; None where it is empty or there is none."""
    if not path.exists() or path.stat().st_size == 0:
        return None
    free = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(1))
    return path.rename(next(name for name in free if not name.exists()))


def check_space(run: Path | None, checkpoint_bytes: int, world: "World", *, keep: int) -> None:
    """Raise UsageError, on every process, where the disk has no room for the checkpoints that a run is going to have.

    These are the newest `keep`, the best, and a new one before the oldest is removed; less those that are there. `run`
    need not exist yet; None is a new directory under runs/.
    """
    checkpoints = max(1, keep + 2 - (0 if run is None else len(checkpoint.steps(run / CHECKPOINTS))))
    where = next(path for path in ((run or RUNS).absolute(), *(run or RUNS).absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(where).free, checkpoints * checkpoint_bytes
    if world.same(free < needed):
        raise UsageError(
            f"{where} has {free / 1e9:.3g} GB free, and {checkpoints} checkpoints of this run need {needed / 1e9:.3g} "
            "GB; make room, or choose another disk with --run-dir"
        )


# ---- ownership -------------------------------------------------------------------------------------------------------


@contextmanager
def claim(
    given: Path | None, name: str, world: "World", say: Callable[[str], None], *, resume: bool = False
) -> Iterator[Path]:
    """The directory of a run of the recipe `name`, owned by this run for the time of the block.

    That is `given`, or a new one under runs/ with the time in its name. The main process makes and locks it. If the
    block fails before the run has done anything worth keeping, what is new in it goes, and so does the directory.
    Raises UsageError on every process where it cannot be made, another process owns it, or it holds a run already that
    is not to be resumed; FastdeitError where the disk is full or broken.
    """
    with ExitStack() as stack:
        path = failure = None
        if world.main:
            try:
                path = stack.enter_context(_owned(given, name, say, resume))
            except UsageError as error:
                failure = error
            except checkpoint.CheckpointError as error:
                failure = FastdeitError(str(error))
            except OSError as error:
                failure = _unusable(given, error)
        path, failure = world.same((path, failure))
        if failure is not None:
            raise failure
        yield path


@contextmanager
def _owned(given: Path | None, name: str, say: Callable[[str], None], resume: bool) -> Iterator[Path]:
    path, made = _dated(name) if given is None else (given, _make(given))
    try:
        _refuse_links(path)
        with locked(path, say):
            if not resume:
                _refuse_run(path)
            with _emptied_on_failure(path):
                disk.make_directory(path / CHECKPOINTS)
                checkpoint.sweep(path / CHECKPOINTS)
                yield path
    finally:
        for directory in reversed(made):
            with suppress(OSError):  # it is not empty: the run is in it
                directory.rmdir()


def _refuse_links(path: Path) -> None:
    """Raise UsageError where a file that a run writes is a link, or no file: a run that somebody else has made would
    lead what this one writes to another place. `checkpoints` may be a link to a folder on another disk; where that is
    not mounted, the run would begin anew, and end at its first checkpoint."""
    checkpoints = path / CHECKPOINTS
    if os.path.lexists(checkpoints) and not checkpoints.is_dir():
        raise UsageError(
            f"{checkpoints} is no folder, or a link that leads to none; mount its disk, or choose another --run-dir"
        )
    for name in sorted(os.listdir(path)):
        written, known = name.removeprefix(".tmp-"), True
        with suppress(FileNotFoundError):  # it was that of a process that has just ended
            kind = (path / name).lstat().st_mode
            is_folder = _FOLDERS.fullmatch(written) is not None
            known = stat.S_ISDIR(kind) if is_folder else stat.S_ISREG(kind) or written not in _WRITTEN
        if not known:
            raise UsageError(
                f"{path / name} is a link, or not what a run has under this name, and a run would write there; "
                "remove it, or choose another --run-dir"
            )


def check_free(given: Path | None, *, resume: bool) -> None:
    """Raise UsageError where `claim` would: as far as that can be known without writing anything."""
    path = (given or RUNS).absolute()
    there = next(each for each in (path, *path.parents) if each.exists())
    if not there.is_dir():
        raise _unusable(given, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    if not os.access(there, os.W_OK | os.X_OK):
        raise _unusable(given, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    if given is not None:
        if given.is_dir():
            _refuse_links(given)
        refuse_owned(given)
        if not resume:
            _refuse_run(given)
        elif (given / METRICS).is_file():
            metrics.check_size(given / METRICS)


def _refuse_run(path: Path) -> None:
    if (path / METRICS).exists() or has_checkpoint(path):
        raise UsageError(f"{path} already holds a run; go on with {command(path)}, or choose another --run-dir")


def _unusable(given: Path | None, error: OSError) -> FastdeitError:
    return (FastdeitError if disk.refuses(error) else UsageError)(
        f"{given or RUNS}: the run directory cannot be made or written to: {error.strerror}; {disk.way_out(error)}, or "
        "choose another --run-dir"
    )


def dated_name(name: str) -> Path:
    """The directory under runs/ of a run of the recipe `name` that begins now, unless another has it already."""
    return RUNS / f"{datetime.now():%Y-%m-%d_%H%M%S}_{name}"


def _dated(name: str) -> tuple[Path, list[Path]]:
    """A new directory under runs/, and the directories that were made for it. Two starts in a second get two."""
    made = _make(RUNS)
    path = dated_name(name)
    stamp = path.name.removesuffix(f"_{name}")
    numbers = count(2)
    while True:
        try:
            path.mkdir()
            disk.sync(RUNS)
        except FileExistsError:
            path = RUNS / f"{stamp}-{next(numbers)}_{name}"
        else:
            return path, [*made, path]


def _make(path: Path) -> list[Path]:
    """Make `path` and its parents; returns those that this call has made, the outermost first."""
    made = []
    for directory in reversed((path, *path.parents)):
        if not directory.exists():
            with suppress(FileExistsError):
                directory.mkdir()
                made.append(directory)
                disk.sync(directory.parent)
    return made


@contextmanager
def _emptied_on_failure(path: Path) -> Iterator[None]:
    """If the block fails and nothing of a run is worth keeping, remove what it has put into `path`."""
    before = set(os.listdir(path))
    try:
        yield
    except BaseException:
        of_a_run = {CHECKPOINTS, RECIPE, METRICS} | set(filter(_TEACHER.fullmatch, before))
        if before.isdisjoint(of_a_run) and not _is_worth_keeping(path):
            for name in set(os.listdir(path)) - before:
                new = path / name
                if new.is_dir() and not new.is_symlink():
                    shutil.rmtree(new, ignore_errors=True)
                    continue
                with suppress(OSError):  # the failure that is under way is the one to be told
                    new.unlink()
        raise


def _is_worth_keeping(path: Path) -> bool:
    log = path / METRICS
    logged = log.exists() and any(record["step"] > 0 for record in metrics.read(log))
    return logged or has_checkpoint(path) or _has_teacher(path)
