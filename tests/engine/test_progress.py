"""Logs get exact plain lines, terminals a bar; the pace is this process's own."""

import io
import re

import pytest

from fastdeit.engine.progress import Progress, table


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def test_plain_lines_are_exactly_these():
    stream, clock = io.StringIO(), Clock()
    with Progress(1000, 100, stream=stream, clock=clock) as progress:
        progress.line(1, loss=6.90776, lr=1e-6, images_per_second=2841.4, data_wait=1.25)
        for step in range(2, 51):
            clock.now += 2
            progress.update(step)
        progress.line(50, loss=6.5, lr=5e-4, images_per_second=12841.4, data_wait=0.0)
        progress.message("checkpoint [bold]step 50[/] saved")
        clock.now += 397
        progress.line(100, top1=41.237, lr=0.5, images_per_second=7)
    assert stream.getvalue().splitlines() == [
        "epoch 0.01/10  step 1/1000  loss 6.9078  lr 1.00e-06  2,841 img/s  data wait 1.2%  eta -",
        "epoch 0.50/10  step 50/1000  loss 6.5000  lr 5.00e-04  12,841 img/s  data wait 0.0%  eta 0:31:40",
        "checkpoint [bold]step 50[/] saved",
        "epoch 1.00/10  step 100/1000  loss 6.5000  top1 41.24%  lr 5.00e-01  7 img/s  data wait 0.0%  eta 1:15:00",
    ]


def test_update_prints_nothing_in_a_log():
    stream = io.StringIO()
    with Progress(10, 5, stream=stream) as progress:
        for step in range(11):
            progress.update(step, loss=1.0)
    assert stream.getvalue() == ""


def test_a_resumed_run_estimates_from_its_own_pace():
    clock = Clock()
    progress = Progress(1000, 100, start=900, stream=io.StringIO(), clock=clock)
    clock.now += 600  # compiling before the first step says nothing about the pace
    progress.update(901)
    assert progress.eta() == "-"
    clock.now += 30
    progress.update(911)
    assert progress.eta() == "0:04:27"  # 89 steps left at 3 s each
    progress.update(1000)
    assert progress.eta() == "0:00:00"


def test_a_misspelt_figure_is_an_error():
    with pytest.raises(TypeError, match=r"unknown progress figures \['los'\]"):
        Progress(10, 5, stream=io.StringIO()).update(1, los=1.0)


def visible(stream):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue()).replace("\r", "\n").splitlines()


def test_a_terminal_gets_a_bar_with_figures_and_messages_above_it(terminal):
    clock = Clock()
    with Progress(1000, 100, start=500, stream=terminal, clock=clock) as progress:
        progress.update(500)
        clock.now += 100
        progress.line(600, loss=2.34567, top1=71.25, images_per_second=2841.4, data_wait=1.2, lr=1e-3)
        progress.message("[bold]saved[/] step 600")
    lines = [line.rstrip() for line in visible(terminal)]
    assert "\x1b[" in terminal.getvalue()
    assert "[bold]saved[/] step 600" in lines
    last = [line for line in lines if line.startswith("epoch")][-1]
    assert re.fullmatch(r"epoch 6\.00/10 [━╸╺ ]{5,} loss 2\.346  top1 71\.2%  2841 img/s  wait 1% eta 0:06:40", last), (
        last
    )
    assert len(last) <= 80
    assert terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h") == 1


def test_a_dumb_terminal_gets_plain_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with Progress(10, 5, stream=terminal) as progress:
        progress.line(5, loss=1.0)
    assert terminal.getvalue() == "epoch 1.00/2  step 5/10  loss 1.0000  eta -\n"


ROWS = [("top-1 fused", "72.31 %"), ("images/s", 2841), ("[red]note", "-")]


def test_a_plain_table_is_aligned():
    stream = io.StringIO()
    table(ROWS, header=("result", "value"), stream=stream)
    assert stream.getvalue() == (
        "result         value\n"
        "top-1 fused  72.31 %\n"
        "images/s        2841\n"
        "[red]note          -\n"
    )  # fmt: skip
    stream = io.StringIO()
    table([], stream=stream)
    table([("a", "b", "c")], stream=stream)
    assert stream.getvalue() == "a  b  c\n"


def test_a_terminal_gets_a_ruled_table(terminal):
    table(ROWS, header=("result", "value"), stream=terminal)
    lines = [line.strip() for line in visible(terminal) if line.strip()]
    assert lines[0].split() == ["result", "value"]
    assert set(lines[1]) == {"─"}
    assert [line.split()[0] for line in lines[2:]] == ["top-1", "images/s", "[red]note"]


def test_rows_of_different_length_are_an_error():
    with pytest.raises(ValueError, match="zip"):
        table([("a", "b"), ("c",)], stream=io.StringIO())
