"""Arrow files of the Hugging Face `datasets` library, read in any order: what `save_to_disk` writes, and its cache.

A file is a stream of messages: the schema, then batches of rows. A message's metadata say where in its body each buffer
is; the images of a batch are one buffer after another of offsets, so that offset and size of every image make each a
`pread`. Only metadata, offsets and labels are read to list them, which takes seconds for a million rows; it is done at
every start. Nothing is mapped (`index.read_range` says why). Arrow files have no checksums.

The file format (`ARROW1`, Feather) is the same stream behind 8 bytes and is read as well.
"""

import json
import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from numpy.typing import NDArray
from pyarrow import ipc

from fastdeit.data.sources import shards
from fastdeit.data.sources.faults import of_file
from fastdeit.data.sources.index import Listed, Strings, digest, read_range
from fastdeit.data.sources.parquet import class_labels, hub_names, plain_labels, require_columns, require_one_type
from fastdeit.data.sources.source import BadImage, DataError, contents, unreadable

_PREFIX = struct.Struct("<iI")
_CONTINUES = -1
_FILE_MAGIC = b"ARROW1\0\0"
_SCHEMA, _RECORD_BATCH = 1, 3
_NO_IMAGE = -1


class ArrowSource(Listed):
    """The rows of `files`, paths relative to `root`, in their order.

    image: column of structs of `bytes` and `path`, or of bytes; label: column of class numbers or names. Class names
    are those in the schema's Hugging Face metadata, else in dataset_info.json beside the first file, else the values of
    a text column, else numbers. Raises DataError where a file is no Arrow file or lacks a column, or no row is
    usable; warns of batches that were left out, and lists them in `skipped`.
    """

    def __init__(self, root: str | Path, files: Sequence[str], image: str = "image", label: str = "label") -> None:
        self._root, self._files = str(root), list(files)
        names, columns, skipped = [], [], []
        schemas = [_schema(os.path.join(self._root, file), image, label) for file in self._files]
        empty = [pyarrow.array([], schema.field(label).type) for schema in schemas]
        require_one_type(root, label, self._files, [plain_labels(self._root, label, one).type for one in empty])
        for number, (file, schema) in enumerate(zip(self._files, schemas, strict=True)):
            for rows in _batches(os.path.join(self._root, file), schema, image, label, skipped):
                names += [f"{file}:{rows.first + row}" for row in range(len(rows.start))]
                labels = plain_labels(self._root, label, rows.label)
                columns.append((np.full(len(rows.start), number, np.int32), rows.start, rows.size, labels))
        if not names:
            raise DataError(f"{root}: no rows in {', '.join(self._files)}{shards.reasons(skipped)}")
        if skipped:
            warnings.warn(
                f"{root}: {len(skipped)} parts of Arrow files are left out:{shards.reasons(skipped)}", stacklevel=2
            )
        files, starts, sizes, chunks = zip(*columns, strict=True)
        self._file, self._start, self._size = map(np.concatenate, (files, starts, sizes))
        known = hub_names(schemas[0].metadata, label) or _info_names(Path(self._root, self._files[0]).parent, label)
        labels, classes = class_labels(self._root, label, pyarrow.chunked_array(chunks), known)
        blob = Strings.of(names)
        super().__init__(classes, blob, labels, digest(blob.blob, labels, self._size, classes), skipped)

    def read(self, index: int) -> NDArray[np.uint8]:
        """The encoded image of row `index`: uint8 `[n]`. BadImage if it has none, or the file was cut meanwhile."""
        size = int(self._size[index])
        if size == _NO_IMAGE:
            raise BadImage("the row has no image bytes (data sets that only hold paths cannot be used)")
        path = os.path.join(self._root, self._files[self._file[index]])
        data = read_range(path, int(self._start[index]), size)
        if len(data) < size:
            raise BadImage("the Arrow file ends before the image does; it was cut while in use")
        return data

    def path(self, index: int) -> str:
        """FILE:ROW of sample `index`, with the folder of the data set."""
        return os.path.join(self._root, self.name(index))


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
    """metadata: with the prefix in front; start, size: of the body in the file."""

    kind: int
    metadata: bytes
    start: int
    size: int


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
        kind, size = _header(metadata[_PREFIX.size :]) if metadata else (0, 0)
        if start + size > end or size < 0:
            raise _Damaged(
                f"the Arrow file is cut short or damaged: it ends at byte {end}, inside the message at byte {at}"
            )
        yield _Message(kind, metadata, start, size)
        at = start + size


def _header(metadata: bytes) -> tuple[int, int]:
    """(kind, size of the body) of a message: fields 1 and 3 of a flatbuffer's table, of which a list says where they
    are; (0, -1) if it is none."""
    try:
        (table,) = struct.unpack_from("<I", metadata)
        places = table - struct.unpack_from("<i", metadata, table)[0]
        count = struct.unpack_from("<H", metadata, places)[0] // 2 - 2
        fields = (*struct.unpack_from(f"<{min(count, 4)}H", metadata, places + 4), 0, 0, 0, 0)
        kind = metadata[table + fields[1]] if fields[1] else 0
        size = struct.unpack_from("<q", metadata, table + fields[3])[0] if fields[3] else 0
    except (struct.error, IndexError):
        return 0, -1
    return kind, size


