"""JSON from files that anybody may have written, or damaged."""

import json
from pathlib import Path
from typing import Any

LARGEST = 16 << 20
"""Bytes of a file that `read` takes. Ours have some kilobytes; what is parsed takes up to twenty times as much."""


def parsed(text: str | bytes) -> Any:
    """What `text` says. Raises ValueError where it is no JSON, and where it is nested too deep for Python."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read(path: Path) -> Any:
    """What the file at `path` says. Raises OSError where it cannot be read, ValueError as `parsed` does, and for a file
    of more than `LARGEST` bytes, of which no more than these is read."""
    with open(path, "rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError(f"it has more than {LARGEST >> 20} MiB")
    return parsed(data)
