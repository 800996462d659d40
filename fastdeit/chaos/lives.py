"""The lives of a run: its processes are started, die or end, and are started again.

One process imports all that a training needs, and every life is forked from it, which saves the seconds of an import
each time. Several ranks are started as srun would. A life whose launcher is to be killed is started by `--nproc`, with
interpreters of its own.
"""

import importlib
import json
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdeit.chaos import victim
from fastdeit.chaos.faults import Fault
from fastdeit.launch.launch import die_with_parent

PRELOADED = (
    *("fastdeit.training", "fastdeit.cli", "fastdeit.data.execute.dali", "fastdeit.kernels.trial"),
    *("torch._dynamo", "matplotlib.pyplot", "matplotlib.backends.backend_agg", "nvidia.dali.fn"),
)
"""What the lives import, if now or later."""
SILENCE_S = 300.0
"""Seconds without a word after which a life is given up."""
ORPHAN_S = 5.0
"""Seconds in which the ranks have to be gone when their launcher is killed."""
PAUSE_S = 0.3
"""Seconds for which the only process of a run is stopped."""


@dataclass
class Life:
    """How a life ended: exit codes of its ranks (negative: the signal), of a launcher under the rank -1."""

    codes: dict[int, int] = field(default_factory=dict)
    text: str = ""
    orphans: int = 0
    silent: bool = False


class Host:
    """Starts lives of `nproc` ranks in `folder`, and hands what they tell to `heard(rank, record)`."""

    def __init__(self, folder: Path, nproc: int, heard: Callable[[int, dict[str, Any]], None]) -> None:
        self.folder, self.nproc, self.heard = folder, nproc, heard
        self._pipe, self._torn, self._pids = folder / "pipe", [b""] * nproc, []
        self._pipes: list[int] = []
        for rank in range(nproc):
            os.mkfifo(f"{self._pipe}.{rank}")
            # Open for both, so that it lives on when the process at the other end does not.
            self._pipes.append(os.open(f"{self._pipe}.{rank}", os.O_RDWR | os.O_NONBLOCK))
        for module in PRELOADED:
            importlib.import_module(module)

    def close(self) -> None:
        """Give the pipes back."""
        for pipe in self._pipes:
            os.close(pipe)

    def live(self, argv: list[str], fault: Fault | None = None) -> Life:
        """Run `fastdeit argv` with the fault in it until all its processes have ended."""
        launched = fault is not None and fault.kind == "launcher"
        orders = {"pipe": str(self._pipe), "fault": None if fault is None else fault.told(), "launcher": launched}
        out, end = os.pipe()
        os.set_blocking(out, False)
        if launched:
            running = {-1: self._forked(orders, [*argv, "--nproc", str(self.nproc)], {}, end)}
        else:
            running = {rank: self._forked(orders, argv, env, end) for rank, env in enumerate(_worlds(self.nproc))}
        os.close(end)
        life, self._pids, self._torn = Life(), [], [b""] * self.nproc
        try:
            self._wait(life, running, out)
            life.orphans = _alive_after(self._pids) if launched else 0
        finally:
            for pid in (*running.values(), *filter(_runs, self._pids)):
                _kill(pid)
            for pid in running.values():
                os.waitpid(pid, 0)
            os.close(out)
        return life

    def _forked(self, orders: dict[str, Any], argv: list[str], env: dict[str, str], out: int) -> int:
        parent = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            os.setsid()  # a Ctrl-C is for chaos, which ends its victims
            die_with_parent(parent)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.environ.update(env)
            code = victim.live(orders, argv)
            sys.stdout.flush()
        finally:
            os._exit(code)

    def _wait(self, life: Life, running: dict[int, int], out: int) -> None:
        """Until none is `running` any more, which this keeps up to date."""
        stopped: set[int] = set()
        heard = time.monotonic()
        with selectors.DefaultSelector() as selector:
            for pipe in self._pipes:
                selector.register(pipe, selectors.EVENT_READ)
            while running:
                selector.select(0.05)
                if self._read(life, out):
                    heard = time.monotonic()
                for rank in list(running):
                    self._look(life, running, rank, stopped)
                if stopped and stopped == set(running):
                    _kill(running[min(stopped)])  # the others have given it up
                life.silent = time.monotonic() - heard > SILENCE_S
                if life.silent:
                    return
        self._read(life, out)

    def _look(self, life: Life, running: dict[int, int], rank: int, stopped: set[int]) -> None:
        """Note how a rank has ended, or that it is stopped. The only one of a run goes on, and is to save."""
        pid = running[rank]
        found, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
        if not found:
            return
        if not os.WIFSTOPPED(status):
            life.codes[rank] = os.waitstatus_to_exitcode(status)
            del running[rank]
            stopped.discard(rank)
        elif self.nproc > 1:
            stopped.add(rank)
        else:
            time.sleep(PAUSE_S)
            os.kill(pid, signal.SIGCONT)
            os.kill(pid, signal.SIGTERM)

    def _read(self, life: Life, out: int) -> bool:
        """Take what has come from the processes; whether it was anything."""
        text = _all_of(out)
        life.text += text.decode(errors="replace")
        told = False
        for rank, pipe in enumerate(self._pipes):
            *lines, self._torn[rank] = (self._torn[rank] + _all_of(pipe)).split(b"\n")
            for record in map(json.loads, lines):
                told = True
                if "pid" in record:
                    self._pids.append(record["pid"])
                self.heard(rank, record)
        return told or bool(text)


def _all_of(source: int) -> bytes:
    found = b""
    while True:
        try:
            piece = os.read(source, 1 << 16)
        except BlockingIOError:
            return found
        if not piece:
            return found
        found += piece


def _worlds(nproc: int) -> list[dict[str, str]]:
    """The environment of each rank, as of torchrun or srun."""
    if nproc == 1:
        return [{}]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = {"WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{name: str(value) for name, value in {**common, "RANK": r, "LOCAL_RANK": r}.items()} for r in range(nproc)]


def _alive_after(pids: list[int]) -> int:
    """How many of the processes are still there after the seconds that they may take to notice."""
    end = time.monotonic() + ORPHAN_S
    while time.monotonic() < end and any(map(_runs, pids)):
        time.sleep(0.05)
    return sum(map(_runs, pids))


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def _kill(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
