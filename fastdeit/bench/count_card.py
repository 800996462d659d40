"""A CUDA card that is not there: the host's part of what runs on one, without the device's.

Tensors on "cuda" are fake (`torch._subclasses.FakeTensorMode`): they have shapes, dtypes and a device, but no values.
So what a step asks of a card can be counted (`count.py`), and a mistake of the host shows: operands on two devices,
dtypes that do not go together, and above all whatever waits for the card, since a value that is read has to be there.
Launches of Triton kernels are checked and noted.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from inspect import Parameter, signature
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol
from unittest.mock import patch
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fastdeit.kernels import _op, _triton
from fastdeit.kernels.dtypes import HALVES
from fastdeit.kernels.native import choice
from fastdeit.kernels.optimizer import _multi_tensor

ARCH = 90
_SEEN_BY_CPP = torch.device("meta")
_MOST_PROGRAMS = 2**31 - 1, 65_535, 65_535
_CACHES = _triton._arch_of, _triton.processors, _op.card, choice.number, _multi_tensor._reserve
_COPIES = {
    torch.ops.aten._to_copy.default: lambda result, x, **options: (x, result, options.get("non_blocking")),
    torch.ops.aten.copy_.default: lambda _, target, source, non_blocking=False: (source, target, non_blocking),
}
"""What copies between devices: (result, *arguments) as (source, target, non_blocking)."""
_WITHOUT_META = {torch.ops.aten._fused_adamw_.tensor_lr}
"""Operations in place that return nothing, and of which torch knows no more for tensors without values."""
_IN_16_BIT = {F.linear, F.conv2d, F.scaled_dot_product_attention, torch.matmul, Tensor.matmul, Tensor.__matmul__}
_IN_32_BIT = {F.layer_norm, F.log_softmax, F.cross_entropy, F.nll_loss}
_WIDEST_HEAD = 256
"""Of FlashAttention."""


class Properties(NamedTuple):
    """Of a card: its streaming multiprocessors, and KiB of shared memory that a block and a multiprocessor can have."""

    name: str
    processors: int
    of_block: int
    of_processor: int


# NVIDIA's CUDA C++ Programming Guide, technical specifications by compute capability, and datasheets.
CARDS = {
    70: Properties("NVIDIA V100", 80, 96, 96),
    80: Properties("NVIDIA A100", 108, 163, 164),
    90: Properties("NVIDIA H200", 132, 227, 228),
    100: Properties("NVIDIA B200", 148, 227, 228),
}


class Waits(AssertionError):
    """The host reads what the card has to compute first."""


class Unsound(AssertionError):
    """A launch that no card takes; the message names the kernel and what is wrong."""


class Watcher(Protocol):
    """What is told of all that is asked of the card."""

    def operation(self, function: Any, inputs: tuple[Any, ...], result: Any) -> None:
        """One operation of PyTorch has run: an overload of `torch.ops`, its arguments, and what it returned."""

    def launch(self, kernel: Any, arguments: dict[str, Any]) -> None:
        """A Triton kernel was launched with these arguments by name."""


class WeakTensors:
    """Tensors by identity, as long as anything else refers to them."""

    def __init__(self) -> None:
        self._alive: WeakValueDictionary[int, Tensor] = WeakValueDictionary()

    def update(self, tensors: Iterable[Tensor]) -> None:
        """Know these tensors, too."""
        self._alive.update((id(tensor), tensor) for tensor in tensors)

    def __len__(self) -> int:
        return len(self._alive)


@dataclass
class Card:
    """What the host asked of the card: kernels, grids and arguments by name, in the order of their launches, unless
    there is a watcher, who is told of them instead; the names of PyTorch's operations that made tensors on it, and
    those of these tensors that are still referred to. capturing: whether its stream is being captured into a CUDA
    graph."""

    capturing: bool = False
    watcher: Watcher | None = None
    operations: list[str] = field(default_factory=list)
    memory: WeakTensors = field(default_factory=WeakTensors)
    launches: list[tuple[Any, tuple[int, ...], dict[str, Any]]] = field(default_factory=list)
    _waiting_forbidden: bool = False

    @property
    def launched(self) -> set[str]:
        """Names of the kernels."""
        return {kernel.fn.__name__ for kernel, _, _ in self.launches}

    @contextmanager
    def never_waited_for(self) -> Iterator[None]:
        """Inside, `Waits` is raised where `torch.cuda.set_sync_debug_mode("error")` would raise on a card."""
        self._waiting_forbidden = True
        try:
            yield
        finally:
            self._waiting_forbidden = False


class _Fakes(FakeTensorMode):
    """Every tensor inside is fake. To PyTorch's C++ those on the card are on the meta device, since autograd would look
    for the streams of a card; so what is asked for on the meta device inside is meant for the card."""

    def __init__(self, card: Card) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._card = card
        self._inside = 0
        """Operations that are being run. What torch puts one of them together of is not asked of the card."""

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return _SEEN_BY_CPP if args[0].fake_device.type == "cuda" else args[0].fake_device
        if func is torch.ops.aten._local_scalar_dense.default:
            if args[0].device.type == "cuda":
                self._waits("a value on the card is read")
            return 0.5 if args[0].is_floating_point() else 0  # any value will do that ends a loop
        if kwargs and kwargs.get("device") == _SEEN_BY_CPP:
            kwargs = {**kwargs, "device": torch.device("cuda", 0)}
        if func.namespace == _op.NAMESPACE:
            with self:  # not opaque, as to a compiler: on a card its own operations and launches run
                return OPDEFS[func._name]._init_fn(*args, **(kwargs or {}))
        if func is torch.ops.aten.scaled_dot_product_attention.default and is_flash(args, kwargs or {}):
            with self:
                return flash(args, kwargs or {})
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # below autograd, nobody else has taken it to pieces
                return func.decompose(*args, **(kwargs or {}))
        self._inside += 1
        try:
            result = None if func in _WITHOUT_META else super().dispatch(func, types, args, kwargs)
        finally:
            self._inside -= 1
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.device.type == "cuda"]
        if made:
            self._card.operations.append(func.overloadpacket._qualified_op_name.removeprefix("aten::"))
            self._card.memory.update(made)
        if self._card.watcher is not None and self._inside == 0:
            self._card.watcher.operation(func, (args, kwargs or {}), result)
        if func in _COPIES:
            self._check_copy(*_COPIES[func](result, *args, **(kwargs or {})))
        return result

    def _check_copy(self, source: Tensor, target: Tensor, non_blocking: bool | None) -> None:
        if source.device.type != target.device.type and not non_blocking:
            self._waits(f"a copy from {source.device.type} to {target.device.type} that is not non_blocking")

    def _waits(self, what: str) -> None:
        if self._card._waiting_forbidden:
            raise Waits(what)


class _Functions(TorchFunctionMode):
    """What autocast does to products and to what it computes in float32, since C++ leaves out tensors that it takes for
    meta tensors; and which kernel attention is on a card. No memory is pinned, which would look for a driver."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        if torch.is_autocast_enabled("cuda"):
            args = autocast(function, args, torch.get_autocast_dtype("cuda"))
        if function is F.scaled_dot_product_attention and args[0].device.type == "cuda" and is_flash(args, options):
            return flash(args, options)
        return function(*args, **options)


