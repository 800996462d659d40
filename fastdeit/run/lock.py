"""The lock of a run directory: `RUN/lock.json`, held by the one process that writes there.

The lock is `flock` on the file: the kernel gives it to one process, and takes it back when that process ends, however
it ends. What stands in the file is for people: {host, pid, since}. So a file that is left behind locks nothing, and
it tells the next owner that the last one died.

flock works on local file systems, and across machines on NFS (Linux 2.6.12 and later), CephFS, GPFS, and Lustre that
is mounted with `flock`. There the server takes the lock of a dead machine back after a time of its own. Where a file
system has no locks, a run goes on without one and says so.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from fastdeit import files, jsons
from fastdeit.engine import _fault
from fastdeit.errors import UsageError

NAME = "lock.json"


@contextmanager
def locked(run_dir: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of the directory `run_dir` for the time of the block.

    Says when the last owner has died, and when there can be no lock. Raises UsageError, with host and process, where
    another process holds it; OSError where the file cannot be written.
    """
    path = run_dir / NAME
    descriptor = _open(path, say)
    try:
        _write(descriptor)
        yield
    finally:
        with suppress(OSError):  # a file that is left behind locks nothing
            path.unlink()  # while the lock is held, so that it cannot be another's
        _held.discard(descriptor)
        os.close(descriptor)


def refuse_owned(run_dir: Path) -> None:
    """Raise UsageError, as `locked` does, where another process holds the lock of the directory now. Nothing is
    written, and nothing is held afterwards."""
    if is_held(run_dir):
        raise _refusal(run_dir / NAME)


def is_held(run_dir: Path) -> bool:
    """Whether a process holds the lock of the directory now, as far as that can be asked."""
    try:
        with files.opened(run_dir / NAME) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # no lock, or none that can be asked
    return False


def _refusal(path: Path) -> UsageError:
    return UsageError(
        f"{path.parent} is being trained by {_describe(_read(path))}; stop that first, or choose another directory "
        "with --run-dir"
    )


def _open(path: Path, say: Callable[[str], None]) -> int:
    """A descriptor of the file at `path`, locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            last = _read(path)
            warning = last and f"{_describe(last)} has died while it trained here; this process takes over"
        except BlockingIOError:
            os.close(descriptor)
            raise _refusal(path) from None
        except OSError as error:
            last = _read(path)
            who = f"; {_describe(last)} may be training here" if last else ""
            warning = f"the file system has no locks ({error.strerror}), so nobody else may train here{who}"
        if _is_still(descriptor, path):
            if warning:
                say(f"{path.parent}: {warning}")
            _held.add(descriptor)
            return descriptor
        os.close(descriptor)  # the owner has ended, and removed the file, since it was opened


def _is_still(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _read(path: Path) -> dict[str, Any] | None:
    """What the owner has written, None where that is nothing."""
    try:
        owner = jsons.read(path)
    except (OSError, ValueError):
        return None
    return owner if isinstance(owner, dict) else None


def _write(descriptor: int) -> None:
    _fault.point(f"write {NAME}")
    owner = {"host": os.uname().nodename, "pid": os.getpid(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(owner).encode() + b"\n", 0)


def _describe(owner: dict[str, Any] | None) -> str:
    if owner is None:
        return "another process"
    return f"process {owner.get('pid')} on {owner.get('host')} (since {owner.get('since')})"


_held: set[int] = set()


def _close_in_child() -> None:
    """A forked child that outlives this process must not keep its locks."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
