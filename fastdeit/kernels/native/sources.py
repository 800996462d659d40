"""The CUDA C++ sources: the repository's folder `kernels/`, of which a wheel has a copy beside this file."""

import hashlib
from pathlib import Path

_SUFFIXES = ".cu", ".cuh", ".h"
_COPY = Path(__file__).parent / "cu"
_REPOSITORY = Path(__file__).parents[3] / "kernels"


def folder() -> Path:
    """Where the sources are; in a checkout, or an editable install of one, the repository's own."""
    return _COPY if _COPY.is_dir() else _REPOSITORY


def texts() -> dict[str, str]:
    """The sources by their names; empty where there are none."""
    files = sorted(path for path in folder().glob("*") if path.suffix in _SUFFIXES)
    return {path.name: path.read_text() for path in files}


def digest(*parts: str) -> str:
    """A hash of the sources and of `parts`, in hexadecimal."""
    every = [*(text for pair in texts().items() for text in pair), *parts]
    return hashlib.sha256("\0".join(every).encode()).hexdigest()
