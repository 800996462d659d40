"""What Inductor makes of timm's training step for a card that is not there: its kernels, and the bytes they move.

The step's forward, loss and backward are traced as `torch.compile` traces them, on tensors without values, and lowered
for a card whose properties stand in `count_card.CARDS`. Inductor's scheduler then knows which kernels there are and
which buffers each reads and writes. Nothing is compiled further and nothing runs.

This calls Inductor's own parts, which change with every release: it is written for `TORCH`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastdeit.bench import count_card, peers
from fastdeit.bench.count import FLASH_BACKWARD, Launch, bytes_of, flash_backward, kind_of_operation
from fastdeit.bench.count_card import CARDS
from fastdeit.bench.measure import CLASSES, CannotRun
from fastdeit.bench.step import Cell
from fastdeit.kernels.dtypes import DTYPES

TORCH = (2, 14)
"""The release whose Inductor is called."""


def launches(model: nn.Module, cell: Cell, arch: int) -> tuple[list[Launch], int]:
    """(Inductor's launches in forward and backward, bytes that forward keeps for backward) of timm's `model` in
    training mode, compiled with its loss as `peers.py` does. CannotRun for another torch or an unknown card."""
    if tuple(map(int, torch.__version__.split(".")[:2])) != TORCH:
        wanted = ".".join(map(str, TORCH))
        raise CannotRun(
            f"what Inductor makes of timm's model is counted with torch {wanted}; this is {torch.__version__}"
        )
    if arch not in CARDS:
        raise CannotRun(f"the properties of a card of sm_{arch} are not known; known are {', '.join(map(str, CARDS))}")
    from torch._inductor.virtualized import V

    with FakeTensorMode(allow_non_fake_inputs=True) as mode, V.set_fake_mode(mode):
        graphs = _traced(model, cell)
    with _card_for_inductor(arch):
        found = [launch for phase, graph in graphs.items() for launch in _lowered(graph, phase)]
    return found, _kept(graphs["forward"])


# ---- tracing ---------------------------------------------------------------------------------------------------------


class _Autocast(TorchFunctionMode):
    """What autocast does on a card, and FlashAttention, while tracing on tensors of the CPU."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        args = count_card.autocast(function, args, self._dtype)
        if function is F.scaled_dot_product_attention and count_card.is_flash(args, options):
            return count_card.flash(args, options)
        if function is Tensor.bernoulli_:  # of drop-path; Inductor takes it to pieces like this, though not for a CPU
            return (torch.rand_like(args[0], dtype=torch.float32) < args[1]).to(args[0].dtype)
        return function(*args, **options)


def _traced(model: nn.Module, cell: Cell) -> dict[str, fx.GraphModule]:
    """The graphs of forward and backward, cut as Inductor cuts them."""
    from functorch.compile import aot_function, make_boxed_func
    from torch._inductor.compile_fx import partition_fn
    from torch._inductor.decomposition import select_decomp_table

    weights = {name: torch.empty(value.shape, requires_grad=True) for name, value in model.named_parameters()}
    images = torch.empty(cell.batch, 3, cell.image_size, cell.image_size)
    targets = torch.empty(cell.batch, CLASSES)
    graphs: dict[str, fx.GraphModule] = {}

    def keep(phase: str) -> Callable:
        def kept(graph: fx.GraphModule, inputs: Any) -> Callable:
            graphs[phase] = graph
            return make_boxed_func(graph)

        return kept

    def loss(values: dict[str, Tensor], images: Tensor, targets: Tensor) -> Tensor:
        with _Autocast(DTYPES[cell.precision]):
            return peers.loss(lambda x: torch.func.functional_call(model, values, (x,)), images, targets, None)

    compilers = {"fw_compiler": keep("forward"), "bw_compiler": keep("backward")}
    traced = aot_function(loss, **compilers, partition_fn=partition_fn, decompositions=select_decomp_table())
    traced(weights, images, targets).backward()
    return graphs


def _kept(forward: fx.GraphModule) -> int:
    """Bytes of what the forward returns besides what it was given."""
    *_, output = forward.graph.nodes
    made = {node for node in output.args[0] if isinstance(node, fx.Node) and node.op != "placeholder"}
    return sum(node.meta["val"].nbytes for node in made if isinstance(node.meta["val"], Tensor))


# ---- lowering --------------------------------------------------------------------------------------------------------


@contextmanager
def _card_for_inductor(arch: int) -> Iterator[None]:
    """Inside, Inductor and Triton believe in a card of that architecture."""
    import torch._dynamo.device_interface as interfaces
    import torch._inductor.scheduler as scheduler
    import torch.utils._triton as has
    from torch._inductor import config
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    card = CARDS[arch]
    major, minor = divmod(arch, 10)
    properties = SimpleNamespace(
        name=card.name,
        major=major,
        minor=minor,
        multi_processor_count=card.processors,
        total_memory=2**37,
        warp_size=32,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        regs_per_multiprocessor=65536,
        shared_memory_per_block=48 * 1024,
        shared_memory_per_block_optin=card.of_block * 1024,
        shared_memory_per_multiprocessor=card.of_processor * 1024,
        gcnArchName="",
    )
    target = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: 0,
        get_device_interface=lambda: torch.cuda,
        get_active_torch_device=lambda: torch.device("cuda", 0),
    )
    cuda, worker = interfaces.CudaInterface, interfaces.CudaInterface.Worker
    asked = staticmethod(lambda *_, **__: properties)
    replaced = (
        (torch.cuda, "get_device_properties", lambda *_, **__: properties),
        (torch.cuda, "get_device_capability", lambda *_, **__: (major, minor)),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "is_available", lambda: True),
        (worker, "get_device_properties", asked),
        (worker, "current_device", staticmethod(lambda: 0)),
        (cuda, "get_device_properties", asked),
        (cuda, "get_compute_capability", staticmethod(lambda *_, **__: arch)),
        (cuda, "is_available", staticmethod(lambda: True)),
        (scheduler, "has_triton", lambda *_, **__: True),
        (has, "has_triton", lambda *_, **__: True),
        (driver, "_active", target),
        (config.triton, "cudagraphs", False),
    )
    with count_card.replacing(*replaced):
        yield


