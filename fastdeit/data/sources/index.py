"""Lists of samples as arrays: small enough for every process of a node to hold, and safe on disk.

1.28 million relative paths are 33 MB of text; as Python strings they take three times as much, in every process.
`Strings` keeps them in one block of bytes, items separated by NUL (which no path contains), and n offsets.

On disk an index is a numpy `.npz` archive behind the 16-byte BLAKE2b of its bytes: `seal` and `unseal`. It is verified
before anything in it is used, and holds no pickled object.
"""

import errno
import io
import os
import tempfile
import zipfile
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from fastdeit.data.sources.faults import retried
from fastdeit.data.sources.source import BadImage

_DIGEST = 16
_MAX_IMAGE = (1 << 31) - 1
"""Bytes of an encoded image. The largest picture that is decoded (`execute/route.py`) has fewer without any packing."""


class Strings(Sequence[str]):
    """Immutable list of non-empty strings without NUL. `blob`: their UTF-8 (surrogateescape), joined by NUL."""

    def __init__(self, blob: bytes) -> None:
        self.blob = blob
        inner = np.flatnonzero(np.frombuffer(blob, np.uint8) == 0)
        self._ends = np.append(inner, len(blob)) if blob else inner

    @classmethod
    def of_rows(cls, parts: Iterable[tuple[str, int, int]]) -> "Strings":
        """The names FILE:ROW of the rows from `first` to `stop` - 1 of files, for parts (file, first, stop), without
        a string for each."""
        rows = (
            f"{file}:" + f"\0{file}:".join(map(str, range(first, stop))) for file, first, stop in parts if first < stop
        )
        return cls(os.fsencode("\0".join(rows)))

    @classmethod
    def of(cls, items: Iterable[str]) -> "Strings":
        """The list of these strings."""
        return cls(os.fsencode("\0".join(items)))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] + 1 if index else 0
        return os.fsdecode(self.blob[start : self._ends[index]])


class Listed:
    """The part of a `Source` that is a list: names, labels and classes. Subclasses add `read`, and `path` where that is
    not the folder `root` and the name.

    names: of the samples within the data set, wherever that lies; labels int64 `[n]`; skipped: (path, reason) of what
    looked like a sample and was left out when the list was made.
    """

    def __init__(
        self,
        classes: Sequence[str],
        names: Strings,
        labels: NDArray[np.int64],
        fingerprint: str,
        skipped: Sequence[tuple[str, str]] = (),
        *,
        root: str | Path = "",
    ) -> None:
        self.classes, self.fingerprint, self.skipped = classes, fingerprint, skipped
        self._root, self._names, self._labels = str(root), names, labels

    def __len__(self) -> int:
        return len(self._labels)

    def label(self, index: int) -> int:
        """Class number of sample `index`."""
        return int(self._labels[index])

    def name(self, index: int) -> str:
        """Name of sample `index` within the data set."""
        return self._names[index]

    def path(self, index: int) -> str:
        """The name of sample `index`, with the folder of the data set."""
        return os.path.join(self._root, self.name(index))


def digest(*parts: bytes | NDArray[np.generic] | Sequence[str]) -> str:
    """Fingerprint of byte strings, arrays and lists of strings."""
    whole = blake2b(digest_size=_DIGEST)
    for part in parts:
        data = part if isinstance(part, bytes | np.ndarray) else Strings.of(part).blob
        whole.update(np.ascontiguousarray(data) if isinstance(data, np.ndarray) else data)
        whole.update(b"\0\0")
    return whole.hexdigest()


def seal(arrays: dict[str, NDArray[np.generic]]) -> bytes:
    """`arrays` as bytes that `unseal` verifies."""
    out = io.BytesIO()
    np.savez(out, **arrays)
    data = out.getvalue()
    return blake2b(data, digest_size=_DIGEST).digest() + data


def unseal(data: bytes | NDArray[np.uint8]) -> dict[str, NDArray[np.generic]]:
    """Inverse of `seal`; ValueError if a bit of it has changed, and for what `seal` does not make, whatever it is."""
    view = memoryview(data)
    if blake2b(view[_DIGEST:], digest_size=_DIGEST).digest() != view[:_DIGEST]:
        raise ValueError("the checksum does not match")
    file = io.BytesIO(view[_DIGEST:])
    try:
        with zipfile.ZipFile(file) as archive:
            if any(one.compress_type != zipfile.ZIP_STORED for one in archive.infolist()):
                raise ValueError("it is compressed")  # a few bytes could become gigabytes
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:
        # A seal tells of damage, not of who made it: the parsers meet anything, as a shape that no memory has room for.
        raise ValueError(str(error) or type(error).__name__) from error


def text_array(text: bytes) -> NDArray[np.uint8]:
    """Bytes as an array for `seal`; `.tobytes()` gives them back."""
    return np.frombuffer(text, np.uint8)


@contextmanager
def atomic(path: Path) -> Generator[BinaryIO, None, None]:
    """A file that appears at `path` complete and on disk when the block ends, or not at all when it raises."""
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise
    sync(path.parent)


def sync(folder: Path) -> None:
    """Have the disk keep the names in a folder as they are now."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_range(path: str, offset: int = 0, size: int | None = None) -> NDArray[np.uint8]:
    """`size` bytes (None: all) of the file at `path` from `offset`, fewer where it ends before; OSError if it cannot be
    read, also after as many tries as the error is worth (`faults`).

    By a read and not by a mapping: a file that is cut or a disk that fails while it is mapped ends the process with
    SIGBUS, and a page fault holds the interpreter lock. Opening the file every time costs 2 us and leaves no state to
    share between threads and processes. O_NONBLOCK, so that a named pipe is an error and not a wait without end.
    """
    return retried(partial(_read_once, path, offset, size))


def read_image(path: str) -> NDArray[np.uint8]:
    """`read_range` of a file that is an encoded image. BadImage for more than 2 GiB, which are not read: a file may be
    a hole."""
    return retried(partial(_read_once, path, 0, None, _MAX_IMAGE))


def read_image_in(path: str, offset: int, size: int, kind: str) -> NDArray[np.uint8]:
    """As `read_image`, of an image in a file of that kind; BadImage where the file was cut meanwhile."""
    data = retried(partial(_read_once, path, offset, size, _MAX_IMAGE))
    if len(data) < size:
        raise BadImage(f"the {kind} file ends before the image does; it was cut while in use")
    return data


def _read_once(path: str, offset: int, size: int | None, most: int | None = None) -> NDArray[np.uint8]:
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        length = os.fstat(handle).st_size - offset if size is None else size
        if most is not None and length > most:
            raise BadImage(f"it has {length:,} bytes; no image has more than {most:,}")
        return np.frombuffer(read_at(handle, offset, size), np.uint8)
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(handle)


def read_at(handle: int, offset: int, size: int | None) -> bytes:
    """`size` bytes (None: all) of an open file from `offset`, fewer only where it ends before.

    One read may bring less: at most 2 GiB, and on network storage what has come so far. EIO where no more comes
    though the file goes on.
    """
    rest = max(os.fstat(handle).st_size - offset, 0)
    wanted = rest if size is None else min(size, rest)
    data = os.pread(handle, wanted, offset)
    while len(data) < wanted:
        more = os.pread(handle, wanted - len(data), offset + len(data))
        if not more:
            raise OSError(errno.EIO, f"{len(data)} of {wanted} bytes came, though the file goes on")
        data += more
    return data
