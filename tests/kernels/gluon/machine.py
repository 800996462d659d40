"""A machine that runs Gluon kernels for Hopper on the CPU, from the same Python source that Triton compiles.

Gluon has no interpreter. Here a kernel runs as plain Python: the functions of the language that it calls are replaced
by those of this file, and values are PyTorch's tensors. What is asynchronous on a card is adversarial here:

    a TMA load      lands when a wait on its mbarrier needs it, and not before: nothing may read the memory earlier, and
                    the bytes that the barrier expects are those that were loaded into it
    a wgmma         reads shared memory until it is waited for: nothing may write there meanwhile. Its result is there
                    when it is waited for, and not before
    a TMA store     reads shared memory until it is waited for, and has to be before the kernel ends
    proxies         what threads have written into shared memory is seen by wgmma and TMA after a fence and then a
                    barrier; what these have read is written by threads after a wait and then a barrier
    mbarriers       are set up once, and seen after a fence and a barrier; a wait for a phase that cannot end is a
                    deadlock. At the end all are invalid, behind the last waits and a barrier: Triton gives the memory
                    of one that is used no more to other data, which PTX forbids before

Every access of global memory is held against its tensor, and no element is written twice in a launch, or read after it
was written there. Products of 16-bit operands are added up in float32.

Layouts are not looked at: Triton's compiler refuses those that do not fit. Nor are the registers and what the threads
of a program do between two of its operations.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

SHARED_MEMORY = 232_448
"""Bytes that a program may have on sm_90."""
_DTYPES = {
    gl.float32: torch.float32,
    gl.float16: torch.float16,
    gl.bfloat16: torch.bfloat16,
    gl.int32: torch.int32,
    gl.int64: torch.int64,
}
_TAKEN_OVER = (
    *("float32", "int32", "int64", "bfloat16", "float16", "constexpr"),
    *("SliceLayout", "DotOperandLayout", "BlockedLayout", "SwizzledSharedLayout"),
)
_POISON = float("nan")


class Fault(Exception):
    """A kernel does what it must not. `kind` is a word for it."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(f"{kind}: {what}")
        self.kind = kind


# ---- values ----------------------------------------------------------------------------------------------------------


class Tile:
    """A tensor in registers. int32 does not wrap."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def to(self, dtype: Any) -> "Tile":
        return Tile(self.data.to(_dtype(dtype)))

    def __getitem__(self, index: Any) -> "Tile":
        return Tile(self.data[index])

    def __int__(self) -> int:
        return int(self.data)

    __index__ = __int__

    def __bool__(self) -> bool:
        return bool(self.data)

    def _with(self, other: Any, function: Callable, swapped: bool = False) -> "Tile":
        if isinstance(other, Pointer):
            return NotImplemented
        other = other.data if isinstance(other, Tile) else other
        mine = self.data
        result = function(other, mine) if swapped else function(mine, other)
        if result.dtype in (torch.int32, torch.int64) and not isinstance(other, float):
            wide = function(_wide(other), _wide(mine)) if swapped else function(_wide(mine), _wide(other))
            if not torch.equal(_wide(result), _wide(wide)):
                raise Fault("overflow", "a number of 32 bits wraps")
        return Tile(result)

    def __add__(self, other: Any) -> Any:
        return self._with(other, torch.add)

    def __radd__(self, other: Any) -> Any:
        return self._with(other, torch.add, True)

    def __sub__(self, other: Any) -> Any:
        return self._with(other, torch.sub)

    def __rsub__(self, other: Any) -> Any:
        return self._with(other, torch.sub, True)

    def __mul__(self, other: Any) -> Any:
        return self._with(other, torch.mul)

    def __rmul__(self, other: Any) -> Any:
        return self._with(other, torch.mul, True)

    def __truediv__(self, other: Any) -> Any:
        return self._with(other, torch.div)

    def __rtruediv__(self, other: Any) -> Any:
        return Tile(other / self.data)

    def __floordiv__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: torch.div(a, b, rounding_mode="floor"))

    def __mod__(self, other: Any) -> Any:
        return self._with(other, torch.remainder)

    def __lt__(self, other: Any) -> Any:
        return Tile(self.data < (other.data if isinstance(other, Tile) else other))

    def __and__(self, other: "Tile") -> "Tile":
        return Tile(self.data & other.data)


def _wide(value: Any) -> Any:
    return value.to(torch.int64) if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int64)


def _dtype(dtype: Any) -> torch.dtype:
    return dtype if isinstance(dtype, torch.dtype) else _DTYPES[dtype]


def _plain(value: Any) -> Any:
    """A constant of Triton as what it stands for."""
    return value.value if isinstance(value, gl.constexpr) else value


class Pointer:
    """An address in the memory of a tensor, or a tile of them."""

    def __init__(self, memory: "Global", offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset

    def __add__(self, other: Any) -> "Pointer":
        return Pointer(self.memory, other + self.offset)

    __radd__ = __add__


class Accumulator:
    """The result of a wgmma that is under way."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.done = value, False

    @property
    def shape(self) -> list[int]:
        return list(self.value.shape)


