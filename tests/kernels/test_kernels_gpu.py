"""What only a card can show: every op inside a CUDA graph, under Inductor, and without a wait for the device."""

import pytest
import torch
from test_kernels_ops import NAMES, public_calls, run

pytestmark = pytest.mark.gpu


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
