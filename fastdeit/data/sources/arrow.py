"""Arrow files of the Hugging Face `datasets` library, read in any order: what `save_to_disk` writes, and its cache.

A file is a stream of messages: the schema, then batches of rows. A message's metadata say where in its body each buffer
is; the images of a batch are one buffer after another of offsets, so that offset and size of every image make each a
`pread`. Only metadata, offsets and labels are read to list them, which takes seconds for a million rows; it is done at
every start. Nothing is mapped (`index.read_range` says why). Arrow files have no checksums. Where a column has a
dictionary, its values are in a message of their own, and the batches that follow have indices into it.

The file format (`ARROW1`, Feather) is the same stream behind 8 bytes and is read as well.
"""

import json
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from numpy.typing import NDArray
from pyarrow import ipc

from fastdeit.data.sources import shards
from fastdeit.data.sources.faults import of_file
from fastdeit.data.sources.index import Listed, Strings, digest, read_image_in, read_range
from fastdeit.data.sources.parquet import class_labels, hub_names, plain_labels, require_columns, require_one_type
from fastdeit.data.sources.source import BadImage, DataError, contents, unreadable

_PREFIX = struct.Struct("<iI")
_CONTINUES = -1
_FILE_MAGIC = b"ARROW1\0\0"
_DICTIONARY, _RECORD_BATCH = 2, 3
_NO_IMAGE = -1
_INLINE = 12  # bytes of data that fit into a view


class ArrowSource(Listed):
    """The rows of `files`, paths relative to `root`, in their order. A sample is called FILE:ROW.

    image: column of structs of `bytes` and `path`, or of bytes; label: column of class numbers or names. Class names
    are those in the schema's Hugging Face metadata, else in dataset_info.json beside the first file, else the values of
    a text column, else numbers. Raises DataError where a file is no Arrow file or lacks a column, or no row is
    usable; warns of batches that were left out, and lists them in `skipped`.
    """

    def __init__(self, root: str | Path, files: Sequence[str], image: str = "image", label: str = "label") -> None:
        self._files = list(files)
        parts, columns, skipped = [], [], []
        schemas = [_schema(os.path.join(root, file), image, label) for file in self._files]
        empty = [pyarrow.nulls(0, schema.field(label).type) for schema in schemas]
        require_one_type(root, label, self._files, [plain_labels(root, label, one).type for one in empty])
        for number, file in enumerate(self._files):
            for rows in _batches(os.path.join(root, file), image, label, skipped):
                parts.append((file, rows.first, rows.first + len(rows.start)))
                labels = plain_labels(root, label, rows.label)
                columns.append((np.full(len(rows.start), number, np.int32), rows.start, rows.size, labels))
        nothing = f"no rows in {', '.join(self._files)}"
        names, _ = shards.told(Strings.of_rows(parts), skipped, root, "parts of Arrow files", nothing)
        files, starts, sizes, chunks = zip(*columns, strict=True)
        self._file, self._start, self._size = map(np.concatenate, (files, starts, sizes))
        known = hub_names(root, label, dict(zip(self._files, (one.metadata for one in schemas), strict=True)))
        known = known or _info_names(Path(root, self._files[0]).parent, label)
        labels, classes = class_labels(root, label, pyarrow.chunked_array(chunks), known)
        fingerprint = digest(names.blob, labels, self._size, classes)
        super().__init__(classes, names, labels, fingerprint, skipped, root=root)

    def read(self, index: int) -> NDArray[np.uint8]:
        """The encoded image of row `index`: uint8 `[n]`. BadImage if it has none, or the file was cut meanwhile."""
        size = int(self._size[index])
        if size == _NO_IMAGE:
            raise BadImage("the row has no image bytes (data sets that only hold paths cannot be used)")
        path = os.path.join(self._root, self._files[self._file[index]])
        return read_image_in(path, int(self._start[index]), size, "Arrow")


