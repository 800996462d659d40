"""Buffers of a method from step to step: the same on all processes, and unchanged by a step that is skipped.

Two kinds are told apart. Buffers of networks, below the children of the method, change in a forward pass: BatchNorm's
running statistics above all. Buffers of the method itself change in its `after_step`, which knows of skipped steps.
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
        self._networks = list(_slots(module for _, module in networks(method) if module is not method))
        self.share()

    def copies(self) -> list[Tensor]:
        """What the networks' buffers are now, for `settle` after the forward passes of a step."""
        return [flat for _, flat in _flattened(self._networks)]

    @torch.no_grad()
    def settle(self, before: list[Tensor], skipped: Tensor) -> None:
        """After the forward passes of a step, before its update: the networks' buffers as all processes made them.

        A float buffer has moved by the mean of the processes' changes, exactly not at all where nothing has changed.
        Where `skipped` (bool scalar) is true, all are as they were in `before`. No value is read from the device.
        """
        for (tensors, after), old in zip(_flattened(self._networks), before, strict=True):
            if self._world.size > 1 and after.is_floating_point():
                change = torch.where(after == old, 0.0, after - old)  # minus infinity less itself would be NaN
                after = old + self._world.sum(change) / self._world.size
            _unflatten(tensors, torch.where(skipped, old, after))

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Whatever happens inside, all buffers are afterwards what they were before."""
        before = [flat for _, flat in _flattened(self._all)]
        try:
            yield
        finally:
            for (tensors, _), flat in zip(_flattened(self._all), before, strict=True):
                _unflatten(tensors, flat)

    @torch.no_grad()
    def share(self) -> None:
        """Give every process the main one's buffers: integers, and what a method has changed itself."""
        if self._world.size > 1:
            for tensors, flat in _flattened(self._all):
                _unflatten(tensors, self._world.broadcast(flat))


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
