"""A pipeline of DALI as a queue of batches, and the module of its graphs."""

import atexit
from collections import deque
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fastdeit.data.execute.prefetch import close_all
from fastdeit.data.sources.source import DataError

if TYPE_CHECKING:
    from nvidia.dali import Pipeline


class Stream:
    """A DALI pipeline as a queue: batches come out in the order in which they went in.

    DALI's first `schedule_run` starts as many runs as the pipeline is deep, which keeps its threads busy from one batch
    to the next. It is therefore held back until that many batches were fed, and if they never come, `filler` takes
    their place and its images are dropped.
    """

    def __init__(self, pipe: "Pipeline", depth: int, filler: dict[str, Any]) -> None:
        self._pipe, self._filler = pipe, filler
        self._missing = depth
        self._wanted: deque[bool] = deque()

    def push(self, inputs: dict[str, Any], wanted: bool = True) -> None:
        """Give the pipeline the inputs of a batch, by their names; `pop` drops what comes of one that is not wanted."""
        for name, value in inputs.items():
            self._pipe.feed_input(name, value)
        self._wanted.append(wanted)
        self._missing -= 1
        if self._missing <= 0:
            self._pipe.schedule_run()

    def pop(self) -> tuple[Any, ...]:
        """The images of the oldest batch; raises RuntimeError if DALI could not make them."""
        while self._missing > 0:
            self.push(self._filler, wanted=False)
        while True:
            images = self._pipe.outputs()
            if self._wanted.popleft():
                return images


@cache
def graphs() -> ModuleType:
    """The module of DALI's graphs, imported by whom images are decoded: all that decodes none does without DALI."""
    try:
        module = import_module("fastdeit.data.execute.graph")
    except ModuleNotFoundError as error:
        if error.name not in ("nvidia", "nvidia.dali"):
            raise
        raise DataError(
            "images are decoded by NVIDIA DALI, which is not installed: pip install nvidia-dali-cuda120"
        ) from error
    # What DALI does when the interpreter exits aborts the process where a thread still decodes, so that they are ended
    # before. Handlers run in the reverse of the order in which they come: this one has to come after DALI's.
    atexit.register(close_all)
    return module
