"""What trials have found on this card, in the user's cache: a file for each card, driver, and set of versions.

    $FASTDEIT_CACHE/kernels/CARD-HASH.json     ~/.cache/fastdeit without FASTDEIT_CACHE

A file that cannot be read, or is of another format, is as good as none. It is written aside and renamed, and what
another process has written meanwhile is kept.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import triton

from fastdeit.kernels._op import REFERENCE
from fastdeit.kernels._tried import Shape
from fastdeit.kernels.native import sources
from fastdeit.kernels.native.cache import home, write_aside

FORMAT = 1
_PACKAGES = "flash-attn-3", "flash-attn-4"
_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Row:
    """What was found for an op and a shape: the backend, the median seconds of each candidate that is right, and why
    others cannot run it."""

    op: str
    shape: Shape
    backend: str
    seconds: dict[str, float]
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def gain(self) -> float:
        """How many times as fast as PyTorch's own operations the backend is."""
        return self.seconds[REFERENCE] / self.seconds[self.backend]


@dataclass(frozen=True)
class Whole:
    """What was found for a whole step: the preset, the median seconds of a forward and backward in each that could run,
    and why others could not. calls: of which step, as of `calls_of`."""

    calls: str
    preset: str
    seconds: dict[str, float]
    failed: dict[str, str] = field(default_factory=dict)


def calls_of(rows: Sequence[Row]) -> str:
    """A name for the steps that make calls like these and no others."""
    calls = sorted([row.op, *row.shape] for row in rows)
    return hashlib.sha256(json.dumps(calls).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Content:
    """What a file holds: rows by op and shape, presets by the calls of a step, and why a backend of an op is wrong on
    this card."""

    rows: dict[tuple[str, Shape], Row] = field(default_factory=dict)
    wholes: dict[str, Whole] = field(default_factory=dict)
    wrong: dict[tuple[str, str], str] = field(default_factory=dict)


def place(device: torch.device, timed: str) -> dict[str, Any]:
    """What a row is valid for. timed: how its seconds were measured."""
    return {
        **_card(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "kernels": _code(),
        "others": _others(),
        "timed": timed,
    }


@cache
def _others() -> dict[str, str]:
    """Versions of the packages whose kernels are tried beside ours, of those that are installed."""
    found = {}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _card(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"card": _processor(), "units": torch.get_num_threads(), "driver": None}
    card = torch.cuda.get_device_properties(device)
    return {"card": card.name, "units": card.multi_processor_count, "driver": _driver()}


def _driver() -> str:
    """Version of the kernel module, else the newest CUDA that the driver knows."""
    text = _DRIVER.read_text() if _DRIVER.exists() else ""
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return found.group() if found else f"CUDA {torch._C._cuda_getDriverVersion()}"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "cpu")


@cache
def _code() -> str:
    """Hash of the sources of all kernels: a mended one has to prove itself anew."""
    root = Path(__file__).parent.parent
    files = sorted(root.rglob("*.py"))
    code = b"".join(str(f.relative_to(root)).encode() + f.read_bytes() for f in files)
    return hashlib.sha256(code + sources.digest().encode()).hexdigest()[:16]


def folder() -> Path:
    """Where files are kept."""
    return home() / "kernels"


class Store:
    """The rows of a place. `notes` says what is wrong with its file, a sentence each, until they are taken."""

    def __init__(self, where: dict[str, Any]) -> None:
        self.place = where
        key = hashlib.sha256(json.dumps(where, sort_keys=True).encode()).hexdigest()[:8]
        name = re.sub(r"[^a-z0-9]+", "-", where["card"].lower()).strip("-")[:40]
        self.path = folder() / f"{name}-{key}.json"
        self.notes: list[str] = []

    def read(self) -> Content:
        """What the file holds; nothing, and a note, where it cannot be used."""
        try:
            content = json.loads(self.path.read_text())
            if content["format"] != FORMAT:
                return self._ignored(f"it has format {content['format']!r}, and this fastdeit reads {FORMAT}")
            if content["place"] != self.place:
                return self._ignored("it is of another card or of other versions")
            rows = [_row(values) for values in content["rows"]]
            wholes = [_whole(values) for values in content["wholes"]]
            wrong = {(op, backend): str(why) for op, backend, why in content["wrong"]}
        except FileNotFoundError:
            return Content()
        except OSError as error:
            return self._ignored(error.strerror or str(error))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            return self._ignored(f"it is damaged ({type(error).__name__}: {error})")
        return Content({(row.op, row.shape): row for row in rows}, {whole.calls: whole for whole in wholes}, wrong)

    def _ignored(self, why: str) -> Content:
        self.notes.append(f"{self.path} is not used: {why}. The kernels are tried anew")
        return Content()

    def add(
        self, row: Row | None = None, whole: Whole | None = None, wrong: dict[tuple[str, str], str] | None = None
    ) -> bool:
        """Keep a row, a preset, and backends that are wrong; False, and a note, where that is not possible."""
        notes = list(self.notes)
        before = self.read()
        self.notes = notes  # what is wrong with the file was said when it was first read
        rows = before.rows | ({} if row is None else {(row.op, row.shape): row})
        wholes = before.wholes | ({} if whole is None else {whole.calls: whole})
        content = {
            "format": FORMAT,
            "place": self.place,
            "rows": [asdict(kept) for kept in rows.values()],
            "wholes": [asdict(kept) for kept in wholes.values()],
            "wrong": [[*names, why] for names, why in (before.wrong | (wrong or {})).items()],
        }
        return self._write(self.path, content)

    def report(self, op: str, backend: str, content: dict[str, Any]) -> Path | None:
        """Write a report of a fault, and return its path; None, and a note, where that is not possible."""
        now = datetime.now(timezone.utc)
        path = self.path.parent / f"report-{op}-{backend}-{now:%Y%m%d-%H%M%S-%f}.json"
        named = {"op": op, "backend": backend, "time": now.isoformat(timespec="seconds"), "place": self.place}
        return path if self._write(path, named | content) else None

    def _write(self, path: Path, content: dict[str, Any]) -> bool:
        try:
            write_aside(path, (json.dumps(content, indent=1) + "\n").encode())
        except OSError as error:
            reason = error.strerror or error
            self.notes.append(f"{path} cannot be written: {reason}. Set FASTDEIT_CACHE=FOLDER to keep what is found")
            return False
        return True


def _row(values: dict[str, Any]) -> Row:
    """The row; ValueError, KeyError or TypeError where the values are not those of one."""
    row = Row(**values | {"shape": Shape(*values["shape"])})
    kinds = {"op": str, "backend": str, "seconds": dict, "failed": dict}
    if not all(isinstance(getattr(row, name), kind) for name, kind in kinds.items()):
        raise TypeError(f"{values} is no row")
    _check_times(f"a row of {row.op}", row.seconds, row.backend, REFERENCE)
    return row


def _whole(values: dict[str, Any]) -> Whole:
    """The preset; errors as of `_row`."""
    whole = Whole(**values)
    kinds = {"calls": str, "preset": str, "seconds": dict, "failed": dict}
    if not all(isinstance(getattr(whole, name), kind) for name, kind in kinds.items()):
        raise TypeError(f"{values} is no preset")
    _check_times(f"the preset {whole.preset}", whole.seconds, whole.preset)
    return whole


def _check_times(whose: str, seconds: dict[str, Any], *names: str) -> None:
    """ValueError unless there are times under these names, and nothing but times under others."""
    for name in (*names, *seconds):
        value = seconds.get(name)
        if not (isinstance(value, int | float) and value > 0):
            raise ValueError(f"{whose} has no time of {name}")
