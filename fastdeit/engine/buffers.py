"""Buffers of a method from step to step: the same on all processes, and unchanged by a step that is skipped.

Buffers may change in a forward pass: BatchNorm's running statistics above all, but a method's own as well, such as the
centre of a teacher's outputs. What changes in the method's `after_step` instead is its own affair, since it knows there
whether the step was skipped.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastdeit.engine.dist import World
from fastdeit.engine.ema import networks

_Slot = tuple[nn.Module, str]


class Buffers:
    """The persistent buffers of `method`, which the processes of `world` agree on from the beginning.

    Buffers are looked up in every step, so that a module may put another tensor into its place. Those that are not
    persistent are a module's cache: they are in no checkpoint, and left alone here.
    """

    def __init__(self, method: nn.Module, world: World) -> None:
        self._world = world
        self._all = list(_slots(method.modules()))
        self._moved = list(_slots(module for _, module in networks(method)))
        self.share()

    def copies(self) -> list[Tensor]:
        """What the buffers are now, but for those of averaged teachers, for `settle` after the forward passes of a
        step."""
        return [flat for _, flat in _flattened(self._moved)]

    @torch.no_grad()
    def settle(self, before: list[Tensor], skipped: Tensor) -> None:
        """After the forward passes of a step, before its update: these buffers as all processes made them.

        A float buffer has moved by the mean of the processes' changes, exactly not at all where nothing has changed.
        Where `skipped` (bool scalar) is true, all are as they were in `before`. No value is read from the device.
        """
        for (tensors, after), old in zip(_flattened(self._moved), before, strict=True):
            if self._world.size > 1 and after.is_floating_point():
                finite = torch.where(old.isfinite(), old, 0.0)  # a largest value may begin at minus infinity
                after = finite + self._world.sum(after - finite) / self._world.size
            _unflatten(tensors, torch.where(skipped, old, after))

    @torch.no_grad()
    def share(self) -> None:
        """Give every process the main one's buffers: integers, and what a method has changed itself."""
        if self._world.size > 1:
            for tensors, flat in _flattened(self._all):
                _unflatten(tensors, self._world.broadcast(flat))


@contextmanager
def kept(module: nn.Module) -> Iterator[None]:
    """Whatever happens inside, the persistent buffers of `module` are afterwards what they were before."""
    slots = list(_slots(module.modules()))
    before = [flat for _, flat in _flattened(slots)]
    try:
        yield
    finally:
        with torch.no_grad():
            for (tensors, _), flat in zip(_flattened(slots), before, strict=True):
                _unflatten(tensors, flat)


def _slots(modules: Iterable[nn.Module]) -> Iterator[_Slot]:
    """(module, key) of every persistent buffer once."""
    seen: set[int] = set()
    for module in modules:
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                yield module, key


def _flattened(slots: list[_Slot]) -> list[tuple[list[Tensor], Tensor]]:
    """(buffers, all their values in one new tensor) for each dtype: a step costs few kernels, and not some a layer."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for module, key in slots:
        buffer = module._buffers[key]
        by_dtype.setdefault(buffer.dtype, []).append(buffer)
    return [(tensors, torch.cat([tensor.flatten() for tensor in tensors])) for tensors in by_dtype.values()]


def _unflatten(tensors: list[Tensor], flat: Tensor) -> None:
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])
