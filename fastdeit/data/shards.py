"""Data sets in several files: which files a split has, and lists of their samples, kept from one start to the next."""

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fastdeit.data.index import atomic, digest, seal, unseal
from fastdeit.data.source import DataError

TFRECORD = re.compile(r"(?P<stem>[^.].*?)(?:-\d+-of-\d+(?:\.tfrecords?)?|\.tfrecords?(?:-\d+-of-\d+)?)")
# The `datasets` library keeps results of `map` and `filter` in files cache-*.arrow beside the data.
ARROW = re.compile(r"(?!cache-)(?P<stem>[^.].*?)(?:-\d+-of-\d+)?\.arrow")
_NUMBER = re.compile(r"-(\d+)-of-(\d+)")
_SHOWN = 5
_READERS = 8

Index = dict[str, NDArray[np.generic]]
Skipped = list[tuple[str, str]]
"""(path, reason) of what was left out."""
Row = TypeVar("Row")


def of_split(root: str | Path, split: str, name: re.Pattern[str]) -> list[str]:
    """Paths relative to `root` of the files of a split, in their order; none if there are none.

    split: a folder, of which all files are taken whose names `name` matches; or what its group `stem` is in names of
    files in `root`, whole or behind a hyphen (TRAIN, DATASET-TRAIN). A file or a glob is taken as it is. Where nothing
    is called val, validation is. Raises DataError where of files named NUMBER-of-COUNT one is missing or there twice.
    """
    root = Path(root)
    if (root / split).is_file():
        return [split]
    if glob.has_magic(split):
        return sorted(path for path in glob.glob(split, root_dir=root) if name.fullmatch(os.path.basename(path)))
    for folder, files in _candidates(root, split, name):
        if files:
            return [os.path.join(folder, file) for file in in_order(root / folder, files)]
    return []


def any_of(root: str | Path, split: str, name: re.Pattern[str]) -> bool:
    """Whether there is a file of a split that is given by its name."""
    return any(files for _, files in _candidates(Path(root), split, name))


def _candidates(root: Path, split: str, name: re.Pattern[str]) -> Iterator[tuple[str, list[re.Match[str]]]]:
    """(folder relative to `root`, its files that may be those of the split)."""
    for called in (split, "validation") if split == "val" else (split,):
        yield called, _matching(root / called, name)
        ends = f"-{called}"
        yield "", [one for one in _matching(root, name) if f"-{one['stem']}".endswith(ends)]


def _matching(folder: Path, name: re.Pattern[str]) -> list[re.Match[str]]:
    try:
        files = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DataError(f"{folder}: the folder cannot be listed: {error.strerror}") from error
    return [match for file in sorted(files) if (match := name.fullmatch(file))]


def in_order(folder: Path, files: list[re.Match[str]]) -> list[str]:
    """File names in `folder`, as matches with a group `stem`, those with a number by the number; DataError unless these
    are 0 to COUNT - 1 of one set of files."""
    sets: dict[tuple[str, int] | None, dict[int, str]] = {}
    for match in files:
        numbers = _NUMBER.search(match[0], match.end("stem"))
        number, count = map(int, numbers.groups()) if numbers else (0, 0)
        parts = sets.setdefault((match["stem"], count) if numbers else None, {})
        if numbers and number in parts:
            raise DataError(f"{folder}: {parts[number]} and {match[0]} are the same part of the data set; remove one")
        parts[number if numbers else len(parts)] = match[0]
    if len(sets) > 1:
        first, second, *_ = (next(iter(parts.values())) for parts in sets.values())
        raise DataError(f"{folder}: {first} and {second} are of different sets of files; name one of them by a glob")
    ((which, parts),) = sets.items()
    count = which[1] if which else len(parts)
    missing = [number for number in range(min(count, len(parts) + 1)) if number not in parts]
    if missing or len(parts) > count:
        what = f"number {missing[0]} is missing" if missing else f"{parts[max(parts)]} is one too many"
        raise DataError(
            f"{folder}: {len(parts)} files that say of themselves that there are {count}: {what}; complete the data "
            "set, or name the files that are to be read by a glob"
        )
    return [parts[number] for number in sorted(parts)]


def cached(root: Path, files: Sequence[str], kind: str, key: str, build: Callable[[], Index]) -> Index:
    """What `build` lists of `files` (paths relative to `root`), from an earlier start where none of them has changed.

    It is kept beside the files, or in $FASTDEIT_CACHE (default ~/.cache/fastdeit) where that cannot be written; `key`
    tells apart what is listed differently. DataError if a file is not there.
    """
    try:
        states = [os.stat(root / file) for file in files]
    except OSError as error:
        raise DataError(f"{error.filename}: the {kind} file cannot be read: {error.strerror}") from error
    state = np.array([(one.st_size, one.st_mtime_ns) for one in states])
    cache = Path(os.environ.get("FASTDEIT_CACHE") or Path.home() / ".cache" / "fastdeit")
    # Beside the files under one name for all machines; elsewhere the name has to tell data sets apart.
    elsewhere = digest([str(root.resolve()), key])
    places = root / f".fastdeit-{kind}-{key}", cache / f"{kind}-{elsewhere}"
    for place in places:
        try:
            index = unseal(place.read_bytes())
        except (OSError, ValueError):
            continue  # none there, or a damaged one: it is only a cache
        if np.array_equal(index["state"], state):
            return index
    index = build() | {"state": state}
    sealed = seal(index)
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with atomic(place) as file:
                file.write(sealed)
        except OSError:
            continue  # read-only, or full
        break
    return index


def scanned(paths: Sequence[str], scan: Callable[[str, Skipped], Iterable[Row]]) -> Iterator[tuple[list[Row], Skipped]]:
    """What `scan` finds in each file, and leaves out, in their order. `_READERS` files are read at a time: a listing
    hops from header to header, and a disk takes longer for each than the program."""

    def whole(path: str) -> tuple[list[Row], Skipped]:
        skipped: Skipped = []
        return list(scan(path, skipped)), skipped

    with ThreadPoolExecutor(_READERS, "fastdeit-scan") as pool:
        yield from pool.map(whole, paths)


def reasons(skipped: Skipped) -> str:
    """The first reasons, a line each, for a message."""
    more = f"\n  and {len(skipped) - _SHOWN} more" if len(skipped) > _SHOWN else ""
    return "".join(f"\n  {path}: {reason}" for path, reason in skipped[:_SHOWN]) + more
