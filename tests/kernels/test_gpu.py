"""What only a card can show: every op inside a CUDA graph, under Inductor, and without a wait for the device."""

import pytest
import torch

from fastdeit import kernels
from tests.kernels.proof import poisoned, repeated
from tests.kernels.test_ops import NAMES, public_calls, run

pytestmark = [pytest.mark.gpu, pytest.mark.card]


def calls_on_card(name):
    with torch.device("cuda"):
        return public_calls(torch.float32)[name]


@pytest.mark.parametrize("name", NAMES)
def test_replay_of_a_graph_is_eager_mode(name):
    call, free = calls_on_card(name)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compilation and first allocations are not captured
        for _ in range(3):
            eager = run(call, free)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(call, free)
    graph.replay()
    torch.cuda.synchronize()
    for mine, theirs in zip((*captured[0], *captured[1]), (*eager[0], *eager[1]), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("backend", ["triton", "fused_backward", "hopper"])
@pytest.mark.parametrize("tokens", [65, 198])
def test_replay_of_attention_is_eager_mode_on_new_values(backend, tokens):
    """On memory that is NaN where nothing was written: what the replay leaves out shows."""
    if backend == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("it needs sm_90")
    qkv, incoming = (torch.randn(4, tokens, n * 192, device="cuda", dtype=torch.bfloat16) for n in (3, 1))
    bias = torch.zeros(3 * 192, device="cuda", requires_grad=True)
    qkv.requires_grad_()

    def step():
        with kernels.use(attention=backend):
            out = kernels.attention(qkv, 3, bias=bias)
            return out, *torch.autograd.grad(out, (qkv, bias), incoming)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), poisoned():
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(2):
        torch.manual_seed(seed)
        with torch.no_grad():
            qkv.normal_()
            incoming.normal_()
            for result in captured:
                result.fill_(torch.nan)
        graph.replay()
        with poisoned():
            eager = step()
        for mine, theirs in zip(captured, eager, strict=True):
            assert mine.isfinite().all()
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("tokens", [65, 145, 197, 198, 208])
@pytest.mark.parametrize("model", [(768, 12), (384, 6), (192, 3)])
def test_both_backwards_of_attention_agree(model, tokens):
    """At the size of a training step, and each of them with the same bits in every run."""
    width, heads = model
    qkv, incoming = (torch.randn(64, tokens, n * width, device="cuda", dtype=torch.bfloat16) for n in (3, 1))
    bias = torch.zeros(3 * width, device="cuda", requires_grad=True)
    qkv.requires_grad_()

    def gradients(backend):
        with kernels.use(attention=backend), poisoned():
            return torch.autograd.grad(kernels.attention(qkv, heads, bias=bias), (qkv, bias), incoming)

    for backend in ("triton", "fused_backward"):
        repeated(lambda chosen=backend: gradients(chosen), 20)
    for one, other in zip(gradients("triton"), gradients("fused_backward"), strict=True):
        assert (one.double() - other.double()).norm() <= 0.01 * other.double().norm()


@pytest.mark.parametrize("name", NAMES)
def test_compiled_by_inductor_is_eager_mode(name):
    torch.compiler.reset()
    call, free = calls_on_card(name)
    with torch.autocast("cuda", torch.bfloat16):
        eager, compiled = run(call, free), run(torch.compile(call, fullgraph=True), free)
    for mine, theirs in zip((*compiled[0], *compiled[1]), (*eager[0], *eager[1]), strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine.double() - theirs.double()).norm() <= 0.02 * theirs.double().norm()


@pytest.mark.parametrize("name", NAMES)
def test_no_op_waits_for_the_device(name):
    call, free = calls_on_card(name)
    run(call, free)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(call, free)
    finally:
        torch.cuda.set_sync_debug_mode("default")
