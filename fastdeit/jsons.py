"""JSON from files that anybody may have written, or damaged."""

import json
from pathlib import Path
from typing import Any

from fastdeit import files

LARGEST = 16 << 20
"""Bytes of a file that `read` takes. Ours have some kilobytes; what is parsed takes up to twenty times as much."""


def is_number(value: Any) -> bool:
    """Whether `value` is a number that can be compared and printed as one: no bool, and no integer of any length."""
    return type(value) is float or (type(value) is int and abs(value) < 1 << 63)


def parsed(text: str | bytes) -> Any:
    """What `text` says. Raises ValueError where it is no JSON, and where it is nested too deep for Python."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read(path: Path) -> Any:
    """What the file at `path` says. Raises OSError and ValueError as `files.read` does, for more than `LARGEST` bytes,
    and ValueError as `parsed` does."""
    return parsed(files.read(path, LARGEST))