def autocast(function: Any, args: Sequence[Any], dtype: torch.dtype) -> Sequence[Any]:
    """The arguments as autocast to that dtype gives them to a function of PyTorch on a card."""
    if function not in _IN_16_BIT | _IN_32_BIT:
        return args
    wanted = dtype if function in _IN_16_BIT else torch.float32
    return [a.to(wanted) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


def flash(args: Sequence[Tensor], options: dict[str, Any]) -> Tensor:
    """Attention by FlashAttention, with arguments of `F.scaled_dot_product_attention`."""
    return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3], scale=options.get("scale"))[0]


def is_flash(args: Sequence[Any], options: dict[str, Any]) -> bool:
    """Whether this call of `F.scaled_dot_product_attention` runs FlashAttention on a card, as far as the models of
    DeiT's family call it: 16 bit, and no mask."""
    q, *others = args
    halves = q.dtype in HALVES and q.shape[-1] <= _WIDEST_HEAD
    return halves and len(others) == 2 and options.get("attn_mask") is None


class _Generator(torch.Generator):
    """Of the CPU, whatever card it is asked for."""

    def __new__(cls, device: Any = None) -> "_Generator":
        return super().__new__(cls)


@contextmanager
def replacing(*values: tuple[Any, str, Any]) -> Iterator[None]:
    """Inside, each owner's attribute of that name has that value: (owner, name, value)."""
    with ExitStack() as stack:
        for owner, name, value in values:
            stack.enter_context(patch.object(owner, name, value))
        yield


