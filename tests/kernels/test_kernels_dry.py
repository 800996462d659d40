"""What every Triton backend asks of a card that is not there, at the shapes of DeiT: sound launches, and no wait."""

import pytest
import torch
from pretended_card import pretended_card

from fastdeit import bench_kernels, models
from fastdeit.bench_measure import CannotRun
from fastdeit.kernels import _op, _triton
from fastdeit.kernels.lint_cases import backends
from fastdeit.kernels.norm import _root_kernel

CARD = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def config():
    return models.build("deit_small_distilled_patch16_224").config


@pytest.mark.parametrize("capturing", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(("op", "backend"), [(op, b.name) for op, b in backends() if op in bench_kernels.works_by_op()])
def test_what_is_measured_runs_forward_and_backward(op, backend, dtype, capturing, config):
    with pretended_card(capturing) as card:
        work = bench_kernels.works_by_op()[op](config, 256, dtype, CARD)
        with card.never_waited_for():
            results = bench_kernels._chosen(_op.OPS[op], backend, work)
        assert card.launched
        for result in results if isinstance(results, tuple) else [results]:
            assert result is None or result.device == CARD


def test_the_sides_of_a_card_are_all_backends_of_triton_and_the_others_say_why(config):
    with pretended_card():
        found = dict(bench_kernels._sides("mlp", CARD))
        assert list(found) == ["triton", "epilogue", "quack", "reference", "compiled"]
        with pytest.raises(CannotRun, match="QuACK"):
            found["quack"](None)


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
