"""What a training step asks of a card, counted on a card that is not there: launches, bytes, FLOPs and memory.

A step runs on `count_card.pretended_card`, on tensors without values, and everything that is launched is noted:

* an operation of PyTorch is one launch, if it makes or changes anything (lists of tensors: as many as
  `multi_tensor_apply` needs). It reads its tensors and writes its results, each byte once;
* a Triton kernel is one launch, and touches each of its tensors once, twice where it updates it in place, and of a list
  of tensors each of them.

Bytes are therefore what has to pass between memory and the card at best: what a cache loses and reads again is not
counted, and neither is what it keeps from one kernel to the next. FLOPs are those of matrix products alone, 2 for a
multiply-add, without what pads a tile.

Memory is that of tensors: `state` is what lies there before the step, `live` what does where the backward begins,
`peak` the most at any time. What an allocator rounds up or loses between its blocks is not counted.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastdeit import kernels
from fastdeit.bench import step as bench_step
from fastdeit.bench.count_card import Card, pretended_card
from fastdeit.bench.step import DROP_PATH, LR, Cell
from fastdeit.engine.optim import Optimizer
from fastdeit.engine.optimizers import AdamW
from fastdeit.kernels import _triton
from fastdeit.kernels.optimizer import _multi_tensor

CARD = torch.device("cuda", 0)
SKIP_GROUP = 64
"""Samples of which a fixed number drops a branch where dropped samples are skipped: the default of data.group_size."""
PHASES = "forward", "backward", "update"

_EPILOGUE = {"mlp": "epilogue", "layer_norm_mlp": "epilogue"}
FORMS: dict[str, dict[str, str]] = {
    "auto": {"": "auto"},
    "triton": {"": "triton"},
    "mlp=epilogue": {"": "auto", **_EPILOGUE},
    "attention=fused_backward": {"": "auto", "attention": "fused_backward"},
    "attention=hopper": {"": "auto", "attention": "hopper"},
    "mlp=epilogue,attention=fused_backward": {"": "auto", "attention": "fused_backward", **_EPILOGUE},
    "fused_adamw=aten": {"": "auto", "fused_adamw": "aten"},
    "reference": {"": "reference"},
}
"""What a choice of backends makes of our step: by name, the backend of each op, "" standing for all others."""
ONLY_ON = {"attention=hopper": 90}
"""Forms of one architecture."""


class CountError(RuntimeError):
    """Something was launched of which there is no count; the message names it."""


@dataclass(frozen=True)
class Counted(Cell):
    """A step to be counted. depth: number of blocks; None for the model's own. drop_path: its rate."""

    depth: int | None = None
    drop_path: float = DROP_PATH

    @property
    def options(self) -> dict[str, Any]:
        """Of our student."""
        return super().options | ({} if self.depth is None else {"depth": self.depth})


# ---- what is counted -------------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """One operation or kernel. `launches` is more than one where a list of tensors takes several."""

    name: str
    phase: str
    kind: str
    bytes: int
    flops: int = 0
    launches: int = 1


class Total(NamedTuple):
    """Of some of a step's launches."""

    launches: int
    bytes: int
    flops: int


@dataclass(frozen=True)
class Count:
    """A step: its launches in their order, and bytes of tensors before it, where its backward begins, and at most; None
    where that is not known."""

    launches: tuple[Launch, ...]
    state: int
    live: int
    peak: int | None

    @property
    def total(self) -> Total:
        """Of the whole step."""
        return _total(self.launches)

    def by(self, column: str) -> dict[str, Total]:
        """Totals by "kind", "phase" or "name"."""
        groups: dict[str, list[Launch]] = defaultdict(list)
        for launch in self.launches:
            groups[getattr(launch, column)].append(launch)
        return {name: _total(group) for name, group in groups.items()}


def _total(launches: Iterable[Launch]) -> Total:
    rows = [(launch.launches, launch.bytes, launch.flops) for launch in launches]
    return Total(*map(sum, zip(*rows, strict=True))) if rows else Total(0, 0, 0)