@contextmanager
def pretended_card(capturing: bool = False, arch: int = ARCH) -> Iterator[Card]:
    """Inside, there is a card of that architecture, one of `CARDS`: 90 is sm_90."""
    card = Card(capturing)
    addresses: dict[int, int] = {}
    stream = SimpleNamespace(cuda_stream=0)
    properties = SimpleNamespace(name=CARDS[arch].name, multi_processor_count=CARDS[arch].processors)
    replaced = (
        (nn.Module, "to", _moved),
        (Tensor, "data_ptr", lambda self: addresses.setdefault(id(self), (len(addresses) + 1) << 30)),
        (Tensor, "__deepcopy__", _copied),
        (torch, "Generator", _Generator),
        (torch.cuda, "get_device_capability", lambda device=None: divmod(arch, 10)),
        (torch.cuda, "get_device_properties", lambda device=None: properties),
        (torch.cuda, "is_bf16_supported", lambda *_, **__: arch >= 80),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "device", lambda device: nullcontext()),
        (torch.cuda, "current_stream", lambda device=None: stream),
        (torch.cuda, "is_current_stream_capturing", lambda: card.capturing),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (_triton, "INTERPRETED", False),
        (_triton, "launch", lambda *args, **options: _check_launch(card, *args, **options)),
    )
    with replacing(*replaced):
        for cache in _CACHES:
            cache.cache_clear()
        try:
            with _Fakes(card), _Functions():
                yield card
        finally:
            for cache in _CACHES:
                cache.cache_clear()


def _moved(module: nn.Module, *args: Any, **options: Any) -> nn.Module:
    """`module.to`, which swaps tensors and cannot swap fake ones."""
    device, dtype, *_ = torch._C._nn._parse_to(*args, **options)
    for part in module.modules():
        for registry in (part._parameters, part._buffers):
            for name, old in registry.items():
                if old is not None:
                    new = old.detach().to(device, dtype if old.is_floating_point() else None)
                    registry[name] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    return module


def _copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """`copy.deepcopy`, which copies memory that fake tensors do not have."""
    new = tensor.detach().clone()
    memo[id(tensor)] = new = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    return new


def _check_launch(card: Card, kernel: Any, grid: tuple[int, ...], *args: Any, warps: int, **constants: Any) -> None:
    """What `_triton.launch` and Triton expect, and no one would notice before there is a card."""
    name = kernel.fn.__name__
    if 0 in grid:
        return
    constants.pop("stages", None)
    _require(warps in (1, 2, 4, 8, 16), f"{name} has {warps} warps")
    sizes = zip(grid, _MOST_PROGRAMS, strict=False)
    _require(all(isinstance(n, int) and 0 < n <= most for n, most in sizes), f"{name} has the grid {grid}")
    declared = signature(kernel.fn)
    given = declared.bind(*args, **constants).arguments
    _require(given.keys() == declared.parameters.keys(), f"{name} is not given all its arguments")
    for argument, value in given.items():
        _check_argument(f"{name}: {argument}", declared.parameters[argument], value)
    if card.watcher is None:
        card.launches.append((kernel, grid, given))
    else:  # which keeps no tensor alive
        card.watcher.launch(kernel, given)


def _check_argument(name: str, parameter: Parameter, value: Any) -> None:
    value = _triton.of_descriptor(value)
    if parameter.annotation is tl.constexpr:
        _require(value is None or isinstance(value, int | tl.dtype), f"{name} is a constant, but {value!r}")
    elif isinstance(value, Tensor):
        _require(value.device.type == "cuda", f"{name} is on {value.device}")
        # Slices of packed tensors are pointers to their first element; the strides are arguments.
        _require(value.is_contiguous() or value.stride(-1) == 1, f"{name} has strides {value.stride()}")
    else:
        _require(value is None or type(value) in (int, float, bool), f"{name} is {value!r}")


def _require(sound: bool, what: str) -> None:
    if not sound:
        raise Unsound(what)
