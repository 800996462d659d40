"""What a run directory says of itself, without its weights: recipe, how far it is, its best, its state.

Everything is read from small files, so that hundreds of runs are listed at once. No torch is imported.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastdeit import files, jsons
from fastdeit.engine import metrics
from fastdeit.errors import UsageError
from fastdeit.recipe.yaml import Problems, Reader, plain
from fastdeit.run import lock
from fastdeit.text import did_you_mean

RUNS = Path("runs")
_log = logging.getLogger(__name__)
LOG, SUMMARY, RECIPE = "metrics.jsonl", "summary.json", "recipe.yaml"
ENVIRONMENT = "environment.json"

State = Literal["finished", "running", "interrupted"]


@dataclass(frozen=True)
class Overview:
    """A run as its files describe it.

    recipe    its fields as recipe.yaml has them; empty where that cannot be read
    records   of metrics.jsonl, in the order of writing
    summary   of the last evaluation, or empty
    state     running: a process holds its lock; finished: it came to its end; interrupted: neither
    seconds   since something was last written
    """

    path: Path
    recipe: Mapping[str, Any]
    records: tuple[Mapping[str, Any], ...]
    summary: Mapping[str, Any]
    state: State
    seconds: float

    @property
    def environment(self) -> dict[str, Any]:
        """What the run ran on, as environment.json has it; empty where that cannot be read."""
        return _json(self.path / ENVIRONMENT)

    @property
    def step(self) -> int:
        """The last step that something was logged of."""
        return max((record["step"] for record in self.records), default=0)

    @property
    def epoch(self) -> float:
        """The same in epochs, which may have a fraction."""
        return max((record.get("epoch", 0.0) for record in self.records), default=0.0)

    @property
    def epochs(self) -> float | None:
        """Epochs of the whole run; None where the recipe cannot be read or has `train.steps`."""
        return self._length("epochs")

    @property
    def steps(self) -> int | None:
        """`train.steps`, where that is the length of the run."""
        return self._length("steps")

    @property
    def model(self) -> str:
        """The name of the network in the recipe; "?" where that cannot be read."""
        model = _mapping(self.recipe.get("model"))
        return str(model.get("timm") or model.get("name") or "?")

    def _length(self, field: str) -> Any:
        value = _mapping(self.recipe.get("train")).get(field)
        return value if jsons.is_number(value) else None

    @property
    def metrics(self) -> dict[str, float]:
        """What the last evaluation measured, by name."""
        last = next((record for record in reversed(self.records) if record.get("kind") == "eval"), {})
        numbers = {name: value for name, value in last.items() if jsons.is_number(value)}
        return {name: value for name, value in numbers.items() if name not in metrics.NOT_MEASURED}

    @property
    def best(self) -> tuple[str, float] | None:
        """Name and best value of the metric that the run is judged by; None before its first evaluation."""
        value = self.summary.get("best")
        return (str(self.summary.get("best_by")), value) if jsons.is_number(value) else None


_LARGEST_RECIPE = 1 << 20  # bytes; ours have some thousand


def is_run(path: Path) -> bool:
    """Whether the directory `path` is that of a run."""
    return (path / LOG).is_file() or (path / RECIPE).is_file()


def find(name: str) -> Path:
    """The run directory `name`, or that of the name in runs/. Raises UsageError where there is none."""
    for path in (Path(name), RUNS / name):
        if is_run(path):
            return path
    there = [path.name for path in RUNS.iterdir()] if RUNS.is_dir() else []
    path = Path(name)
    why = "is no run: it has neither recipe.yaml nor metrics.jsonl" if path.exists() else "does not exist"
    raise UsageError(f"{name} {why}{did_you_mean(path.name, there) or '; `fastdeit runs list` shows those in runs/'}")


def read(path: Path) -> Overview:
    """The run in the directory `path`. What is not there or damaged is left empty."""
    log = path / LOG
    try:
        records = tuple(metrics.read(log)) if log.is_file() else ()
        written = max(file.stat().st_mtime for file in (path, log) if file.exists())
    except OSError as error:
        raise UsageError(f"{path}: the run cannot be read: {error.strerror}") from error
    except metrics.MetricsError as error:
        raise UsageError(str(error)) from error
    summary = _json(path / SUMMARY)
    state = "running" if lock.is_held(path) else "finished" if summary.get("finished") else "interrupted"
    return Overview(path, _recipe(path / RECIPE), records, summary, state, time.time() - written)


def all_in(folder: Path) -> Iterator[Overview]:
    """The runs directly in `folder`, the newest first; a warning says which cannot be read. Raises UsageError where
    there is no such folder."""
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}; `fastdeit train` puts runs into {RUNS}/ where it is started")
    found = []
    for path in filter(is_run, folder.iterdir()):
        try:
            found.append(read(path))
        except UsageError as error:
            _log.warning("%s", error)
    yield from sorted(found, key=lambda run: run.seconds)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = jsons.read(path)
    except (OSError, ValueError):
        return {}
    return _mapping(found)


def _mapping(value: Any) -> dict[str, Any]:
    """`value` where it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def _recipe(path: Path) -> dict[str, Any]:
    """Not validated: a run of another version, or with a method that is not installed here, is listed all the same."""
    problems = Problems()
    try:
        found = Reader(files.read(path, _LARGEST_RECIPE).decode(), str(path), problems).document()
    except (OSError, ValueError):
        return {}
    return {} if found is None or problems.found else _mapping(plain(found))
