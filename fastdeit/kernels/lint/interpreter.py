"""Triton's interpreter with checked pointers: every access of a kernel is held against the tensors it was given.

The interpreter of Triton runs a kernel on NumPy arrays and reads and writes whatever an address points to. Here a
pointer argument is not an address but the number of its tensor, with an offset of bytes. So an access is known to
belong to one tensor, which need not have memory, and is checked before it happens:

    out of bounds    every element that is read or written belongs to the tensor: to its shape and strides, not merely
                     to the allocation that it is a part of
    misaligned       an address is a multiple of the size of what is read or written there
    overflow         no sum, difference or product of 32-bit integers wraps
    broken promise   what `tl.multiple_of` promises to the compiler holds

Kernels of optimizers read addresses from tables. `Memory.known` has the tensors that these may point into.

What reads and writes do is up to the `Memory`: the lint's has no memory at all (`bounds.py`), that of the tests has the
tensors' own, and watches the order of accesses (tests/kernels/checked.py).

This reaches into the interpreter of Triton; `unavailable()` says whether the installed one is made as expected.
"""

import inspect
import operator
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

from fastdeit.kernels import _triton

_PACKAGE = "fastdeit.kernels."
_TRITON = Path(triton.__file__).parent
_SLOT = 56
"""Bits of an offset. The bits above are the number of the tensor; 0 is that of addresses from tables."""
_EXPECTED = {
    "create_masked_load": ["ptrs", "mask", "other"],
    "create_masked_store": ["ptrs", "value", "mask"],
    "create_atomic_rmw": ["rmwOp", "ptr", "val", "mask", "sem", "scope"],
    "create_assert": ["condition", "message"],
    "create_barrier": [],
}
"""The parameters of what is replaced. Of the first two they begin like this: those behind say how caches are used, and
differ between versions."""
_SANITIZER = "binary_op_sanitize_overflow_impl"
_EXACT = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}
"""By their names in Triton, the operations whose results may not wrap."""


