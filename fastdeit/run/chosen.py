"""Which checkpoint an address of a run means. No torch is imported, so a mistake in an address is said at once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdeit import plugins
from fastdeit.engine import checkpoint
from fastdeit.engine.checkpoint import Checkpoint, CheckpointError
from fastdeit.errors import UsageError, naming
from fastdeit.recipe import resolve as recipes
from fastdeit.run import bare, directory
from fastdeit.run.address import Address, parse


def chosen(address: Address, tensors: bool = True) -> tuple[Checkpoint, list[str]]:
    """(the checkpoint that the address of a run or of a checkpoint means, what is to be said of the choice).

    That is the one that is named, or the newest that verifies. `tensors` as of `engine.checkpoint.load`. Raises
    UsageError where there is none, and where the one that is named is damaged.
    """
    notes: list[str] = []
    with naming(address, CheckpointError):
        if address.kind == "checkpoint":
            return checkpoint.load(address.path, tensors), notes
        root = address.path / directory.CHECKPOINTS
        if not checkpoint.steps(root):
            raise UsageError(f"{address}: the run has no checkpoint yet")
        if address.step is not None:
            return _of_step(address, root, address.step, tensors), notes

        def damaged(path: Path, why: str) -> None:
            notes.append(f"skipped {path}, which is damaged: {why}")

        found = checkpoint.newest(root, damaged, tensors)
        if address.best:
            step, told = _best(address, state_of(address, found, "record"))
            notes += told
            found = found if found.step == step else _of_step(address, root, step, tensors)
    return found, notes


def check(text: str, overrides: Sequence[str], model: str | None = None) -> None:
    """Raise UsageError or RecipeError for a mistake in the address `text`, in the `model` that a bare file is said to
    be of, or in overrides of the recipe of the run, or of that of a bare file.

    Mistakes that only the tensors or timm tell are found later.
    """
    address = parse(text)
    if model is not None:
        with naming(f"--model {model}", ValueError):
            bare.split(model)
    if address.kind in ("safetensors", "pickle", "timm"):
        recipes.override(bare.stand_in(), overrides)
    if address.kind == "run" and checkpoint.steps(address.path / directory.CHECKPOINTS):
        recipes.override(recipes.to_evaluate(directory.recipe_of(address.path)), overrides)


def state_of(address: Address, found: Checkpoint, part: str) -> dict[str, Any]:
    """A part of the state that `fastdeit train` saves: recipe, identity, record. Raises UsageError without it."""
    state = found.state.get(part)
    if not isinstance(state, dict):
        raise UsageError(f"{address}: {found.path} is no checkpoint of `fastdeit train`: its manifest has no {part}")
    plugins.read_from(found.path, state)
    return state


def place_of(found: Checkpoint) -> Path:
    """The run that the checkpoint lies in, or itself where it was taken out of one."""
    return found.path.parent.parent if found.path.parent.name == directory.CHECKPOINTS else found.path


def _of_step(address: Address, root: Path, step: int, tensors: bool) -> Checkpoint:
    steps = checkpoint.steps(root)
    if step not in steps:
        there = ", ".join(map(str, steps))
        raise UsageError(f"{address}: there is no checkpoint of step {step}; there are those of the steps {there}")
    return checkpoint.load(root / f"step_{step:08d}", tensors)


def _best(address: Address, record: Mapping[str, Any]) -> tuple[int, list[str]]:
    """(the step of the best evaluation, what is to be said of it)."""
    step, metric = record.get("best_step"), record.get("best_by")
    if not step:
        raise UsageError(f"{address}: the run has no evaluation yet by which a best could be chosen; leave out @best")
    if str(metric).endswith("_ema") and not address.ema:
        return step, [f"the best {metric} is that of the averaged weights, which @best,ema gives"]
    return step, []
