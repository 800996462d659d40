"""TFRecord files of images, read in any order: ImageNet as TensorFlow's scripts write it, and data sets of TFDS.

A file is records one after another,

    8 bytes   length of the data, little-endian     4 bytes   masked CRC-32C of these 8
    ...       data                                  4 bytes   masked CRC-32C of the data

and the data of a record are a `tf.train.Example` in protocol buffers' wire format: a map from names to lists of bytes,
floats or integers. One pass over the files, which skips the images, finds every record and in it the image and the
class number. That list is kept (`shards.cached`), and made anew when a file's size or time of change differs. Lengths
are verified in that pass, data whenever they are read.

Nothing in a record says whether class numbers count from 0 or from 1: scripts descended from Inception's give ImageNet
the numbers 1 to 1000 and keep 0 for a background, TFDS counts from 0. See `TFRecordSource.first`.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from fastdeit.data.sources import shards
from fastdeit.data.sources.faults import of_file
from fastdeit.data.sources.index import Listed, digest, read_at, read_range
from fastdeit.data.sources.kinds import Kind
from fastdeit.data.sources.scan import scanned
from fastdeit.data.sources.source import MAX_LABEL, BadImage, DataError, lines_of

DECIDES = "a file labels.txt beside the records, with a line NUMBER:NAME for each class, says what classes there are"
_CACHE_FORMAT = "1"
_IMAGES = (b"image/encoded", b"image")
_LABELS = (b"image/class/label", b"label")
_TFDS_NAMES, _SLIM_NAMES, _BACKGROUND = "label.labels.txt", "labels.txt", "background"
_SHOWN = 5

_HEADER, _TAIL = 12, 4
_MASK_DELTA = 0xA282EAD8
_WINDOW, _HEAD = 2048, 40
_MAX_RECORD = (1 << 31) - 1  # of any message of protocol buffers
_VARINT, _FIXED_64, _LENGTH_DELIMITED, _FIXED_32 = 0, 1, 2, 5
_FIELD_1, _FIELD_2, _FIELD_1_VARINT = 0x0A, 0x12, 0x08
_BYTES, _INTEGERS = "bytes", "integers"
_WANTED_LENGTHS = frozenset(len(name) for name in (*_IMAGES, *_LABELS))
_LISTS = {0x0A: _BYTES, 0x12: "floats", 0x1A: _INTEGERS}

_Range = tuple[int, int]
"""Of bytes in a file: the first, and the one behind the last."""


class TFRecordSource(Listed):
    """The images of `files`, paths relative to `root`, in the order of files and records. A sample is called
    FILE:RECORD.

    first: the class number that becomes label 0. If None, class names beside the files say it (TFDS' label.labels.txt,
    a name a line, from 0; slim's labels.txt, NUMBER:NAME a line, where a class 0 called background that no image has is
    none); else it is the smallest number in `files` if that is 0 or 1. Where it is larger, classes are taken to count
    from 0, and the attribute `first` is None. Without names, a class is named by its number as it is stored. Raises
    DataError where no file has a usable record; warns of what was left out, and lists it in `skipped`.
    """

    def __init__(self, root: str | Path, files: Sequence[str], first: int | None = None) -> None:
        self._files = list(files)
        key = digest([_CACHE_FORMAT, *files])
        index = shards.cached(Path(root), self._files, "tfrecord", key, lambda: _index(str(root), self._files))
        self._file, self._offset, self._size = index["part"], index["offset"], index["size"]
        self._start, self._length = index["start"], index["length"]
        nothing = (
            f"no image with a label in {len(files)} TFRecord file{'s' if len(files) > 1 else ''}; a record is a "
            "tf.train.Example with image/encoded and image/class/label, or image and label"
        )
        names, skipped = shards.listed_in(index, root, "entries of TFRecord files", nothing)
        labels, classes, self.first = _numbered(str(root), self._files, index["label"], first)
        super().__init__(classes, names, labels, digest(names.blob, labels, self._size), skipped, root=root)

    def read(self, index: int) -> NDArray[np.uint8]:
        """The encoded image `index`: uint8 `[n]`. BadImage if its record was cut, or its checksum does not match."""
        size, start = int(self._size[index]), int(self._start[index])
        path = os.path.join(self._root, self._files[self._file[index]])
        record = read_range(path, int(self._offset[index]), size + _TAIL)
        if len(record) < size + _TAIL:
            raise BadImage("the TFRecord file ends before the record does; it was cut while in use")
        if _masked_crc(record[:size]) != int.from_bytes(record[size:], "little"):
            raise BadImage("its bytes in the TFRecord file have changed (checksum mismatch); copy the file anew")
        return record[start : start + int(self._length[index])]


def files(root: str | Path, split: str) -> list[str]:
    """Paths relative to `root` of the TFRecord files of a split (`shards.of_split`): train-00000-of-01024,
    imagenet2012-train.tfrecord-00000-of-01024, train.tfrecord, or those in the folder train. DataError if there is
    none."""
    found = shards.of_split(root, split, shards.TFRECORD)
    if not found:
        raise DataError(
            f"{root}: no TFRecord file of split {split!r}; looked for {split}-00000-of-00001, "
            f"NAME-{split}.tfrecord-00000-of-00001, {split}.tfrecord and such files in {split}; files of other "
            "names are given by a glob"
        )
    return found


def _index(root: str, files: list[str]) -> shards.Index:
    names, columns, skipped = [], [np.empty((6, 0), np.int64)], []
    paths = [os.path.join(root, file) for file in files]
    for part, (file, (found, left_out)) in enumerate(zip(files, scanned(paths, _listed), strict=True)):
        names += [f"{file}:{record}" for record in found[0].tolist()]
        columns.append(np.vstack((np.full_like(found[0], part), found[1:])))
        skipped += left_out
    types = {"part": np.int32, "offset": np.int64, "size": np.int32, "start": np.int32, "length": np.int32}
    types |= {"label": np.int64}
    return {
        **{key: row.astype(kind) for (key, kind), row in zip(types.items(), np.hstack(columns), strict=True)},
        **shards.stored(names, skipped),
    }


def _listed(path: str) -> tuple[NDArray[np.int64], shards.Skipped]:
    """What `_samples` finds in a file, a row of int64 `[6, n]` each, and what it leaves out."""
    skipped: shards.Skipped = []
    return np.array(list(_samples(path, skipped)), np.int64).reshape(-1, 6).T, skipped


def _samples(path: str, skipped: shards.Skipped) -> Iterator[tuple[int, int, int, int, int, int]]:
    """(number of the record in the file, offset and size of its data, start in them and length of the image, class
    number) of every usable record."""
    try:
        with _Window(path) as window:
            for number, (offset, size) in enumerate(_frames(window)):
                try:
                    yield number, offset, size, *_sample(window, offset, size)
                except _Unusable as error:
                    skipped.append((f"{path}:{number}", str(error)))
    except _Unusable as error:
        skipped.append((path, str(error)))
    except OSError as error:
        if not of_file(error):
            raise
        skipped.append((path, f"the TFRecord file cannot be read: {error.strerror}"))


class _Unusable(Exception):
    """What is wrong with a record, or with the rest of a file."""


class _Window:
    """A file, of which the part read last is in memory, `data` from byte `start` on: the end of one record comes
    with the start of the next."""

    def __init__(self, path: str) -> None:
        # O_NONBLOCK, so that a named pipe is an error and not a wait without end.
        self._handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self.end = os.fstat(self._handle).st_size
        self.data, self.start = b"", 0

    def __enter__(self) -> "_Window":
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._handle)

    def at(self, offset: int, size: int) -> int:
        """Where in `data` the byte at `offset` is; `size` bytes from there are in it, fewer only at the file's end."""
        place = offset - self.start
        if place < 0 or place + size > len(self.data):
            self.data, self.start = read_at(self._handle, offset, max(size, _WINDOW)), offset
            return 0
        return place

    def bytes(self, offset: int, size: int) -> bytes:
        place = self.at(offset, size)
        return self.data[place : place + size]


