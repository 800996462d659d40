"""A generator run ahead of its consumer in a thread of its own."""

import threading
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Generic, TypeVar

T = TypeVar("T")

_running: "dict[Prefetch, None]" = {}


class Closed(Exception):
    """`Prefetch.close` was called; ends the thread that waits for the next item."""


class Prefetch(Generic[T], Iterator[T]):
    """Iterator over `items`, produced in a thread at most `depth` ahead.

    An exception in `items` is raised to the consumer after the items before it. `close` wakes and ends the thread,
    whatever it waits for here; where one Prefetch feeds another, close the first before the second.
    """

    def __init__(self, items: Generator[T, None, None], depth: int, name: str) -> None:
        self._items, self._depth = items, depth
        self._ready: deque[T] = deque()
        self._closed = self._finished = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        _running[self] = None
        self._thread.start()

    def __next__(self) -> T:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._finished or self._closed)
            if self._closed:
                raise Closed
            if self._ready:
                self._changed.notify_all()
                return self._ready.popleft()
            if self._error is not None:
                raise self._error
            raise StopIteration

    def close(self) -> None:
        """Stop producing, drop what is ready and wait for the thread, which finishes at most the item it is working
        on."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        error = None
        try:
            with closing(self._items) as items:
                for item in items:
                    if not self._put(item):
                        break
        except BaseException as raised:
            error = raised
        with self._changed:
            self._error, self._finished = error, True
            self._changed.notify_all()
        _running.pop(self)

    def _put(self, item: T) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: len(self._ready) < self._depth or self._closed)
            if not self._closed:
                self._ready.append(item)
                self._changed.notify_all()
            return not self._closed


def close_all() -> None:
    """Close every Prefetch whose thread still runs, in the order in which they were made."""
    for prefetch in list(_running):
        prefetch.close()
