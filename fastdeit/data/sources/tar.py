"""Tar shards in the WebDataset layout, read in any order.

A sample is the members of one shard that share a key, the name up to the first dot of its last part: `0001.jpg` with
`0001.cls` (a class number or name) or `0001.json` (an object with one of them in a field). Where that leaves no image,
as in `cat.1.jpg` with `cat.1.cls`, keys go up to the last dot. The headers of all shards are read once; offset and size
of every image then make each a `pread`. That list is kept (`shards.cached`), and made anew when a shard has changed.

Nothing is ever extracted. Members that no well-formed shard has (links, absolute names, `..`, a name that comes twice)
are left out with a reason, as are samples without a label; hidden files and the like without one. A file that is
several tar files one behind the other is read to its end.
"""

import json
import os
import re
import tarfile
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastdeit.data.sources.faults import of_file
from fastdeit.data.sources.index import Listed, Strings, digest, read_image_in, read_range, text_array
from fastdeit.data.sources.kinds import Columns, Kind
from fastdeit.data.sources.names import is_litter
from fastdeit.data.sources.scan import scanned
from fastdeit.data.sources.shards import TAR as SHARD
from fastdeit.data.sources.shards import Index, Skipped, any_of, cached, listed_in, of_split, stored
from fastdeit.data.sources.source import EXTENSIONS, MAX_LABEL, DataError, class_numbers, is_no_class

_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_WHOLE = re.compile(r"[+-]?\d+", re.ASCII)
_IMAGES = tuple(extension[1:] for extension in EXTENSIONS)
_CACHE_FORMAT = "5"
_LABEL_FIELD = "label"
_LABEL_BYTES = 1 << 20
_NAME_LENGTH = 200
_SHOWN = 3
_WORD = {int: "number", str: "name"}
_BLOCK = 512
_CHUNK = 1 << 20
_MAX_HEADER = 1 << 20
_ABOUT_THE_NEXT = {
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
}


