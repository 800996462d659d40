"""The record of a run: metrics.jsonl, always, and optional sinks that may fail without harm.

metrics.jsonl is append-only JSON lines, each written by one system call, so a kill can tear the last line at most. A
resumed run first drops the records after its checkpoint, so every step is in the file once. NaN and infinities are
written as Python's json module writes them.

Sinks (TensorBoard, Weights & Biases) get the same records. A sink that cannot start is an error at start; one that
fails during the run is reported once and switched off.
"""

import errno
import io
import json
import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from fastdeit import files, jsons
from fastdeit.engine import _fault, disk

LARGEST = 1 << 29
"""Bytes of a metrics.jsonl that is read. A line of each of a million steps has half of that."""
NOT_MEASURED = frozenset({"step", "kind", "epoch", "seconds", "images", "bad_images", "lower_is_better"})
"""Keys of a record of kind "eval" that are no metrics."""
_TOLD = 10  # damaged lines that are named
_log = logging.getLogger(__name__)


class MetricsError(Exception):
    """A metrics record or sink that cannot be used; the message says which and what to do."""


class Sink(Protocol):
    """Somewhere records go besides metrics.jsonl."""

    def write(self, step: int, **values: Any) -> None:
        """Take the record of a step: `MetricsLog.write` gets the same."""

    def close(self) -> None:
        """Send what is still held back; no record comes after."""


# ---- metrics.jsonl -------------------------------------------------------------------------------


class MetricsLog:
    """Appends records to `path`; a line that an earlier process left torn at the end is cut off on opening."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _fault.point(f"open {self.path.name}")
        self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 (open for the life of the log)
        self._cut_torn_line()

    def write(self, step: int, **values: Any) -> None:
        """Append `{"step": step, **values}`; on return the line has left the process.

        Raises MetricsError naming the key if a value is not JSON (a tensor, a numpy array), OSError if the disk fails.
        """
        line = _encode({"step": step, **values})
        start = os.fstat(self._file.fileno()).st_size
        _fault.point(f"write {self.path.name}")
        if self._file.write(line) != len(line):
            # A full disk takes part of a line; the next record must not continue it.
            self._file.truncate(start)
            raise OSError(errno.ENOSPC, "no space left for a line of metrics", str(self.path))

    def truncate(self, step: int, kind: str | None = None) -> None:
        """Drop the records of steps after `step`, which the resumed run will write again, and damaged lines.

        kind  drop those of this kind of `step` itself, too
        """
        kept = [
            line
            for line, record in _records(self.path)
            if record["step"] < step or (record["step"] == step and (kind is None or record.get("kind") != kind))
        ]
        disk.replace(self.path, b"".join(kept))
        self._file.close()
        self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115

    def close(self) -> None:
        """Close the file; no record can be appended after."""
        self._file.close()

    def _cut_torn_line(self) -> None:
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            self._file.truncate(whole)


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl in the order of writing.

    A torn last line, which a kill leaves, is ignored; any other line that is not a record is skipped with a
    warning. Raises MetricsError for a file of more than `LARGEST` bytes, and OSError.
    """
    return [record for _, record in _records(Path(path))]


def check_size(path: Path) -> None:
    """Raise MetricsError where `read` would refuse a file for its size; nothing of it is read."""
    if path.stat().st_size > LARGEST:
        raise _too_large(path)


def _too_large(path: Path) -> MetricsError:
    return MetricsError(
        f"{path} is no log of metrics: it has more than {LARGEST >> 20} MiB; move it away, and the run goes on with a "
        "new one"
    )


