"""Images that cannot be used: counted over all processes of a run and over its resumes, and told once.

`BadList` is the list of one split: in memory, and in the file `bad_images.jsonl` of the run directory once there is
one. `BadImages` is what one loader makes of it: it counts what it meets, and raises once they are too many.
"""

import errno
import fcntl
import json
import os
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from fastdeit import jsons
from fastdeit.data.sources.source import DataError, MachineError, Source, itemised
from fastdeit.text import one_line

FILE = "bad_images.jsonl"
OnBad = Callable[[str, str], None]

_LARGEST = 1 << 29  # bytes of the file: those of millions of images
_LISTED = 20
_HANDFUL, _SHARE = 5, 10


class BadList:
    """The images of one split that cannot be used, as (path, reason) by their number.

    split: its name in the file, which has a line {"split", "index", "path", "reason"} for each image. Processes append
    to it one at a time; each sees what the others have found when it finds something itself.
    """

    def __init__(self, split: str) -> None:
        self._split = split
        self._found: dict[int, tuple[str, str]] = {}
        self._file: Path | None = None
        self._read = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._found)

    def entries(self) -> list[tuple[str, str]]:
        """(path, reason) of all."""
        return list(self._found.values())

    def add(self, index: int, path: str, reason: str) -> bool:
        """Enter an image; whether it is new to all processes."""
        with self._lock:
            return self._exchange(index, path, reason) if self._file else self._enter(index, path, reason)

    def keep_in(self, folder: Path) -> None:
        """Share the list with those who keep theirs in `folder`, and take up what is in the file already. Where there
        is no such folder, as on a machine that does not see the run directory, it stays this process's own."""
        with self._lock:
            if folder.is_dir():
                self._file = folder / FILE
                self._exchange()

    def refresh(self) -> None:
        """Take up what other processes have found since."""
        with self._lock:
            if self._file:
                self._exchange()

    def mended(self, source: Source, fault: Callable[[int], str | None]) -> list[str]:
        """Strike out those images that `fault` finds nothing wrong with any more; their paths. For one process, while
        no other has opened the list."""
        with self._lock:
            kept = {
                index: (one_line(source.path(index)), reason)  # the data set may have been moved meanwhile
                for index, (_, reason) in self._found.items()
                if index < len(source) and fault(index) is not None
            }
            gone = [path for index, (path, _) in self._found.items() if index not in kept]
            self._found = kept
            if gone and self._file:
                self._rewrite()
            return gone

    def _enter(self, index: int, path: str, reason: str) -> bool:
        if index in self._found:
            return False
        self._found[index] = path, reason
        return True

    def _exchange(self, *entry: int | str) -> bool:
        """Read what others have written, and write `entry` (index, path, reason) if it is new. No file without one."""
        if not entry and not self._file.exists():
            return False
        try:
            with open(os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644), "r+b", buffering=0) as file:
                with suppress(OSError):  # a file system without locks: two may then tell of the same image
                    fcntl.flock(file, fcntl.LOCK_EX)
                if os.fstat(file.fileno()).st_size > _LARGEST:
                    raise OSError(errno.EFBIG, f"it has more than {_LARGEST >> 20} MiB")
                self._take_up(file)
                new = bool(entry) and self._enter(*entry)
                if new:
                    file.write(self._line(*entry))
                    self._read = file.tell()
                return new
        except OSError as error:
            raise MachineError(
                f"{self._file}: the list of images that cannot be used cannot be kept: {error.strerror or error}"
            ) from error

    def _take_up(self, file: BinaryIO) -> None:
        file.seek(self._read)
        data = file.read()
        self._read += len(data)
        for line in data.splitlines():
            with suppress(ValueError, TypeError, KeyError):  # a line that was cut when a process was killed
                entry = jsons.parsed(line)
                if entry["split"] == self._split:
                    self._enter(int(entry["index"]), str(entry["path"]), str(entry["reason"]))
        if data and not data.endswith(b"\n"):
            self._read += file.write(b"\n")

    def _rewrite(self) -> None:
        others = []
        for line in self._file.read_bytes().splitlines(keepends=True):
            with suppress(ValueError, TypeError, KeyError):
                others += [line] if jsons.parsed(line)["split"] != self._split else []
        ours = [self._line(index, *found) for index, found in self._found.items()]
        temporary = self._file.with_name(f".tmp-{FILE}")
        temporary.write_bytes(b"".join([*others, *ours]))
        self._read = temporary.stat().st_size
        os.replace(temporary, self._file)

    def _line(self, index: int, path: str, reason: str) -> bytes:
        return json.dumps({"split": self._split, "index": index, "path": path, "reason": reason}).encode() + b"\n"


class BadImages:
    """What a loader of `source` makes of images that cannot be used.

    count: how often it met one; reasons: path to reason of those it met, each once. on_bad(path, reason) is called for
    each image that is new to `shared`, and DataError raised once there are more in it than `max_fraction` allows.
    """

    def __init__(
        self, source: Source, max_fraction: float, on_bad: OnBad | None, shared: BadList | None = None
    ) -> None:
        self.count = 0
        self.reasons: dict[str, str] = {}
        self._source, self._max_fraction = source, max_fraction
        self._shared = BadList("") if shared is None else shared
        self._on_bad = on_bad or _warn
        self._lock = threading.Lock()

    def add(self, index: int, reason: str) -> None:
        """Count sample `index`; report it if it is new, and raise DataError if that makes too many (or all)."""
        path, reason = one_line(self._source.path(index)), one_line(reason)
        with self._lock:
            self.count += 1
            self.reasons.setdefault(path, reason)
        if self._shared.add(index, path, reason):
            self._on_bad(path, reason)
        self.check(len(self._shared))

    def check(self, total: int) -> None:
        """DataError if `total` images of all processes are too many: more than `allowed`, or all."""
        n = len(self._source)
        if total <= allowed(n, self._max_fraction) and (total < n or not n):
            return
        listed = itemised(self._shared.entries(), _LISTED)
        raise DataError(
            f"{total} of {n} images cannot be used, more than max_bad_fraction {self._max_fraction:g} "
            f"allows; repair or delete the files that are damaged, or raise max_bad_fraction:{listed}"
        )


def allowed(images: int, max_fraction: float) -> int:
    """How many of so many images may be bad: `max_fraction` of them; of a small set a tenth, up to a handful, unless
    the fraction is zero. A thousandth of 500 images is none, and one bad file no reason to end a run."""
    if max_fraction == 0:
        return 0
    return max(int(max_fraction * images), min(_HANDFUL, -(-images // _SHARE)))


def _warn(path: str, reason: str) -> None:
    warnings.warn(f"{path} is not used: {reason}", stacklevel=2)
