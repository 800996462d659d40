"""Which kernels run on a card: the library that CMake built, else what NVRTC compiles, else none, and why.

What is merely not there is said by `info()` and `fastdeit doctor`. What is there and broken is said in a warning, once.
"""

import ctypes
import os
import warnings
from collections.abc import Iterator
from functools import cache

import torch

from fastdeit.kernels._op import ChoiceError
from fastdeit.kernels.native import build, library
from fastdeit.kernels.native.cuda import CompileError, CudaError, Driver
from fastdeit.kernels.native.library import Library, LibraryError
from fastdeit.kernels.native.module import Module
from fastdeit.kernels.native.runnable import Runnable

VARIABLE = "FASTDEIT_NATIVE"
_MODES = "auto", "0", "1"
_FOR_OTHERS = f"they are for cards before sm_{build.AFTER_TURING}; others run them where they are asked for by name"


class Found:
    """For cards of one capability: the kernels that run there, None where none do, and why others do not. The next ones
    are looked for when those before them are dropped."""

    def __init__(self, card: int) -> None:
        self.refused: list[str] = []
        self._others = _kernels(card, self.refused)
        self.kernels = next(self._others, None)

    @property
    def why_not(self) -> str:
        """Why none runs, in one sentence."""
        return ", and ".join(self.refused)

    def drop(self, why: str) -> None:
        """These kernels do not run on this card after all. Where no others take their place, the op says so."""
        self.refused.append(why)
        self.kernels = next(self._others, None)
        if self.kernels is not None:
            _say(why)


def capability(device: torch.device, forced: bool) -> tuple[bool, str]:
    """Whether the native kernels run on `device`, and the reason: as of `_op.Backend`.

    They are compiled here, if need be, so that the answer is true. Cards that Triton has tensor cores for run them only
    where they are asked for by name. ChoiceError where `FASTDEIT_NATIVE` is none of what it can be.
    """
    mode = os.environ.get(VARIABLE) or "auto"
    if mode not in _MODES:
        raise ChoiceError(f"{VARIABLE} is {mode[:40]!r}, but must be one of: {', '.join(_MODES)}")
    if device.type != "cuda":
        return False, "no CUDA device"
    card = number(device)
    if card < build.OLDEST:
        return False, f"they need sm_{build.OLDEST} or newer, not sm_{card}"
    if card >= build.AFTER_TURING and not forced:
        return False, _FOR_OTHERS
    if mode == "0":
        return False, f"{VARIABLE}=0 switches them off"
    there = found(card)
    return (False, there.why_not) if there.kernels is None else (True, there.kernels.origin)


def native_status() -> str:
    """One sentence: whether the native kernels are there for the CUDA device, or why they are not used on it."""
    able, reason = capability(torch.device("cuda" if torch.cuda.is_available() else "cpu"), False)
    return f"{'available' if able else 'not used here'}: {reason}"


@cache
def number(device: torch.device) -> int:
    """The compute capability of a card: 70 is 7.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def driver() -> Driver:
    """The NVIDIA driver of this machine. Raises CudaError where there is none."""
    try:
        return Driver(ctypes.CDLL("libcuda.so.1"))
    except OSError as error:
        raise CudaError(f"the NVIDIA driver cannot be loaded: {error}") from error


@cache
def found(card: int) -> Found:
    """What there is for cards of that capability. Looked for once in a process."""
    return Found(card)


def _kernels(card: int, refused: list[str]) -> Iterator[Runnable]:
    if (path := library.built()) is not None:
        try:
            yield Library(path)
        except LibraryError as error:
            refused.append(_say(f"the library {path} is not used: {error}"))
    try:
        system = driver()
        program = build.program(card)
        for note in program.notes:
            _say(note)
        yield Module(program, system)
    except build.Missing as error:
        refused.append(str(error))
    except CompileError as error:
        refused.append(_say(f"the kernels could not be compiled for sm_{card}: {error}"))
    except CudaError as error:
        refused.append(_say(str(error)))


def _say(sentence: str) -> str:
    warnings.warn(f"native kernels: {sentence}", RuntimeWarning, stacklevel=2)
    return sentence
