"""The rows of an experiment, DIR/NAME.jsonl: one for every variant and seed that has been trained to its end."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fastdeit import jsons
from fastdeit.errors import UsageError
from fastdeit.experiments.experiment import Experiment, Variant


@dataclass(frozen=True)
class Row:
    """What came of one training.

    overrides  of the variant, then those of the command
    facts      sizes: parameters, images, steps, batch_size
    """

    variant: str
    seed: int
    overrides: tuple[str, ...]
    metrics: Mapping[str, float]
    facts: Mapping[str, int] = field(default_factory=dict)


def read(path: Path) -> list[Row]:
    """The rows of a file, in their order; none where there is no file. A line that was cut off is left out, any other
    that is no row raises UsageError."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1].splitlines()  # a killed process may have written half a line
    try:
        plain = [jsons.parsed(line) for line in whole]
        return [Row(**{**each, "overrides": tuple(each["overrides"])}) for each in plain]
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"{path} is no file of rows of an experiment ({error}); delete it or give another --out"
        ) from error


def append(path: Path, row: Row) -> None:
    """Add a row at the end of the file, behind the last whole line."""
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    with open(path, "r+" if path.exists() else "w") as file:
        file.seek(len(whole.encode()))
        file.truncate()
        file.write(json.dumps(asdict(row)) + "\n")


def check(path: Path, found: Sequence[Row], experiment: Experiment, overrides: Sequence[str]) -> None:
    """Raise UsageError where the rows are of other variants or other overrides than those that are asked for now."""
    variants = {each.name: each for each in experiment.variants}
    for row in found:
        expected = settings(variants[row.variant], overrides) if row.variant in variants else None
        if row.overrides != expected:
            why = f"the row of variant {row.variant}, seed {row.seed} was trained with {' '.join(row.overrides)}"
            now = "there is no such variant now" if expected is None else f"now it would be {' '.join(expected)}"
            raise UsageError(f"{path}: {why}; {now}. Give another --out, or delete the file")


def settings(variant: Variant, overrides: Sequence[str]) -> tuple[str, ...]:
    """What a row of the variant has as its overrides."""
    return (*variant.overrides, *overrides)