def _records(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    records, skipped = [], []
    try:
        data = files.read(path, LARGEST)
    except ValueError as error:
        raise _too_large(path) from error
    for number, line in enumerate(io.BytesIO(data), 1):
        if not line.endswith(b"\n"):
            break
        try:
            record = jsons.parsed(line)
        except ValueError:
            record = None
        if _is_record(record):
            records.append((line, record))
        else:
            skipped.append(number)
    for number in skipped[:_TOLD]:
        _log.warning("%s:%d is not a metrics record; skipped", path, number)
    if len(skipped) > _TOLD:
        _log.warning("%s: %d more lines are none either; skipped", path, len(skipped) - _TOLD)
    return records


def _is_record(record: Any) -> bool:
    """Whether `record` is one of this module's, of which others may rely on these fields."""
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return False
    numbers = [record["step"], *(record[name] for name in ("epoch", "seconds") if name in record)]
    texts = isinstance(record.get("kind", ""), str) and isinstance(record.get("lower_is_better", []), list)
    return texts and all(map(jsons.is_number, numbers))


def _encode(record: dict[str, Any]) -> bytes:
    try:
        return json.dumps(record).encode() + b"\n"
    except (TypeError, ValueError) as error:
        for key, value in record.items():
            try:
                json.dumps(value)
            except (TypeError, ValueError):
                raise MetricsError(
                    f"metric {key!r} is a {type(value).__name__}; metrics are plain numbers, strings, lists and dicts"
                ) from error
        raise


# ---- sinks ---------------------------------------------------------------------------------------


def open_sinks(names: Sequence[str], run_dir: Path, config: Mapping[str, Any], step: int = 0) -> list[Sink]:
    """Sinks by name ("tensorboard", "wandb"), each of them safe to write to for the rest of the run.

    `config` (plain JSON values) is shown with the run where the sink can do so; `step` is the step a resumed run starts
    from. Raises MetricsError for an unknown name, a missing package or a sink that cannot start.
    """
    unknown = sorted(set(names) - set(_SINKS))
    if unknown:
        raise MetricsError(f"unknown metrics sink {unknown[0]!r}; known are {', '.join(sorted(_SINKS))}")
    sinks: list[Sink] = []
    for name in names:
        try:
            sinks.append(Tolerant(name, _SINKS[name](Path(run_dir), config, step)))
        except ImportError as error:
            raise MetricsError(
                f"metrics sink {name!r} needs a package that is not installed ({error}): pip install 'fastdeit[{name}]'"
            ) from error
        except Exception as error:
            # Whatever a third party's client raises at start (no network, no account), the user can act on it now.
            raise MetricsError(f"metrics sink {name!r} could not start: {error}") from error
    return sinks


def check_sinks(names: Sequence[str]) -> None:
    """Raise MetricsError, with what to install, for a sink whose package is missing; nothing is imported."""
    for name in names:
        if find_spec(name) is None:
            raise MetricsError(
                f"engine.sinks: {name} needs a package that is not installed: pip install 'fastdeit[{name}]'"
            )


class Tolerant(Sink):
    """A sink whose first failure is reported and whose later records are dropped: a chart never costs a run."""

    def __init__(self, name: str, sink: Sink) -> None:
        self.name = name
        self.sink: Sink | None = sink

    def write(self, step: int, **values: Any) -> None:
        self._attempt(lambda sink: sink.write(step, **values))

    def close(self) -> None:
        self._attempt(lambda sink: sink.close())
        self.sink = None

    def _attempt(self, action: Callable[[Sink], None]) -> None:
        if self.sink is None:
            return
        try:
            action(self.sink)
        except Exception as error:
            self.sink = None
            _log.warning(
                "metrics sink %s failed and is off for the rest of this run (%s: %s); metrics.jsonl goes on",
                self.name,
                type(error).__name__,
                error,
            )


class TensorBoardSink(Sink):
    """Scalars under `run_dir`/tensorboard, tagged "kind/key"; on resume, events after `step` are hidden."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, **values: Any) -> None:
        for tag, value in _scalars(values).items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink(Sink):
    """One Weights & Biases run per run directory; a resumed run continues it, with its step as the x axis."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any], step: int) -> None:
        import wandb

        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project="fastdeit",
            name=run_dir.resolve().name,
            id=id_file.read_text().strip(),
            resume="allow",
            dir=str(run_dir),
            config=dict(config),
        )
        # Its own step counter refuses to go back, which a resumed run does.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, **values: Any) -> None:
        self._run.log({"step": step, **_scalars(values)})

    def close(self) -> None:
        self._run.finish()


_SINKS: dict[str, Callable[[Path, Mapping[str, Any], int], Sink]] = {"tensorboard": TensorBoardSink, "wandb": WandbSink}


def _scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among `values`, as "kind/key"; strings and lists stay in metrics.jsonl."""
    prefix = f"{values['kind']}/" if "kind" in values else ""
    return {prefix + key: value for key, value in values.items() if type(value) in (int, float)}
