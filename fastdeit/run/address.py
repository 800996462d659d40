"""One address for weights, in every verb and in every field of a recipe.

    RUN                      a run directory: its newest checkpoint that verifies
    RUN@best                 the checkpoint of its best evaluation
    RUN@step=1250            the checkpoint of that step
    RUN@ema, RUN@best,ema    the average of the weights instead of the weights
    CHECKPOINT, CHECKPOINT@ema   a directory step_00001250 of a run
    FILE.safetensors
    FILE.pth, FILE.pth@ENTRY     what torch.save wrote, and which of its entries to take (models/pickled.py)
    timm:NAME                the weights that timm publishes for its model NAME

This module reads the words and looks at the file system, nothing more. It imports no torch.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastdeit.errors import UsageError
from fastdeit.text import did_you_mean

FORMS = (
    "RUN, RUN@best, RUN@ema, RUN@step=1250, RUN@best,ema, a checkpoint directory, FILE.safetensors, "
    "FILE.pth (also .pt, .bin, .ckpt, .pth.tar; FILE.pth@ENTRY chooses an entry), or timm:NAME"
)
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pth.tar")
"""Endings of the files that `torch.save` writes."""

_STEP = re.compile(r"step=(\d{1,8})")


@dataclass(frozen=True)
class Address:
    """An address in its parts.

    text   as it was given, for messages
    kind   what is addressed
    path   of the run, checkpoint or file; None for timm
    name   of the timm model, else None
    step   of the checkpoint that was asked for, of a run; None for the newest, or the best
    best   the checkpoint of the best evaluation, of a run
    ema    the average of the weights, of a run or a checkpoint
    entry  dotted name of the entry of a pickled file; None for the one that `models.pickled` chooses
    """

    text: str
    kind: Literal["run", "checkpoint", "safetensors", "pickle", "timm"]
    path: Path | None = None
    name: str | None = None
    step: int | None = None
    best: bool = False
    ema: bool = False
    entry: str | None = None

    def __str__(self) -> str:
        return self.text


def parse(text: str) -> Address:
    """The address that `text` says. `~` is expanded, and a path that has an `@` in its name is found.

    Raises UsageError, with the address and what to write instead, for a form that does not exist, for a path where
    nothing is, and for something that holds no weights.
    """
    if text.startswith("timm:"):
        return _timm(text)
    try:
        path, selector = _split(text)
        if not path.exists():
            raise UsageError(f"{text}: {_nothing_there(path)}")
        return (_directory if path.is_dir() else _file)(text, path, selector)
    except (OSError, RuntimeError) as error:  # no permission, too long a name; a home directory that nobody has
        raise UsageError(f"{text}: it cannot be looked for: {getattr(error, 'strerror', None) or error}") from error


def is_address(word: str) -> bool:
    """Whether `word` can only be meant as an address, where the name or the file of a recipe could stand, too."""
    ending = word.rpartition("@")[0] or word
    return word.startswith("timm:") or ending.endswith((".safetensors", *PICKLES)) or _is_directory(ending)


def _is_directory(path: str) -> bool:
    try:
        return Path(path).expanduser().is_dir()
    except (OSError, RuntimeError):  # RuntimeError: a home directory that nobody has
        return False


def _timm(text: str) -> Address:
    name, at, selector = text.removeprefix("timm:").partition("@")
    if not name:
        raise UsageError(f"{text}: name a model of timm, as in timm:deit_tiny_patch16_224")
    if at:
        raise UsageError(f"{text}: timm's models have one set of weights; leave out @{selector}")
    return Address(text, "timm", name=name)


def _split(text: str) -> tuple[Path, str | None]:
    """(path, what stands behind the last `@`): None where there is none, or where the `@` belongs to the path."""
    whole = Path(text).expanduser()
    before, at, after = text.rpartition("@")
    if not at or not before or "/" in after or whole.exists():
        return whole, None
    return Path(before).expanduser(), after


def _nothing_there(path: Path) -> str:
    folder = path.parent
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    there = "" if folder.is_dir() else f"; there is no {folder} either"
    return f"there is no {path}{did_you_mean(path.name, names) or f'{there}; weights are addressed as {FORMS}'}"


def _directory(text: str, path: Path, selector: str | None) -> Address:
    if (path / "manifest.json").exists():
        if selector not in (None, "ema"):
            raise UsageError(f"{text}: a checkpoint takes only @ema, not @{selector}; a run takes @best and @step=")
        return Address(text, "checkpoint", path, ema=selector == "ema")
    if not (path / "checkpoints").is_dir():
        why = "is neither a run (it has no checkpoints/) nor a checkpoint"
        if path.name.startswith("step_"):
            why = "has no manifest.json, so it is no whole checkpoint"
        files = sorted(entry.name for entry in path.iterdir() if entry.name.endswith((".safetensors", *PICKLES)))
        way_out = f"its file {path / files[0]} can be addressed" if files else f"weights are addressed as {FORMS}"
        raise UsageError(f"{text}: the directory {path} {why}; {way_out}")
    return Address(text, "run", path, **_of_run(text, selector))


def _of_run(text: str, selector: str | None) -> dict[str, int | bool | None]:
    """The selectors of a run: at most one of best and step=N, and ema."""
    chosen: dict[str, int | bool | None] = {}
    for word in [] if selector is None else selector.split(","):
        match = _STEP.fullmatch(word)
        key, value = ("step", int(match[1])) if match else (word, True)
        if key not in ("best", "ema", "step") or (key == "step" and match is None):
            hint = did_you_mean(word, ("best", "ema", "step=1250"))
            raise UsageError(f"{text}: @{word} says nothing of a run{hint or '; there are @best, @ema and @step=1250'}")
        if key in chosen:
            raise UsageError(f"{text}: {key} stands there twice")
        chosen[key] = value
    if "best" in chosen and "step" in chosen:
        raise UsageError(f"{text}: best and step each name a checkpoint; give one of them")
    return chosen


def _file(text: str, path: Path, selector: str | None) -> Address:
    if path.name.endswith(".safetensors"):
        if selector is not None:
            raise UsageError(
                f"{text}: a safetensors file holds one set of weights; leave out @{selector}. The average of a run is "
                "addressed through the run, as in runs/x@ema"
            )
        return Address(text, "safetensors", path)
    if path.name.endswith(PICKLES):
        if selector == "":
            raise UsageError(f"{text}: name an entry behind the @, as in {path.name}@model_ema")
        return Address(text, "pickle", path, entry=selector)
    raise UsageError(f"{text}: {path.name} does not look like weights; they are addressed as {FORMS}")
