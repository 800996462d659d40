"""The one seam through which tests make the file system fail.

Code that must survive a full disk or a kill calls `point(name)` before each write, fsync, rename and unlink. It does
nothing unless a test has put a callback in place with `inject`, which may raise an OSError or kill the process."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_callback: Callable[[str], None] | None = None


def point(name: str) -> None:
    """Announce the operation that comes next, for example "fsync model.safetensors"."""
    if _callback is not None:
        _callback(name)


@contextmanager
def inject(callback: Callable[[str], None]) -> Iterator[None]:
    """Call `callback` with the name of every point reached inside the `with` block."""
    global _callback
    previous, _callback = _callback, callback
    try:
        yield
    finally:
        _callback = previous
