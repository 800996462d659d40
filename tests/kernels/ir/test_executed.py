"""What Triton's compiler makes of the kernels computes the right numbers, touches nothing but its tensors, and does not
depend on the order of programs: `FASTDEIT_IR=90 pytest -m gpu tests/kernels/ir`, without a card (`executed.py`).

The cases are those of the checked interpreter, which cover all loops, branches and masks of all kernels, and those with
16 bits once more in bfloat16, whose products the interpreter gets wrong."""

import os
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch

from fastdeit.kernels import _triton
from fastdeit.kernels.lint.interpreter import Fault
from tests.kernels import faulty_kernels as faulty
from tests.kernels.checked import ORDERS
from tests.kernels.checked_cases import every_case, same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("FASTDEIT_IR" not in os.environ, reason="FASTDEIT_IR=90 runs compiled kernels on the CPU"),
]
CASES = every_case() | {
    again.name: again
    for case in every_case().values()
    if case.dtype == torch.float16
    for again in [replace(case, dtype=torch.bfloat16)]
}


@pytest.mark.parametrize("name", CASES)
def test_compiled_kernels_are_right_in_any_order(name, compiled):
    case = CASES[name]
    outcome = case.run("forward", within=compiled)
    case.judge(outcome)
    for order in ORDERS[1:]:
        assert same_bits(outcome, case.run(order, within=compiled)), order


@contextmanager
def hopper(compiled):
    """Attention by what the compiler made of its kernels in Gluon, which only newer versions of Triton have."""
    from tests.kernels.gluon.on_machine import hopper_on_cpu

    with hopper_on_cpu(), compiled():
        yield


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 70, 198])
def test_compiled_kernels_in_gluon_are_right(dtype, tokens, compiled):
    from tests.kernels.gluon.on_machine import packed, prove

    prove(packed(dtype, 2, tokens, 2), 2, within=partial(hopper, compiled))


# ---- the tool itself -------------------------------------------------------------------------------------------------


def launch(compiled, kernel, *others, count=5, N=4, grid=(2,), order="forward", dtype=torch.float32):
    x, y = torch.arange(count, dtype=dtype), torch.zeros(count, dtype=dtype)
    with compiled(order) as launched:
        _triton.launch(kernel, grid, x, y, *others, count, N=N, warps=1)
    assert launched == [f"tests.kernels.faulty_kernels.{kernel.fn.__name__}"]
    return y


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64], ids=str)
def test_a_good_kernel_passes(compiled, dtype, order):
    assert launch(compiled, faulty.copy, order=order, dtype=dtype).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("kernel", "kind", "words"),
    [
        (faulty.load_one_too_many, "out of bounds", "load of 4 bytes at byte 20 of x, which has [5] elements"),
        (faulty.store_without_mask, "out of bounds", "store of 4 bytes at byte 20 of y"),
        (faulty.load_before_the_first, "out of bounds", "at byte -4 of x"),
        (faulty.load_across_elements, "misaligned", "load of 4 bytes at byte 2 of x"),
        (faulty.store_to_one_place, "race", "store to y, which program number 0 wrote"),
        (faulty.load_what_the_next_stores, "race", "store to y, which program number 0 reads"),
        (faulty.load_its_own_store, "no barrier", "load from y of what the program itself wrote"),
        (faulty.store_twice_at_once, "race", "two values for one element of y"),
    ],
    ids=lambda value: value.fn.__name__ if hasattr(value, "fn") else None,
)
@pytest.mark.parametrize("order", ORDERS)
def test_a_fault_is_told_with_its_tensor_and_line(compiled, kernel, kind, words, order):
    with pytest.raises(Fault) as caught:
        launch(compiled, kernel, order=order)
    assert caught.value.kind == kind
    assert "faulty_kernels.py:" in str(caught.value)
    assert "tl.store(" in str(caught.value)
    if order == "forward":
        assert words in str(caught.value)


@pytest.mark.parametrize("order", ORDERS)
def test_only_an_acquire_and_release_behind_a_barrier_lets_the_last_program_read(compiled, order):
    def total(kernel):
        x, y, ticket = torch.arange(4.0), torch.zeros(5), torch.zeros(1, dtype=torch.int32)
        with compiled(order):
            _triton.launch(kernel, (4,), x, y, ticket, 4, N=4, warps=1)
        return y[0]

    assert total(faulty.sum_by_the_last) == 6
    for kernel in (faulty.sum_with_a_relaxed_ticket, faulty.sum_without_a_barrier):
        with pytest.raises(Fault, match=r"race: load from y of what program number \d wrote"):
            total(kernel)


def test_another_order_shows_what_depends_on_it(compiled):
    results = set()
    for order in ORDERS:
        ticket = torch.zeros(1, dtype=torch.int32)
        y = launch(compiled, faulty.first_come_first_served, ticket, grid=(5,), order=order)
        results.add(tuple(y.tolist()))
    assert len(results) == 3


def test_a_line_is_that_of_the_helper_that_was_inlined(compiled):
    """The ticket has no element, and the access to it is in `_loss.is_last`."""
    with pytest.raises(Fault, match=r"atomic addition.*, _loss\.py:\d+: .*atomic_add"):
        launch(compiled, faulty.sum_by_the_last, torch.zeros(0, dtype=torch.int32), grid=(4,))


def test_a_kernel_is_compiled_once_for_each_form(compiled):
    from tests.kernels.ir import executed

    launch(compiled, faulty.copy)
    before = len(executed._modules)
    launch(compiled, faulty.copy, order="reverse")
    assert len(executed._modules) == before
    launch(compiled, faulty.copy, N=8)
    assert len(executed._modules) == before + 1
