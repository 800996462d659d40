"""What an error of reading means, and what is done about it: one table for every reader.

An error has one of three answers. What passes is tried again, so that a hiccup of the storage does not change a batch
and replay holds. What the machine lacks stops the run with a sentence, and no file is called bad for it. What is left
is the file's own: training takes a substitute, evaluation goes without it, and both count and report it once.
"""

import errno
import math
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from fastdeit.data.sources.notices import is_first

Result = TypeVar("Result")

_TOLD_S = 5
_told: dict[float, float] = {}
"""When a wait of so many seconds was last told, by `time.monotonic`."""
_telling = threading.Lock()


@dataclass(frozen=True)
class Answer:
    """What is done about an error.

    waits: seconds before each further try; none where it would not help. lacking: what the machine lacks, and what to
    do about it, where no try helps; None where the file is at fault then.
    """

    waits: tuple[float, ...] = ()
    lacking: str | None = None


_FILE = Answer()
# A disk has tried for seconds before it gives up a sector.
_DISK = Answer(waits=(0.1, 0.4, 1.6))
# A server that restarts, or a network that is mended, takes longer, and all files are behind it.
_SERVER = Answer(waits=(0.1, 0.5, 2, 8, 16), lacking="the storage does not answer; see to it")

ANSWERS = {
    errno.EIO: _DISK,
    **dict.fromkeys((errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT), _SERVER),
    **dict.fromkeys((errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOTCONN), _SERVER),
    **dict.fromkeys((errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH), _SERVER),
    errno.EMFILE: Answer(lacking="this process may not open more files; raise its limit with `ulimit -n`"),
    errno.ENFILE: Answer(lacking="this machine has too many files open; close programs, or raise fs.file-max"),
    errno.ENOMEM: Answer(lacking="this machine has no memory left; close programs, or use fewer threads or processes"),
    errno.ENOSPC: Answer(lacking="the disk is full; make room"),
    errno.EDQUOT: Answer(lacking="the disk quota is used up; make room"),
}
"""By the number of the error. Every other error is the file's: it is not there, may not be read, is a folder."""


def answer(error: OSError | MemoryError) -> Answer:
    """What is done about `error`."""
    return ANSWERS.get(errno.ENOMEM if isinstance(error, MemoryError) else error.errno, _FILE)


def of_file(error: OSError) -> bool:
    """Whether `error` tells something of the file alone: another read, or another machine, would meet it too."""
    return answer(error) == _FILE


def retried(call: Callable[[], Result]) -> Result:
    """What `call` returns, or the error that it still raises after as many tries as that error has."""
    tries = 0
    while True:
        try:
            return call()
        except OSError as error:
            waits = answer(error).waits
            if tries >= len(waits):
                raise
            if waits[tries] >= _TOLD_S and (is_first("LOCAL_RANK") or tries + 1 == len(waits)):
                _tell(error, waits[tries])
            time.sleep(waits[tries])
            tries += 1


def _tell(error: OSError, wait: float) -> None:
    """Say that reading fails, by one of the threads that wait for the same storage. Before the last try every process
    says so, before that the first of the machine."""
    with _telling:
        now = time.monotonic()
        if now - _told.get(wait, -math.inf) < wait:
            return
        _told[wait] = now
    print(f"reading fails: {error}; trying again in {wait:g} s", file=sys.stderr, flush=True)
