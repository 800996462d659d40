"""What makes a run another run: the fields of its recipe and the data that cannot change when it goes on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdeit.errors import UsageError
from fastdeit.run import directory
from fastdeit.text import one_line


def refuse_other_run(
    run: Path, fields: Sequence[tuple[str, Any, Any]], data: Sequence[tuple[str, Any, Any]] = ()
) -> None:
    """Raise UsageError if `fields` of the recipe differ, or something of the `data`: (name, of the run, asked for)."""
    if not fields and not data:
        return
    lines = "\n".join(
        f"  {name}: the run has {_short(old)}, asked for {_short(new)}" for name, old, new in (*fields, *data)
    )
    if any(field in _OF_THE_STATE for field, _, _ in fields):
        way_out = f"A new run that begins with its weights: `fastdeit train RECIPE model.weights={one_line(run)}`"
    else:
        fork = directory.command(run, *(as_overrides(fields) or ["section.field=value"]), verb="--from")
        way_out = f"A new run that goes on from its weights and its optimizer: {one_line(fork)}"
    raise UsageError(
        f"{one_line(run)} is another run; resume it with its own settings, or start anew with another --run-dir:\n"
        f"{lines}\n{way_out}"
    )


_OF_THE_STATE = frozenset(
    {"optim.name"} | {f"model.{name}" for name in ("name", "timm", "image_size", "num_classes", "weights")}
)
"""Fields that a fork cannot change: they decide which tensors a checkpoint has, and what a run begins with."""


def as_overrides(differences: Sequence[tuple[str, Any, Any]]) -> list[str]:
    """The differences (field, old value, new value) as overrides of a command line."""
    return [f"{field}={new if _is_plain(new) else json.dumps(new)}" for field, _, new in differences]


def _is_plain(value: Any) -> bool:
    return isinstance(value, str) and value.replace("_", "").replace("/", "").isalnum() and not value.isdigit()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
