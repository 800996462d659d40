"""What every Triton backend asks of a card that is not there, at the sizes of DeiT: sound launches, and no wait."""

import pytest
import torch

from fastdeit.bench import kernels
from fastdeit.bench.count_card import pretended_card
from fastdeit.bench.kernels import Work
from fastdeit.bench.measure import CannotRun
from fastdeit.kernels import _triton
from fastdeit.kernels._example import FEW, Maker
from fastdeit.kernels._op import OPS
from fastdeit.kernels.optimizer import _multi_tensor
from fastdeit.kernels.optimizer.norm import _root_kernel
from tests.kernels.examples import dry_calls

CARD = torch.device("cuda", 0)
CALLS = dry_calls()


@pytest.mark.parametrize(
    "capturing", [pytest.param(False, id="eager", marks=pytest.mark.slow), pytest.param(True, id="captured")]
)
@pytest.mark.parametrize("name", CALLS)
def test_every_example_runs_forward_and_backward(name, capturing):
    op, backend, example, sizes, dtype = CALLS[name]
    with pretended_card(capturing) as card:
        _multi_tensor._reserve().refill()  # as steps before a capture do
        work = Work(op.name, example.build(Maker(sizes, dtype, CARD)), 0)
        with card.never_waited_for():
            results = kernels._chosen(op, backend.name, work)
        assert card.launched
        for result in results if isinstance(results, tuple) else [results]:
            assert result is None or result.device == CARD


def test_the_sides_of_a_card_are_all_backends_of_triton_and_the_others_say_why():
    with pretended_card():
        found = dict(kernels._sides("mlp", CARD))
        mixtures = ["epilogue_forward", "epilogue_backward"]
        assert list(found) == ["triton", "epilogue", *mixtures, "quack", "reference", "compiled"]
        with pytest.raises(CannotRun, match="QuACK"):
            found["quack"](None)


@pytest.mark.parametrize("capturing", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("name", ["fused_adamw", "fused_lamb", "fused_sgd", "global_norm", "distillation_loss"])
def test_nothing_on_the_card_outlives_a_call(name, capturing):
    """What an op kept could lie in the memory pool of the graph that was recorded at its first use, where the next
    graph writes something else. Each launch of an optimizer takes one copy from the host, in a graph, too."""
    op = OPS[name]
    with pretended_card() as card:
        work = Work(name, op.examples[0].build(Maker(FEW, torch.float16, CARD)), 0)
        before = len(card.memory)
        for card.capturing in (False, capturing):
            card.operations.clear()
            kernels._chosen(op, "triton", work)
            card.launches.clear()
            assert len(card.memory) == before
        if name.startswith("fused"):
            assert card.operations.count("_to_copy") == 1
            assert not [operation for operation in card.operations if operation.startswith("_foreach")]


def test_a_graph_reads_memory_of_the_host_that_nothing_else_writes(monkeypatch):
    monkeypatch.setattr(_multi_tensor, "_RESERVED", 10)
    reserve = _multi_tensor._Reserve()
    with pytest.raises(RuntimeError, match="run the update once before the capture"):
        reserve.take([1])
    with pretended_card():
        reserve.refill()
        first, second = reserve.take([1, 2, 3]), reserve.take([4, 5, 6])
        assert (first.storage_offset(), second.storage_offset()) == (0, 3)
        with pytest.raises(RuntimeError, match="for the 5 addresses and sizes"):
            reserve.take([0] * 5)
        reserve.refill()
        assert reserve.take([0] * 5).untyped_storage() is not first.untyped_storage()


# ---- what this would find --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "changes", "message"),
    [
        ((1, 65_536), {}, "_root_kernel"),
        ((-1,), {}, "_root_kernel"),
        ((1.0,), {}, "_root_kernel"),
        ((1,), {"partial": torch.zeros(4)}, "partial is on cpu"),
        ((1,), {"count": torch.int32}, "count is torch.int32"),
        ((1,), {"BLOCK": 16.0}, "BLOCK is a constant, but 16.0"),
    ],
)
def test_a_launch_that_no_card_takes_is_found(grid, changes, message):
    with pretended_card():
        arguments = {name: torch.zeros(4, device=CARD) for name in ("partial", "norm")} | {"count": 4, "BLOCK": 16}
        _triton.launch(_root_kernel, grid[:1] if changes else (1,), **arguments, warps=8)
        with pytest.raises(AssertionError, match=message):
            _triton.launch(_root_kernel, grid, **arguments | changes, warps=8)
