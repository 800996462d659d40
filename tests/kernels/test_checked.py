"""Kernels touch nothing but their tensors, no program depends on another one's place in the order, and whatever the
order, the bits are the same: in Triton's interpreter, with every access checked (`checked.py`).

Each run proves one example of every op; slow runs prove all examples and what those do not reach, and that what was
proven covers all loops, branches and masks of all kernels."""

import numpy as np
import pytest
import torch

from fastdeit.kernels import _triton
from fastdeit.kernels.lint import interpreter
from fastdeit.kernels.lint.interpreter import Extent, Fault
from tests.kernels import faulty_kernels as faulty
from tests.kernels.checked import ORDERS, checked, programs
from tests.kernels.checked_cases import CheckedCase, Outcome, every_case, quick_cases, same_bits
from tests.kernels.kernel_coverage import jit_functions, measured, places_of

pytestmark = pytest.mark.skipif(interpreter.unavailable() is not None, reason=str(interpreter.unavailable()))

_PRODUCT, _PRODUCT_BACKWARD = (f"mlp.gelu_products._product_gelu_{name}kernel" for name in ("", "backward_"))
ALLOWED = {
    "losses._forward_kernel: in _loss.binary_cross_entropy: branch `BINARY`": "called where BINARY; cosub's is not",
    **{
        f"attention.{kernel}: in attention.tiles.logits: branch `RAGGED`": "`visible` masks"
        for kernel in ("forward._online_kernel", "backward._query_gradient_kernel")
    },
    **{
        f"{kernel}: in mlp.gelu.normal_distribution: branch `EXACT`": "results of 16 bits only"
        for kernel in (_PRODUCT, _PRODUCT_BACKWARD)
    },
    "optimizer.norm._squares_kernel: in optimizer._multi_tensor.chunk: branch `found_inf is not None`": (
        "a norm is never skipped"
    ),
}
"""What of device functions a kernel cannot reach, and why."""


def prove_orders(case: CheckedCase, *orders: str) -> Outcome:
    first, *others = (case.run(order) for order in orders)
    assert all(same_bits(first, other) for other in others), f"{case.name} depends on the order of programs"
    return first


@pytest.mark.parametrize("name", quick_cases())
def test_an_example_of_every_op(name):
    case = quick_cases()[name]
    case.judge(case.run("shuffled"))


@pytest.mark.slow
@pytest.mark.parametrize("name", every_case())
def test_every_case_in_any_order(name):
    case = every_case()[name]
    case.judge(prove_orders(case, *ORDERS))


@pytest.mark.slow
def test_every_loop_goes_round_twice_and_every_branch_and_mask_has_two_sides():
    with measured() as coverage:
        for case in every_case().values():
            case.run("forward")
    missing = coverage.missing(places_of(jit_functions().values()))
    assert {name: what for name, what in missing.items() if name not in ALLOWED} == {}
    assert not ALLOWED.keys() - missing.keys(), "these are covered now: take them off the list"


# ---- the tools themselves --------------------------------------------------------------------------------------------


def launch(kernel, *others, count=5, N=4, grid=(2,), x=None, order="forward"):
    """y of `count` elements after the launch of the kernel, by default on x = 0, 1, 2, ... of as many."""
    x = torch.arange(count, dtype=torch.float32) if x is None else x
    y = torch.zeros(count)
    with checked(order):
        _triton.launch(kernel, grid, x, y, *others, count, N=N, warps=1)
    return y


@pytest.mark.parametrize("order", ORDERS)
def test_a_good_kernel_passes(order):
    assert launch(faulty.copy, order=order).tolist() == [0, 1, 2, 3, 4]


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
        (faulty.wrap_around, "overflow", "int32 overflow"),
        (faulty.promise_too_much, "broken promise", "5 is no multiple of 16"),
    ],
    ids=lambda value: value.fn.__name__ if hasattr(value, "fn") else None,
)
@pytest.mark.parametrize("order", ORDERS)
def test_a_fault_is_told_with_its_tensor_and_line(kernel, kind, words, order):
    with pytest.raises(Fault) as caught:
        launch(kernel, order=order)
    assert caught.value.kind == kind
    assert "faulty_kernels.py:" in str(caught.value)
    if order == "forward":
        assert words in str(caught.value)


def test_a_view_is_not_the_tensor_that_it_is_a_part_of():
    """The columns beside those of the view belong to somebody else."""
    packed = torch.zeros(3, 8)
    assert launch(faulty.copy, x=packed[:, :5][0]).tolist() == [0] * 5
    with pytest.raises(Fault, match=r"byte 8 of x, which has \[3, 2\] elements of 4 bytes, strides \(8, 1\)"):
        launch(faulty.copy, x=packed[:, :2])


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x[1:, 2:5],
        lambda x: x[:, ::3],
        lambda x: x.transpose(0, 2),
        lambda x: x[:, :1].expand(4, 6, 8),
        lambda x: x[1, 2],
        lambda x: x[:0],
        lambda x: x[1, 2, 3],
    ],
    ids=["dense", "sliced", "strided", "transposed", "expanded", "row", "empty", "element"],
)
def test_an_extent_has_the_elements_of_its_tensor_and_no_other(view):
    tensor = view(torch.arange(4 * 6 * 8).view(4, 6, 8))
    extent = Extent.of("x", tensor)
    own = {(n - tensor.storage_offset()) * 8 for n in tensor.flatten().tolist()}
    offsets = np.arange(-80, 1600)
    assert set(offsets[extent.holds(offsets, 8)].tolist()) == own
    halves = {at + half for at in own for half in (0, 4)}
    assert set(offsets[extent.holds(offsets, 4) & (offsets % 4 == 0)].tolist()) == halves
    pairs = {at for at in own if at + 8 in own}
    assert set(offsets[extent.holds(offsets, 16) & (offsets % 8 == 0)].tolist()) == pairs


def test_only_the_last_program_may_read_what_others_wrote():
    x, ticket = torch.arange(4.0), torch.zeros(1, dtype=torch.int32)
    for order in ORDERS:
        assert launch(faulty.sum_by_the_last, ticket, count=5, x=x, N=4, grid=(4,), order=order)[0] == 6
    for kernel in (faulty.sum_with_a_relaxed_ticket, faulty.sum_without_a_barrier):
        y, count = torch.zeros(5), 4
        with checked(), pytest.raises(Fault, match="race: load from y of what program number 0 wrote"):
            _triton.launch(kernel, (4,), x, y, ticket.zero_(), count, N=4, warps=1)


def test_another_order_shows_what_depends_on_it():
    results = set()
    for order in ORDERS:
        ticket = torch.zeros(1, dtype=torch.int32)
        y = launch(faulty.first_come_first_served, ticket, count=5, grid=(5,), order=order)
        results.add(tuple(y.tolist()))
    assert len(results) == 3


def test_orders_have_every_program_once():
    for order in ORDERS:
        assert sorted(programs((2, 3), order, 0)) == [(x, y, 0) for x in range(2) for y in range(3)]


def test_coverage_tells_what_is_missing():
    with measured("tests.kernels") as coverage:
        launch(faulty.one_round_and_one_side, count=4, grid=(1,))
    found = coverage.missing(places_of([faulty.one_round_and_one_side]))
    name = "tests.kernels.faulty_kernels.one_round_and_one_side"
    assert found == {
        f"{name}: loop `for start in range(0, count, N)`": "never went round twice",
        f"{name}: loop `for start in range(count)`": "never ran",
        f"{name}: branch `count < 0`": "only ever false",
        f"{name}: mask `x + start + at, mask=start + at < count`": "only ever true",
    }