def _lowered(graph: fx.GraphModule, phase: str) -> Iterator[Launch]:
    """Inductor's kernels, in the order of their launches."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.fx_passes.replace_random import replace_random_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    placeholders = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    for node in graph.graph.nodes:
        node.args = tuple(_moved(value) for value in node.args)
        node.kwargs = {name: _moved(value) for name, value in node.kwargs.items()}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        inputs = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") if isinstance(x, Tensor) else x
            for x in placeholders
        ]
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
    with V.set_fake_mode(mode):
        replace_random_passes(graph)
        post_grad_passes(graph, is_inference=False)
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
        lowering = GraphLowering(graph, example_inputs=inputs, is_backward=phase == "backward")
        with V.set_debug_handler(DebugContext()), V.set_graph_handler(lowering):
            lowering.run(*inputs)
            lowering._update_scheduler()
            for node in lowering.scheduler.nodes:
                if (launch := _launch(node, phase)) is not None:
                    yield launch


def _moved(value: Any) -> Any:
    """An argument of a traced operation, made for the card."""
    return torch.device("cuda", 0) if isinstance(value, torch.device) else value


def _launch(node: Any, phase: str) -> Launch | None:
    """What a node of the scheduler launches; None where it launches nothing."""
    from torch._inductor.ir import MultiOutput

    origins = [origin for part in node.get_nodes() if part.node is not None for origin in part.node.get_origins()]
    names = {_name(origin) for origin in origins} - {None}
    called = next((origin for origin in origins if origin.target.overloadpacket in flop_registry), None)
    if node.is_extern() and called is not None:
        return None if isinstance(node.node, MultiOutput) else _library_call(called, phase)
    moved = int(node.get_read_write_buffers_sizes())
    if moved == 0 or "Nop" in type(node).__name__:
        return None
    return Launch(" ".join(sorted(names)), phase, _kind(names), moved)


def _library_call(origin: fx.Node, phase: str) -> Launch:
    """Products and attention, which Inductor leaves to libraries."""
    args, options = fx.map_arg((origin.args, origin.kwargs), lambda of: of.meta["val"])
    result, name = origin.meta["val"], origin.target.overloadpacket.__name__
    flops = int(flop_registry[origin.target.overloadpacket](*args, **options, out_val=result))
    moved = bytes_of(leaf for leaf in tree_leaves((args, options, result)) if isinstance(leaf, Tensor))
    if name == FLASH_BACKWARD:
        return flash_backward(phase, args[1], moved, flops)
    return Launch(name, phase, kind_of_operation(name), moved, flops)


def _name(origin: fx.Node) -> str | None:
    packet = getattr(origin.target, "overloadpacket", None)
    return None if packet is None else packet.__name__


def _kind(names: set[str]) -> str:
    """Of a kernel of Inductor's, by the operations that are fused in it."""
    if names & {"exp", "log"} and "erf" not in names:
        return "loss"
    if "rsqrt" in names or {"sub", "sum"} <= names:  # LayerNorm and its backward
        return "norm"
    if "cat" in names and "sum" not in names:
        return "copies"
    if "erf" in names and "sum" not in names:
        return "gelu"
    if "sum" in names:
        return "sums"
    if names <= {"convert_element_type", "permute", "view", "convolution", "_to_copy", "expand", "t"}:
        return "casts"
    return "other"
