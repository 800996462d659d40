"""Images that a list names: a CSV, TSV, JSONL or text file, with the path of an image and its label in each line; or
a JSON file, with an array of objects that have both.

Paths are relative to the root of the data set, or absolute, so that images may lie on several disks. A path without its
extension, or without the folder of the split, is completed as one of the first of the list can be.
"""

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdeit.data.sources.folder import FileSource, has_class_folders
from fastdeit.data.sources.index import Strings
from fastdeit.data.sources.kinds import Columns, Kind
from fastdeit.data.sources.names import is_litter
from fastdeit.data.sources.source import (
    EXTENSIONS,
    MAX_LABEL,
    NO_FLOATS,
    DataError,
    class_numbers,
    is_no_class,
    lines_of,
    listed,
    text_of,
)

IMAGE_COLUMNS = (
    *("path", "filepath", "file_path", "image_path", "filename", "file_name", "file", "image", "img"),
    *("image_id", "imageid", "id"),
)
"""What the column of the paths is usually called; the first that there is counts."""
LABEL_COLUMNS = ("label", "class", "class_name", "target", "category", "label_id", "class_id", "breed", "species")
_TABLES = {".csv": ",", ".tsv": "\t"}
_IN_FOLDERS = (*_TABLES, ".jsonl")
_SIGNS = (*_IN_FOLDERS, ".json")
_SUFFIXES = (*_SIGNS, ".txt")
_WHOLE_FLOAT = re.compile(r"\d+\.0*", re.ASCII)

_LOOKED_AT = 1000  # entries of the root
_TRIED = 10
"""Images of a list of which one has to be there; a later one that is not there is a bad file."""

Pairs = list[tuple[int, str, str]]
"""Number of the line, or of the object in an array, path and label of each image."""


class ListSource(FileSource):
    """The images that the file `path` names. Classes are the sorted labels, or numbers where all of them are numbers;
    or those of `training`, by which held-out images are numbered. DataError where a line cannot be used."""

    def __init__(
        self, root: Path, path: Path, columns: Columns, training: "ListSource | None" = None, split: str = ""
    ) -> None:
        self.columns = columns
        pairs = _pairs(path, columns)
        _require_once(root, path, pairs)
        labels, classes = _labels(path, [label for _, _, label in pairs], training)
        before, behind = _completion(root, path, split, [name for _, name, _ in pairs[:_TRIED]])
        super().__init__(root, classes, Strings.of(f"{before}{name}{behind}" for _, name, _ in pairs), labels)


def is_list(name: str) -> bool:
    """Whether a file may be a list of images by its name."""
    return name.endswith(_SIGNS) and not is_litter(name)


def of_split(root: Path, split: str) -> Path:
    """The list of a split: a file, SPLIT.csv, .tsv, .jsonl or .txt, or metadata.csv or .jsonl in the folder SPLIT.
    DataError if there is none, or more than one."""
    places = _places(root, split, _SUFFIXES)
    there = [place for place in places if place.is_file()]
    if len(there) > 1:
        names = [str(place.relative_to(root)) for place in there]
        raise DataError(f"{root}: {' and '.join(names)} may both be the list of split {split!r}; give the file's name")
    if not there:
        raise DataError(f"{root}: no list of split {split!r}; looked for {listed([one.name for one in places], 9)}")
    return there[0]


def _places(root: Path, split: str, suffixes: Iterable[str]) -> list[Path]:
    places = [root / f"{split}{suffix}" for suffix in suffixes]
    places += [root / split / f"metadata{suffix}" for suffix in _IN_FOLDERS]
    return [root / split, *places] if split.endswith(_SUFFIXES) else places


def _pairs(path: Path, columns: Columns) -> Pairs:
    if path.suffix in (".jsonl", ".json"):
        pairs = _of_objects(path, columns)
    elif path.suffix in _TABLES:
        pairs = _of_table(path, columns)
    else:
        pairs = _of_lines(path)
    if not pairs:
        raise DataError(f"{path}: the list names no image")
    wrong = set(filter(is_no_class, {label for _, _, label in pairs}))
    for line, name, label in pairs:
        if not name or not label:
            raise DataError(f"{path}, line {line}: an image has no {'label' if name else 'path'}; mend or remove it")
        if "\0" in name:
            raise DataError(f"{path}, line {line}: {name!r} is no path; mend or remove it")
        if label in wrong:
            way_out = NO_FLOATS if _WHOLE_FLOAT.fullmatch(label) else "mend it"
            raise DataError(f"{path}, line {line}: the label {label!r} is neither a class number nor a name; {way_out}")
    return pairs


