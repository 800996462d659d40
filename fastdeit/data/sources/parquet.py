"""Image data sets of the Hugging Face hub: Parquet files with a column `image`, a struct of `bytes` and `path` or the
bytes alone, and a column `label` of class numbers or names. The columns may have other names.

Parquet is compressed and encoded by row groups, so that one image costs the reading of its whole group (some hundred
images). The groups used last are kept, up to `_CACHE_BYTES`. That serves evaluation and packing, which go through the
rows in order; for training, which reads in random order, pack the data set first.
"""

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow
from numpy.typing import NDArray
from pyarrow import compute, parquet

from fastdeit import jsons
from fastdeit.data.sources import shards
from fastdeit.data.sources.index import Listed, Strings, digest, read_range
from fastdeit.data.sources.source import (
    MAX_LABEL,
    NO_FLOATS,
    BadImage,
    DataError,
    class_numbers,
    is_no_class,
    listed,
    unreadable,
)

_CACHE_BYTES = 256 << 20
_MAX_GROUP = 4 << 30
"""Bytes of the image column of a row group that may be more than the file has: each image that is read costs memory for
all of them. Encoded images hardly get smaller in a file, so a group that is as large as its file may be larger."""
_MAX_DICTIONARY = 1 << 30  # an array of Arrow's has 2 GiB
_MAX_LABELS = 1 << 30
"""Bytes of the labels of a file. A name of 64 letters for each of 16 million rows."""
_Column = TypeVar("_Column", pyarrow.Array, pyarrow.ChunkedArray)


class ParquetSource(Listed):
    """The rows of `files`, paths relative to `root`, in their order. A sample is called FILE:ROW.

    Class names are those in the Hugging Face metadata, else the values of a text column, else numbers. Raises DataError
    where a file or a column is missing or damaged.
    """

    def __init__(self, root: str | Path, files: Sequence[str], image: str = "image", label: str = "label") -> None:
        self._root, self._files, self._image, self._label = str(root), list(files), image, label
        self._metadata: list[parquet.FileMetaData] = []
        self._groups: list[tuple[int, int]] = []
        columns, lengths, parts = [], [], []
        for number, file in enumerate(self._files):
            metadata, column = self._open(file)
            self._metadata.append(metadata)
            columns.append(column)
            parts.append((file, 0, metadata.num_rows))
            self._groups += [(number, group) for group in range(metadata.num_row_groups)]
            lengths += [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        names = Strings.of_rows(parts)
        if not names:
            raise DataError(f"{root}: no rows in {', '.join(self._files)}")
        self._start = np.cumsum([0, *lengths])
        self._cache: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()
        require_one_type(root, label, self._files, [one.type for one in columns])
        column = pyarrow.chunked_array([chunk for one in columns for chunk in one.chunks], columns[0].type)
        known = hub_names(root, label, dict(zip(self._files, (one.metadata for one in self._metadata), strict=True)))
        labels, classes = class_labels(self._root, label, column, known)
        super().__init__(classes, names, labels, digest(names.blob, labels, classes), root=root)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._root, self._files, self._image, self._label)

    def read(self, index: int) -> NDArray[np.uint8]:
        """The encoded image of row `index`: uint8 `[n]`. BadImage if it has none, or its row group is damaged."""
        group = int(np.searchsorted(self._start, index, "right")) - 1
        try:
            row = self._group(group)[index - int(self._start[group])]
        except pyarrow.ArrowException as error:
            raise BadImage(f"its row group cannot be read: {error}") from error
        data = row["bytes"] if pyarrow.types.is_struct(row.type) else row
        if pyarrow.types.is_dictionary(data.type):
            data = data.value
        if not data.is_valid:
            raise BadImage("the row has no image bytes (data sets that only hold paths cannot be used)")
        return np.frombuffer((data.value if isinstance(data, pyarrow.DictionaryScalar) else data).as_buffer(), np.uint8)

    def _open(self, file: str) -> tuple[parquet.FileMetaData, pyarrow.ChunkedArray]:
        """Metadata and label column of a file."""
        path = os.path.join(self._root, file)
        try:
            with parquet.ParquetFile(_Bytes(path)) as opened:
                schema, metadata = opened.schema_arrow, opened.metadata
                require_columns(path, schema, self._image, self._label)
                self._require_fitting(path, schema, metadata)
            with parquet.ParquetFile(_Bytes(path), metadata=metadata, read_dictionary=[self._label]) as opened:
                labels = opened.read(columns=[self._label]).column(0)
                _require_short(path, self._label, _text_size(labels))
                return metadata, plain_labels(path, self._label, labels)
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError):
                unreadable(error, path)
            raise DataError(f"{path}: the Parquet file cannot be read: {error}") from error

    def _require_fitting(self, path: str, schema: pyarrow.Schema, metadata: parquet.FileMetaData) -> None:
        """DataError for a file of a few bytes that would take gigabytes to read."""
        size = os.stat(path).st_size
        if metadata.num_rows > size:
            raise DataError(
                f"{path}: {metadata.num_rows:,} rows in {size:,} bytes, so most of them hold no image; write the file "
                "anew without them"
            )
        column = _path_of(schema, self._image)
        labels = 0
        for number in range(metadata.num_row_groups):
            labels += _size_of(metadata, number, self._label)
            images = _size_of(metadata, number, column)
            if images > (most := _most(path)):
                raise DataError(
                    f"{path}: column {self._image!r} of row group {number} has {images:,} bytes uncompressed, and each "
                    f"image would cost memory for all of them (more than {most:,} are not read of a file of {size:,}); "
                    "write the file anew with smaller row groups"
                )
        _require_short(path, self._label, labels)

    def _group(self, number: int) -> Any:
        """The image column of a row group."""
        with self._lock:
            if number not in self._cache:
                file, group = self._groups[number]
                path = os.path.join(self._root, self._files[file])
                self._cache[number] = _images(path, self._metadata[file], group, self._image)
            self._cache.move_to_end(number)
            while len(self._cache) > 1 and sum(column.nbytes for column in self._cache.values()) > _CACHE_BYTES:
                self._cache.popitem(last=False)
            return self._cache[number]


