"""A data set in one file: the encoded images one after another, then their index.

    16 bytes   magic and format version
    ...        the bytes of sample 0, 1, ..., exactly as the original source gave them
    ...        index, sealed (`index.py`): offset [n+1], crc32 [n], label [n], names, classes, fingerprint
    32 bytes   offset and length of the index, magic and format version again

One file is copied, moved and lost as a whole. It appears complete or not at all, the index is verified when it is
opened and every sample when it is read, so that a damaged copy is named and not trained on. The fingerprint is that of
the original source: a run that was started on a folder may be continued on its pack.
"""

import os
import struct
import zlib
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from fastdeit.data.sources.index import Listed, Strings, atomic, read_range, seal, text_array, unseal
from fastdeit.data.sources.kinds import Kind
from fastdeit.data.sources.parts import labels_of
from fastdeit.data.sources.source import BadImage, DataError, NamedSource, annotations_of, unreadable

VERSION = 1
SUFFIX = ".pack"
_MARK = struct.Struct("<12sI")
_FOOTER = struct.Struct("<QQ16s")
_MAGIC = b"fastdeitpack"


class PackedSource(Listed):
    """The samples of a file that `pack` wrote. DataError if the file or its index is damaged; `read` raises BadImage if
    the sample is."""

    def __init__(self, path: str | Path) -> None:
        index = _read_index(str(path))
        self._offset, self._crc = index["offset"], index["crc"]
        classes, names = (Strings(index[key].tobytes()) for key in ("classes", "names"))
        fingerprint = index["fingerprint"].tobytes().decode()
        super().__init__(list(classes), names, index["label"], fingerprint, root=path)

    def read(self, index: int) -> NDArray[np.uint8]:
        """The bytes of sample `index`: uint8 `[n]`. BadImage if their checksum does not match."""
        start = int(self._offset[index])
        data = read_range(self._root, start, int(self._offset[index + 1]) - start)
        if zlib.crc32(data) != self._crc[index]:
            raise BadImage("its bytes in the packed file have changed (checksum mismatch); copy the file anew")
        return data

    def path(self, index: int) -> str:
        """PACK:NAME of sample `index`."""
        return f"{self._root}:{self.name(index)}"


def pack(
    source: NamedSource,
    out: str | Path,
    progress: Callable[[int, int], None] | None = None,
    threads: int = 1,
) -> None:
    """Write the samples of `source` to the file `out`, replacing it; progress(done, total) is called after each.

    threads  that call `source.read`, a few samples ahead of the file

    Bytes are copied, not re-encoded, images that cannot be decoded among them. DataError, and no file, if one cannot
    be read or `out` cannot be written, and for a source with annotations, which a pack would leave behind.
    """
    require_no_annotations(source)
    out = Path(out)
    try:
        with atomic(out) as file:
            _write(source, file, progress or (lambda done, total: None), threads)
    except OSError as error:
        raise DataError(f"{out}: the packed file cannot be written: {error.strerror or error}") from error


def require_no_annotations(source: NamedSource) -> None:
    """DataError where the source knows more of its samples than their class, which a packed file would not have."""
    known = annotations_of(source, 0) if len(source) else None
    if known is not None:
        raise DataError(
            f"{source.path(0)}: the data set has annotations ({', '.join(known)}), and a packed file holds images and "
            "their classes alone; train on the data set as it is"
        )


def _write(source: NamedSource, file: BinaryIO, progress: Callable[[int, int], None], threads: int) -> None:
    total = len(source)
    offset, crc = np.empty(total + 1, np.int64), np.empty(total, np.uint32)
    mark = _MARK.pack(_MAGIC, VERSION)
    file.write(mark)
    offset[0] = len(mark)
    with closing(_samples(source, threads)) as samples:
        for i, data in enumerate(samples):
            file.write(data)
            offset[i + 1], crc[i] = offset[i] + len(data), zlib.crc32(data)
            progress(i + 1, total)
    index = seal(
        {
            "offset": offset,
            "crc": crc,
            "label": labels_of(source),
            "names": text_array(Strings.of(map(source.name, range(total))).blob),
            "classes": text_array(Strings.of(source.classes).blob),
            "fingerprint": text_array(source.fingerprint.encode()),
        }
    )
    file.write(index)
    file.write(_FOOTER.pack(offset[-1], len(index), mark))


def _samples(source: NamedSource, threads: int) -> Generator[NDArray[np.uint8]]:
    """All samples in order, of which no more than twice as many as there are threads are in memory."""
    with ThreadPoolExecutor(threads, "fastdeit-pack") as pool:
        ahead: deque[Future[NDArray[np.uint8]]] = deque()
        try:
            for index in range(len(source)):
                ahead.append(pool.submit(_sample, source, index))
                if len(ahead) == 2 * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _sample(source: NamedSource, index: int) -> NDArray[np.uint8]:
    try:
        return source.read(index)
    except (OSError, BadImage) as error:
        if isinstance(error, OSError):
            unreadable(error, source.path(index))
        raise DataError(
            f"{source.path(index)} cannot be read: {error}; repair or delete it and pack again (`check` lists all such "
            "files at once)"
        ) from error


def _read_index(path: str) -> dict[str, NDArray[np.generic]]:
    try:
        size = os.stat(path).st_size
        mark = read_range(path, 0, _MARK.size).tobytes()
        footer = read_range(path, max(size - _FOOTER.size, 0), _FOOTER.size).tobytes()
        sealed = read_range(path, *_index_range(path, size, mark, footer))
    except OSError as error:
        unreadable(error, path)
        raise DataError(f"{path}: the packed data set cannot be read: {error.strerror or error}") from error
    try:
        index = unseal(sealed)
        if missing := {"offset", "crc", "label", "names", "classes", "fingerprint"} - index.keys():
            raise ValueError(f"it has no {' and no '.join(sorted(missing))}")
        return index
    except ValueError as error:
        raise DataError(f"{path}: the index of the packed file is damaged: {error}; copy or pack it anew") from error


def _index_range(path: str, size: int, mark: bytes, footer: bytes) -> tuple[int, int]:
    """(offset, length) of the index."""
    if len(mark) < _MARK.size or not mark.startswith(_MAGIC):
        raise DataError(f"{path}: not a packed data set: it starts with {mark!r}; make one with `pack`")
    version = _MARK.unpack(mark)[1]
    if version != VERSION:
        raise DataError(f"{path}: packed in format {version}, but this release reads {VERSION}; pack the data anew")
    if len(footer) < _FOOTER.size or not footer.endswith(mark):
        raise DataError(f"{path}: the packed file is cut short or its end is damaged; copy or pack it anew")
    start, length, _ = _FOOTER.unpack(footer)
    if start + length + _FOOTER.size != size:
        raise DataError(f"{path}: the end of the packed file is damaged; copy or pack it anew")
    return start, length


def _open(root: Path, split: str) -> PackedSource:
    return PackedSource(root / (split if split.endswith(SUFFIX) else split + SUFFIX))


PACKED = Kind(
    "packed",
    _open,
    "ROOT/{train}.pack and ROOT/{val}.pack, made by `fastdeit data pack`",
    lambda root, train, val: any((root / f"{split}{SUFFIX}").is_file() for split in (train, val)),
    (SUFFIX,),
)
