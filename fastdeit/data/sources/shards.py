"""Data sets in several files: which files a split has, and lists of their samples, kept from one start to the next."""

import fcntl
import glob
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastdeit.data.sources.index import atomic, digest, seal, unseal
from fastdeit.data.sources.source import DataError
from fastdeit.text import one_line

TFRECORD = re.compile(r"(?P<stem>[^.].*?)(?:-\d+-of-\d+(?:\.tfrecords?)?|\.tfrecords?(?:-\d+-of-\d+)?)")
# The `datasets` library keeps results of `map` and `filter` in files cache-*.arrow beside the data.
ARROW = re.compile(r"(?!cache-)(?P<stem>[^.].*?)(?:-\d+-of-\d+)?\.arrow")
_NUMBER = re.compile(r"-(\d+)-of-(\d+)")
_SHOWN = 5
_PATIENCE_S = 5

Index = dict[str, NDArray[np.generic]]
Skipped = list[tuple[str, str]]
"""(path, reason) of what was left out."""


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
    tells apart what is listed differently. Of processes and threads that want it at the same time one builds it, and
    the others wait, on all machines that the locks of the file system reach; where there are none, each builds it.
    DataError if a file is not there.
    """
    try:
        states = [os.stat(root / file) for file in files]
    except OSError as error:
        raise DataError(f"{error.filename}: the {kind} file cannot be read: {error.strerror}") from error
    state = np.array([(one.st_size, one.st_mtime_ns) for one in states])
    cache = Path(os.path.expanduser(os.environ.get("FASTDEIT_CACHE") or "~/.cache/fastdeit"))
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
    warnings.warn(
        f"{root}: the list of samples cannot be kept ({refused}), so that every start makes it anew; set "
        "FASTDEIT_CACHE to a folder that can be written",
        stacklevel=4,
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
    if os.environ.get("RANK", "0") == "0":
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def reasons(skipped: Skipped) -> str:
    """The first reasons, a line each, for a message."""
    more = f"\n  and {len(skipped) - _SHOWN} more" if len(skipped) > _SHOWN else ""
    return "".join(f"\n  {one_line(path)}: {one_line(reason)}" for path, reason in skipped[:_SHOWN]) + more