def ours(
    cell: Counted,
    arch: int,
    form: str | Mapping[str, str],
    skip: bool = False,
    residual: torch.dtype | None = None,
    fp8: bool = False,
    keep: bool = False,
    optimizer: type[Optimizer] = AdamW,
) -> Count:
    """Our step in one of `FORMS`, by name or as such a choice, on a card of that architecture: 90 is sm_90.

    `skip`: with model.drop_path_skip; `residual`: the dtype of the stream, as of engine.residual; `fp8`: with
    engine.products fp8; `keep`: with engine.keep_activations; `optimizer`: the class of optim.name.
    RuntimeError where the card lacks a backend that the form forces, or products of 8 bits; ValueError where the model
    cannot skip."""
    choices = dict(FORMS[form] if isinstance(form, str) else form)
    with counted_card(arch) as (card, counter), kernels.use(choices.pop(""), **choices):
        engine, _, _ = bench_step.engine(cell, CARD, "none", optimizer=optimizer)
        if skip:
            engine.method.model.set_drop_path_skip(SKIP_GROUP)
        engine.method.model.set_residual(residual)
        engine.method.model.set_keep_activations(keep)
        if fp8:
            if reason := kernels.fp8_refusal(CARD):
                raise RuntimeError(reason)
            engine.method.model.set_fp8_products()
        images = torch.zeros(cell.batch, cell.image_size, cell.image_size, 3, dtype=torch.uint8)
        batch = bench_step.batch(cell, engine.method.noise(), CARD, images)
        return counter.second(card, lambda: engine.step([batch], LR))


@contextmanager
def counted_card(arch: int) -> Iterator[tuple[Card, "Watch"]]:
    """Inside, there is a card of that architecture, and everything that lies on it is known."""
    split = _multi_tensor.split
    with pretended_card(arch=arch) as card:
        watch = card.watcher = Watch()

        def noted(*lists: Sequence[Tensor]) -> list[_multi_tensor.Lists]:
            parts = split(*lists)
            for part in parts:
                watch.note_lists(part)
            return parts

        with patch.object(_multi_tensor, "split", noted):
            yield card, watch


# ---- how -------------------------------------------------------------------------------------------------------------

_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_NO_LAUNCH = _ALLOCATIONS | {"lift_fresh", "detach", "alias", "device", "is_same_size"}
_OVERWRITES = {"copy_", "fill_", "zero_", "bernoulli_", "uniform_", "normal_", "_foreach_copy_", "_foreach_zero_"}
"""They write what they change without reading it."""
_READ_ONLY = {"_fused_adamw_": {"grads"}}
"""Arguments that an operation may change by its schema, and does not here."""
_IN_PLACE = {"masters", "exp_avgs", "exp_avg_sqs", "emas", "momenta", "step"}
"""Arguments of our kernels that are read and written."""


