"""How far a verb is: a bar, or lines, on stderr."""

import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager


@contextmanager
def shown(what: str) -> Generator[Callable[[int, int], None], None, None]:
    """progress(done, total) as a bar on a terminal, else a line for every tenth; on stderr, apart from the result."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield _lines(what)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(what: str) -> Callable[[int, int], None]:
    printed = 0

    def progress(done: int, total: int) -> None:
        nonlocal printed
        if 10 * done // total > printed:
            printed = 10 * done // total
            print(f"{what}: {done:,} of {total:,}", file=sys.stderr, flush=True)

    return progress