def files(root: str | Path, split: str) -> list[str]:
    """Paths relative to `root` of the Arrow files of a split: those that state.json in the folder of the split lists,
    or those with a name that says so (`shards.of_split`): train/*.arrow, train.arrow, NAME-train-00000-of-00002.arrow.
    DataError if there is none."""
    root = Path(root)
    if (root / split / "state.json").exists():
        return [os.path.join(split, file) for file in _saved(root / split)]
    found = shards.of_split(root, split, shards.ARROW)
    if not found and (root / "state.json").exists():
        raise DataError(
            f"{root}: this is one split, saved on its own; give the folder that it is in, and its name "
            f"{root.resolve().name!r} as that of a split"
        )
    if not found:
        raise DataError(
            f"{root}: no Arrow file of split {split!r}; looked for {split}/state.json, {split}/*.arrow, {split}.arrow "
            f"and NAME-{split}.arrow"
        )
    return found


def _saved(folder: Path) -> list[str]:
    """The files of a data set that `save_to_disk` wrote to `folder`."""
    path = folder / "state.json"
    try:
        state = json.loads(contents(path))
        found = [str(one["filename"]) for one in state["_data_files"]]
        selection = state.get("_indices_data_files")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: not what save_to_disk writes, or damaged: {error!r}") from error
    if selection:
        raise DataError(f"{path}: a selection of the rows is saved apart from them; save flatten_indices() of it")
    matches = [shards.ARROW.fullmatch(file) for file in found]
    for file, match in zip(found, matches, strict=True):
        if match is None or os.path.basename(file) != file:
            raise DataError(f"{path}: {file!r} is no name of an Arrow file in this folder")
        if not (folder / file).exists():
            raise DataError(f"{path}: {file} is listed, but not there; copy the data set anew")
    if not found:
        raise DataError(f"{path}: it lists no files")
    return shards.in_order(folder, [match for match in matches if match])


def _info_names(folder: Path, label: str) -> list[str] | None:
    """Class names in the dataset_info.json that the `datasets` library writes beside its files."""
    path = folder / "dataset_info.json"
    try:
        return json.loads(contents(path))["features"][label]["names"] if path.exists() else None
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


class _Message(NamedTuple):
    """metadata: with the prefix in front; start, size: of the body in the file; dictionary: the number of the one in
    it."""

    kind: int
    metadata: bytes
    start: int
    size: int
    dictionary: int = 0


class _Rows(NamedTuple):
    """first: number in the file of the first row; start, size (int64): of each image in the file."""

    first: int
    start: NDArray[np.int64]
    size: NDArray[np.int64]
    label: pyarrow.Array


class _Damaged(Exception):
    """Why the rest of a file cannot be read."""


def _messages(path: str) -> Iterator[_Message]:
    end = os.stat(path).st_size
    at = len(_FILE_MAGIC) if read_range(path, 0, len(_FILE_MAGIC)).tobytes() == _FILE_MAGIC else 0
    while True:
        prefix = read_range(path, at, _PREFIX.size).tobytes()
        if len(prefix) < _PREFIX.size:
            raise _Damaged(f"the Arrow file is cut short: it ends at byte {end}, without an end mark")
        mark, length = _PREFIX.unpack(prefix)
        if mark != _CONTINUES:
            raise _Damaged(f"no Arrow message, or a damaged one, at byte {at} of {end}: it starts with {prefix!r}")
        if length == 0:
            return
        start = at + _PREFIX.size + length
        metadata = read_range(path, at, start - at).tobytes() if start <= end else b""
        kind, size, dictionary = _header(metadata[_PREFIX.size :]) if metadata else (0, 0, 0)
        if start + size > end or size < 0:
            raise _Damaged(
                f"the Arrow file is cut short or damaged: it ends at byte {end}, inside the message at byte {at}"
            )
        yield _Message(kind, metadata, start, size, dictionary)
        at = start + size


def _header(metadata: bytes) -> tuple[int, int, int]:
    """(kind, size of the body, number of the dictionary in it) of a message, from a flatbuffer's tables; size -1 if it
    is none. _Damaged for a dictionary that continues an earlier one, which Arrow copies: no addresses tell of it."""
    try:
        fields = _fields(metadata, *struct.unpack_from("<I", metadata))
        kind = metadata[fields[1]] if fields[1] else 0
        size = struct.unpack_from("<q", metadata, fields[3])[0] if fields[3] else 0
        number, grows = 0, False
        if kind == _DICTIONARY:
            inner = _fields(metadata, fields[2] + struct.unpack_from("<I", metadata, fields[2])[0])
            number = struct.unpack_from("<q", metadata, inner[0])[0] if inner[0] else 0
            grows = bool(inner[2] and metadata[inner[2]])
    except (struct.error, IndexError):
        return 0, -1, 0
    if grows:
        raise _Damaged("a dictionary in it is stored in parts, which are not read; write the file anew without deltas")
    return kind, size, number


