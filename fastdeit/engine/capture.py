"""A training step as one CUDA graph: forward, loss, backward, clipping, update and EMA, launched at once.

A graph replays kernels on the addresses they were recorded with. Therefore batches, the learning rate and other numbers
are copied into tensors that stay, the first steps run normally (kernels are compiled, libraries and buckets allocate),
and one step is recorded; recording runs nothing, so that every step is run exactly once. Nothing in a step may look at
the device, or depend on anything but these tensors and those the step itself changes. Numbers of Python's that a step
reads are part of the recording: `Constants` raises an error when one of them changes.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from fastdeit.batch import map_tensors, tensors_of

WARM_STEPS = 11
"""Steps before the recording: DDP rebuilds and times its buckets in the first ten."""


class CaptureError(RuntimeError):
    """A step that was recorded cannot be replayed, because something changed that it does not read again."""


class GraphedStep:
    """`step(batches, *numbers)` on a CUDA device, recorded once and replayed. Batches keep their shapes for ever.

    batches: dataclasses, tuples and tensors, of which tensors may change from step to step and nothing else does.
    numbers: learning rate and the like; floats here, float64 scalars on the device there. module: its Python attributes
    are watched from the recording on.
    """

    def __init__(self, step: Callable[..., None], device: torch.device, module: nn.Module | None = None) -> None:
        self._step, self._device, self._module = step, device, module
        self._batches: list[Any] | None = None
        self._numbers: list[Tensor] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._constants: Constants | None = None
        self._stream = torch.cuda.Stream(device)
        self._ran = 0

    def __call__(self, batches: Sequence[Any], *numbers: float) -> None:
        self._receive(batches, numbers)
        if self._ran < WARM_STEPS:
            # On the stream of the recording: libraries keep a workspace a stream, and autograd remembers where it ran.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                self._step(self._batches, *self._numbers)
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        else:
            if self._graph is None:
                self._graph = self._recorded()
                self._constants = Constants(self._module) if self._module is not None else None
            if self._constants is not None:
                self._constants.check()
            self._graph.replay()
        self._ran += 1

    def _receive(self, batches: Sequence[Any], numbers: Sequence[float]) -> None:
        if self._batches is None:
            self._batches = [map_tensors(torch.clone, batch) for batch in batches]
            self._numbers = [torch.zeros((), dtype=torch.float64, device=self._device) for _ in numbers]
        copy_tensors(self._batches, batches)
        for kept, number in zip(self._numbers, numbers, strict=True):
            kept.fill_(number)

    def _recorded(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # thread_local: loader threads go on allocating and copying meanwhile, which "global", the default, forbids.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._step(self._batches, *self._numbers)
        return graph


class Constants:
    """The Python values in the attributes of a module and of those below it, as they are now.

    Watched are numbers, text, None, and tuples, lists, dicts and sets of them that are not empty. Tensors are not: a
    recorded step reads them anew. Neither is what an object of another class holds, such as a scheduler of the method.
    """

    def __init__(self, module: nn.Module) -> None:
        self._known = list(_constants(module))

    def check(self) -> None:
        """Raise CaptureError, which names attribute and values, if one has changed."""
        for attributes, key, value, name in self._known:
            now = attributes.get(key)
            if now is not value and not (_is_plain(now) and now == value):
                raise CaptureError(
                    f"{name} was {value!r} when the step was recorded as a CUDA graph and is {now!r} now, but the "
                    f"graph goes on with {value!r}. Keep what changes during the run in a tensor (a buffer, or a "
                    "function of batch.step), or train with engine.capture=none"
                )


_OF_EVERY_MODULE = set(vars(nn.Module())) - {"training"}
_PLAIN = bool, int, float, str, type(None)


def _constants(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any, str]]:
    for path, child in module.named_modules():
        for key, value in vars(child).items():
            empty = isinstance(value, tuple | list | set | frozenset | dict) and not value  # a cache, or a list to fill
            if key not in _OF_EVERY_MODULE and _is_plain(value) and not empty:
                name = ".".join(filter(None, (type(module).__name__, path, key)))
                yield vars(child), key, deepcopy(value), name


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list | set | frozenset):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, (*value.keys(), *value.values())))
    return isinstance(value, _PLAIN)


def copy_tensors(kept: Any, new: Any) -> None:
    """Copy the tensors in `new` into those at the same places in `kept`; ValueError where anything else differs."""
    theirs = tensors_of(new)
    mine = tensors_of(kept)
    shapes = [[(t.shape, t.dtype) for t in tensors] for tensors in (mine, theirs)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"a recorded step takes batches like its first, {shapes[0]}, but got {shapes[1]}")
    torch._foreach_copy_(mine, theirs)