def _of_table(path: Path, columns: Columns) -> Pairs:
    separator = _TABLES[path.suffix]
    try:
        reader = csv.reader(io.StringIO(text_of(path), newline=""), delimiter=separator, skipinitialspace=True)
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise DataError(f"{path}: not a table, or a damaged one: {error}") from error
    if not rows:
        return []
    head = [cell.strip() for cell in rows[0][1]]
    other = next((one for one in ",;\t|" if one in head[0]), separator) if len(head) == 1 else separator
    if other != separator:
        raise DataError(f"{path}: its columns are separated by {other!r}; of a {path.suffix} file, by {separator!r}")
    if columns == Columns() and len(head) == 2 and head[0].lower().endswith(EXTENSIONS):
        image, label = 0, 1
    else:
        image, label = _chosen(path, head, columns)
        del rows[0]
    short = next((line for line, row in rows if len(row) <= max(image, label)), None)
    if short is not None:
        raise DataError(f"{path}, line {short}: fewer columns than the first line has; mend or remove it")
    return [(line, row[image].strip(), row[label].strip()) for line, row in rows]


def _of_objects(path: Path, columns: Columns) -> Pairs:
    pairs: Pairs = []
    names: tuple[str, str] | None = None
    for line, text in _objects(path):
        try:
            found = json.loads(text) if isinstance(text, str) else text
            if not isinstance(found, dict):
                raise TypeError(f"it is a {type(found).__name__}")
            if names is None:
                keys = list(found)
                image, label = _chosen(path, keys, columns)
                names = keys[image], keys[label]
            image_path, value = (found[name] for name in names)
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise DataError(
                f"{path}, line {line}: not an object with the fields of the first one: {error!r}"
            ) from error
        pairs.append((line, _text(path, line, image_path), _text(path, line, value).strip()))
    return pairs


def _objects(path: Path) -> Iterator[tuple[int, Any]]:
    """(number of the line, its text) of a file with an object in each, or (number, object) of an array of them."""
    if path.suffix == ".json" and (text := text_of(path).strip())[:1] in ("[", "{"):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            if text.startswith("["):
                raise DataError(f"{path}: not JSON, or damaged: {error}") from error
        else:
            if not isinstance(found, list):
                raise DataError(
                    f"{path}: no array of objects with a path and a label each; write one, as "
                    "frame.to_json(FILE, orient='records') does"
                )
            yield from enumerate(found, 1)
            return
    for line, row in enumerate(lines_of(path), 1):
        if row.strip():
            yield line, row


