"""Compiled kernels in the user's cache.

    $FASTDEIT_CACHE/native/NAME     ~/.cache/fastdeit without FASTDEIT_CACHE

A file begins with the SHA-256 of the rest. It is written aside and renamed, so that processes which compile at the same
time do not disturb each other.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

_DIGEST = hashlib.sha256().digest_size


class Damaged(Exception):
    """A file of the cache is not what was written; the message says how."""


def home() -> Path:
    """What `fastdeit.cache_folder` says. Kernels stand alone, so they do not import that."""
    return Path(os.path.expanduser(os.environ.get("FASTDEIT_CACHE") or "~/.cache/fastdeit"))


def folder() -> Path:
    """Where compiled kernels are kept. It need not exist."""
    return home() / "native"


def read(path: Path) -> bytes | None:
    """What `write` has put there, None where there is no such file. Raises Damaged, and OSError."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    digest, image = content[:_DIGEST], content[_DIGEST:]
    if hashlib.sha256(image).digest() != digest:
        raise Damaged("its checksum is not that of its content")
    return image


def write(path: Path, image: bytes) -> None:
    """Keep a compiled kernel, in the place of what is there. Raises OSError where that is not possible."""
    write_aside(path, hashlib.sha256(image).digest() + image)


def write_aside(path: Path, content: bytes) -> None:
    """Write a file of the cache beside its place, and rename it. Raises OSError where that is not possible."""
    scratch = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(content)
        scratch.replace(path)
    except OSError:
        with suppress(OSError):
            scratch.unlink()
        raise
