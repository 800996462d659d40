"""A training step as one CUDA graph: forward, loss, backward, clipping, update and EMA, launched at once.

A graph replays kernels on the addresses they were recorded with. Therefore batches and the learning rate are copied
into tensors that stay, the first steps run normally (kernels are compiled, libraries and buckets allocate), and one
step is recorded; recording runs nothing, so that every step is run exactly once. Nothing in a step may look at the
device, or depend on anything but these tensors and those the step itself changes.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

WARM_STEPS = 11
"""Steps before the recording: DDP rebuilds and times its buckets in the first ten."""


class GraphedStep:
    """`step(batches, lr)` on a CUDA device, recorded once and replayed. Batches keep their shapes for ever.

    batches: dataclasses, tuples and tensors, of which tensors may change from step to step and nothing else does. lr: a
    float here, a float64 scalar on the device there.
    """

    def __init__(self, step: Callable[[Sequence[Any], Tensor], None], device: torch.device) -> None:
        self._step, self._device = step, device
        self._batches: list[Any] | None = None
        self._lr = torch.zeros((), dtype=torch.float64, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream = torch.cuda.Stream(device)
        self._ran = 0

    def __call__(self, batches: Sequence[Any], lr: float) -> None:
        self._receive(batches, lr)
        if self._ran < WARM_STEPS:
            # On the stream of the recording: libraries keep a workspace a stream, and autograd remembers where it ran.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                self._step(self._batches, self._lr)
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        else:
            if self._graph is None:
                self._graph = self._recorded()
            self._graph.replay()
        self._ran += 1

    def _receive(self, batches: Sequence[Any], lr: float) -> None:
        if self._batches is None:
            self._batches = [map_tensors(torch.clone, batch) for batch in batches]
        copy_tensors(self._batches, batches)
        self._lr.fill_(lr)

    def _recorded(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # thread_local: loader threads go on allocating and copying meanwhile, which "global", the default, forbids.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._step(self._batches, self._lr)
        return graph


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with `function` applied to the tensors in its dataclasses, tuples and lists."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(function, item) for item in value)
    if is_dataclass(value):
        return replace(value, **{f.name: map_tensors(function, getattr(value, f.name)) for f in fields(value)})
    return value


def copy_tensors(kept: Any, new: Any) -> None:
    """Copy the tensors in `new` into those at the same places in `kept`; ValueError where anything else differs."""
    theirs = tensors_of(new)
    mine = tensors_of(kept)
    shapes = [[(t.shape, t.dtype) for t in tensors] for tensors in (mine, theirs)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"a recorded step takes batches like its first, {shapes[0]}, but got {shapes[1]}")
    torch._foreach_copy_(mine, theirs)


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in `value`, in order."""
    found: list[Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, value)
    return found