def _images(path: str, metadata: parquet.FileMetaData, group: int, image: str) -> pyarrow.ChunkedArray:
    """The image column of a row group, in memory that the size of the group's pages bounds. BadImage where it has more
    than `_most` bytes."""
    most = _most(path)
    column = _path_of(metadata.schema.to_arrow_schema(), image)
    small = _size_of(metadata, group, column) <= _MAX_DICTIONARY
    with parquet.ParquetFile(
        _Bytes(path),
        metadata=metadata,
        page_checksum_verification=True,
        # An image of many rows that the file has once is in memory once.
        read_dictionary=[column] if small else [],
    ) as opened:
        if small:
            return opened.read_row_group(group, columns=[column], use_threads=False).column(0)
        rows, size = [], 0
        for row in opened.iter_batches(1, row_groups=[group], columns=[column], use_threads=False):
            rows.append(row.column(0))
            size += row.nbytes
            if size > most:
                raise BadImage(f"its row group has more than {most:,} bytes of images; write smaller row groups")
    return pyarrow.chunked_array(rows)


def _most(path: str) -> int:
    """Bytes of images that a row group of the file may have."""
    return max(_MAX_GROUP, 2 * os.stat(path).st_size)


def _path_of(schema: pyarrow.Schema, image: str) -> str:
    """What Parquet calls the column of the images' bytes."""
    return f"{image}.bytes" if pyarrow.types.is_struct(schema.field(image).type) else image


def _size_of(metadata: parquet.FileMetaData, group: int, column: str) -> int:
    """Bytes of the uncompressed pages of a column."""
    there = metadata.row_group(group)
    columns = map(there.column, range(there.num_columns))
    return sum(one.total_uncompressed_size for one in columns if one.path_in_schema == column)


def _text_size(labels: pyarrow.ChunkedArray) -> int:
    """Bytes of the labels, each for itself, though a dictionary may hold them once."""
    if not pyarrow.types.is_dictionary(labels.type):
        return labels.nbytes
    lengths = [(compute.binary_length(one.dictionary.cast(pyarrow.binary())), one.indices) for one in labels.chunks]
    return sum(compute.sum(each.take(indices).cast(pyarrow.int64())).as_py() or 0 for each, indices in lengths)


def _require_short(path: str, label: str, size: int) -> None:
    if size > _MAX_LABELS:
        raise DataError(
            f"{path}: column {label!r} has {size:,} bytes, more than labels can have ({_MAX_LABELS:,}); say by "
            "data.label_column=NAME which column holds them"
        )


