"""Files of a run on a disk that may be full, read-only or broken: whoever reads one has the old or the new one, whole.

What a disk refuses becomes a `DiskError`, a sentence with the path, the cause and the way out.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastdeit.engine import _fault

_WAYS_OUT = {
    errno.ENOSPC: "make room on its disk",
    errno.EDQUOT: "make room below your quota, or have it raised",
    errno.EROFS: "have its file system mounted so that it can be written to",
    errno.EACCES: "give yourself the right to write there",
    errno.EPERM: "give yourself the right to write there",
    errno.EIO: "see whether its disk is sound (dmesg)",
}


class DiskError(Exception):
    """A file of a run could not be written."""


def refuses(error: OSError) -> bool:
    """Whether the disk is what fails, and not the path: another path on it would do no better."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def way_out(error: OSError) -> str:
    """What a person can do about an error of the disk."""
    return _WAYS_OUT.get(error.errno or 0, "see what is at that path")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the disk refuses in the block is raised as DiskError: the file or folder `path` could not be written."""
    try:
        yield
    except OSError as error:
        raise DiskError(f"{path} could not be written: {error.strerror or error}; {way_out(error)}") from error


def replace_text(path: Path, text: str) -> None:
    """Write a text file in one step, which survives a power cut. Raises DiskError; the file that was there then is."""
    with writing(path):
        replace(path, text.encode())


def replace(path: Path, data: bytes) -> None:
    """As `replace_text`, of any file. Raises OSError."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        _fault.point(f"write {path.name}")
        temporary.write_bytes(data)
        sync(temporary)
        _fault.point(f"rename {path.name}")
        os.replace(temporary, path)
        sync(path.parent)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def make_directory(path: Path) -> None:
    """Make the directory `path` in one that is there, so that a power cut does not take it with all that is in it.

    One that is there already is left alone. Raises OSError.
    """
    with suppress(FileExistsError):
        _fault.point(f"mkdir {path.name}")
        path.mkdir()
        sync(path.parent)


def sync(path: Path) -> None:
    """Have the disk keep the file or the directory `path` as it is now. Raises OSError."""
    _fault.point(f"fsync {path.name}")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