class Header(tarfile.TarInfo):
    """A header of a tar file. ReadError for one that says more of the next file than anybody has to say: Python keeps
    that in memory, and a packed or sparse file may have gigabytes of it."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        """The method that tarfile names for those who add types of headers."""
        if self.type in _ABOUT_THE_NEXT and self.size > _MAX_HEADER:
            raise tarfile.ReadError(f"a header at byte {self.offset} has {self.size:,} bytes")
        return super()._proc_member(archive)


class Member(NamedTuple):
    """A file in a tar file, with its place there in bytes."""

    name: str
    offset: int
    size: int


class TarSource(Listed):
    """The images of `shards`, paths relative to `root`, in the order of shards and members. A sample is called
    SHARD:MEMBER.

    label_field: field of `.json` members that holds the class number or name, FIELD.FIELD of an object in a field.
    Classes are the sorted names; where labels are numbers, these, 0 to the largest. Raises DataError where no shard has
    a usable sample; warns of what was left out, and lists it in `skipped`.
    """

    def __init__(self, root: str | Path, shards: Sequence[str], label_field: str = _LABEL_FIELD) -> None:
        self._shards = list(shards)
        key = digest([_CACHE_FORMAT, label_field, *shards])
        index = cached(Path(root), self._shards, "tar", key, lambda: _index(Path(root), self._shards, label_field))
        self._shard, self._offset, self._size = index["shard"], index["offset"], index["size"]
        nothing = (
            f"no image with a label in {len(shards)} tar file{'s' if len(shards) > 1 else ''}; a sample is KEY.jpg "
            f"with KEY.cls (a class number or name) or KEY.json (with field {label_field!r}); unpack tar files whose "
            "folders, or whose own names, say the classes"
        )
        names, skipped = listed_in(index, root, "entries of tar files", nothing)
        named = list(Strings(index["classes"].tobytes()))
        if len(named) == 1:
            raise DataError(f"{root}: every label is {named[0]!r}; classification needs two or more classes")
        classes = named or class_numbers(index["label"], root)
        fingerprint = digest(names.blob, index["label"], self._size, *([named] if named else []))
        super().__init__(classes, names, index["label"], fingerprint, skipped, root=root)

    def read(self, index: int) -> NDArray[np.uint8]:
        """The encoded image `index`: uint8 `[n]`. BadImage if the tar file was cut meanwhile."""
        shard = os.path.join(self._root, self._shards[self._shard[index]])
        return read_image_in(shard, int(self._offset[index]), int(self._size[index]), "tar")


def shards(root: str | Path, pattern: str) -> list[str]:
    """Paths relative to `root` of the tar files that `pattern` means: a folder (all `*.tar` in it), a name with
    `{0000..0127}` or `{a,b}`, a glob, or a word of their names (`train` for train-0001.tar and set-train-0001.tar).
    Sorted where the pattern gives no order; DataError if there is none, or a numbered one is missing."""
    root = Path(root)
    found = []
    for part in _braces(pattern):
        files = of_split(root, part, SHARD) if root.is_dir() else []
        if not files:
            what = part if part.endswith(".tar") else f"{part}/*.tar or {part}-*.tar"
            raise DataError(
                f"{root}: no tar file {what}; give the folder of the shards, or their names as in "
                "train-{0000..0127}.tar"
            )
        found += files
    return found


def _braces(pattern: str) -> list[str]:
    """`a{00..02}` -> a00, a01, a02; `{x,y}` -> x, y; leading zeros are kept."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    first, last, words = match.groups()
    items = words.split(",") if words else [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
    return [rest for item in items for rest in _braces(pattern[: match.start()] + item + pattern[match.end() :])]


def _index(root: Path, shards: list[str], label_field: str) -> Index:
    found = list(scanned([os.path.join(root, shard) for shard in shards], partial(_listed, label_field)))
    labels = [label for _, _, inside, _ in found for label in inside]
    names = [f"{shard}:{name}" for shard, (inside, *_) in zip(shards, found, strict=True) for name in inside]
    places = np.hstack([np.empty((2, 0), np.int64), *(place for _, place, _, _ in found)])
    shard = np.repeat(np.arange(len(shards)), [len(inside) for inside, *_ in found])
    skipped = [one for *_, left_out in found for one in left_out]
    kind = str if sum(isinstance(label, str) for label in labels) > len(labels) / 2 else int
    kept = np.array([isinstance(label, kind) for label in labels], bool)
    skipped += [
        (
            os.path.join(root, names[at]),
            f"its label {labels[at]!r} is a {_WORD[type(labels[at])]}, most are {_WORD[kind]}s",
        )
        for at in np.flatnonzero(~kept)
    ]
    wanted = [label for label in labels if isinstance(label, kind)]
    classes = sorted(set(wanted)) if kind is str else []
    number = {name: at for at, name in enumerate(classes)}
    return {
        "shard": shard[kept],
        "offset": places[0, kept],
        "size": places[1, kept],
        "label": np.array([number.get(label, label) for label in wanted], np.int64),
        "classes": text_array(Strings.of(classes).blob),
        **stored((name for name, usable in zip(names, kept, strict=True) if usable), skipped),
    }


def _listed(label_field: str, path: str) -> tuple[list[str], NDArray[np.int64], list[int | str], Skipped]:
    """What `_samples` finds in a shard, as names, places int64 `[2, n]` and labels, and what it leaves out."""
    skipped: Skipped = []
    samples = list(_samples(label_field, path, skipped))
    places = np.array([(image.offset, image.size) for image, _ in samples], np.int64).reshape(-1, 2).T
    return [image.name for image, _ in samples], places, [label for _, label in samples], skipped


def _samples(label_field: str, path: str, skipped: Skipped) -> Iterator[tuple[Member, int | str]]:
    """Every image of a shard with its label."""
    groups: dict[str, dict[str, Member]] = {}
    for member in members(path, skipped):
        parts = [part for part in member.name.split("/") if part not in ("", ".")]
        if any(map(is_litter, parts)):
            continue
        match = _KEY.fullmatch("/".join(parts))
        if match is None:
            skipped.append((f"{path}:{member.name}", "the name is not KEY.EXTENSION"))
            continue
        key, extension = match.group(1), match.group(2).lower()
        group = groups.setdefault(key, {})
        if extension in group:
            skipped.append((f"{path}:{member.name}", "an earlier file in the tar file has this name"))
        else:
            group[extension] = member
    for key, group in _with_dots_in_keys(groups):
        images = [group[extension] for extension in group if extension in _IMAGES]
        if len(images) != 1:
            found = " and ".join(repr(image.name) for image in images) or f"only {', '.join(sorted(group))}"
            skipped.append((f"{path}:{key}", f"a sample has one image; here is {found}"))
            continue
        try:
            yield images[0], _label(path, group, label_field)
        except _NoLabel as error:
            skipped.append((f"{path}:{images[0].name}", str(error)))


def _with_dots_in_keys(groups: dict[str, dict[str, Member]]) -> Iterator[tuple[str, dict[str, Member]]]:
    """(key, members by extension) of `groups`, of which those without an image are split at the last dot instead."""
    for key, group in groups.items():
        if any(extension in _IMAGES for extension in group) or not any(
            extension.endswith(EXTENSIONS) for extension in group
        ):
            yield key, group
            continue
        split: dict[str, dict[str, Member]] = {}
        for extension, member in group.items():
            inner, dot, last = extension.rpartition(".")
            split.setdefault(key + dot + inner, {})[last] = member
        yield from split.items()


class _NoLabel(Exception):
    """Why a sample has no label."""


def _label(path: str, group: dict[str, Member], label_field: str) -> int | str:
    """The class number or name of a sample."""
    extension = "cls" if "cls" in group else "json"
    member = group.get(extension)
    if member is None:
        raise _NoLabel("there is no .cls and no .json file with its label")
    if member.size > _LABEL_BYTES:
        raise _NoLabel(f"its .{extension} file has {member.size} bytes, too many for a label")
    data = read_range(path, member.offset, member.size).tobytes()
    try:
        value = data.decode() if extension == "cls" else _field(json.loads(data), label_field)
        label = _number_or_name(value)
    except (ValueError, TypeError, KeyError, RecursionError):
        want = "a class number or name" if extension == "cls" else f"an object with field {label_field!r}"
        raise _NoLabel(f"its .{extension} file is not {want}: {data[:40]!r}") from None
    if isinstance(value, dict):
        parts = " or ".join(f"data.label_column={label_field}.{key}" for key in list(value)[:_SHOWN])
        raise _NoLabel(f"its label is an object; say which field of it is meant by {parts}")
    if label is None or (isinstance(label, int) and not 0 <= label <= MAX_LABEL):
        raise _NoLabel(f"its label {value if label is None else label!r} is not a class number (0 to {MAX_LABEL})")
    return label


def _field(found: Any, name: str) -> Any:
    """The value of a field, or of FIELD.FIELD in an object that is in a field."""
    if name not in found and "." in name:
        outer, _, inner = name.partition(".")
        return _field(found[outer], inner)
    return found[name]


def _number_or_name(value: object) -> int | str | None:
    """A whole number as such, also where it is written as text; other text in one line, as a name; None of the rest.
    ValueError for text that is neither."""
    if not isinstance(value, str):
        return value if type(value) is int else None
    text = value.strip()
    if _WHOLE.fullmatch(text):
        return int(text)
    if not 0 < len(text) <= _NAME_LENGTH or not text.isprintable() or is_no_class(text):
        raise ValueError(f"{text!r} is neither a class number nor a name")
    return text


def members(path: str, skipped: Skipped, start: int = 0, stop: int | None = None) -> Iterator[Member]:
    """The regular files of a tar file that lie wholly inside it; what is wrong with it goes to `skipped`.

    start, stop: where it begins and ends in the file at `path`, if it is a member of another tar file.
    """
    at: int | None = start
    try:
        length = os.path.getsize(path) if stop is None else stop
        if not os.path.isfile(path):
            raise tarfile.ReadError("it is not a regular file")  # opening a pipe would wait for ever
        with open(path, "rb") as file:
            while at is not None:
                end = yield from _archive(file, path, at, length, skipped)
                closing = read_range(path, end, min(_BLOCK, length - end))
                if len(closing) < _BLOCK or closing.any():
                    skipped.append((path, f"the tar file is cut short or damaged at byte {end} of {length}"))
                    return
                at = _next_archive(path, end, length)
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        if isinstance(error, OSError) and not of_file(error):
            raise
        skipped.append((path, _why_not(path, start, error)))


def _archive(file: BinaryIO, path: str, start: int, length: int, skipped: Skipped) -> Generator[Member, None, int]:
    """The regular files of the archive that starts at byte `start` of `file`; returns the byte at which it ends."""
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:", tarinfo=Header) as archive:
        end = start
        while end < length and (info := archive.next()) is not None:
            archive.members.clear()  # tarfile keeps every header it has read
            if archive.offset <= end:
                raise tarfile.ReadError(f"the header at byte {info.offset} has a negative size")
            end = archive.offset
            reason = _unusable(info, length)
            if reason:
                skipped.append((f"{path}:{info.name}", reason))
            elif info.isreg():
                yield Member(info.name, info.offset_data, info.size)
    return min(end, length)


def _next_archive(path: str, end: int, length: int) -> int | None:
    """Where behind the zeros that end an archive another one starts, as in `cat a.tar b.tar`; None if none does."""
    for at in range(end, length, _CHUNK):
        found = np.flatnonzero(read_range(path, at, min(_CHUNK, length - at)))
        if len(found):
            return (at + int(found[0])) // _BLOCK * _BLOCK
    return None


def _unusable(info: tarfile.TarInfo, length: int) -> str | None:
    if info.isdir():
        return None
    if not info.isreg() or info.issparse():
        return "not a regular file (a link, a device or a sparse file)"
    if info.name.startswith("/") or ".." in info.name.split("/") or "\0" in info.name:
        return "the name is absolute, leads upwards or contains a NUL"
    if info.offset_data + info.size > length:
        return f"the tar file is cut short: it ends at byte {length}, inside this file"
    return None


def _why_not(path: str, at: int, error: Exception) -> str:
    try:
        start = read_range(path, at, 6).tobytes()
    except OSError as refused:
        return f"the tar file cannot be read: {refused.strerror}"
    packers = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
    packer = next((name for magic, name in packers.items() if start.startswith(magic)), None)
    if packer:
        return f"compressed with {packer}; only a plain tar file can be read in any order, so uncompress it"
    return f"not a tar file, or one that is cut short or damaged: {error}"


def _open(root: Path, split: str, columns: Columns) -> TarSource:
    if columns.image is not None:
        raise DataError(
            f"data.image_column={columns.image}: a tar file has no such column; it recognises its images by their "
            "extensions (data.label_column names the field of KEY.json that holds the label)"
        )
    return TarSource(root, shards(root, split), columns.label or _LABEL_FIELD)


TAR = Kind(
    "tar",
    _open,
    "ROOT/{train}/*.tar and ROOT/{val}/*.tar, or ROOT/{train}-*.tar and ROOT/{val}-*.tar, with KEY.jpg and KEY.cls or "
    "KEY.json in them",
    lambda root, train, val: any_of(root, train, SHARD),
    (".tar",),
    numbered=True,
    columns=True,
)