def _frames(window: _Window) -> Iterator[tuple[int, int]]:
    """(offset, size) of the data of every record; _Unusable where the next one cannot be found."""
    if not window.end:
        raise _Unusable("the TFRecord file is empty")
    offset = 0
    while offset < window.end:
        header = window.bytes(offset, _HEADER)
        if len(header) < _HEADER:
            reason = f"the TFRecord file is cut short: it ends at byte {window.end}, inside a record's length"
            raise _Unusable(reason if offset else _no_start(header))
        size = int.from_bytes(header[:8], "little")
        if _masked_crc(header[:8]) != int.from_bytes(header[8:], "little"):
            raise _Unusable(_damaged(offset, window.end) if offset else _no_start(header))
        start, offset = offset + _HEADER, offset + _HEADER + size + _TAIL
        if offset > window.end:
            raise _Unusable(
                f"the TFRecord file is cut short: it ends at byte {window.end}, inside a record of {size} bytes that "
                f"starts at byte {start}"
            )
        yield start, size


def _masked_crc(data: bytes | NDArray[np.uint8]) -> int:
    """CRC-32C of `data` as TFRecord stores it: rotated and displaced, so that a record may well contain CRCs."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


def _damaged(offset: int, end: int) -> str:
    return (
        f"the TFRecord file is damaged at byte {offset} of {end}: the length of a record does not match its checksum, "
        "so that what comes after it cannot be found"
    )


def _no_start(start: bytes) -> str:
    packers = {b"\x1f\x8b": "gzip", b"\x78\x01": "zlib", b"\x78\x9c": "zlib", b"\x78\xda": "zlib"}
    packer = packers.get(start[:2])
    if packer:
        return f"compressed with {packer}; only a plain TFRecord file can be read in any order, so uncompress it"
    return f"not a TFRecord file, or one that is damaged: it starts with {start!r}"


def _sample(window: _Window, offset: int, size: int) -> tuple[int, int, int]:
    """Start in the record and length of its image, and its class number; _Unusable if it lacks one of them."""
    if size > _MAX_RECORD:
        raise _Unusable(f"a record of {size} bytes is more than a tf.train.Example can have")
    try:
        features = _features(window, offset, offset + size)
    except (IndexError, ValueError):
        raise _Unusable("its data are no tf.train.Example, or a damaged one") from None
    start, stop = _first(_IMAGES, features)
    return start - offset, stop - start, _first(_LABELS, features)


def _first(wanted: Sequence[bytes], features: dict[bytes, Any]) -> Any:
    for name in wanted:
        if name in features:
            if isinstance(features[name], _Unusable):
                raise features[name]
            return features[name]
    there = ", ".join(repr(name.decode(errors="replace")) for name in list(features)[:_SHOWN]) or "none"
    raise _Unusable(f"no feature {' and no feature '.join(name.decode() for name in wanted)}; there are {there}")


def _features(window: _Window, start: int, stop: int) -> dict[bytes, Any]:
    """The features of an Example by name, until those most wanted are found: where images are, class numbers, or the
    _Unusable that says why not; None for what nobody wants. Example: features = 1. Features: map entries = 1."""
    features: dict[bytes, Any] = {}
    for outer, at, last in _fields(window, start, stop):
        while outer == _FIELD_1 and (at := _behind_unwanted(window, at, last, features)) < last:
            tag, entry, after = next(_fields(window, at, last))
            if tag == _FIELD_1:
                _add(window, entry, after, features)
            if _IMAGES[0] in features and _LABELS[0] in features:
                return features
            at = after
    return features


def _behind_unwanted(window: _Window, at: int, last: int, features: dict[bytes, Any]) -> int:
    """Where the first entry at or behind `at` is that may be wanted, or is not of the common form: less than 128 bytes,
    a short name first. Most entries are passed over here, in a fraction of the time that it takes to parse them."""
    place = window.at(at, _HEAD)
    data, shift = window.data, at - place
    edge = min(len(data) - _HEAD, last - shift)
    while place < edge:
        size, length = data[place + 1], data[place + 3]
        if data[place] != _FIELD_1 or data[place + 2] != _FIELD_1 or size > 127 or length > min(size - 2, _HEAD - 4):
            break
        if length in _WANTED_LENGTHS or place + 2 + size > last - shift:
            break
        features[data[place + 4 : place + 4 + length]] = None
        place += 2 + size
    return place + shift


def _add(window: _Window, at: int, after: int, features: dict[bytes, Any]) -> None:
    name, feature = _entry(window, at, after)
    try:
        features[name] = _PARSERS[name](window, name.decode(), feature) if name in _PARSERS else None
    except _Unusable as error:
        features[name] = error


def _entry(window: _Window, at: int, after: int) -> tuple[bytes, _Range]:
    """Name, cut to what a wanted one may have, and place of the feature of a map entry: name = 1, feature = 2. Behind a
    name that nobody wants, nothing is parsed."""
    name, feature = b"", (after, after)
    for tag, start, stop in _fields(window, at, after):
        if tag == _FIELD_1:
            name = window.bytes(start, min(stop - start, _HEAD))
            if name not in _PARSERS:
                break
        elif tag == _FIELD_2:
            feature = start, stop
    return name, feature


def _image(window: _Window, name: str, feature: _Range) -> _Range:
    """Where the only value of a list of bytes is. BytesList: values = 1."""
    values = [
        (at, after) for tag, at, after in _fields(window, *_list(window, name, feature, _BYTES)) if tag == _FIELD_1
    ]
    if len(values) != 1:
        raise _Unusable(f"feature {name} holds {len(values)} values, not one")
    return values[0]


def _label(window: _Window, name: str, feature: _Range) -> int:
    """The only value of a list of integers. Int64List: values = 1, packed into bytes or one by one."""
    values = []
    for tag, at, after in _fields(window, *_list(window, name, feature, _INTEGERS)):
        if tag not in (_FIELD_1, _FIELD_1_VARINT):
            continue
        data, place = window.bytes(at, min(after - at, _HEAD)), 0
        while place < len(data):
            value, place = _varint(data, place)
            values.append(value)
    if len(values) != 1:
        raise _Unusable(f"feature {name} holds {'no' if not values else 'several'} values, not one")
    label = values[0] - (values[0] >> 63 << 64)
    if not 0 <= label <= MAX_LABEL:
        raise _Unusable(f"its label {label} is not a class number (0 to {MAX_LABEL})")
    return label


_PARSERS = {**dict.fromkeys(_IMAGES, _image), **dict.fromkeys(_LABELS, _label)}


def _list(window: _Window, name: str, feature: _Range, kind: str) -> _Range:
    """Where the values of a feature are. Feature: one of BytesList = 1, FloatList = 2, Int64List = 3."""
    lists = [(_LISTS[tag], (at, after)) for tag, at, after in _fields(window, *feature) if tag in _LISTS]
    if not lists:
        raise _Unusable(f"feature {name} holds nothing")
    found, where = lists[-1]
    if found != kind:
        raise _Unusable(f"feature {name} holds {found}, not {kind}")
    return where


def _fields(window: _Window, at: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(tag, start, stop) of the fields of a message in protocol buffers' wire format; ValueError or IndexError if it is
    none."""
    while at < stop:
        place = window.at(at, _HEAD)
        data = window.data
        tag, length = data[place], data[place + 1]
        if tag & 0x87 == _LENGTH_DELIMITED and length < 128:
            start, after = at + 2, at + 2 + length
        else:
            tag, start, after = _long_field(data, place, at)
        if after > stop:
            raise ValueError
        yield tag, start, after
        at = after


