"""In a process of the run that chaos interrupts: it does the fault that is ordered, and writes down what the run sees.

The loop is wrapped from outside: `TrainLoader.batches` tells every batch, and `engine._fault` every operation on a
checkpoint. Both count towards the moment of the fault. What is seen goes to a pipe, which outlives a kill and which no
limit on files touches.
"""

import hashlib
import json
import os
import pickle
import resource
import runpy
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from typing import Any

import torch
import torch.distributed.distributed_c10d  # messages between processes are pickled: its own Unpickler is not counted
from torch.utils._pytree import tree_leaves

from fastdeit.batch import Batch
from fastdeit.chaos.faults import AT_START, Fault
from fastdeit.data.loader import TrainLoader
from fastdeit.engine import _fault
from fastdeit.launch import launch


def live(orders: dict[str, Any], argv: list[str]) -> int:
    """`fastdeit argv` in this process, with the fault of `orders` in it; its exit code.

    orders  pipe: prefix of the names of the pipes, to which the rank is added; fault: `Fault.told`, or None;
            launcher: whether this process starts others, which then are the victims
    """
    if orders["launcher"]:
        told = json.dumps(orders | {"launcher": False})
        real = launch.worker_command
        launch.worker_command = lambda words: real([told, *words], "fastdeit.chaos.victim")
    else:
        witness = _Witness(orders["pipe"], Fault(**orders["fault"]) if orders["fault"] else None)
        witness.watch()
    sys.argv = ["fastdeit", *argv]
    try:
        runpy.run_module("fastdeit", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


class _Witness:
    """Sees what the run sees, and does the fault when it is due."""

    def __init__(self, pipe: str, fault: Fault | None) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.fault = fault if fault is not None and fault.rank in (None, self.rank) else None
        self._pipe = os.open(f"{pipe}.{self.rank}", os.O_WRONLY)
        self._due, self._points, self._steps, self._recorded = False, 0, 0, False

    def watch(self) -> None:
        self.tell(pid=os.getpid())
        pickle.load, pickle.loads = partial(self._counted, pickle.load), partial(self._counted, pickle.loads)
        pickle.Unpickler = _counting(self.tell)
        torch.load = partial(self._counted, torch.load)
        stream, witness = TrainLoader.batches, self

        def batches(loader: TrainLoader, start: int, stop: int) -> Iterator[list[Batch]]:
            # The first stream is the training's. Later ones measure statistics on batches that were there before.
            first, witness._recorded = not witness._recorded, True
            with closing(stream(loader, start, stop)) as found:
                for step, micro_batches in enumerate(found, start):
                    if first:
                        witness.saw(step, micro_batches)
                    yield micro_batches

        TrainLoader.batches = batches
        # For the life of the process: there is no block to leave.
        self._seam = _fault.inject(self._operation)
        self._seam.__enter__()
        if self.fault is not None and self.fault.step == AT_START:
            self._strike()

    def tell(self, **values: Any) -> None:
        line = json.dumps(values).encode() + b"\n"
        while line:
            line = line[os.write(self._pipe, line) :]

    def saw(self, step: int, micro_batches: list[Batch]) -> None:
        """Tell the samples of a step and a hash of all that the step is made from; the fault may be due here."""
        digest, samples = hashlib.sha256(), []
        for batch in micro_batches:
            epoch = int(batch.step.epoch)
            samples += [[epoch, *pair] for pair in zip(batch.index.tolist(), batch.copy.tolist(), strict=True)]
            mixing, named = (batch.partner, batch.pixel_lam, batch.box), (batch.noise, batch.extras)
            for tensor in tree_leaves((batch.images, batch.targets, mixing, named)):
                dense = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                digest.update(dense.reshape(-1).view(torch.uint8).numpy())
        self.tell(step=step, time=time.monotonic(), samples=samples, digest=digest.hexdigest())
        self._steps += 1
        # At the first steps of a life the processes are patient with one that hangs: code may be compiled.
        settled = self._steps > 2 or self.fault is None or self.fault.kind != "hang"
        if self.fault is not None and not self._due and settled and 0 <= self.fault.step <= step:
            self._due = True
            if self.fault.points == 0:
                self._strike()

    def _operation(self, name: str) -> None:
        if self._due and self.fault.points:
            self._points += 1
            if self._points == self.fault.points:
                self._strike()

    def _strike(self) -> None:
        if self.fault.kind == "disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.fault.limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            return
        whom = os.getppid() if self.fault.kind == "launcher" else os.getpid()
        if self.fault.delay == 0:
            os.kill(whom, self.fault.number)
            return
        later = threading.Timer(self.fault.delay, os.kill, (whom, self.fault.number))
        later.daemon = True
        later.start()

    def _counted(self, read: Callable[..., Any], what: Any, *args: Any, **options: Any) -> Any:
        self.tell(pickle=_size(what))
        return read(what, *args, **options)


def _counting(tell: Callable[..., None]) -> type:
    class Counting(pickle.Unpickler):
        def __init__(self, file: Any, **options: Any) -> None:
            tell(pickle=_size(file))
            super().__init__(file, **options)

    return Counting


def _size(what: Any) -> int:
    """Bytes of what is to be unpickled: bytes, a path or a file; 1 where that cannot be known."""
    if isinstance(what, (bytes, bytearray, memoryview)):
        return len(what)
    if hasattr(what, "getbuffer"):
        return len(what.getbuffer())
    try:
        return os.path.getsize(what if isinstance(what, (str, os.PathLike)) else what.fileno())
    except (AttributeError, OSError):
        return 1


if __name__ == "__main__":
    sys.exit(live(json.loads(sys.argv[1]), sys.argv[2:]))