def _text(path: Path, line: int, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        raise DataError(f"{path}, line {line}: {value!r} is neither a class number nor a name; {NO_FLOATS}")
    if not isinstance(value, str | int) or isinstance(value, bool) or not _is_text(str(value)):
        raise DataError(f"{path}, line {line}: {value!r} is neither a path nor a class name or number")
    return str(value)


def _is_text(value: str) -> bool:
    """False for halves of a character, which JSON can write and no file can be called."""
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return False
    return True


def _of_lines(path: Path) -> Pairs:
    """Lines PATH LABEL; a path may have spaces."""
    pairs: Pairs = []
    for line, row in enumerate(lines_of(path), 1):
        if row.strip():
            name, space, label = row.strip().replace("\t", " ").rpartition(" ")
            if not space:
                raise DataError(f"{path}, line {line}: {label!r} is no line PATH LABEL, with a space between them")
            pairs.append((line, name.strip(), label))
    return pairs


def _chosen(path: Path, head: list[str], columns: Columns) -> tuple[int, int]:
    """Which of the columns `head` are those of paths and labels."""
    lower = [name.lower() for name in head]
    found: list[int] = []
    for field, asked, usual in (("image", columns.image, IMAGE_COLUMNS), ("label", columns.label, LABEL_COLUMNS)):
        at = head.index(asked) if asked in head else None
        if asked is None:
            at = next((lower.index(name) for name in usual if name in lower), None)
        if at is None:
            what = f"no column {asked!r}" if asked else f"no column is known to be that of the {field}s"
            without = (
                "; a list without labels, as of a test set, cannot be the held-out split: data.val=10% holds a share "
                "of the training images out instead"
            )
            raise DataError(
                f"{path}: {what}; the columns are {listed(head, 20)}: name the right one by data.{field}_column=NAME"
                f"{without if field == 'label' else ''}"
            )
        found.append(at)
    return found[0], found[1]


def _require_once(root: Path, path: Path, pairs: Pairs) -> None:
    seen: dict[str, int] = {}
    above = f"{os.path.abspath(root)}/"
    for line, name, _ in pairs:
        place = os.path.normpath(name) if "./" in name or "//" in name else name
        before = seen.setdefault(place.removeprefix(above), line)
        if before != line:
            raise DataError(f"{path}: {name!r} stands in lines {before} and {line}; an image has one label: remove one")


def _labels(path: Path, values: list[str], training: ListSource | None) -> tuple[NDArray[np.int64], Sequence[str]]:
    known = None if training is None else list(training.classes)
    if all(value.isascii() and value.isdigit() for value in values) and known in (None, _numbers(known)):
        most = MAX_LABEL if known is None else len(known) - 1
        # Python makes no number of a text of thousands of digits; the first twenty say that it is too large.
        number = {value: int(value.lstrip("0")[:20] or "0") for value in values}
        if max(number.values()) > most:
            raise DataError(f"{path}: a label is larger than {most}, the largest class number that there can be")
        written = {number[value]: value for value in number}
        twice = next((value for value in number if written[number[value]] != value), None)
        if twice is not None:
            both = listed(sorted([twice, written[number[twice]]]))
            raise DataError(f"{path}: the labels {both} are one number; write it alike")
        labels = np.array([number[value] for value in values], np.int64)
        return labels, class_numbers(labels, path) if known is None else known
    classes = sorted(set(values)) if known is None else known
    if len(classes) < 2:
        raise DataError(f"{path}: every label is {classes[0]!r}; classification needs two or more classes")
    places = {name: at for at, name in enumerate(classes)}
    others = sorted(set(values) - set(classes))
    if others:
        raise DataError(f"{path}: the classes {listed(others)} are not among those of the training images")
    return np.array([places[value] for value in values], np.int64), classes


def _numbers(classes: list[str] | None) -> list[str]:
    return [str(number) for number in range(len(classes or ()))]


def _completion(root: Path, path: Path, split: str, first: Sequence[str]) -> tuple[str, str]:
    """What comes before and behind each path, so that one of the `first` is there."""
    stem = Path(split).name.removesuffix(path.suffix)
    folders = dict.fromkeys(["", *(f"{one}/" for one in (*_between(root, path), stem, f"{stem}_images", "images"))])
    ends = ["", *EXTENSIONS, ".JPEG", ".JPG"]
    for name, folder, end in product(first, folders, ends):
        if (root / f"{folder}{name}{end}").is_file():
            return folder, end
    others = [f"{one}/" for one in _folders(root)]
    for name in first:
        found = [(folder, end) for folder, end in product(others, ends) if (root / f"{folder}{name}{end}").is_file()]
        there = list(dict.fromkeys(folder for folder, _ in found))
        if len(there) > 1:
            raise DataError(f"{path}: its image {name!r} is in {listed(there)}; write the folder into the paths")
        if found:
            return found[0]
    way_out = "write / between folders" if "\\" in first[0] else "paths are relative to that folder, or absolute"
    raise DataError(f"{path}: its first image, {first[0]!r}, is not in {root}; {way_out}")


def _folders(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        found = [entry.name for entry in islice(entries, _LOOKED_AT) if entry.is_dir() and not is_litter(entry.name)]
    return sorted(found)


def _between(root: Path, path: Path) -> list[str]:
    """The folder of the list, where that is not the root."""
    folder = path.parent.relative_to(root).as_posix() if path.is_relative_to(root) else path.parent.as_posix()
    return [] if folder == "." else [folder]


def _open(root: Path, split: str, columns: Columns) -> ListSource:
    return ListSource(root, of_split(root, split), columns, None, split)


def _held_out(training: ListSource, root: Path, split: str) -> ListSource:
    """Held-out images, whose classes are those of the training images: few of them may not show all."""
    return ListSource(root, of_split(root, split), training.columns, training, split)


def _has_list(root: Path, train: str, val: str) -> bool:
    named = any(place.is_file() for place in _places(root, train, _SIGNS))
    # Beside a folder of that name it may be anything.
    named = named or ((root / f"{train}.txt").is_file() and not (root / train).is_dir())
    return named and not has_class_folders(root, train, val)


LIST = Kind(
    "list",
    _open,
    "ROOT/{train}.csv and ROOT/{val}.csv (or .tsv, .jsonl, .json, .txt), with a path and a label in each line",
    _has_list,
    _SIGNS,
    columns=True,
    held_out=_held_out,
)
