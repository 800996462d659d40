"""Accuracy on ImageNet of the weights that timm publishes: the table that `fastdeit published` compares with.

`published.csv` has it. Its numbers are timm's own evaluation (results/results-imagenet.csv of pytorch-image-models at
aa4b5850), because papers leave out the crop, which moves the top-1 accuracy of DeiT by 0.2. Importing this module
imports no torch.
"""

import csv
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from pydantic import TypeAdapter

from fastdeit.errors import UsageError
from fastdeit.recipe.config import DataSplits
from fastdeit.text import did_you_mean


@dataclass(frozen=True)
class Published:
    """What one set of weights reaches on the 50,000 images of ImageNet's validation.

    model       timm's name, with the tag of the weights
    image_size  pixels of a side
    crop_ratio  of the centre crop; the resize is bicubic
    top1, top5  in per cent
    """

    model: str
    image_size: int
    crop_ratio: float
    top1: float
    top5: float


def published(patterns: Sequence[str] = ()) -> list[Published]:
    """The rows of the models whose names fit one of the patterns, such as `deit3*`, in the table's order; all without.

    A name without a tag stands for all tags, and one may begin with `timm:`, as an address of weights does. Raises
    ValueError for a pattern that fits no model.
    """
    rows, patterns = _table(), [pattern.removeprefix("timm:") for pattern in patterns]
    for pattern in patterns:
        if not any(_fits(row, pattern) for row in rows):
            known = dict.fromkeys(name for row in rows for name in (row.model, row.model.partition(".")[0]))
            hint = did_you_mean(pattern, known)
            there_are = "; `fastdeit published` lists those that are"
            raise ValueError(f"no published accuracy of {pattern!r} is known here{hint or there_are}")
    return [row for row in rows if not patterns or any(_fits(row, pattern) for pattern in patterns)]


def check_overrides(overrides: Sequence[str]) -> None:
    """Raise UsageError for an override of what is as published, or of what an evaluation does not ask."""
    free = {"threads", "max_bad_fraction", *DataSplits.model_fields}
    for text in overrides:
        section, _, field = text.partition("=")[0].partition(".")
        if section != "engine" and not (section == "data" and field in free):
            raise UsageError(
                f"{text}: a published number has its own model, size, crop and normalisation; only fields of engine: "
                f"and data.{', data.'.join(sorted(free))} can be set"
            )


def listing(rows: Sequence[Published]) -> str:
    """The rows as a table to read."""
    lines = [f"{'':44}  pixels   crop    top-1    top-5"]
    for row in rows:
        shown = f"{row.image_size:6}  {row.crop_ratio:5g}"
        lines.append(f"{row.model:44}  {shown}  {row.top1:5.2f} %  {row.top5:5.2f} %")
    return "\n".join(lines)


def _fits(row: Published, pattern: str) -> bool:
    return fnmatch.fnmatchcase(row.model, pattern) or fnmatch.fnmatchcase(row.model.partition(".")[0], pattern)


def _table() -> list[Published]:
    with resources.files(__package__).joinpath("published.csv").open(encoding="utf-8", newline="") as lines:
        return TypeAdapter(list[Published]).validate_python(list(csv.DictReader(lines)))
