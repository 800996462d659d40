"""What `fastdeit train` is asked for: a new run, one to go on with, or a fork.

```
fastdeit train [RECIPE] [section.field=value ...] [--run-dir DIR]     a new run
fastdeit train --resume RUN [section.field=value ...]                 go on with RUN, by its own recipe
fastdeit train RECIPE --resume                                        go on with the newest of RECIPE under runs/
fastdeit train [RECIPE] --run-dir DIR --resume                        go on with DIR; with a RECIPE, or begin there
fastdeit train --from ADDRESS [section.field=value ...]               a new run that begins where another stood
```
"""

import argparse
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from fastdeit.errors import UsageError
from fastdeit.recipe import resolve as recipes
from fastdeit.recipe.length import left_open
from fastdeit.recipe.resolve import Recipe
from fastdeit.run import directory, fork
from fastdeit.run.identity import refuse_other_run


@dataclass(frozen=True)
class Request:
    """A command, read.

    recipe   with the overrides of the command
    run_dir  where the run is, or is to be; None for a new directory under runs/
    resume   whether to go on with what is there
    origin   the checkpoint that a fork begins with
    """

    recipe: Recipe
    run_dir: Path | None = None
    resume: bool = False
    origin: fork.Origin | None = None

    @property
    def goes_on(self) -> bool:
        """Whether there are weights of a run already, so that what the recipe begins with need not be there."""
        return self.origin is not None or (self.resume and directory.has_checkpoint(self.run_dir))


def read(args: argparse.Namespace, say: Callable[[str], None]) -> Request:
    """The request that the arguments of `fastdeit train` make, checked as far as it can be without the data.

    `args.resume` is None without the flag, "" for the flag alone, else the run that is named.
    Raises UsageError or RecipeError where that is no request, or not one that can be carried out.
    """
    given = None if args.run_dir is None else Path(args.run_dir).expanduser()
    if args.origin is not None:
        return _fork(args, given, say)
    if args.resume is None:
        return Request(recipes.load(args.recipe, args.overrides), given)
    if args.resume:
        if given is not None:
            raise UsageError(f"--resume {args.resume} says which run; leave out --run-dir {args.run_dir}")
        _no_recipe(args, f"--resume {args.resume}")
        return _resume(Path(args.resume).expanduser(), args)
    if given is None:
        # Which of all runs is meant, a bare `--resume` says by the recipe.
        return _resume(directory.newest(recipes.load(args.recipe, args.overrides).name), args)
    if args.named and not directory.can_go_on(given):
        recipe = recipes.load(args.recipe, args.overrides)
        if Path(args.recipe).expanduser() == given / directory.RECIPE:
            recipe = directory.as_it_was_called(given, recipe)
        return Request(recipe, given, resume=True)
    return _resume(given, args)


def restart(args: argparse.Namespace, run: Path) -> None:
    """Change the arguments of a command into those that go on with `run`, which it began before it failed.

    Before its first checkpoint there is nothing to go on from; then it begins there once more, and a fork as told.
    The run's own recipe counts, as it is that of the command.
    """
    goes_on = directory.can_go_on(run)
    if not goes_on and args.origin is not None:
        return
    if goes_on and args.named:
        recipes.load(args.recipe, args.overrides)  # what the user's own recipe names may be executed
    args.resume, args.run_dir, args.origin = "", str(run), None
    args.named = None if goes_on else args.recipe


def _resume(run: Path, args: argparse.Namespace) -> Request:
    """Go on with `run`; a recipe that is named must be the one of the run."""
    if not run.is_dir():
        raise UsageError(f"--resume: there is no run {run}; give a directory that has {directory.CHECKPOINTS}/")
    if (run / "manifest.json").exists():
        at = f"--from {run}"
        raise UsageError(
            f"--resume: {run} is one checkpoint; a run goes on from its newest: --resume {run.parent.parent}. To go on "
            f"from this one, in a new run: {at}"
        )
    given = recipes.load(args.recipe, args.overrides) if args.named else None  # first: what it names may be executed
    before = directory.recipe_of(run)
    recipe = recipes.override(before, args.overrides) if given is None else given_again(given, before)
    # What the recipe leaves to the size of the data set is compared when that is known (`Saver.restore`).
    later = left_open(recipe)
    refuse_other_run(run, [change for change in recipes.difference(before, recipe) if change[0] not in later])
    return Request(recipe, run, resume=True)


def given_again(recipe: Recipe, before: Recipe) -> Recipe:
    """`recipe`, which is given again to go on with a run by the recipe `before`: with the run's name, and its threads
    if none are given, as its results depend on them. What it leaves to be chosen is what the run has chosen, but for
    what other settings of it exclude, such as kept activations beside `checkpoint_blocks`: that is chosen anew."""
    engine = recipe.engine.model_copy(update={"threads": recipe.engine.threads or before.engine.threads})
    for name in ("capture", "keep_activations", "precision"):
        if getattr(engine, name) == "auto":
            with suppress(ValidationError):
                engine = type(engine).model_validate(engine.model_dump() | {name: getattr(before.engine, name)})
    return recipe.model_copy(update={"name": before.name, "engine": engine})


def _fork(args: argparse.Namespace, given: Path | None, say: Callable[[str], None]) -> Request:
    if args.resume is not None:
        raise UsageError("--from begins a new run and --resume goes on with one; give one of the two")
    _no_recipe(args, f"--from {args.origin}")
    origin = fork.opened(args.origin, say)
    return Request(recipes.override(origin.recipe, args.overrides), given, origin=origin)


def _no_recipe(args: argparse.Namespace, flag: str) -> None:
    if args.named:
        raise UsageError(f"{flag} takes the recipe from the run; leave out {args.recipe}")
