"""Files that anybody may have put there: a regular file is read, and no more of it than such a file may have."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def opened(path: Path) -> BinaryIO:
    """The file at `path`, to be read. Raises OSError, also for what is no regular file: a pipe is waited for without
    end, and a device may have no end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return open(descriptor, "rb")


def read(path: Path, limit: int) -> bytes:
    """The bytes of the file at `path`. Raises OSError as `opened` does, and ValueError for more than `limit` bytes,
    which are not read."""
    with opened(path) as file:
        small = os.fstat(file.fileno()).st_size <= limit
        data = file.read(limit + 1) if small else b""
    if not small or len(data) > limit:
        raise ValueError(f"it has more than {limit >> 20} MiB")
    return data