@dataclass
class Watch:
    """Notes launches while `counting`, and what lies on the card from its beginning (a `count_card.Watcher`)."""

    launches: list[Launch] = field(default_factory=list)
    counting: bool = False
    now: int = 0
    live: int = 0
    peak: int = 0
    _phase: str = PHASES[0]
    _storages: dict[int, weakref.ref] = field(default_factory=dict)
    _lists: dict[int, tuple[Tensor, int]] = field(default_factory=dict)

    def second(self, card: Card, step: Callable[[], object]) -> Count:
        """The second of two calls of `step`: the first makes what is kept for all others."""
        step()
        state = self.peak = self.now
        self.counting = True
        step()
        self.counting = False
        return Count(tuple(self.launches), state, self.live, self.peak)

    def note_lists(self, part: _multi_tensor.Lists) -> None:
        """Which bytes the rows of addresses of a launch stand for."""
        for row, dtype in zip(part.rows, part.types, strict=True):
            if row is not None:
                self._lists[id(row)] = row, part.elements * dtype.primitive_bitwidth // 8

    def operation(self, function: Any, inputs: tuple[Any, ...], result: Any) -> None:
        """One of PyTorch's."""
        made = _on_card(result)
        for tensor in made:
            self._keep(tensor)
        name = function.overloadpacket.__name__
        if not self.counting or name in _NO_LAUNCH:
            return
        args, options = inputs
        given = _on_card(inputs)
        changed = [] if not function._schema.is_mutable else _changed(function, args, options)
        known = {_storage(tensor) for tensor in given}
        fresh = [tensor for tensor in made if _storage(tensor) not in known]
        if not fresh and not changed:  # a view, or nothing of the card's
            return
        only_written = name in _OVERWRITES or function._overloadname.endswith("out")
        overwritten = set(map(id, changed)) if only_written else set()
        read = [tensor for tensor in given if id(tensor) not in overwritten]
        flops = flop_registry.get(function.overloadpacket, lambda *_, **__: 0)(*args, **options, out_val=result)
        moved = bytes_of(read) + bytes_of([*fresh, *changed])
        launches = _launches_of_lists(args) if name.startswith(("_foreach_", "_fused_")) else 1
        if name == FLASH_BACKWARD:
            self.launches.append(flash_backward(self._now_in(), args[1], moved, int(flops)))
        else:
            casts = name == "_foreach_copy_" and args[0][0].dtype != args[1][0].dtype
            kind = "casts" if casts else kind_of_operation(name)
            self.launches.append(Launch(name, self._now_in(), kind, moved, int(flops), launches))

    def launch(self, kernel: Any, arguments: dict[str, Any]) -> None:
        """One of our Triton kernels."""
        if not self.counting:
            return
        moved, seen = 0, set()
        for name, value in arguments.items():
            value = _triton.of_descriptor(value)
            if not isinstance(value, Tensor):
                continue
            _, of_list = self._lists.get(id(value), (None, None))
            key = _place(value) if of_list is None else (name,)
            if key not in seen:
                moved += (_dense(value) if of_list is None else of_list) * (1 + (name in _IN_PLACE))
            seen.add(key)
        module = kernel.fn.__module__.removeprefix("fastdeit.kernels.")
        name = f"{module}.{kernel.fn.__name__}"
        flops = _flops_of(kernel, arguments)
        self.launches.append(Launch(name, self._now_in(), _kind_of_kernel(name), moved, flops))

    def _now_in(self) -> str:
        """The phase of a step that this is: autograd knows whether it is differentiating."""
        if torch._C._current_graph_task_id() != -1:
            if self._phase == PHASES[0]:
                self.live = self.now
            self._phase = PHASES[1]
        elif self._phase == PHASES[1]:
            self._phase = PHASES[2]
        return self._phase

    def _keep(self, tensor: Tensor) -> None:
        """Count a tensor's memory until nothing refers to it."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def gone(_: weakref.ref) -> None:
            self.now -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _on_card(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.device.type == "cuda"]


def _changed(function: Any, args: Sequence[Any], options: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes to, by its schema."""
    kept = _READ_ONLY.get(function.overloadpacket.__name__, ())
    declared = function._schema.arguments
    given = [args[i] if i < len(args) else options.get(argument.name) for i, argument in enumerate(declared)]
    written = [
        value
        for argument, value in zip(declared, given, strict=True)
        if argument.alias_info is not None and argument.alias_info.is_write and argument.name not in kept
    ]
    return _on_card(written)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return _storage(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _dense(tensor: Tensor) -> int:
    """Bytes of a tensor's elements that are different ones: an expanded dimension counts once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride != 0 or size == 0 else 1
    return elements * tensor.element_size()


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the elements of these tensors, each once."""
    return sum({_place(tensor): _dense(tensor) for tensor in tensors}.values())


# ATen/native/cuda/MultiTensorApply.cuh: blocks of a launch, elements of a block, and tensors of a launch by the number
# of lists.
_MTA_BLOCKS, _MTA_CHUNK, _MTA_TENSORS = 320, 65_536, (110, 64, 48, 36, 30)


def _launches_of_lists(args: Sequence[Any]) -> int:
    """How many launches an operation on lists of tensors takes (`multi_tensor_apply`)."""
    lists = [value for value in args if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor)]
    sizes = [tensor.numel() for tensor in lists[0]]
    wide = sum([tensor.numel() for tensor in other] == sizes for other in lists)
    most = _MTA_TENSORS[min(wide, len(_MTA_TENSORS)) - 1]
    launches = blocks = tensors = 0
    for size in sizes:
        tensors += 1
        chunks = -(-size // _MTA_CHUNK)
        for chunk in range(chunks):
            blocks += 1
            last = chunk == chunks - 1
            if blocks == _MTA_BLOCKS or (last and tensors == most):
                launches, blocks, tensors = launches + 1, 0, 0 if last else 1
    return launches + (blocks > 0)


FLASH_BACKWARD = "_scaled_dot_product_flash_attention_backward"


def flash_backward(phase: str, q: Tensor, moved: int, flops: int) -> Launch:
    """FlashAttention-2's backward (Dao, 2023), of which an operation's arguments show less than it moves: it is three
    kernels, adds dq up in float32 (cleared, added to, read: 16 bytes an element), and reads the output and its gradient
    for delta alone."""
    return Launch(FLASH_BACKWARD, phase, "attention", moved + (16 + q.element_size()) * q.numel(), flops, 3)


# ---- kinds -----------------------------------------------------------------------------------------------------------

KINDS = (
    "products",
    "attention",
    "norm",
    "gelu",
    "sums",
    "casts",
    "copies",
    "zeros",
    "input",
    "loss",
    "update",
    "other",
)
"""products: of matrices, GELU in their epilogue included; gelu: with casts of its results to 8 bits; norm: LayerNorm
with the residual addition and drop-path that are fused into it; sums: over rows, of bias gradients above all; copies:
tensors put together or laid out anew."""

_OPERATIONS = {
    **dict.fromkeys(("mm", "addmm", "_scaled_mm", "bmm", "baddbmm", "convolution", "convolution_backward"), "products"),
    **dict.fromkeys(("native_layer_norm", "native_layer_norm_backward"), "norm"),
    **dict.fromkeys(("gelu", "gelu_backward"), "gelu"),
    **dict.fromkeys(("sum", "mean"), "sums"),
    **dict.fromkeys(("clone", "copy_", "cat", "stack", "select_backward", "slice_backward"), "copies"),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros", "zero_", "fill_", "full", "ones", "ones_like"), "zeros"),
    **dict.fromkeys(("_log_softmax", "_log_softmax_backward_data", "nll_loss_forward", "nll_loss_backward"), "loss"),
    "_to_copy": "casts",
}
_OF_KERNELS = (
    ("attention.", "attention"),
    ("layer_norm.", "norm"),
    ("mlp.gelu_products.", "products"),
    ("mlp.gelu._column_sums_kernel", "sums"),
    ("mlp.gelu.", "gelu"),
    ("fp8.gelu.", "gelu"),
    ("fp8.cast.", "casts"),
    ("input.", "input"),
    ("losses.", "loss"),
    ("_loss.", "loss"),
    ("cosub.", "loss"),
    ("optimizer.", "update"),
)
"""Beginnings of `module.kernel`, the first that fits."""


def kind_of_operation(name: str) -> str:
    """One of `KINDS`, by the name of an operation of PyTorch."""
    if "attention" in name:
        return "attention"
    if name.startswith(("_foreach_", "_fused_")):
        return "update"
    return _OPERATIONS.get(name, "other")


def _kind_of_kernel(name: str) -> str:
    found = next((kind for beginning, kind in _OF_KERNELS if name.startswith(beginning)), None)
    if found is None:
        raise CountError(f"the kernel {name} is of no kind; add its module to _OF_KERNELS in bench/count.py")
    return found


_SCORES = {
    "_one_pass_kernel": 2,
    "_online_kernel": 2,
    "_query_gradient_kernel": 3,
    "_key_gradient_kernel": 4,
    "_fused_kernel": 5,
    "forward_kernel": 2,
    "backward_kernel": 5,
}
"""Kernels of attention: how many products they make of all queries with all keys."""
_WITH_GELU = {"_product_gelu_kernel": "x", "_product_gelu_backward_kernel": "dout"}
"""Kernels of products with GELU: the argument that has the rows."""


def _flops_of(kernel: Any, arguments: dict[str, Any]) -> int:
    name = kernel.fn.__name__
    if name in _SCORES:
        q = _triton.of_descriptor(arguments[next(name for name in ("q", "qkv", "rows") if name in arguments)])
        batch, queries, width = q.shape
        keys = arguments["k"].shape[1] if "k" in arguments else queries
        width //= 1 if "k" in arguments else 3
        return 2 * _SCORES[name] * batch * queries * keys * width
    if name in _WITH_GELU:
        return 2 * len(arguments[_WITH_GELU[name]]) * arguments["DEPTH"] * arguments["WIDTH"]
    expected = _triton.EXPECTED.get((kernel.fn.__module__, name))
    if expected is not None and expected.products:
        raise CountError(f"{kernel.fn.__module__}.{name} multiplies matrices; count its FLOPs in bench/count.py")
    return 0
