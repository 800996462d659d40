"""What a person sees of a run: a bar with live figures on a terminal, one plain line an interval in a log file."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from fastdeit.text import one_line

if TYPE_CHECKING:
    import rich.progress

_FIGURES: dict[str, Callable[[float], str]] = {
    "loss": lambda x: f"loss {x:.4f}",
    "top1": lambda x: f"top1 {x:.2f}%",
    "lr": lambda x: f"lr {x:.2e}",
    "images_per_second": lambda x: f"{x:,.0f} img/s",
    "data_wait": lambda x: f"data wait {x:.1f}%",
}
# The bar must fit a terminal of 80 columns beside them.
_BAR_FIGURES: dict[str, Callable[[float], str]] = {
    "loss": lambda x: f"loss {x:.3f}",
    "top1": lambda x: f"top1 {x:.1f}%",
    "images_per_second": lambda x: f"{x:.0f} img/s",
    "data_wait": lambda x: f"wait {x:.0f}%",
}


class Progress:
    """Progress of a run from step `start` to `total_steps`; a context manager.

    `update` moves the bar and remembers the figures; `line` ends an interval: in a log it prints exactly one line.
    Figures, each optional: `loss`; `top1` and `data_wait` in percent; `lr`; `images_per_second`. On a terminal `line`
    is the same as `update`; elsewhere `update` prints nothing, and no colour or control code is ever written. The ETA
    comes from this process's own pace since its first call: evaluations count, steps before a resume do not.

    `clock` returns seconds.
    """

    def __init__(
        self,
        total_steps: int,
        steps_per_epoch: int,
        *,
        start: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self.step = start
        self.stream = sys.stdout if stream is None else stream
        self._clock = clock
        self._first: tuple[int, float] | None = None
        self._figures: dict[str, float] = {}
        self._bar: rich.progress.Progress | None = _bar(self.stream, clock) if _is_terminal(self.stream) else None
        if self._bar is not None:
            self._task = self._bar.add_task(self._epoch(), total=total_steps, completed=start, figures="", eta="")
            self._bar.start()

    def update(self, step: int, **figures: float) -> None:
        """`step` steps of the run are done. Cheap; may be called every step."""
        unknown = figures.keys() - _FIGURES.keys()
        if unknown:
            raise TypeError(f"unknown progress figures {sorted(unknown)}; known are {list(_FIGURES)}")
        self.step = step
        self._figures.update(figures)
        if self._first is None:
            self._first = (step, self._clock())
        if self._bar is not None:
            shown = "  ".join(self._shown(_BAR_FIGURES))
            self._bar.update(
                self._task, completed=step, description=self._epoch(), figures=shown, eta=f"eta {self.eta()}"
            )

    def line(self, step: int, **figures: float) -> None:
        """End of an interval: `update`, and one line where there is no bar."""
        self.update(step, **figures)
        if self._bar is None:
            parts = [self._epoch(), f"step {step}/{self.total_steps}", *self._shown(_FIGURES), f"eta {self.eta()}"]
            print("  ".join(parts), file=self.stream, flush=True)

    def message(self, text: str) -> None:
        """Print `text` above the bar, or as a line of the log: as one line, whatever names are in it."""
        text = one_line(text)
        if self._bar is None:
            print(text, file=self.stream, flush=True)
        else:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def eta(self) -> str:
        """Time left as h:mm:ss, or "-" until two different steps were seen."""
        if self._first is None or self.step <= self._first[0]:
            return "-"
        step, since = self._first
        seconds = (self._clock() - since) / (self.step - step) * (self.total_steps - self.step)
        minutes, seconds = divmod(max(0, round(seconds)), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"

    def close(self) -> None:
        """Leave the bar as it stands and give the terminal back."""
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _shown(self, formats: dict[str, Callable[[float], str]]) -> list[str]:
        return [text(self._figures[name]) for name, text in formats.items() if name in self._figures]

    def _epoch(self) -> str:
        return f"epoch {self.step / self.steps_per_epoch:.2f}/{self.total_steps / self.steps_per_epoch:g}"


def table(rows: Sequence[Sequence[Any]], header: Sequence[str] = (), stream: TextIO | None = None) -> None:
    """Print `rows` in aligned columns, the first to the left and the others to the right; ruled on a terminal."""
    stream = sys.stdout if stream is None else stream
    header = [one_line(name) for name in header]
    cells = [[one_line(cell) for cell in row] for row in rows]
    if _is_terminal(stream):
        _rich_table(cells, header, stream)
        return
    lines = [list(header), *cells] if header else cells
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        aligned = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        print("  ".join(aligned).rstrip(), file=stream)
    stream.flush()


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _bar(stream: TextIO, clock: Callable[[], float]) -> "rich.progress.Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[figures]}", markup=False),
        TextColumn("{task.fields[eta]}", markup=False),
        console=Console(file=stream),
        get_time=clock,
        expand=True,
    )


def _rich_table(cells: list[list[str]], header: Sequence[str], stream: TextIO) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns = len(cells[0]) if cells else len(header)
    ruled = Table(box=SIMPLE_HEAD, show_header=bool(header))
    for column in range(columns):
        name = Text(header[column]) if header else ""
        ruled.add_column(name, justify="right" if column else "left")
    for line in cells:
        ruled.add_row(*map(Text, line))
    Console(file=stream).print(ruled)
