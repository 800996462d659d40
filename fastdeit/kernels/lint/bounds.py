"""Out-of-bounds accesses and overflows of offsets at sizes that fit no machine: `fastdeit kernels lint --bounds`.

The lint's examples run on tensors of the meta device, so that their launches are recorded (`cases.py`), once at the
sizes that the lint compiles and once so large that the largest argument has more than 2**31 elements. Of each launch
the programs at the corners of the grid run in Triton's interpreter on memory that is not there: what is read is 0, what
is written is dropped, and every access is checked against its tensor (`interpreter.py`).

What this shows: offsets of the kernels are sums and products of program ids, loop variables and sizes, none of them
negative, and so are largest and smallest at the corners. (Products number their blocks in groups; there, too, the last
program has the last rows and columns.) Therefore no program of these launches, which are those for sm_90, leaves its
tensors, and no 32-bit offset wraps. What it does not show: other sizes, the values of results, and addresses that
depend on data (labels, partners, boxes), which are taken where the data is 0. Loops of more than `LONG` rounds go
through their first and last ones, so that a pointer that such a loop moves along is not followed; no kernel has one.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor
from triton.runtime.interpreter import _interpreter, interpreter_builder

from fastdeit.kernels import _triton
from fastdeit.kernels._example import Maker
from fastdeit.kernels._table import aligned
from fastdeit.kernels.lint import interpreter
from fastdeit.kernels.lint.cases import Case, cases
from fastdeit.kernels.lint.interpreter import Extent, Fault, Memory, Places
from fastdeit.kernels.lint.lint import LintError
from fastdeit.kernels.optimizer import _multi_tensor

LONG = 256
"""Most rounds of a loop that are all gone through: twice those over the depth of the widest product of DeiT-B."""
_BEYOND = 2**31 * 9 // 8
"""Elements of the largest argument at huge sizes."""
_FIRST, _APART = 1 << 40, 1 << 12
"""Address of the first tensor that only a table names, and bytes between two of these."""


class Nothing(Memory):
    """Memory that is not there. Tensors of the CPU, which have contents, can be read; every ticket is the last."""

    def load(self, places: Places, dtype: np.dtype) -> NDArray:
        """Zeros, or the contents of a tensor of the CPU."""
        nothing = np.zeros(len(places.offset), dtype)
        if places.extents[0].start and places.extents[0] in self._extents:
            return _interpreter.load(places.addresses, np.ones(len(nothing), bool), nothing, dtype)
        return nothing

    def store(self, places: Places, values: NDArray) -> None:
        """Nothing is kept."""

    def atomic(self, places: Places, values: NDArray, semantic: str) -> NDArray:
        """What makes the sum 0: that of the last program."""
        return -values


@dataclass(frozen=True)
class Checked:
    """A launch: its kernel, how many programs ran, the elements from the first to the last of its largest tensor, and
    the fault, if there is one."""

    op: str
    case: str
    kernel: str
    programs: int
    elements: int
    fault: str | None


def check(case: Case, seen: set[Any] | None = None, arch: int = 90) -> list[Checked]:
    """Every launch of a case on an architecture, but for those that are in `seen`, with the same addresses; adds to it.
    RuntimeError where kernels cannot be interpreted."""
    memory, seen = Nothing(), set() if seen is None else seen
    with _addressed(memory), _triton.recording(arch) as recorded:
        case.run()
    # Addresses do not depend on products, which take most of the time.
    no_products = interpreter.replaced(interpreter_builder, "create_dot", lambda a, b, total, *_: total)
    found = []
    with interpreter.session(), no_products:
        for launch in recorded.launches:
            key = _addresses_of(launch)
            if key not in seen:
                seen.add(key)
                found.append(_check(case, launch, memory))
    return found


def _addresses_of(launch: _triton.Launch) -> Any:
    """What the addresses of a launch depend on: of tensors their layouts, not whether 16 bits are those of bfloat16."""

    def layout(value: Any) -> Any:
        if isinstance(value, Tensor):
            return tuple(value.shape), value.stride(), value.element_size()
        return value.primitive_bitwidth if isinstance(value, tl.dtype) else str(value)

    return launch.kernel.fn, launch.grid, tuple((name, layout(value)) for name, value in launch.arguments.items())


def _check(case: Case, launch: _triton.Launch, memory: Memory) -> Checked:
    programs, fault = corners(launch.grid), None
    try:
        with _short_loops(launch.kernel.fn.__module__), np.errstate(all="ignore"):
            interpreter.run(launch.kernel, launch.grid, launch.arguments, memory, programs)
    except Fault as found:
        fault = str(found)
    extents = [Extent.of(name, value) for name, value in launch.arguments.items() if isinstance(value, Tensor)]
    largest = max(extent.end // extent.itemsize for extent in (*extents, *memory.known))
    return Checked(case.op, case.name, interpreter.title(launch.kernel.fn), len(programs), largest, fault)


def corners(grid: Sequence[int]) -> list[tuple[int, int, int]]:
    """The first two and the last of every axis of the grid."""
    axes = (sorted({0, min(1, n - 1), n - 1}) for n in (*grid, 1, 1)[:3])
    return list(product(*axes))


def huge_cases() -> dict[str, list[Case]]:
    """`cases`, with so many samples that the largest argument has more than 2**31 elements. Optimizers know no samples:
    theirs have so many classes. The casts of weights know neither: theirs have so many hidden features. By op."""
    return {op: [_huge(case) for case in found] for op, found in cases().items()}


def _huge(case: Case) -> Case:
    run, op, backend, example, make = case.run.func, *case.run.args

    def sizes(name: str, times: int) -> Maker:
        return replace(make, sizes=replace(make.sizes, **{name: times * getattr(make.sizes, name)}))

    def run_huge() -> None:
        once = _elements(example.build(make))
        for name in ("batch", "classes", "hidden"):
            twice = _elements(example.build(sizes(name, 2)))
            growing = [one for one, two in zip(once, twice, strict=True) if two > one]
            if growing:
                break
        run(op, backend, example, sizes(name, -(-_BEYOND // max(growing))))

    return replace(case, run=run_huge, name=f"{case.name}, huge")


def _elements(args: Sequence[Any]) -> list[int]:
    tensors = (tensor for arg in args for tensor in (arg if isinstance(arg, list) else [arg]))
    return [tensor.numel() for tensor in tensors if isinstance(tensor, Tensor)]


@contextmanager
def _addressed(memory: Memory) -> Iterator[None]:
    """Inside, tensors of the meta device have addresses in the tables of optimizers, and the tables have contents."""
    part = _multi_tensor._part

    def addressed(kind: tuple, columns: Sequence[Sequence[int]], places: Sequence[int | None], device: Any) -> Any:
        (_, *dtypes), (sizes, *_) = kind, columns
        rows: list[list[int]] = []
        for number, dtype in enumerate(dtypes):
            rows.append([])
            for i, size in enumerate(sizes):
                start = memory.known[-1].start + memory.known[-1].end + _APART if memory.known else _FIRST
                start -= start % 16
                memory.known.append(Extent(f"tensor {i} of list {number}", start, dtype.itemsize, (size,), (1,)))
                rows[-1].append(start)
        return part(kind, [sizes, *rows], places, torch.device("cpu"))

    with interpreter.replaced(_multi_tensor, "_part", addressed):
        yield


@contextmanager
def _short_loops(kernel: str) -> Iterator[None]:
    """Inside, loops of more than `LONG` rounds go through the first and the last three of them: those of functions in
    the module of a kernel, and in the package."""

    def ends(*limits: Any) -> Sequence[int]:
        every = range(*map(int, limits))
        return every if len(every) <= LONG else [*every[:3], *every[-3:]]

    package = __package__.rpartition(".")[0]
    modules = [module for name, module in sys.modules.items() if name.startswith(package) or name == kernel]
    modules.remove(sys.modules[__name__])
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(interpreter.replaced(module, "range", ends))
        yield


# ---- command ---------------------------------------------------------------------------------------------------------


def check_all(ops: Sequence[str]) -> list[Checked]:
    """Every launch of the cases of the ops at real and at huge sizes, by a process per core."""
    workers = min(len(os.sched_getaffinity(0)), len(ops))
    with ProcessPoolExecutor(workers, get_context("fork"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return [checked for found in pool.map(check_op, ops) for checked in found]


def check_op(op: str) -> list[Checked]:
    """Every launch of the cases of an op at real and at huge sizes, those with the same addresses once."""
    seen: set[Any] = set()
    return [checked for case in (*cases()[op], *huge_cases()[op]) for checked in check(case, seen)]


def main(args: argparse.Namespace) -> int:
    """`fastdeit kernels lint --bounds`: print a line for every kernel and op, and every fault; 1 if there is any."""
    if reason := interpreter.unavailable():
        raise LintError(f"--bounds needs Triton's interpreter, but {reason}")
    known = cases()
    if args.op is not None and args.op not in known:
        raise LintError(f"the op {args.op!r} has no Triton kernels; those that have: {', '.join(known)}")
    found = check_all([args.op] if args.op else list(known))
    print("Bounds and 32-bit offsets at the corners of the grids, on memory that is not there\n")
    groups: dict[tuple[str, str], list[Checked]] = {}
    for checked in found:
        groups.setdefault((checked.op, checked.kernel), []).append(checked)
    lines = [("op", "kernel", "launches", "programs", "largest tensor", "")]
    for (op, kernel), own in groups.items():
        faults = sum(checked.fault is not None for checked in own)
        largest = f"{max(checked.elements for checked in own) / 2**31:.2f} x 2**31"
        counts = str(len(own)), str(sum(checked.programs for checked in own)), largest
        lines.append((op, kernel, *counts, f"{faults} faults" if faults else "within bounds"))
    print(aligned(lines))
    faults = [f"{checked.op} | {checked.case} | {checked.fault}" for checked in found if checked.fault]
    print("\n" + ("\n".join(faults) or f"{len(found)} launches, all within bounds"))
    return 1 if faults else 0