def _schema(path: str, image: str, label: str) -> pyarrow.Schema:
    """The schema of a file; DataError unless it has usable columns."""
    try:
        schema = ipc.read_schema(pyarrow.py_buffer(next(_messages(path)).metadata))
        require_columns(path, schema, image, label)
        if pyarrow.types.is_dictionary(schema.field(label).type):
            raise DataError(
                f"{path}: column {label!r} is stored as a dictionary, which is not read from Arrow files; cast it to "
                f"{schema.field(label).type.value_type}, or save the data set as Parquet"
            )
    except StopIteration:
        raise DataError(f"{path}: the Arrow file cannot be read: it holds nothing") from None
    except (_Damaged, pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError):
            unreadable(error, path)
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: the Arrow file cannot be read: {reason}") from error
    return schema


def _batches(
    path: str, schema: pyarrow.Schema, image: str, label: str, skipped: list[tuple[str, str]]
) -> Iterator[_Rows]:
    """The rows of a file, batch by batch; what is wrong with it goes to `skipped`."""
    first = 0
    try:
        for message in _messages(path):
            if message.kind == _RECORD_BATCH:
                rows = _rows(path, message, schema, image, label, first)
                first += len(rows.start)
                yield rows
    except _Damaged as error:
        skipped.append((path, f"{error}; rows from {first} on are lost"))
    except OSError as error:
        if not of_file(error):
            raise DataError(f"{path}: {unreadable(error, path)}") from error
        skipped.append((path, f"the Arrow file cannot be read: {error.strerror or error}"))


def _rows(path: str, message: _Message, schema: pyarrow.Schema, image: str, label: str, first: int) -> _Rows:
    """The rows of a batch. Arrow itself says where buffers are: it is given the metadata with a body of zeros, none of
    which is ever touched, and the addresses that it answers are places in the body that the file has."""
    try:
        memory = np.zeros(len(message.metadata) + message.size, np.uint8)
        memory[: len(message.metadata)] = np.frombuffer(message.metadata, np.uint8)
        buffer = pyarrow.py_buffer(memory)
        batch = ipc.read_record_batch(ipc.read_message(buffer), schema)
        body = _Body(path, message, buffer.address + len(message.metadata))
        start, size = _images(body, batch.column(image))
        labels = _labels(body, batch.column(label))
    except (pyarrow.ArrowException, OSError, MemoryError) as error:
        if isinstance(error, OSError) and not of_file(error):
            raise
        raise _Damaged(f"the batch at byte {message.start} is compressed or damaged: {error}") from error
    return _Rows(first, start, size, labels)


class _Body:
    """The body of a message in the file, addressed as that of zeros at `origin`."""

    def __init__(self, path: str, message: _Message, origin: int) -> None:
        self._path, self._message, self._origin = path, message, origin

    def place(self, buffer: pyarrow.Buffer) -> int:
        """Where in the file a buffer starts."""
        place = buffer.address - self._origin
        if not 0 <= place <= self._message.size - buffer.size:
            raise pyarrow.ArrowInvalid("a buffer lies outside of it")
        return self._message.start + place

    def read(self, buffer: pyarrow.Buffer | None, kind: Any, count: int) -> NDArray[Any]:
        """The first `count` items of a buffer."""
        size = np.dtype(kind).itemsize * count
        if buffer is None or buffer.size < size:
            raise pyarrow.ArrowInvalid("a buffer is too short for its rows")
        return read_range(self._path, self.place(buffer), size).view(kind)


def _images(body: _Body, column: pyarrow.Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Start in the file and size of every image of a column; the size is _NO_IMAGE where there is none."""
    nested, count = pyarrow.types.is_struct(column.type), len(column)
    images = column.field("bytes") if nested else column
    validity, offsets, data = images.buffers()
    if not count:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    width = np.int64 if pyarrow.types.is_large_binary(images.type) else np.int32
    ends = body.read(offsets, width, count + 1).astype(np.int64)
    if ends[0] < 0 or (np.diff(ends) < 0).any() or ends[-1] > (data.size if data else 0):
        raise pyarrow.ArrowInvalid("images lie outside of it")
    there = np.ones(count, bool)
    for bits in (validity, column.buffers()[0] if nested else None):
        if bits is not None:
            there &= np.unpackbits(body.read(bits, np.uint8, -(-count // 8)), count=count, bitorder="little").astype(
                bool
            )
    start = body.place(data) if data else 0
    return start + ends[:-1], np.where(there, np.diff(ends), _NO_IMAGE)


def _labels(body: _Body, column: pyarrow.Array) -> pyarrow.Array:
    """The labels themselves."""
    buffers = [one and pyarrow.py_buffer(body.read(one, np.uint8, one.size)) for one in column.buffers()]
    labels = pyarrow.Array.from_buffers(column.type, len(column), buffers)
    labels.validate(full=True)
    return labels