class Fault(Exception):
    """A kernel does what it must not. `kind` is one of the module's list, or of those that a `Memory` adds."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(f"{kind}: {what}")
        self.kind, self.what = kind, what


@cache
def unavailable() -> str | None:
    """Why kernels cannot be checked in this process; None if they can."""
    if not _triton.INTERPRETED:
        return "TRITON_INTERPRET is not set"
    builder = interpreter.InterpreterBuilder
    for name, wanted in _EXPECTED.items():
        found = getattr(builder, name, None)
        names = [] if found is None else list(inspect.signature(found).parameters)[1:]
        if found is None or (names[: len(wanted)] if name.startswith("create_masked") else names) != wanted:
            return f"the interpreter of Triton {triton.__version__} has another {name}"
    if not hasattr(TritonSemantic, _SANITIZER):
        return f"Triton {triton.__version__} has no {_SANITIZER}"
    if not hasattr(interpreter, "_LangPatchScope"):
        return f"the interpreter of Triton {triton.__version__} does not restore triton.language; 3.6 and newer do"
    return None


# ---- tensors and pointers --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extent:
    """The bytes of a tensor: of which name, from which address (0 where there is no memory), in which layout."""

    name: str
    start: int
    itemsize: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @staticmethod
    def of(name: str, tensor: Tensor) -> "Extent":
        """That of a tensor, which may be on the meta device."""
        start = 0 if tensor.is_meta else tensor.data_ptr()
        return Extent(name, start, tensor.element_size(), tuple(tensor.shape), tensor.stride())

    @property
    def end(self) -> int:
        """Bytes from the first element to behind the last."""
        if 0 in self.shape:
            return 0
        return self.itemsize * (1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True)))

    def holds(self, offset: NDArray, size: int) -> NDArray:
        """Which of the accesses of `size` bytes at these offsets touch nothing but elements of the tensor."""
        within = (offset >= 0) & (offset + size <= self.end)
        if size <= self.itemsize:
            return within & self._owns(offset // self.itemsize) & (offset % self.itemsize + size <= self.itemsize)
        for byte in range(0, size, self.itemsize):
            within = within & self._owns((offset + byte) // self.itemsize)
        return within

    def _owns(self, element: NDArray) -> NDArray:
        """Which offsets of elements are those of an index: largest stride first, each takes what it can. That is exact
        where the elements of a dimension do not lie between those of another, as in every view of a dense tensor."""
        owned = np.ones(element.shape, bool)
        for stride, count in sorted(zip(self.strides, self.shape, strict=True), reverse=True):
            if stride and count > 1:
                index = np.minimum(element // stride, count - 1)
                element = element - index * stride
        return owned & (element == 0)


@dataclass
class Memory:
    """What the pointers of a launch point into.

    known     tensors whose addresses a kernel may find in tables, by no name of its arguments
    """

    known: list[Extent] = field(default_factory=list)

    def begin(self, label: str, grid: tuple[int, int, int], arguments: dict[str, Any]) -> None:
        """A launch begins."""
        self.label, self.program = label, (0, 0, 0)
        self._extents: list[Extent] = []
        self._known = sorted(self.known, key=lambda extent: extent.start)
        self._starts = np.array([extent.start for extent in self._known], np.int64)

    def pointer(self, name: str, tensor: Tensor) -> int:
        """The number that stands for the first element of a tensor."""
        self._extents.append(Extent.of(name, tensor))
        return len(self._extents) << _SLOT

    def load(self, places: "Places", dtype: np.dtype) -> NDArray:
        """The values at these places."""
        raise NotImplementedError

    def store(self, places: "Places", values: NDArray) -> None:
        """Write the values to these places."""
        raise NotImplementedError

    def atomic(self, places: "Places", values: NDArray, semantic: str) -> NDArray:
        """Add the values to those at the places, and return what was there before."""
        raise NotImplementedError

    def barrier(self) -> None:
        """All threads of the program have come here."""

    def fault(self, kind: str, what: str) -> Fault:
        """A fault of the running program, with the line of the kernel."""
        return Fault(kind, f"{what}, by program {self.program} of {self.label}, {_line()}")

    def places(self, addresses: NDArray, size: int, access: str) -> "Places":
        """Where the accesses of `size` bytes lie; `Fault` if one is outside its tensor, or misaligned."""
        extents, owner, offset = self._resolve(addresses.reshape(-1).astype(np.uint64), size, access)
        for number, extent in enumerate(extents):
            own = offset if len(extents) == 1 else offset[owner == number]
            if (wrong := (extent.start + own) % size != 0).any():
                at = int(own[wrong][0])
                raise self.fault("misaligned", f"{access} of {size} bytes at byte {at} of {extent.name}")
            good = extent.holds(own, size)
            if not good.all():
                at = int(own[~good][0])
                place = (
                    f"byte {at} of {extent.name}, which has {list(extent.shape)} elements of {extent.itemsize} bytes"
                )
                layout = "" if extent.end == extent.itemsize * np.prod(extent.shape) else f", strides {extent.strides}"
                raise self.fault("out of bounds", f"{access} of {size} bytes at {place}{layout}")
        return Places(extents, owner, offset, size)

    def _resolve(self, addresses: NDArray, size: int, access: str) -> tuple[list[Extent], NDArray, NDArray]:
        """(tensors, number of the tensor of each access, offset of each access)."""
        slots = (addresses + np.uint64(1 << _SLOT - 1)) >> np.uint64(_SLOT)
        offset = (addresses - (slots << np.uint64(_SLOT))).astype(np.int64)
        slot = int(slots[0])
        if slot and (slots == slots[0]).all():
            return [self._extents[slot - 1]], np.zeros(len(offset), np.int64), offset
        if not slot and not slots.any() and self._known:
            number = np.searchsorted(self._starts, offset, side="right") - 1
            # An address between two tensors counts as one behind the first of them.
            numbers, owner = np.unique(np.maximum(number, 0), return_inverse=True)
            return [self._known[n] for n in numbers], owner, offset - self._starts[numbers][owner]
        raise self.fault(
            "out of bounds", f"{access} of {size} bytes at address {int(addresses[0])}, which is of no tensor"
        )


@dataclass(frozen=True)
class Places:
    """Where accesses lie: `owner` has the number of the tensor of each, `offset` its bytes from there."""

    extents: list[Extent]
    owner: NDArray
    offset: NDArray
    size: int

    @property
    def addresses(self) -> NDArray:
        """uint64 addresses of memory that is there."""
        starts = np.array([extent.start for extent in self.extents], np.int64)
        return (starts[self.owner] + self.offset).astype(np.uint64)


def _line() -> str:
    """File and line of the innermost function of a kernel that is running: the device function, where it is in one."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code not in _CODES:
        frame = frame.f_back
    return "an unknown line" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


_CODES: set[Any] = set()
"""Code objects of functions of kernels outside Triton that ran."""

# ---- execution -------------------------------------------------------------------------------------------------------

_memory: Memory | None = None


