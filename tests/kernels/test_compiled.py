"""What `torch.compile` gets to see of the ops where nothing but the reference would run: PyTorch's own, to be fused."""

import pytest
import torch
from torch import Tensor

from fastdeit import kernels
from tests.kernels.proof import assert_as_good
from tests.kernels.test_ops import NAMES, B, C, N, counted, optimizer_lists, public_calls, rand, run

OF_THE_HOST = {"pixels", "patchify"}
"""Ops that have a backend of their own on the CPU."""
TRACED = [name for name in NAMES if name not in OF_THE_HOST]


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch.compiler.reset()


def registered(ops):
    """Names of our ops in a graph."""
    return {op.split(".")[1] for op in ops if op.startswith("fastdeit.")}


class Graphs:
    """`function` compiled, with our ops in each graph that Dynamo made of it."""

    def __init__(self, function, **options):
        self.found = []
        self.run = torch.compile(function, fullgraph=True, backend=self._compiler, **options)

    def _compiler(self, graph, inputs):
        self.found.append(registered(str(n.target) for n in graph.graph.nodes if n.op == "call_function"))
        return graph


@pytest.fixture
def attention():
    """(compiled attention, its graphs, eager results): an op whose only backend on a CPU is the reference."""
    qkv = rand(B, N, 3 * C, dtype=torch.float64)
    graphs = Graphs(lambda: kernels.attention(qkv, 2))
    return graphs, kernels.attention(qkv, 2)


@pytest.mark.parametrize("autocast", [False, True], ids=["float64", "autocast"])
@pytest.mark.parametrize("name", NAMES)
def test_the_graph_has_pytorchs_ops_and_computes_what_eager_mode_does(name, autocast):
    call, free = public_calls(torch.float32 if autocast else torch.float64)[name]
    ops = []
    compiled = torch.compile(call, fullgraph=True, backend=counted(ops))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        eager, mine = run(call, free), run(compiled, free)
    assert ops
    assert registered(ops) == {name} & OF_THE_HOST
    for one, other in zip((*mine[0], *mine[1]), (*eager[0], *eager[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12 if one.dtype == torch.float64 else 1e-6, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("name", TRACED)
def test_inductor_is_as_good_as_eager_mode(name, autocast):
    """Error against float64, of results and gradients, at most twice that of eager mode."""

    def outcome(dtype, compiled):
        call, free = public_calls(dtype)[name]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.float32):
            results, grads = run(torch.compile(call, fullgraph=True) if compiled else call, free)
        return [t.detach() for t in (*results, *grads)]

    exact = outcome(torch.float64, False)
    mine, eager = outcome(torch.float32, True), outcome(torch.float32, False)
    for number, tensors in enumerate(zip(mine, eager, exact, strict=True)):
        assert_as_good(*tensors, f"{name} {number}")


def test_a_choice_made_after_compilation_is_followed(attention):
    graphs, expected = attention
    for backend, found in (
        ("auto", [set()]),
        ("reference", [set(), {"attention"}]),
        ("auto", [set(), {"attention"}]),
        ("reference", [set(), {"attention"}]),
    ):
        with kernels.use(backend):
            torch.testing.assert_close(graphs.run(), expected)
        assert graphs.found == found
    torch.testing.assert_close(graphs.run(), expected)
    with kernels.use(mlp="reference"):  # of another op
        torch.testing.assert_close(graphs.run(), expected)
    assert {"attention"} not in graphs.found[2:]


def test_the_environment_chooses_for_compiled_functions_too(attention, force):
    force("attention=reference")
    graphs, _ = attention
    graphs.run()
    with kernels.use(attention="auto"):
        graphs.run()
    assert graphs.found == [{"attention"}, set()]


def test_a_backend_forced_after_compilation_that_cannot_run_raises(attention, monkeypatch):
    monkeypatch.setattr("fastdeit.kernels._triton.INTERPRETED", False)
    graphs, _ = attention
    graphs.run()
    with kernels.use(attention="triton"), pytest.raises(RuntimeError, match="attention=triton, which cannot run on"):
        graphs.run()


def test_an_op_that_changes_its_arguments_stays_opaque():
    (params, *others), step = optimizer_lists(), torch.tensor(1.0)
    numbers = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    graphs = Graphs(lambda: kernels.fused_lamb(params, *others, step, 1e-2, **numbers))
    graphs.run()
    assert graphs.found == [{"fused_lamb"}]


@pytest.mark.parametrize("name", ["distillation_loss", "cosub_loss"])
@pytest.mark.parametrize("label", [-1, 7])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_label_that_does_not_exist_raises(name, label, backend):
    logits, y1, lam = rand(4, 7), torch.tensor([0, 6]), torch.ones(2)
    functions = {
        "distillation_loss": lambda: kernels.distillation_loss(logits[:2], None, (y1, y1, lam)).total,
        "cosub_loss": lambda: kernels.cosub_loss(logits, (y1, y1, lam)),
    }
    compiled = torch.compile(functions[name], fullgraph=True, backend=backend)
    compiled()
    y1[1] = label
    with pytest.raises(RuntimeError, match="out of bounds"):
        compiled()


def test_selected_samples_do_not_break_the_graph():
    x, branch, kept = rand(4, 3, C), rand(2, 3, C), torch.tensor([2, 0])
    ones = torch.ones(C, dtype=torch.float64)

    def function() -> tuple[Tensor, Tensor]:
        return kernels.add_layer_norm(x, branch, ones, ones, branch_samples=kept, norm_samples=kept)

    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(), function())


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_need_nothing_of_ours(strict):
    class Module(torch.nn.Module):
        def forward(self, qkv: Tensor, residual: Tensor, ones: Tensor) -> Tensor:
            return kernels.add_layer_norm(residual, kernels.attention(qkv, 2), ones, ones)[1]

    args = rand(B, N, 3 * C, grad=False), rand(B, N, C, grad=False), torch.ones(C, dtype=torch.float64)
    program = torch.export.export(Module(), args, strict=strict)
    assert not registered(str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*args), Module()(*args))