def _long_field(data: bytes, place: int, at: int) -> tuple[int, int, int]:
    """As `_fields`, of one field of any wire type that is at `place` in `data`."""
    tag, start = _varint(data, place)
    kind = tag & 7
    if kind == _VARINT:
        stop = _varint(data, start)[1]
    elif kind == _LENGTH_DELIMITED:
        size, start = _varint(data, start)
        stop = start + size
    elif kind in (_FIXED_32, _FIXED_64):
        stop = start + (4 if kind == _FIXED_32 else 8)
    else:
        raise ValueError(kind)
    return tag, at + start - place, at + stop - place


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """(value, where it ends): seven bits a byte, the lowest first, while the eighth bit is set."""
    value = 0
    for count, byte in enumerate(data[place : place + 10]):
        value |= (byte & 127) << 7 * count
        if byte < 128:
            return value & 0xFFFFFFFFFFFFFFFF, place + count + 1
    raise ValueError


def _numbered(
    root: str, files: Sequence[str], numbers: NDArray[np.int64], first: int | None
) -> tuple[NDArray[np.int64], list[str], int | None]:
    """(labels, class names, `TFRecordSource.first`) for class numbers as they are stored."""
    smallest, largest = int(numbers.min()), int(numbers.max())
    if largest == 0:
        raise DataError(f"{root}: every label is 0; classification needs two or more classes")
    path, names = _names(root, files[0], smallest if first is None else first)
    if path:
        first = min(names)
    elif first is None and smallest < 2:
        first = smallest
    begin = first or 0
    classes = [names[number] for number in sorted(names)] if path else [str(one) for one in range(begin, largest + 1)]
    if smallest < begin or largest >= begin + len(classes):
        others = f"{path} names those" if path else "those of the training split are"
        end = f" to {max(names)}" if path else " on"
        raise DataError(
            f"{root}: class numbers from {smallest} to {largest}, but {others} from {begin}{end}; {DECIDES}"
        )
    if len(classes) < 2:
        raise DataError(f"{root}: every label is {smallest}; classification needs two or more classes")
    return numbers - begin, classes, first


