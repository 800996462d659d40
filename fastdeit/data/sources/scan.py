"""Many files gone through to list what is in them: in threads, or in processes of their own where there is much to do.

A listing hops from header to header. A disk takes longer for each than the program, so that several files are read at a
time; where the bytes are in memory already, one interpreter is the limit, and only further ones help.

Those are not started by `multiprocessing`: a forked process inherits the locks that threads of this one hold, and a
spawned one runs the caller's main script again, which would have to be written for it. These know nothing of that
script. They get the function by its name and some paths at a time over a socket, and end when it is closed, in whatever
way this process ends.
"""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection, Pipe, wait
from typing import TypeVar

from fastdeit.data.sources.faults import retried
from fastdeit.data.sources.source import DataError, unreadable

Found = TypeVar("Found")

_READERS = 8  # files read at a time by this process
_READERS_EACH = 4  # and by each of several
_MOST_PROCESSES = 16
_MUCH = 8 << 30  # bytes: about 75,000 photographs, almost a second of one core; a process takes 0.2 s to start
_PROCESS = (
    "import sys; sys.path[:] = sys.argv[2:]; from fastdeit.data.sources.scan import serve; serve(int(sys.argv[1]))"
)


def scanned(paths: Sequence[str], scan: Callable[[str], Found], size: int | None = None) -> Iterator[Found]:
    """What `scan` finds in each file, in their order; size: of all together in bytes, where `paths` are parts of a
    file.

    scan: a function of a module that can be imported, or a `functools.partial` of one, whose results can be pickled.
    What it raises is raised here; an OSError as a DataError, after as many tries as it is worth (`faults`). Of the
    processes of a run one lists files (`shards.cached`), so that it alone may warn.
    """
    scan = partial(_patiently, scan)
    processes = min(len(os.sched_getaffinity(0)), _MOST_PROCESSES, -(-len(paths) // _READERS_EACH))
    if processes > 1 and (sum(map(_size, paths)) if size is None else size) >= _MUCH:
        yield from _by_processes(paths, scan, processes)
        return
    with ThreadPoolExecutor(_READERS, "fastdeit-scan") as pool:
        yield from pool.map(scan, paths)


def _patiently(scan: Callable[[str], Found], path: str) -> Found:
    """What `scan` finds in a file. A hiccup of the storage must not leave out a file from a list that is kept."""
    try:
        return retried(partial(scan, path))
    except OSError as error:
        raise DataError(f"{path}: {unreadable(error, path)}") from error


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return 0  # what is wrong with it is for `scan` to say


def _by_processes(paths: Sequence[str], scan: Callable[[str], Found], count: int) -> Iterator[Found]:
    parts = [paths[at : at + _READERS_EACH] for at in range(0, len(paths), _READERS_EACH)]
    waiting, busy, done = iter(range(len(parts))), {}, {}

    def give(process: Connection) -> None:
        number = next(waiting, None)
        if number is not None:
            busy[process] = number
            with suppress(OSError):  # one that has ended is met when it is to answer
                process.send((scan, parts[number]))

    with _processes(count) as processes:
        for process in processes:
            give(process)
        for number, part in enumerate(parts):
            while number in busy.values():
                for process in wait(busy):
                    answered = busy.pop(process)
                    try:
                        found = process.recv()
                    except (EOFError, OSError):
                        warnings.warn("a process that lists files has ended; what it had is listed here", stacklevel=2)
                        continue
                    if found is not None:
                        done[answered] = found
                    give(process)
            # Where `scan` raised in a process, or ended it, it does so again, and this time where it is heard.
            yield from done.pop(number) if number in done else map(scan, part)


@contextmanager
def _processes(count: int) -> Generator[list[Connection], None, None]:
    """Sockets of `count` processes that `serve`, fewer if no more can be started; killed when the block ends."""
    path = [entry for entry in sys.path if isinstance(entry, str)]
    started: list[tuple[subprocess.Popen[bytes], Connection]] = []
    try:
        for _ in range(count):
            ours, theirs = Pipe()
            with theirs:
                process = subprocess.Popen(
                    [sys.executable or "", "-c", _PROCESS, str(theirs.fileno()), *path],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env={**os.environ, "OMP_NUM_THREADS": "1"},  # numpy brings threads for products of matrices
                    start_new_session=True,  # Ctrl-C is for this process, which ends the others
                )
            started.append((process, ours))
    except OSError as error:
        warnings.warn(f"{len(started)} of {count} processes to list files could be started: {error}", stacklevel=4)
    try:
        yield [ours for _, ours in started]
    finally:
        for process, ours in started:
            ours.close()
            process.kill()
        for process, _ in started:
            process.wait()


def serve(handle: int) -> None:
    """Body of such a process: functions with lists of paths arrive at the socket `handle`, and results leave. None
    stands for those of a list in which one of them raised."""
    with Connection(handle) as parent, ThreadPoolExecutor(_READERS_EACH) as pool, suppress(EOFError, OSError):
        while True:
            scan, paths = parent.recv()
            try:
                found = list(pool.map(scan, paths))
            except Exception:
                found = None  # the caller scans these again: its exception needs no way through the socket
            parent.send(found)
