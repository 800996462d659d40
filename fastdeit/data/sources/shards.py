"""Data sets in several files: which files a split has, and lists of their samples, kept from one start to the next."""

import fcntl
import glob
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastdeit.cache_folder import cache_folder
from fastdeit.data.sources.index import Strings, atomic, digest, seal, text_array, unseal
from fastdeit.data.sources.notices import is_first, say, say_here
from fastdeit.data.sources.source import DataError, itemised

TFRECORD = re.compile(r"(?P<stem>[^.].*?)(?:-\d+-of-\d+(?:\.tfrecords?)?|\.tfrecords?(?:-\d+-of-\d+)?)")
# The `datasets` library keeps results of `map` and `filter` in files cache-*.arrow beside the data.
ARROW = re.compile(r"(?!cache-)(?P<stem>[^.].*?)(?:-\d+-of-\d+)?\.arrow")
# The hub puts a hash behind the number of some parts.
PARQUET = re.compile(r"(?P<stem>[^.].*?)(?:-\d+-of-\d+(?:-[0-9a-f]{8,})?)?\.parquet")
# ImageNet's archives as downloaded are no shards (`imagenet_tar.py`).
TAR = re.compile(r"(?!ILSVRC2012_img_)(?P<stem>[^.].*?)(?:-\d+-of-\d+)?\.tar")
HUB_PLACES = "", "data"
"""Folders in the root in which Parquet files of the hub lie."""
_NUMBER = re.compile(r"-(\d+)-of-(\d+)")
_LAST_NUMBER = re.compile(r"(.*?)(\d+)", re.DOTALL)
_SHOWN = 5
_COMPLETE = "complete the data set, or name the files that are to be read by a glob"
_PATIENCE_S = 5
_INT64 = (1 << 63) - 1

Index = dict[str, NDArray[np.generic]]
Skipped = list[tuple[str, str]]
"""(path, reason) of what was left out."""


def of_split(root: str | Path, split: str, name: re.Pattern[str], places: Sequence[str] = ("",)) -> list[str]:
    """Paths relative to `root` of the files of a split, in their order; none if there are none.

    split: a folder, of which all files are taken whose names `name` matches; or what its group `stem` is in names of
    files in `places`, folders in `root`: whole or behind a hyphen (TRAIN, DATASET-TRAIN), else as a word of it
    (TRAIN-0001, DATASET-TRAIN-0001). A file or a glob is taken as it is. Raises DataError where of numbered files one
    is missing or there twice.
    """
    root = Path(root)
    if (root / split).is_file():
        return [split]
    if glob.has_magic(split):
        return sorted(path for path in glob.glob(split, root_dir=root) if name.fullmatch(os.path.basename(path)))
    for folder, files in _candidates(root, split, name, places):
        if files:
            return [os.path.join(folder, file) for file in in_order(root / folder, files)]
    return []


def any_of(root: str | Path, split: str, name: re.Pattern[str], places: Sequence[str] = ("",)) -> bool:
    """Whether there is a file of a split that is given by its name."""
    return any(files for _, files in _candidates(Path(root), split, name, places))