def _names(root: str, file: str, first: int) -> tuple[Path | None, dict[int, str]]:
    """The file with the class names, beside the records or in `root`, and these by number; None if there is none."""
    folders = Path(root, file).parent, Path(root)
    places = [folder / name for folder in folders for name in (_TFDS_NAMES, _SLIM_NAMES)]
    path = next((place for place in places if place.exists()), None)
    if path is None:
        return None, {}
    lines = lines_of(path)
    while len(lines) > 1 and not lines[-1]:
        lines.pop()
    numbered = [line.partition(":")[::2] for line in lines] if path.name == _SLIM_NAMES else list(enumerate(lines))
    try:
        numbers = sorted(int(number) for number, _ in numbered)
    except ValueError:
        raise DataError(f"{path}: a line is not NUMBER:NAME; mend or remove it") from None
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))) or numbers[0] < 0:
        raise DataError(f"{path}: the class numbers are not consecutive; mend or remove it")
    names = {int(number): name for number, name in numbered}
    if not all(names.values()) or "\0" in "".join(names.values()):
        raise DataError(f"{path}: a class has no name, or one with a NUL; mend or remove it")
    if first > 0 and names.get(0) == _BACKGROUND and len(names) > 1:
        del names[0]
    return path, names


def _open(root: Path, split: str) -> TFRecordSource:
    return TFRecordSource(root, files(root, split))


def _held_out(training: TFRecordSource, root: Path, split: str) -> TFRecordSource:
    """Held-out records, with classes counted as in the training split: few of them may not have the first class."""
    if training.first is None:
        raise DataError(
            f"{root}: the smallest class number is neither 0 nor 1, so that the classes may count from either; "
            f"{DECIDES}"
        )
    return TFRecordSource(root, files(root, split), training.first)


TFRECORD = Kind(
    "tfrecord",
    _open,
    "ROOT/{train}-00000-of-01024 ... and ROOT/{val}-00000-of-00128 ..., the same as NAME-{train}.tfrecord"
    "-00000-of-01024 ..., or in the folders ROOT/{train} and ROOT/{val}",
    lambda root, train, val: shards.any_of(root, train, shards.TFRECORD),
    (".tfrecord", ".tfrecords", "-00000-of-00001"),
    numbered=True,
    held_out=_held_out,
)
