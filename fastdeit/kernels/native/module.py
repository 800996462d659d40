"""Kernels that NVRTC compiled, launched through the driver."""

from ctypes import c_float, c_int, c_void_p

import torch
from torch import Tensor

from fastdeit.kernels.native import launches
from fastdeit.kernels.native.build import Program
from fastdeit.kernels.native.cuda import CudaError, Driver
from fastdeit.kernels.native.launches import Launch, Sizes
from fastdeit.kernels.native.runnable import Backward, Unusable


class Module:
    """A `Runnable` of a compiled program. A device loads it at its first launch there."""

    def __init__(self, program: Program, driver: Driver) -> None:
        self.origin = f"{program.compiler} compiled it for {program.architecture}"
        self._program, self._driver = program, driver
        self._modules: dict[int, int] = {}
        self._functions: dict[tuple[int, str], int] = {}
        self._loaded: set[tuple[int, int]] = set()
        """(device, head_dim) of which all kernels are loaded."""

    def forward(self, qkv: Tensor, out: Tensor, lse: Tensor, sizes: Sizes, stream: int) -> None:
        """As of `Runnable`; the kernels of the backward are loaded as well, because it could not refuse."""
        self._load(sizes)
        self._launch(launches.FORWARD, sizes, stream, [qkv, out, lse], tail=_numbers(sizes))

    def backward(self, tensors: Backward, sizes: Sizes, stream: int) -> None:
        """As of `Runnable`: two launches, and one more for dbias."""
        grad, qkv, out, lse, dqkv, dbias, delta, partial = tensors
        numbers = _numbers(sizes)
        self._launch(launches.QUERY_GRADIENT, sizes, stream, [qkv, out, grad, lse, delta, dqkv, partial], tail=numbers)
        self._launch(launches.KEY_GRADIENT, sizes, stream, [qkv, grad, lse, delta, dqkv, partial], tail=numbers)
        if dbias is not None:
            rows = [c_int(sizes.batch * sizes.blocks), c_int(sizes.columns)]
            self._launch(launches.BIAS_GRADIENT, sizes, stream, [partial, dbias], tail=rows)

    def _load(self, sizes: Sizes) -> None:
        which = torch.cuda.current_device(), sizes.head_dim
        if which in self._loaded:
            return
        try:
            for kernel in launches.KERNELS:
                self._function(launches.launch(kernel, sizes))
        except CudaError as error:
            raise Unusable(f"the driver does not take what {self._program.compiler} compiled: {error}") from error
        self._loaded.add(which)

    def _launch(
        self, kernel: str, sizes: Sizes, stream: int, tensors: list[Tensor | None], tail: list[c_int | c_float]
    ) -> None:
        launch = launches.launch(kernel, sizes)
        pointers = [c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]
        grid, block = (launch.grid, 1, 1), (launch.block, 1, 1)
        self._driver.launch(self._function(launch), grid, block, launch.shared, stream, [*pointers, *tail])

    def _function(self, launch: Launch) -> int:
        device = torch.cuda.current_device()
        if (found := self._functions.get((device, launch.name))) is None:
            if device not in self._modules:
                self._modules[device] = self._driver.load(self._program.image)
            found = self._driver.function(self._modules[device], launch.name, launch.shared)
            self._functions[device, launch.name] = found
        return found


def _numbers(sizes: Sizes) -> list[c_int | c_float]:
    return [c_int(sizes.tokens), c_int(sizes.heads), c_float(sizes.scale)]