def _candidates(
    root: Path, split: str, name: re.Pattern[str], places: Sequence[str]
) -> Iterator[tuple[str, list[re.Match[str]]]]:
    """(folder relative to `root`, its files that may be those of the split)."""
    yield split, _matching(root / split, name)
    word = re.compile(rf"(?:.*[-_.])?{re.escape(split)}(?:[-_.].*)?", re.DOTALL)
    for place in places:
        there = _matching(root / place, name)
        yield place, [one for one in there if f"-{one['stem']}".endswith(f"-{split}")]
        yield place, [one for one in there if re.match(rf"{re.escape(split)}[-_.]", one["stem"])]
        yield place, [one for one in there if word.fullmatch(one["stem"])]


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
    are 0 to COUNT - 1 of one set of files, or, where no name says the count, without a gap."""
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
        raise DataError(f"{folder}: {first} and {second} belong to different sets of files; choose one set by a glob")
    ((which, parts),) = sets.items()
    if which is None:
        _require_no_gap(folder, [match["stem"] for match in files])
        return list(parts.values())
    count = which[1]
    missing = _missing(parts, 0, count)
    if missing or len(parts) > count:
        what = missing or f"{parts[max(parts)]} is one too many"
        raise DataError(f"{folder}: {len(parts)} of {count} files, as {parts[min(parts)]}: {what}; {_COMPLETE}")
    return [parts[number] for number in sorted(parts)]


def _require_no_gap(folder: Path, stems: list[str]) -> None:
    """DataError where of several names that end in a number some between 0 or 1 and the last are missing, though no
    more than are there: where there are more, the number is none of a part."""
    numbers: dict[str, set[int]] = {}
    for stem in stems:
        match = _LAST_NUMBER.fullmatch(stem)
        if match:
            numbers.setdefault(match[1], set()).add(int(match[2]))
    for prefix, found in numbers.items():
        first, last = 0 if 0 in found else 1, max(found)
        if len(found) > 1 and len(found) <= last - first < 2 * len(found):
            raise DataError(f"{folder}: of the files {prefix}NUMBER, {_missing(found, first, last)}; {_COMPLETE}")


def _missing(found: Iterable[int], first: int, stop: int) -> str:
    """Which numbers from `first` to `stop - 1` are not among `found`, in words; "" if none. `stop` may be anything that
    a file name says: the work grows with `found` alone."""
    runs = []
    for number in (*sorted(number for number in found if first <= number < stop), stop):
        if number > first:
            runs.append(str(first) if number == first + 1 else f"{first} to {number - 1}")
        first = number + 1
    if not runs:
        return ""
    shown = ", ".join(runs[:_SHOWN]) + (" and more" if len(runs) > _SHOWN else "")
    return f"number {shown} is missing" if len(runs) == 1 and "to" not in runs[0] else f"numbers {shown} are missing"


def cached(root: Path, files: Sequence[str], kind: str, key: str, build: Callable[[], Index]) -> Index:
    """What `build` lists of `files` (paths relative to `root`), from an earlier start where none of them has changed:
    size, inode and both times, of which that of the last change of the inode cannot be set back.

    It is kept beside the files, or in $FASTDEIT_CACHE (default ~/.cache/fastdeit) where that cannot be written; `key`
    tells apart what is listed differently. Of processes and threads that want it at the same time one builds it, and
    the others wait, on all machines that the locks of the file system reach; where there are none, each builds it.
    DataError if a file is not there.
    """
    try:
        states = [os.stat(root / file) for file in files]
    except OSError as error:
        raise DataError(f"{error.filename}: the {kind} file cannot be read: {error.strerror}") from error
    state = np.array([(one.st_size, one.st_mtime_ns, one.st_ctime_ns, one.st_ino & _INT64) for one in states])
    cache = cache_folder()
    # Beside the files under one name for all machines; elsewhere the name has to tell data sets apart.
    elsewhere = digest([str(root.resolve()), key])
    places = root / f".fastdeit-{kind}-{key}", cache / f"{kind}-{elsewhere}"
    index = _load(places, state)
    if index is None:
        task = f"the samples of {len(files):,} {kind} file{'s' if len(files) > 1 else ''}"
        with _exclusive(places, f"{root}: waiting for another process, which lists {task}") as alone:
            index = _load(places, state)
            if index is None:
                others = "" if alone else ", as does every process, since no file can be locked"
                with _notice_if_slow(f"{root}: listing {task}{others}; later starts read the list"):
                    index = build() | {"state": state}
                _store(places, index, root)
    return index


def _load(places: Sequence[Path], state: NDArray[np.int64]) -> Index | None:
    for place in places:
        try:
            index = unseal(place.read_bytes())
        except (OSError, ValueError):
            continue  # none there, or a damaged one: it is only a cache
        if np.array_equal(index["state"], state):
            return index
    return None


def _store(places: Sequence[Path], index: Index, root: Path) -> None:
    sealed, refused = seal(index), ""
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with atomic(place) as file:
                file.write(sealed)
            return
        except OSError as error:
            refused = f"{place.parent}: {error.strerror}"  # read-only, or full
    say_here(
        f"{root}: the list of samples cannot be kept ({refused}), so that every start makes it anew; set "
        "FASTDEIT_CACHE to a folder that can be written"
    )


@contextmanager
def _exclusive(places: Sequence[Path], waiting: str) -> Generator[bool, None, None]:
    """The block is left to one process or thread at a time with the same `places`: True; False where none of them can
    be locked.

    The lock is on the open file of the list itself, so that it ends with its process, however that ends, and leaves no
    file of its own. A list is replaced and not written over. So a lock may be of one that has been replaced, and two
    may build at once: that costs time, and no list depends on it.
    """
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(place, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:
            continue  # read-only, or full
        with open(handle, "rb"):
            if not _locked(handle, waiting):
                continue
            yield True
        return
    yield False


def _locked(handle: int, waiting: str) -> bool:
    """Lock a file, as soon as nobody else has it; False where the file system has no locks."""
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with _notice_if_slow(waiting):
                fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


@contextmanager
def _notice_if_slow(what: str) -> Generator[None, None, None]:
    """`what` is said on stderr if the block takes long; of the processes of a run, by the first."""
    timer = threading.Timer(_PATIENCE_S, print, (what,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    if is_first("RANK"):
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def stored(names: Iterable[str], skipped: Skipped) -> Index:
    """The part of a list for `cached` that `listed_in` reads."""
    return {"names": text_array(Strings.of(names).blob), "skipped": text_array(json.dumps(skipped).encode())}


def listed_in(index: Index, root: str | Path, what: str, nothing: str) -> tuple[Strings, Skipped]:
    """(names, what was left out) of a list; `told` of them."""
    skipped = [tuple(entry) for entry in json.loads(index["skipped"].tobytes())]
    return told(Strings(index["names"].tobytes()), skipped, root, what, nothing)


def told(names: Strings, skipped: Skipped, root: str | Path, what: str, nothing: str) -> tuple[Strings, Skipped]:
    """Both as they are. A warning says what was left out, which is called `what`. DataError, which says `nothing`,
    where no sample is left."""
    if not names:
        raise DataError(f"{root}: {nothing}{itemised(skipped, _SHOWN)}")
    if skipped:
        say(f"{root}: {len(skipped)} {what} are left out:{itemised(skipped, _SHOWN)}")
    return names, skipped