class _Bytes(io.RawIOBase):
    """A file for Arrow, every read of which is a `read_range`: errors are judged as those of all readers."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path, self._at, self._end = path, 0, os.stat(path).st_size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._end}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        data = read_range(self._path, self._at, None if size < 0 else size).tobytes()
        self._at += len(data)
        return data


def require_columns(path: str, schema: pyarrow.Schema, image: str, label: str) -> None:
    """DataError unless a file has one column `image`, of images, and one column `label`, of numbers or names."""
    names = schema.names
    missing = [(field, name) for field, name in (("image", image), ("label", label)) if name not in names]
    if missing:
        options = " and ".join(f"data.{field}_column={_likely(schema, field)}" for field, _ in missing)
        raise DataError(
            f"{path}: no column {' and no column '.join(name for _, name in missing)}; there are {names}: name "
            f"the right one by {options}"
        )
    if names.count(image) + names.count(label) > 2:
        raise DataError(f"{path}: column {image} or {label} is there twice; there are {names}")
    if not _holds_images(schema.field(image).type):
        raise DataError(f"{path}: column {image} is no struct of bytes and path, but {schema.field(image).type}")
    plain_labels(path, label, pyarrow.nulls(0, schema.field(label).type))


def _likely(schema: pyarrow.Schema, field: str) -> str:
    """The only column that may be meant, else NAME."""
    images = {one.name for one in schema if _holds_images(one.type)}
    found = images if field == "image" else set(schema.names) - images
    return found.pop() if len(found) == 1 else "NAME"


def _holds_images(kind: pyarrow.DataType) -> bool:
    if pyarrow.types.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and _is_bytes(kind[at].type)
    return _is_bytes(kind)


def _is_bytes(kind: pyarrow.DataType) -> bool:
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind) or pyarrow.types.is_binary_view(kind)


def _is_text(kind: pyarrow.DataType) -> bool:
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)


def plain_labels(root: str | Path, label: str, column: _Column) -> _Column:
    """A column of class numbers as int64, of names as strings, in whatever width or form they are stored: dictionaries,
    large strings, views, bytes. DataError where it holds anything else."""
    kind = column.type
    if pyarrow.types.is_dictionary(kind):
        if isinstance(column, pyarrow.DictionaryArray):  # Arrow does not cast one whose values are views
            return plain_labels(root, label, column.dictionary).take(column.indices)
        column, kind = column.cast(kind.value_type), kind.value_type
    if not (pyarrow.types.is_integer(kind) or _is_text(kind) or _is_bytes(kind)):
        way_out = f"; {NO_FLOATS}" if pyarrow.types.is_floating(kind) else ""
        raise DataError(f"{root}: column {label!r} holds {kind}, not class numbers or names{way_out}")
    try:
        return column.cast(pyarrow.int64() if pyarrow.types.is_integer(kind) else pyarrow.string())
    except pyarrow.ArrowException as error:
        raise DataError(f"{root}: column {label!r} holds {kind} that are no class numbers or names: {error}") from error


def require_one_type(root: str | Path, label: str, files: Sequence[str], kinds: Sequence[pyarrow.DataType]) -> None:
    """DataError where labels are numbers in one file and names in another."""
    for file, kind in zip(files, kinds, strict=True):
        if kind != kinds[0]:
            raise DataError(
                f"{root}: column {label!r} is of different types in {files[0]} ({kinds[0]}) and {file} ({kind}); write "
                "the files anew with one of them"
            )


def class_labels(
    root: str | Path, label: str, column: pyarrow.ChunkedArray, names: Sequence[str] | None
) -> tuple[NDArray[np.int64], list[str]]:
    """(labels, class names) of a column `label` (`plain_labels`); names: of class 0, 1, ..., if they are known. Raises
    DataError where a row has no label, or one that is no class number."""
    if column.null_count:
        raise DataError(f"{root}: {column.null_count} rows have no {label!r}; remove them")
    if pyarrow.types.is_string(column.type):
        classes, labels = np.unique(column.to_pylist(), return_inverse=True)
        wrong = [name for name in classes.tolist() if is_no_class(name) or not name.strip()]
        if wrong:
            raise DataError(
                f"{root}: column {label!r} holds {listed(wrong)}, which is neither a class number nor a name; remove "
                "the rows without a label, and write numbers as numbers"
            )
        return labels, classes.tolist()
    labels = column.to_numpy()
    if labels.min() < 0 or labels.max() > MAX_LABEL:
        raise DataError(
            f"{root}: column {label!r} has labels from {labels.min()} to {labels.max()}, which are no "
            "class numbers (-1 marks a split without labels)"
        )
    # Names that do not cover the labels are not theirs.
    return labels, list(names) if names and len(names) > labels.max() else class_numbers(labels, root)


def hub_names(root: str | Path, label: str, metadata: Mapping[str, Mapping[bytes, bytes] | None]) -> list[str] | None:
    """Class names in the metadata of schemas, by file, that the `datasets` library wrote. DataError where two files
    have others, or in another order: the numbers of one of them would mean other classes."""
    found = {file: names for file, one in metadata.items() if (names := _names_in(one, label)) is not None}
    first = next(iter(found), None)
    for file, names in found.items():
        if names != found[first]:
            raise DataError(
                f"{root}: {first} and {file} number their classes differently ({listed(found[first])}; "
                f"{listed(names)}), so that labels mean different classes; write the files anew with one list of names"
            )
    return None if first is None else found[first]


def _names_in(metadata: Mapping[bytes, bytes] | None, label: str) -> list[str] | None:
    try:
        return [str(name) for name in jsons.parsed(metadata[b"huggingface"])["info"]["features"][label]["names"]]
    except (KeyError, TypeError, ValueError):
        return None


def files(root: str | Path, split: str) -> list[str]:
    """Paths relative to `root` of the Parquet files of a split (`shards.of_split`): those of the folder `split`, or
    SPLIT-00000-of-00002.parquet, SPLIT-0000.parquet or SPLIT.parquet in `root` or in its folder data, or a glob.
    DataError if there is none, or one is missing."""
    found = shards.of_split(root, split, shards.PARQUET, shards.HUB_PLACES)
    if not found:
        raise DataError(
            f"{root}: no Parquet file of split {split!r}; looked for {split}/*.parquet, {split}-*.parquet and "
            f"{split}.parquet, also in data/"
        )
    return found
