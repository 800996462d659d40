"""Hung and dead processes of a run are found, named, and ended.

The processes of a run go in step: where one hangs, all others soon wait for it in a collective, and none of them can
tell which one it is. So each has a thread that watches its own main thread. The main thread says where it is
(`Watch.at`), and how often it has said so counts how far it is. When it has said nothing for too long, the thread
writes the stacks of its process to stderr and puts the count into the store. The process with the lowest count, or the
one that has put nothing there, is the one that hangs. Then all end.

Each thread also puts a sign of life into the store. When a collective fails, those without one are dead.

A process that is stopped and continued (a suspended job) does not hang. So it counts its own time, by the turns of a
second thread: a turn that takes far too long is one in which the process did not run.

Two things keep a thread from all that. A store does not answer while the process that keeps it is stopped: the second
thread counts how long, and ends this process. And no thread of Python runs while C code keeps the interpreter's lock: a
timer of faulthandler's, which needs no lock, writes the stacks then and ends the process.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.distributed import Store

from fastdeit.engine.rendezvous import ranks

START_S = 3600.0
"""The time-out until a run has made its first step, while it evaluates, and while it saves: code is compiled then, data
are looked through, and files are written that all others wait for."""
_LIFE_S = 1.0
_LOST_LIVES = 5
"""Signs of life that a process may owe before it counts as dead."""
_LOST_S = _LOST_LIVES * _LIFE_S


def of_collectives(limit_s: float) -> float:
    """Seconds after which a collective gives up where the watch does after `limit_s`: later, as the watch says more."""
    return 1.5 * limit_s


class LostError(RuntimeError):
    """Other processes of the run have ended, or their machines cannot be reached."""


class Watch:
    """Watches the main thread of this process of a run, from `running` on.

    store      a connection for this object alone, with the keys of this attempt
    timeout_s  seconds in which the main thread has to say something, once the run has made a step, and in which the
               store has to answer, but at least `_LOST_S`
    keeper     the process of rank 0 in words, if it keeps the store; None: a launcher does, whose silence alone does
               not end the run
    leave      ends the process with a code
    clock      seconds of a clock that goes on while this process is stopped

    At places that are `patient` START_S counts, if it is longer than `timeout_s`.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        store: Store,
        timeout_s: float,
        *,
        keeper: str | None = None,
        leave: Callable[[int], Any] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self.patient, self._running = True, False
        self._store, self._keeper, self._leave, self._clock = store, keeper, leave, clock
        self._time_s, self._turned, self._stopped_s = 0.0, clock(), 0.0
        self._tick_s, self._answers = min(_LIFE_S, timeout_s / 4), 0
        self._said = (0, "the start", self._time_s, 0.0)
        self._failed: dict[str, Any] | None = None  # the process that has said so
        self._main = threading.get_ident()
        self._end = threading.Event()

    def at(self, place: str, *, patient: bool) -> None:
        """The main thread says that it is at `place` now; costs a microsecond."""
        changed, self.patient = patient != self.patient, patient
        self._said = (self._said[0] + 1, place, self._time_s, self._stopped_s)
        if changed and self._running:
            self._set_timer()  # at once: in the next turn of a thread this one may hold the lock

    def limit_s(self) -> float:
        """Seconds that the main thread may be where it is."""
        patient = self.patient and self._failed is None
        return max(START_S, self.timeout_s) if patient else self.timeout_s

    def fails(self) -> None:
        """Tell the others that this process fails, so that none of them waits for it with the patience of a start.

        The first one counts: those that fail because it has gone do not take its place.
        """
        own = {"rank": self.rank, "host": socket.gethostname(), "pid": os.getpid()}
        with contextlib.suppress(RuntimeError):
            self._store.compare_set("failed", "", json.dumps(own))

    def stopped_s(self) -> float:
        """Seconds that this process was stopped for since the main thread last said where it is."""
        return self._all_stopped_s(self._clock()) - self._said[3]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch for the time of the block."""
        self._turned = self._clock()
        watching = threading.Thread(target=self._watch, daemon=True, name="fastdeit-watch")
        second = threading.Thread(target=self._watch_store, args=[watching], daemon=True, name="fastdeit-watch-store")
        watching.start()
        second.start()
        self._running = True
        try:
            yield
        finally:
            self._running = False
            self._end.set()
            second.join()
            faulthandler.cancel_dump_traceback_later()

    def lost(self) -> str | None:
        """Which other processes are dead, in words; None: all are alive. Takes some seconds."""
        try:
            before = self._lives()
            time.sleep(_LOST_S)
            after = self._lives()
            dead = [rank for rank in range(self.size) if rank != self.rank and before[rank] == after[rank]]
            whose = [json.loads(self._store.get(f"here/{rank}")) for rank in dead]
        except RuntimeError:
            return "the store of the run is gone, and with it rank 0 or the launcher"
        if not dead:
            return None
        named = ", ".join(f"process {each['pid']} on {each['host']}" for each in whose[:8])
        return f"{ranks(dead)} of {self.size} ended or cannot be reached any more ({named})"

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        life = 0
        while not self._end.wait(self._tick_s):
            life += 1
            hangs = self._stays()
            with contextlib.suppress(RuntimeError):  # the store is gone: the main thread will see that
                self._store.set(f"life/{self.rank}", str(life))
                if self._failed is None and self._has(["failed"]):
                    self._failed = json.loads(self._store.get("failed"))
                hangs = self._has(["hangs"]) or hangs  # another one has found that the run hangs
            self._answers += 1
            if hangs:
                self._hangs()
                return

    def _watch_store(self, watching: threading.Thread) -> None:
        """End this process when the store does not answer the thread `watching`, or when no thread of Python runs.

        Turns of this thread are counted, so the time in which this process is stopped as well does not count.
        """
        answers = turns = 0
        while watching.is_alive():
            self._set_timer()
            watching.join(self._tick_s)
            self._turn()
            turns = turns + 1 if answers == self._answers else 0
            answers = self._answers
            seconds = turns * self._tick_s
            if seconds > max(self.timeout_s, _LOST_S) and (self._keeper or (self._stays() and not self._end.is_set())):
                who = f"rank 0 hangs ({self._keeper})" if self._keeper else "the launcher hangs"
                _write(
                    f"fastdeit: {who}: its store has not answered for {seconds:.0f} s, so it is stopped or its machine "
                    "cannot be reached\n"
                    f"fastdeit: rank {self.rank} waited for it in {self._line()}; its stacks:\n{_stacks()}"
                )
                self._leave(1)
                return

    def _set_timer(self) -> None:
        """End this process with its stacks if no thread of Python runs. That is after the others have named this rank:
        they could not, if its store were gone. The timer counts the time in which this process is stopped, so it has
        the patience of the collectives, which do so, too."""
        limit_s = self.limit_s()
        faulthandler.dump_traceback_later(max(of_collectives(limit_s), limit_s + 3 * _LOST_S), exit=True, file=2)

    def _turn(self) -> None:
        """Count the time since the last turn. Of one that took far longer than any should, the process was stopped."""
        now = self._clock()
        self._stopped_s = self._all_stopped_s(now)
        seconds, self._turned = now - self._turned, now
        self._time_s += seconds if seconds <= _LOST_S else self._tick_s

    def _all_stopped_s(self, now: float) -> float:
        since = now - self._turned
        return self._stopped_s + (since if since > _LOST_S else 0.0)

    def _stays(self) -> bool:
        """Whether the main thread has been where it is for too long."""
        return self._time_s - self._said[2] > self.limit_s()

    def _has(self, keys: list[str]) -> bool:
        """Whether the store has all `keys`; that it answers is noted."""
        found = self._store.check(keys)
        self._answers += 1
        return found

    def _lives(self) -> list[bytes | None]:
        keys = [f"life/{rank}" for rank in range(self.size)]
        return [self._store.get(key) if self._store.check([key]) else None for key in keys]

    def _hangs(self) -> None:
        """Say what there is to be said, and end the process."""
        count, place, since, _ = self._said
        seconds = self._time_s - since
        if self._failed is not None:
            who = "rank {rank} (process {pid} on {host})".format(**self._failed)
            _write(
                f"fastdeit: {who} has failed; look for what it has said. Rank {self.rank} waited for it for "
                f"{seconds:.0f} s in {self._line()}\n"
            )
            self._leave(1)
            return
        own = {"count": count, "place": place, "line": self._line(), "host": socket.gethostname(), "pid": os.getpid()}
        with contextlib.suppress(RuntimeError):
            self._store.set("hangs", str(self.rank))
        _write(f"fastdeit: rank {self.rank} has not moved for {seconds:.0f} s; its stacks:\n{_stacks()}")
        culprits = [self.rank]
        with contextlib.suppress(RuntimeError):
            self._store.set(f"hangs/{self.rank}", json.dumps(own))
            found = self._others()
            culprits = hung(found, self.size)
            if self.rank == min(found):
                _write(f"fastdeit: {verdict(found, culprits, self.size, seconds)}\n")
                self._store.set("told", "")
            self._until(["told"])
        if self.rank not in culprits:
            time.sleep(_LIFE_S)  # so that a launcher that tells which rank ended first names the right one
        self._leave(1)

    def _others(self) -> dict[int, Mapping[str, Any]]:
        """What the processes that can still speak have put into the store: they look once in `_LIFE_S` seconds."""
        keys = {rank: f"hangs/{rank}" for rank in range(self.size)}
        self._until(list(keys.values()))
        return {rank: json.loads(self._store.get(key)) for rank, key in keys.items() if self._store.check([key])}

    def _until(self, keys: list[str]) -> None:
        """Wait until the store has all `keys`, or until those who owe them count as dead."""
        end = time.monotonic() + _LOST_S
        while time.monotonic() < end and not self._has(keys):
            time.sleep(0.05)

    def _line(self) -> str:
        frame = sys._current_frames().get(self._main)
        if frame is None:
            return "an unknown line"
        return f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})"


def hung(found: Mapping[int, Mapping[str, Any]], size: int) -> list[int]:
    """The ranks that all others wait for, of what each that can still speak has `found` of itself."""
    silent = [rank for rank in range(size) if rank not in found]
    fewest = min(each["count"] for each in found.values())
    behind = [rank for rank, each in found.items() if each["count"] == fewest]
    return silent or behind


def verdict(found: Mapping[int, Mapping[str, Any]], culprits: list[int], size: int, seconds: float) -> str:
    """One sentence for each rank that hangs."""
    if len(culprits) == size and size > 1:
        lines = "; ".join(f"rank {rank} in {each['line']}" for rank, each in found.items())
        return f"all {size} ranks have been at {found[0]['place']} for {seconds:.0f} s, and none is behind: {lines}"
    told = []
    for rank in culprits:
        each = found.get(rank)
        if each is None:
            told.append(f"rank {rank} hangs: it says nothing at all, so it is stopped or its machine is")
        else:
            where = f"process {each['pid']} on {each['host']}"
            told.append(f"rank {rank} hangs ({where}): at {each['place']} for {seconds:.0f} s, in {each['line']}")
    others = [rank for rank in found if rank not in culprits]
    return "; ".join(told) + f"; {ranks(others)} waited for it" * bool(others)


def _stacks() -> str:
    """The Python stacks of all threads."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


def _write(text: str) -> None:
    """In one piece, so that the stacks of several processes do not mix."""
    os.write(2, text.encode())