def _fields(metadata: bytes, table: int) -> list[int]:
    """Where the first four fields of the flatbuffer's table at byte `table` are, as a list of the table says; 0 for one
    that is not there."""
    places = table - struct.unpack_from("<i", metadata, table)[0]
    count = struct.unpack_from("<H", metadata, places)[0] // 2 - 2
    offsets = (*struct.unpack_from(f"<{min(count, 4)}H", metadata, places + 4), 0, 0, 0, 0)
    return [offset and table + offset for offset in offsets[:4]]


def _schema(path: str, image: str, label: str) -> pyarrow.Schema:
    """The schema of a file; DataError unless it has usable columns."""
    try:
        schema = ipc.read_schema(pyarrow.py_buffer(next(_messages(path)).metadata))
        require_columns(path, schema, image, label)
    except StopIteration:
        raise DataError(f"{path}: the Arrow file cannot be read: it holds nothing") from None
    except (_Damaged, pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError):
            unreadable(error, path)
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: the Arrow file cannot be read: {reason}") from error
    return schema


def _batches(path: str, image: str, label: str, skipped: list[tuple[str, str]]) -> Iterator[_Rows]:
    """The rows of a file, batch by batch; what is wrong with it goes to `skipped`."""
    first = 0
    before: dict[int | None, _Message] = {}  # the schema, and the dictionaries as they are now
    try:
        for message in _messages(path):
            if message.kind == _RECORD_BATCH:
                rows = _rows(path, [*before.values(), message], image, label, first)
                first += len(rows.start)
                yield rows
            else:
                before[message.dictionary if message.kind == _DICTIONARY else None] = message
    except _Damaged as error:
        skipped.append((path, f"{error}; rows from {first} on are lost"))
    except OSError as error:
        if not of_file(error):
            raise DataError(f"{path}: {unreadable(error, path)}") from error
        skipped.append((path, f"the Arrow file cannot be read: {error.strerror or error}"))


def _rows(path: str, messages: Sequence[_Message], image: str, label: str, first: int) -> _Rows:
    """The rows of the last message, a batch; the others are the schema and dictionaries. Arrow itself says where
    buffers are: it is given the metadata with bodies of zeros, none of which is ever touched, and the addresses that it
    answers are places in the bodies that the file has."""
    try:
        body = _Bodies(path, messages)
        with ipc.open_stream(body.stream) as stream:
            batch = stream.read_next_batch()
        start, size = _images(body, batch.column(image))
        labels = _labels(body, batch.column(label))
    except (pyarrow.ArrowException, OSError, MemoryError) as error:
        if isinstance(error, OSError) and not of_file(error):
            raise
        raise _Damaged(f"the batch at byte {messages[-1].start} is compressed or damaged: {error}") from error
    return _Rows(first, start, size, labels)


class _Bodies:
    """The bodies of messages in the file, addressed as those of zeros in `stream`, where the messages follow each
    other."""

    def __init__(self, path: str, messages: Sequence[_Message]) -> None:
        self._path, self._messages = path, messages
        ends = np.cumsum([len(message.metadata) + message.size for message in messages])
        memory = np.zeros(int(ends[-1]), np.uint8)
        self.stream = pyarrow.py_buffer(memory)
        self._origins = [int(end) - message.size for end, message in zip(ends, messages, strict=True)]
        for origin, message in zip(self._origins, messages, strict=True):
            memory[origin - len(message.metadata) : origin] = np.frombuffer(message.metadata, np.uint8)

    def place(self, buffer: pyarrow.Buffer) -> int:
        """Where in the file a buffer starts."""
        for origin, message in zip(self._origins, self._messages, strict=True):
            place = buffer.address - self.stream.address - origin
            if 0 <= place <= message.size - buffer.size:
                return message.start + place
        raise pyarrow.ArrowInvalid("a buffer lies outside of it")

    def read(self, buffer: pyarrow.Buffer | None, kind: Any, count: int) -> NDArray[Any]:
        """The first `count` items of a buffer."""
        size = np.dtype(kind).itemsize * count
        if buffer is None or buffer.size < size:
            raise pyarrow.ArrowInvalid("a buffer is too short for its rows")
        return read_range(self._path, self.place(buffer), size).view(kind)


