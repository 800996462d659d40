"""What the words of a measurement name. Importing this module imports no torch, so that a mistake is said at once."""

import argparse
from pathlib import Path

from fastdeit.errors import UsageError
from fastdeit.models import names
from fastdeit.recipe import resolve

SETS = (
    *("data.root", "data.source", "data.train", "data.val", "data.repeats", "data.threads", "data.group_size"),
    *("data.size_schedule", "train.batch_size", "train.accumulate"),
)
"""Fields of a recipe that every measurement of input sets itself (`data.py`), and that no override may name."""


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for a `--model` that we do not have, for an override of what the benchmark sets itself, and for
    rows that cannot be appended to the file `--out`; RecipeError for what is wrong with the recipe."""
    if "recipe" in args:
        own = (*SETS, "model.image_size") if args.what == "train" else SETS
        for field in (override.partition("=")[0] for override in args.overrides):
            if field in own:
                raise UsageError(f"{field} is set by the benchmark (by flags: --batch, --threads)")
        resolve.load(args.recipe, args.overrides)
    given = getattr(args, "model", None) or []
    try:
        for name in [given] if isinstance(given, str) else given:
            names.check(name)
    except ValueError as error:
        raise UsageError(f"--model: {error}") from error
    check_out(getattr(args, "out", None))


def check_out(out: str | None) -> None:
    """UsageError, before anything is measured, where rows cannot be appended to the file `out`."""
    if out is None:
        return
    path = Path(out)
    existed = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror}") from error
    if not existed:
        path.unlink()