# ---- global memory ---------------------------------------------------------------------------------------------------


class Global:
    """A tensor of global memory: who wrote each element in this launch, 0 for nobody."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous")
        self.name, self.tensor = name, tensor
        self.flat, self.writer = tensor.view(-1), torch.zeros(tensor.numel(), dtype=torch.int32)

    def load(self, offset: Tensor, program: int) -> Tensor:
        self._check(offset, "reads")
        if self.writer[offset].any():
            raise Fault("race", f"program {program} reads of {self.name} what was written in this launch")
        return self.flat[offset]

    def store(self, offset: Tensor, values: Tensor, program: int) -> None:
        self._check(offset, "writes")
        if self.writer[offset].any() or offset.unique().numel() != offset.numel():
            raise Fault("race", f"program {program} writes of {self.name} what was written in this launch")
        self.writer[offset] = program + 1
        self.flat[offset] = values.to(self.flat.dtype)

    def _check(self, offset: Tensor, does: str) -> None:
        if offset.numel() and (int(offset.min()) < 0 or int(offset.max()) >= self.flat.numel()):
            raise Fault("bounds", f"it {does} {self.name} at {int(offset.min())} to {int(offset.max())}, outside of it")


class Boxes:
    """A tensor descriptor as a kernel sees it."""

    def __init__(self, memory: Global, descriptor: TensorDescriptor) -> None:
        self.memory, self.block_shape, self.layout = memory, list(descriptor.block_shape), descriptor.layout
        self.size, self.strides, self.dtype = list(descriptor.shape), list(descriptor.strides), descriptor.base.dtype
        self.nbytes_per_cta = math.prod(self.block_shape) * descriptor.base.element_size()

    def places(self, coordinates: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """(offset of each element of the box, which of them the tensor has)"""
        offset, there = torch.zeros(self.block_shape, dtype=torch.int64), torch.ones(self.block_shape, dtype=torch.bool)
        for dim, (start, count) in enumerate(zip(coordinates, self.block_shape, strict=True)):
            place = int(start) + torch.arange(count)
            place = place.view([-1 if d == dim else 1 for d in range(len(self.block_shape))])
            offset = offset + place * self.strides[dim]
            there = there & (place >= 0) & (place < self.size[dim])
        return offset, there


# ---- shared memory ---------------------------------------------------------------------------------------------------

_SEEN, _WRITTEN, _FENCED = range(3)
"""What other proxies see of memory that threads have written: all of it; nothing; all of it behind a barrier."""


class Shared:
    """A view of an allocation. Beside each element: whether it is `there`; what is `seen` of it; how many asynchronous
    operations read it (`readers`); whether one did so since the last barrier (`read`); whether a load is on the way."""

    def __init__(self, machine: "Machine", fields: dict[str, Tensor], layout: Any) -> None:
        self.machine, self.fields, self.layout = machine, fields, layout

    @property
    def shape(self) -> list[int]:
        return list(self.fields["data"].shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.fields["data"].dtype

    def _view(self, change: Callable[[Tensor], Tensor]) -> "Shared":
        return Shared(self.machine, {name: change(field) for name, field in self.fields.items()}, self.layout)

    def index(self, number: Any) -> "Shared":
        number = int(number)
        if not 0 <= number < self.shape[0]:
            raise Fault("bounds", f"buffer {number} of {self.shape[0]}")
        return self._view(lambda field: field[number])

    def reshape(self, shape: Sequence[Any]) -> "Shared":
        return self._view(lambda field: field.view([int(_plain(size)) for size in shape]))

    def permute(self, order: Sequence[int]) -> "Shared":
        return self._view(lambda field: field.permute(tuple(order)))

    def load(self, layout: Any) -> Tile:
        self._check_there("threads read")
        return Tile(self.fields["data"].clone())

    def store(self, value: Tile) -> None:
        if value.shape != self.shape or value.dtype != self.dtype:
            raise Fault("type", f"{value.dtype} {value.shape} is stored into {self.dtype} {self.shape}")
        if self.fields["arriving"].any():
            raise Fault("race", "threads write where a load is still to land")
        if self.fields["readers"].any():
            raise Fault("race", "threads write what an asynchronous operation still reads")
        if self.fields["read"].any():
            raise Fault("barrier", "threads write what an operation has read that others may not have waited for")
        self.fields["data"].copy_(value.data)
        self.fields["there"].fill_(True)
        self.fields["seen"].fill_(_WRITTEN)

    def operand(self, by: str) -> Tensor:
        """The contents, from now on read by an asynchronous operation."""
        self._check_there(f"{by} reads")
        if (self.fields["seen"] != _SEEN).any():
            raise Fault("fence", f"{by} reads what threads have written without a fence and a barrier since")
        self.fields["readers"].add_(1)
        return self.fields["data"].clone()

    def released(self) -> None:
        """An asynchronous operation has read it."""
        self.fields["readers"].sub_(1)
        self.fields["read"].fill_(True)

    def _check_there(self, what: str) -> None:
        if self.fields["arriving"].any():
            raise Fault("early", f"{what} where a load is still to land")
        if not self.fields["there"].all():
            raise Fault("unwritten", f"{what} what nothing was written to")

    def begin_load(self) -> None:
        used = any(self.fields[name].any() for name in ("there", "arriving", "readers"))
        if used:
            raise Fault("race", "a load writes where something was before: this machine wants new memory")
        self.fields["arriving"].fill_(True)

    def land(self, values: Tensor) -> None:
        self.fields["data"].copy_(values)
        self.fields["arriving"].fill_(False)
        self.fields["there"].fill_(True)


class Mbarrier:
    """A barrier that counts arrivals and bytes of loads."""

    def __init__(self) -> None:
        self.count = 0
        self.seen = _SEEN
        self.phase, self.pending, self.bytes = 0, 0, 0
        self.waited = False  # since the last barrier of threads
        self.loads: list[tuple[Shared, Tensor, int]] = []

    def init(self, count: int) -> None:
        if self.count:
            raise Fault("mbarrier", "a barrier is set up twice")
        self.count = self.pending = count
        self.seen = _WRITTEN

    def check(self) -> None:
        if not self.count:
            raise Fault("mbarrier", "a barrier is used that was not set up")
        if self.seen != _SEEN:
            raise Fault("fence", "a barrier is used without a fence and a barrier of threads since it was set up")

    def expect(self, size: int) -> None:
        self.check()
        if not self.pending:
            raise Fault("mbarrier", "more arrive at a barrier than it waits for")
        self.pending -= 1
        self.bytes += size

    def wait(self, phase: int) -> None:
        self.check()
        self.waited = True
        if self.phase % 2 != phase:
            return
        for target, values, size in self.loads:
            target.land(values)
            self.bytes -= size
        self.loads.clear()
        if self.bytes < 0 and not self.pending:
            raise Fault("bytes", f"{-self.bytes} bytes more are loaded than a barrier expects")
        if self.bytes or self.pending:
            missing = f"{self.pending} arrivals" if self.pending else f"{self.bytes} bytes"
            raise Fault("deadlock", f"a wait for a barrier that lacks {missing}")
        self.phase, self.pending = self.phase + 1, self.count

    def invalidate(self) -> None:
        self.check()
        if self.loads:
            raise Fault("end", "a barrier is made invalid while a load is still to arrive at it")
        if self.waited:
            raise Fault("barrier", "a barrier is made invalid that other threads may still wait for")
        self.count = 0


class Mbarriers:
    """An allocation of them."""

    def __init__(self, barriers: list[Mbarrier]) -> None:
        self.barriers = barriers

    def index(self, number: Any) -> Mbarrier:
        number = int(number)
        if not 0 <= number < len(self.barriers):
            raise Fault("bounds", f"barrier {number} of {len(self.barriers)}")
        return self.barriers[number]


# ---- the machine -----------------------------------------------------------------------------------------------------


class Machine:
    """One program: its shared memory, and the asynchronous operations that are under way."""

    def __init__(self, program: int) -> None:
        self.program, self.bytes = program, 0
        self.memory: list[Shared] = []
        self.barriers: list[Mbarrier] = []
        self.products: list[tuple[Accumulator, list[Shared]]] = []
        self.stores: list[Shared] = []

    # ---- memory

    def allocate(self, dtype: Any, shape: Sequence[Any], layout: Any) -> Any:
        shape, dtype = [int(_plain(size)) for size in shape], _dtype(dtype)
        self.bytes += math.prod(shape) * dtype.itemsize
        if self.bytes > SHARED_MEMORY:
            raise Fault("memory", f"{self.bytes} bytes of shared memory, at most {SHARED_MEMORY} fit")
        if isinstance(layout, hopper.mbarrier.MBarrierLayout):
            barriers = [Mbarrier() for _ in range(math.prod(shape))]
            self.barriers += barriers
            return Mbarriers(barriers)
        fields = {
            "data": torch.full(shape, _POISON, dtype=dtype),
            "there": torch.zeros(shape, dtype=torch.bool),
            "seen": torch.zeros(shape, dtype=torch.int8),
            "readers": torch.zeros(shape, dtype=torch.int32),
            "read": torch.zeros(shape, dtype=torch.bool),
            "arriving": torch.zeros(shape, dtype=torch.bool),
        }
        self.memory.append(Shared(self, fields, layout))
        return self.memory[-1]

    def fence(self) -> None:
        for memory in self.memory:
            seen = memory.fields["seen"]
            seen[seen == _WRITTEN] = _FENCED
        for barrier in self.barriers:
            if barrier.seen == _WRITTEN:
                barrier.seen = _FENCED

    def barrier(self) -> None:
        for memory in self.memory:
            seen = memory.fields["seen"]
            seen[seen == _FENCED] = _SEEN
            memory.fields["read"].fill_(False)
        for barrier in self.barriers:
            if barrier.seen == _FENCED:
                barrier.seen = _SEEN
            barrier.waited = False

    # ---- TMA

    def load_box(self, boxes: Boxes, coordinates: Sequence[Any], barrier: Mbarrier, target: Shared) -> None:
        barrier.check()
        if target.shape != boxes.block_shape or target.dtype != boxes.dtype:
            raise Fault("type", f"a box {boxes.block_shape} is loaded into {target.shape}")
        target.begin_load()
        offset, there = boxes.places(coordinates)
        values = torch.zeros(boxes.block_shape, dtype=boxes.dtype)
        values[there] = boxes.memory.load(offset[there], self.program)
        barrier.loads.append((target, values, boxes.nbytes_per_cta))

    def store_box(self, boxes: Boxes, coordinates: Sequence[Any], source: Shared) -> None:
        if source.shape != boxes.block_shape or source.dtype != boxes.dtype:
            raise Fault("type", f"{source.shape} is stored as a box {boxes.block_shape}")
        offset, there = boxes.places(coordinates)
        boxes.memory.store(offset[there], source.operand("a TMA store")[there], self.program)
        self.stores.append(source)

    def wait_for_stores(self, pending: int) -> None:
        while len(self.stores) > pending:
            self.stores.pop(0).released()

    # ---- wgmma

    def multiply(self, a: Any, b: Shared, total: Any, use_acc: Any = True, is_async: bool = False) -> Any:
        if not isinstance(b, Shared):
            raise Fault("type", "the second operand of wgmma is not in shared memory")
        read = [operand for operand in (a, b) if isinstance(operand, Shared)]
        left, right = (x.operand("wgmma") if isinstance(x, Shared) else x.data for x in (a, b))
        (m, k), (other, n) = left.shape, right.shape
        if k != other or m % 64 or k % 16 or n % 8 or left.dtype != right.dtype or left.dtype.itemsize != 2:
            raise Fault("type", f"wgmma of {left.dtype} {[m, k]} and {right.dtype} {[other, n]}")
        if total.shape != [m, n]:
            raise Fault("type", f"wgmma adds {[m, n]} to {total.shape}")
        value = left.float() @ right.float()
        if bool(use_acc):
            value = value + (total.value if isinstance(total, Accumulator) else total.data)
        result = Accumulator(value)
        self.products.append((result, read))
        return result if is_async else self.wait_for_products(0, [result])

    def wait_for_products(self, outstanding: int, results: Sequence[Any]) -> Any:
        while len(self.products) > outstanding:
            result, read = self.products.pop(0)
            result.done = True
            for operand in read:
                operand.released()
        found = []
        for result in results:
            if isinstance(result, Accumulator) and not result.done:
                raise Fault("early", "a product is read that was not waited for")
            found.append(Tile(result.value) if isinstance(result, Accumulator) else result)
        return found[0] if len(found) == 1 else tuple(found)

    def end(self) -> None:
        """The program ends."""
        if any(barrier.loads for barrier in self.barriers):
            raise Fault("end", "a load is under way when the kernel ends")
        if any(barrier.count for barrier in self.barriers):
            raise Fault("mbarrier", "a barrier is not made invalid when the kernel ends")
        if self.products or self.stores:
            raise Fault("end", "a product or a store is under way when the kernel ends")

    # ---- what kernels call

    def language(self) -> dict[str, Any]:
        """The names that a kernel has, by those that its module gives them."""

        def tile(x: Any) -> Tensor:
            return x.data if isinstance(x, Tile) else torch.tensor(x)

        def where(condition: Tile, one: Any, other: Any) -> Tile:
            return Tile(torch.where(condition.data, tile(one), tile(other)))

        def full(shape: Sequence[Any], value: Any, dtype: Any, layout: Any = None) -> Tile:
            return Tile(torch.full([int(_plain(size)) for size in shape], _plain(value), dtype=_dtype(dtype)))

        def offsets(pointer: Pointer, mask: Tile | None) -> tuple[Tensor, Tensor]:
            offset = _wide(tile(pointer.offset))
            shown = torch.ones_like(offset, dtype=torch.bool) if mask is None else mask.data
            return offset, shown

        def load(pointer: Pointer, mask: Tile | None = None, other: float = 0.0) -> Tile:
            offset, shown = offsets(pointer, mask)
            values = torch.full(offset.shape, other, dtype=pointer.memory.flat.dtype)
            values[shown] = pointer.memory.load(offset[shown], self.program)
            return Tile(values)

        def store(pointer: Pointer, value: Tile, mask: Tile | None = None) -> None:
            offset, shown = offsets(pointer, mask)
            pointer.memory.store(offset[shown], value.data[shown], self.program)

        functions = SimpleNamespace(
            **{name: getattr(gl, name) for name in _TAKEN_OVER},
            static_range=lambda *bounds: range(*map(_plain, bounds)),
            program_id=lambda axis: Tile(torch.tensor(self.program, dtype=torch.int32)),
            allocate_shared_memory=self.allocate,
            barrier=self.barrier,
            full=full,
            zeros=lambda shape, dtype, layout=None: full(shape, 0, dtype),
            arange=lambda start, end, layout=None: Tile(torch.arange(int(start), int(end), dtype=torch.int32)),
            convert_layout=lambda value, layout: value,
            to_tensor=lambda x: x if isinstance(x, Tile) else Tile(torch.tensor(x, dtype=torch.int32)),
            inline_asm_elementwise=lambda asm, constraints, args, dtype, is_pure, pack: args[0],
            where=where,
            max=lambda x, axis: Tile(x.data.amax(axis)),
            sum=lambda x, axis: Tile(x.data.sum(axis)),
            maximum=lambda a, b: Tile(torch.maximum(tile(a), tile(b))),
            exp2=lambda x: Tile(torch.exp2(x.data)),
            log2=lambda x: Tile(torch.log2(x.data)),
            load=load,
            store=store,
        )
        tma = SimpleNamespace(async_load=self.load_box, async_store=self.store_box, store_wait=self.wait_for_stores)
        mbarrier = SimpleNamespace(
            MBarrierLayout=hopper.mbarrier.MBarrierLayout,
            init=lambda barrier, count: barrier.init(count),
            expect=lambda barrier, size: barrier.expect(size),
            wait=lambda barrier, phase: barrier.wait(phase),
            invalidate=lambda barrier: barrier.invalidate(),
        )
        return {
            "gl": functions,
            "tma": tma,
            "mbarrier": mbarrier,
            "fence_async_shared": self.fence,
            "warpgroup_mma": self.multiply,
            "warpgroup_mma_wait": lambda num_outstanding, deps: self.wait_for_products(num_outstanding, deps),
        }


def _translated(function: Callable, names: dict[str, Any], known: dict[Callable, Callable]) -> Callable:
    """The function with the machine's names in place of Gluon's, and so everything of Gluon that it calls."""
    if function not in known:
        scope: dict[str, Any] = {}
        known[function] = copy = FunctionType(
            function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
        )
        copy.__kwdefaults__ = function.__kwdefaults__
        for name, value in function.__globals__.items():
            if name in names:
                scope[name] = names[name]
            elif isinstance(value, GluonJITFunction):
                scope[name] = _translated(value.fn, names, known)
            else:
                scope[name] = _plain(value)
    return known[function]


def run(kernel: GluonJITFunction, grid: tuple[int], arguments: dict[str, Any], order: str = "forward") -> None:
    """Run the programs of a launch one after the other, the first or the last one first. `Fault` for the first thing
    that is wrong."""
    memories: dict[int, Global] = {}

    def given(name: str, value: Any) -> Any:
        tensor = value.base if isinstance(value, TensorDescriptor) else value
        if not isinstance(tensor, Tensor):
            return value
        memory = memories.setdefault(tensor.data_ptr(), Global(name, tensor))
        return Boxes(memory, value) if tensor is not value else Pointer(memory)

    made = {name: given(name, value) for name, value in arguments.items()}
    assert list(inspect.signature(kernel.fn).parameters) == list(made), "arguments that the kernel does not have"
    for program in range(grid[0]) if order == "forward" else reversed(range(grid[0])):
        machine = Machine(program)
        _translated(kernel.fn, machine.language(), {})(**made)
        machine.end()