def _images(body: _Bodies, column: pyarrow.Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Start in the file and size of every image of a column; the size is _NO_IMAGE where there is none."""
    if pyarrow.types.is_struct(column.type):
        start, size = _images(body, column.field("bytes"))
        return start, np.where(_there(body, column), size, _NO_IMAGE)
    if not len(column):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    if pyarrow.types.is_dictionary(column.type):
        start, size = _images(body, column.dictionary)
        indices, there = column.indices, _there(body, column.indices)
        at = body.read(indices.buffers()[1], indices.type.to_pandas_dtype(), len(indices)).astype(np.int64)
        if (there & ((at < 0) | (at >= len(size)))).any():
            raise pyarrow.ArrowInvalid("images lie outside of their dictionary")
        at[~there] = len(size)
        return np.append(start, 0)[at], np.append(size, _NO_IMAGE)[at]
    if pyarrow.types.is_binary_view(column.type):
        return _viewed(body, column)
    _, offsets, data = column.buffers()
    width = np.int64 if pyarrow.types.is_large_binary(column.type) else np.int32
    ends = body.read(offsets, width, len(column) + 1).astype(np.int64)
    if ends[0] < 0 or (np.diff(ends) < 0).any() or ends[-1] > (data.size if data else 0):
        raise pyarrow.ArrowInvalid("images lie outside of it")
    start = body.place(data) if data else 0
    return start + ends[:-1], np.where(_there(body, column), np.diff(ends), _NO_IMAGE)


def _viewed(body: _Bodies, column: pyarrow.Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`_images` of a column of views: each has the size in 4 bytes, then up to 12 bytes of data or else 4 bytes of its
    beginning, the number of a buffer and the place in it (Arrow's columnar format, Variable-size Binary View)."""
    _, views, *data = column.buffers()
    rows = body.read(views, "<i4", 4 * len(column)).reshape(-1, 4).astype(np.int64)
    there, size = _there(body, column), rows[:, 0]
    apart = there & (size > _INLINE)
    number, offset = rows[apart, 2], rows[apart, 3]
    ends = np.array([one.size if one else 0 for one in data], np.int64)
    if (size[there] < 0).any() or (number < 0).any() or (number >= len(data)).any() or (offset < 0).any():
        raise pyarrow.ArrowInvalid("images lie outside of it")
    if (offset + size[apart] > ends[number]).any():
        raise pyarrow.ArrowInvalid("images lie outside of it")
    start = body.place(views) + 16 * np.arange(len(column)) + 4
    start[apart] = np.array([body.place(one) if one else 0 for one in data], np.int64)[number] + offset
    return start, np.where(there, size, _NO_IMAGE)


def _there(body: _Bodies, column: pyarrow.Array) -> NDArray[np.bool_]:
    """Which items of a column are no nulls."""
    bits, count = column.buffers()[0], len(column)
    if bits is None:
        return np.ones(count, bool)
    return np.unpackbits(body.read(bits, np.uint8, -(-count // 8)), count=count, bitorder="little").astype(bool)


def _labels(body: _Bodies, column: pyarrow.Array) -> pyarrow.Array:
    """The labels themselves."""
    if pyarrow.types.is_dictionary(column.type):
        return pyarrow.DictionaryArray.from_arrays(_labels(body, column.indices), _labels(body, column.dictionary))
    buffers = [one and pyarrow.py_buffer(body.read(one, np.uint8, one.size)) for one in column.buffers()]
    labels = pyarrow.Array.from_buffers(column.type, len(column), buffers)
    labels.validate(full=True)
    return labels
