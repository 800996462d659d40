"""Kernels compiled for a card that is not there, and run on the CPU: what Triton's compiler made of them, not their
Python source.

`ttsem` runs the compiler's first product, TTIR: helpers are inlined, constants folded, and numbers have the types that
they have on a card, so that products of bfloat16 are right, too. Kernels in Gluon have no TTIR. Of them it runs the
next product, TTGIR, with shared memory, TMA and wgmma, none of which is ever late here: tests/kernels/gluon is about
that. Memory is that of the checked interpreter (tests/kernels/checked.py). So each access is checked as there: against
the extent of its tensor, and against those of other programs, which only an acquire and a release order.

What ttsem 0.1.0 does not do itself is the reason for what stands here:

    it compiles each launch down to PTX, and then once more    `_compiled` stops at its product, and keeps it
    it knows no memory but that of the arguments               `Watched.known` has what tables of addresses point to
    it drops the memory order of atomic additions              `_atomic_addition` passes it on
    it runs no barrier                                         `_barrier`
    it finds no line in helpers that were inlined              `_line`
    it knows no PTX that moves a number                        `_inline_ptx`
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import triton
from numpy.typing import NDArray
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import create_function_from_signature

from fastdeit.kernels import _triton
from fastdeit.kernels.lint import interpreter
from fastdeit.kernels.lint.interpreter import Fault
from tests.kernels.checked import Watched, knowing_lists, programs
from tests.kernels.proof import poisoned

TTSEM, TRITON = "0.1.0", (3, 8)
"""The versions that this was written for: it reaches into both."""
_SEMANTICS = {1: "RELAXED", 2: "ACQUIRE", 3: "RELEASE", 4: "ACQUIRE_RELEASE"}
_INTEGER_ADDITION = 4
_PLACE = re.compile(r'"([^"]+)":(\d+):\d+')
"""A place in a source, as MLIR prints it. In a chain of calls the first is the innermost."""


@cache
def unavailable() -> str | None:
    """Why compiled kernels cannot be run in this process; None if they can."""
    try:
        found = version("ttsem")
    except PackageNotFoundError:
        return "ttsem is not installed (`pip install fastdeit[ir]`, Python 3.12 or newer)"
    if found != TTSEM:
        return f"ttsem {found} is installed, but {TTSEM} is wanted"
    if _triton.VERSION != TRITON:
        return f"Triton {triton.__version__} is installed, but {'.'.join(map(str, TRITON))} is wanted"
    if triton.knobs.runtime.interpret:
        return "TRITON_INTERPRET is set, so that nothing is compiled; FASTDEIT_IR=90 leaves it unset"
    return None


class _Accesses:
    """What ttsem asks of a memory, by `Watched`, whose pointers are numbers of tensors with offsets."""

    access_log = None  # ttsem's own, which knows no order

    def __init__(self, watched: Watched) -> None:
        self.watched = watched

    def load(self, pointers: NDArray, mask: NDArray | None, other: Any, dtype: np.dtype) -> NDArray:
        """The values where the mask is true, `other` or 0 elsewhere."""
        result = np.zeros(pointers.shape, dtype)
        if other is not None:
            result[...] = other
        shown = _shown(mask, pointers.shape)
        if shown.any():
            places = self.watched.places(pointers[shown], result.itemsize, "load")
            result[shown] = self.watched.load(places, result.dtype)
        return result

    def store(self, pointers: NDArray, values: NDArray, mask: NDArray | None) -> None:
        """Write the values where the mask is true."""
        shown = _shown(mask, pointers.shape)
        if shown.any():
            places = self.watched.places(pointers[shown], values.itemsize, "store")
            self.watched.store(places, np.broadcast_to(values, pointers.shape)[shown])


def _shown(mask: NDArray | None, shape: tuple[int, ...]) -> NDArray:
    return np.ones(shape, bool) if mask is None else np.broadcast_to(mask, shape)


def _atomic_addition(interp: Any, op: Any, args: list[Any]) -> list[Any]:
    kind, order = (int(op.attrs[name]) for name in ("atomic_rmw_op", "sem"))
    if kind != _INTEGER_ADDITION or not np.all(args[2]):
        raise NotImplementedError(f"the only atomic operation here adds integers without a mask, not {op.text}")
    watched, pointer = interp.memory.watched, np.asarray(args[0])
    value = np.asarray(args[1])
    places = watched.places(pointer.reshape(1), value.itemsize, "atomic addition")
    before = watched.atomic(places, value.reshape(1), _SEMANTICS[order])
    return [before.astype(value.dtype).reshape(pointer.shape)]


def _barrier(interp: Any, op: Any, args: list[Any]) -> list[Any]:
    interp.memory.watched.barrier()
    return []


def _inline_ptx(interp: Any, op: Any, args: list[Any]) -> list[Any]:
    if op.attrs["asm_string"].strip('"') != "mov.b32 $0, $1;":
        raise NotImplementedError(f"the only PTX here moves a number, not {op.text}")
    return args


# ---- compilation -----------------------------------------------------------------------------------------------------

_modules: dict[tuple[Any, ...], Any] = {}
"""By the source and everything else that the compiler specialises on. Parsing takes most of the time."""


def _compiled(kernel: Any, arguments: dict[str, Any], options: dict[str, Any], arch: int) -> tuple[Any, list[str]]:
    """(TTIR, or TTGIR of Gluon, as ttsem holds it; names of the arguments that are left in it)."""
    from ttsem import mlir

    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, special, chosen = bind(**arguments, **options)
    chosen, signature, constants, attributes = kernel._pack_args(backend, options, bound, special, chosen)
    names = [name for name, kind in signature.items() if kind != "constexpr"]
    key = kernel.cache_key, arch, *map(str, (chosen, signature, constants, attributes))
    if key not in _modules:
        mlir.enable_generic_printing()
        kind, product = (GluonASTSource, "ttgir") if kernel.is_gluon() else (ASTSource, "ttir")
        source = kind(kernel, signature, constants, attributes)
        chosen = backend.parse_options({**vars(chosen), **source.parse_options()})
        stages: dict[str, Any] = {}
        backend.add_stages(stages, chosen, source.language)
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        implementation, modules = backend.get_codegen_implementation(chosen), backend.get_module_map()
        module = source.make_ir(target, chosen, implementation, modules, context)
        module = stages[product](module, {"target": target, **vars(chosen)})
        _modules[key] = mlir.parse(str(module))
    return _modules[key], names


def _line(error: BaseException) -> str:
    """The line of the kernel of an operation that failed: ttsem adds its text, with its place, as a note."""
    for note in getattr(error, "__notes__", ()):
        if found := _PLACE.search(note.rpartition(" loc(")[2]):
            path, number = found.groups()
            text = Path(path).read_text().splitlines()[int(number) - 1].strip()
            return f"{Path(path).name}:{number}: {text}"
    return "an unknown line"


def _parts(watched: Watched, name: str, value: Any, kinds: Iterator[Any]) -> list[Any]:
    """What an argument is in the compiled kernel, whose next arguments have these types: of a tensor descriptor itself,
    its shape and its strides."""
    from ttsem import values

    kind = next(kinds)
    if isinstance(value, Tensor):
        return [np.array(watched.pointer(name, value), np.int64)]
    if (base := _triton.of_descriptor(value)) is value:
        return [values.cast_to(np.asarray(value), kind)]
    sizes = tuple(map(tuple, (value.shape, value.strides, value.block_shape)))
    numbers = [values.cast_to(np.asarray(number), next(kinds)) for number in (*value.shape, *value.strides)]
    return [values.Descriptor(watched.pointer(name, base), *sizes, kind.elem), *numbers]


class _Unplaced(Watched):
    """Whose faults come without a line: that of the interpreter's source is none of the kernel's."""

    def fault(self, kind: str, what: str) -> Fault:
        return Fault(kind, f"{what}, by program {self.program} of {self.label}")


# ---- the context -----------------------------------------------------------------------------------------------------


@contextmanager
def executed(order: str = "forward", seed: int = 0, arch: int = 90) -> Iterator[list[str]]:
    """Inside, all launches of the package on tensors of the CPU are compiled for a card of this architecture and run
    here, their programs in this order, and memory that was never written is NaN. Gives the list of the kernels that
    were launched. `Fault` for the first thing that is wrong, as in `checked`."""
    from ttsem.interp import Interp
    from ttsem.ops import OPS

    watched, launched, to_record = _Unplaced(), [], _triton.launch

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int, stages: int = 1, **constants: Any) -> None:
        if 0 in grid:
            return
        if _triton._recording is not None:  # of tensors that may have no memory
            to_record(kernel, grid, *args, warps=warps, stages=stages, **constants)
            return
        launched.append(interpreter.title(kernel.fn))
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | constants
        # Cases that shrink blocks leave too few elements for a warp.
        options = {"num_warps": max(1, warps), "num_stages": stages, "enable_fp_fusion": True}
        module, names = _compiled(kernel, arguments, options, arch)
        sizes = (*grid, *(1,) * (3 - len(grid)))
        watched.begin(launched[-1], sizes, {name: _triton.of_descriptor(value) for name, value in arguments.items()})
        ((entry, function),) = module.funcs.items()  # all helpers are inlined
        kinds = iter([kind for _, kind in function.regions[0].blocks[0].args])
        given = [part for name in names for part in _parts(watched, name, arguments[name], kinds)]
        interp = Interp(module, _Accesses(watched), sizes)
        for program in programs(grid, order, seed):
            watched.program = program
            try:
                interp.run(entry, given, program)
            except Fault as fault:
                raise Fault(fault.kind, f"{fault.what}, {_line(fault)}") from None

    with ExitStack() as stack:
        stack.enter_context(poisoned())
        stack.enter_context(knowing_lists(watched))
        ours = {"tt.atomic_rmw": _atomic_addition, "ttg.barrier": _barrier, "gpu.barrier": _barrier}
        ours["tt.elementwise_inline_asm"] = _inline_ptx
        stack.enter_context(mock.patch.dict(OPS, ours))
        for name, value in (
            ("launch", launch),
            ("INTERPRETED", True),  # so that backends take tensors of the CPU
            ("require_products", lambda *_: None),
            ("arch", lambda device: arch),
        ):
            stack.enter_context(mock.patch.object(_triton, name, value))
        yield launched
