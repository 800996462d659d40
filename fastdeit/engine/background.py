"""What a checkpoint needs to be written beside the training: a copy of the state in host memory, and one thread."""

import threading
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Files = Mapping[str, Mapping[str, Tensor]]
"""Tensors by the file of a checkpoint, and by their name in it."""


class HostCopies:
    """Copies of tensors in host memory, pinned where they come from a GPU. The next copy uses the same memory again."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], Tensor] = {}

    def of(self, files: Files) -> dict[str, dict[str, Tensor]]:
        """Dense copies of all tensors. What no checkpoint can hold is passed on; whoever writes it says so."""
        copies = {
            file: {name: self._copy((file, name), tensor) for name, tensor in group.items()}
            for file, group in files.items()
        }
        self._kept = {(file, name): copy for file, group in copies.items() for name, copy in group.items()}
        if any(isinstance(tensor, Tensor) and tensor.is_cuda for group in files.values() for tensor in group.values()):
            torch.cuda.synchronize()  # the copies were queued
        return copies

    def _copy(self, place: tuple[str, str], tensor: Tensor) -> Tensor:
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            return tensor
        copy = self._kept.get(place)
        if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return copy.copy_(tensor.detach(), non_blocking=True)


class Worker:
    """Does one piece of work at a time in a thread. An error of the work is raised to whoever asks for its end."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(self, work: Callable[[], None]) -> None:
        """Start `work` when the work before it has ended, whose error must have been asked for."""
        self.join()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        # A second signal to stop ends the process at once: what is half written then has no checkpoint's name.
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether nothing is being worked on."""
        return self._thread is None or not self._thread.is_alive()

    def join(self) -> None:
        """Wait for the end of the work, and keep its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def result(self) -> None:
        """Wait for the end of the work, and raise its error, once."""
        self.join()
        error, self._error = self._error, None
        if error is not None:
            raise error