@contextmanager
def session() -> Iterator[None]:
    """Inside, `run` works: triton.language is that of the interpreter, whose accesses are those of a `Memory`."""
    if reason := unavailable():
        raise RuntimeError(f"kernels cannot be checked: {reason}")
    builder = interpreter.interpreter_builder
    checked = {
        "create_masked_load": _load,
        "create_masked_store": _store,
        "create_atomic_rmw": _atomic,
        "create_assert": _assert,
        "create_barrier": lambda: _memory.barrier(),
        "options": replace(builder.options, debug=True, sanitize_overflow=True),
    }
    with ExitStack() as stack:
        # `tl.sum` and its like are functions of a kernel, too, whose names of the language are those of tl.core.
        for function in (tl.sum.fn, _triton_language):
            stack.callback(interpreter._patch_lang(function).restore)
        stack.enter_context(replaced(tl, "multiple_of", _multiple_of))
        stack.enter_context(replaced(TritonSemantic, _SANITIZER, _check_overflow))
        stack.enter_context(replaced(interpreter.InterpretedFunction, "__call__", _call))
        for name, value in checked.items():
            stack.enter_context(replaced(builder, name, value))
        yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, the attribute of a module, class or object is `value`."""
    own, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def _triton_language() -> Any:
    """A function that sees the name `tl`, as all kernels do: the interpreter looks for it."""
    return tl


def run(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    memory: Memory,
    programs: Iterable[tuple[int, int, int]],
) -> None:
    """Run these programs of a launch, in this order. `Fault` for the first thing that is wrong."""
    global _memory
    sizes = (*grid, *(1,) * (3 - len(grid)))
    memory.begin(title(kernel.fn), sizes, arguments)
    function = _rewritten(kernel)
    constants = {name for name, kind in inspect.get_annotations(kernel.fn).items() if "constexpr" in str(kind)}
    values = {
        name: value if name in constants else _argument(name, value, memory)
        for name, value in inspect.getcallargs(kernel.fn, **arguments).items()
    }
    builder = interpreter.interpreter_builder
    builder.set_grid_dim(*sizes)
    _memory = memory
    try:
        for program in programs:
            memory.program = program
            builder.set_grid_idx(*program)
            function(**values)
    except Exception as error:
        while error.__cause__ is not None and not isinstance(error, Fault):
            error = error.__cause__
        raise error from None
    finally:
        _memory = None


def title(function: Any) -> str:
    """`module.function` of a function of a kernel, as messages call it: without the name of the package."""
    return f"{function.__module__.removeprefix(_PACKAGE)}.{function.__name__}"


def running() -> str:
    """The `title` of the kernel that is running."""
    return _memory.label


def _argument(name: str, value: Any, memory: Memory) -> Any:
    if not isinstance(value, Tensor):
        return interpreter._implicit_cvt(value)
    kind = tl.str_to_ty(triton.runtime.jit.mangle_type(value), None)
    address = np.array([memory.pointer(name, value)], np.uint64)
    return tl.tensor(interpreter.TensorHandle(address, kind), kind)


def _rewritten(function: Any) -> Any:
    result = function.rewrite()
    if not Path(result.__code__.co_filename).is_relative_to(_TRITON):
        _CODES.add(result.__code__)
    return result


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    """A device function: without patching the language once more for every call."""
    return _rewritten(function)(*args, **kwargs)


def _load(ptrs: Any, mask: Any, other: Any, *_: Any) -> Any:
    element = ptrs.get_element_ty()
    dtype = interpreter._get_np_dtype(element)
    shown = np.broadcast_to(mask.data, ptrs.data.shape)
    result = np.zeros(ptrs.data.shape, dtype)
    if other is not None:
        result[...] = other.data
    if shown.any():
        places = _memory.places(ptrs.data[shown], dtype.itemsize, "load")
        result[shown] = _memory.load(places, dtype)
    return interpreter.TensorHandle(result, element)


def _store(ptrs: Any, value: Any, mask: Any, *_: Any) -> None:
    shown = np.broadcast_to(mask.data, ptrs.data.shape)
    if shown.any():
        places = _memory.places(ptrs.data[shown], value.data.dtype.itemsize, "store")
        _memory.store(places, np.broadcast_to(value.data, ptrs.data.shape)[shown])


def _atomic(operation: Any, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any) -> Any:
    if operation.name != "ADD" or not mask.data.all():
        raise NotImplementedError(f"an atomic operation that is not an addition of integers: {operation}")
    places = _memory.places(ptr.data, val.data.dtype.itemsize, "atomic addition")
    before = _memory.atomic(places, val.data.reshape(-1), sem.name)
    return interpreter.TensorHandle(before.reshape(ptr.data.shape).astype(val.data.dtype), val.dtype.scalar)


def _assert(condition: Any, message: str) -> None:
    if not condition.data.all():
        raise _memory.fault("overflow", message)


def _check_overflow(semantic: Any, lhs: Any, rhs: Any, operation: Any) -> None:
    """What Triton checks, too, by six more operations of its language: most of the time of a kernel would be these."""
    kind, name = lhs.type.scalar, operation.__name__
    if kind.int_bitwidth >= 64:
        return
    exact = _EXACT[name](*(side.handle.data.astype(np.int64) for side in (lhs, rhs)))
    if (exact < kind.get_int_min_value()).any() or (exact > kind.get_int_max_value()).any():
        raise _memory.fault("overflow", f"int{kind.int_bitwidth} overflow detected for operation {name}")


def _multiple_of(value: Any, factors: Any, **_: Any) -> Any:
    factors = [factors] if not isinstance(factors, list | tuple) else factors
    divisor = getattr(factors[-1], "value", factors[-1])
    if (value.handle.data % divisor).any():
        raise _memory.fault("broken promise", f"{value.handle.data.flat[0]} is no multiple of {divisor}")
    return value
