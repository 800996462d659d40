"""What the guard makes of norms over many steps: a loss scale within bounds, and spikes against the usual norm."""

import math
from collections import Counter

import pytest
import torch

from fastdeit.engine import replicas
from fastdeit.engine.fit import FitError, check_fit
from fastdeit.engine.guard import Guard
from fastdeit.engine.replicas import DriftError

CPU = torch.device("cpu")


def judged(guard, *norms):
    """The verdicts on steps whose gradients have these norms."""
    return [guard.judge([torch.tensor([norm * guard.scale.item()])]) for norm in norms]


# ---- loss scale ------------------------------------------------------------------------------------------------------


def test_the_loss_scale_has_a_floor_and_recovers():
    guard = Guard("fp16", None, CPU)
    for _ in range(200):
        guard.judge([torch.tensor([math.inf])])
        assert guard.scale.item() >= 1.0
    assert guard.scale.item() == 1.0
    (verdict,) = judged(guard, 3.0)
    assert (verdict.factor.item(), verdict.norm.item(), verdict.skip.item()) == (1.0, 3.0, False)
    guard.good.fill_(1999)
    judged(guard, 1.0)
    assert guard.scale.item() == 2.0


def test_the_loss_scale_has_a_ceiling():
    guard = Guard("fp16", None, CPU)
    guard.scale.fill_(2.0**32)
    guard.good.fill_(1999)
    guard.judge([torch.zeros(1)])
    assert guard.scale.item() == 2.0**32


# ---- spikes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["warn", "skip", "rollback"])
@pytest.mark.parametrize("times", [11, 1000, 1e20])
def test_a_spike_is_counted_and_skipped_where_that_is_asked(policy, times):
    guard = Guard("fp32", None, CPU, policy)
    judged(guard, *[2.0] * 9)
    assert guard.noticed().count == 0
    (spike,) = judged(guard, 2.0 * times)
    assert guard.noticed() == (1, 10)
    assert spike.skip.item() == (policy != "warn")
    assert guard.skipped.item() == (policy != "warn")
    assert not guard.in_row(), "a spike is finite, and no step of the row at which a run is stopped"
    (after,) = judged(guard, 2.0)
    assert not after.skip.item()
    assert guard.noticed() == (1, 10)
    assert guard.usual.item() < 4.0, "a spike enters the usual norm as ten times that"


QUIET = {
    "steady": [1.0] * 60,
    "nine times": [1.0] * 10 + [9.0] * 3 + [1.0] * 10,
    "falling": [100 * 0.9**step for step in range(60)],
    "growing": [1.05**step for step in range(60)],
    "the first steps, whatever they are": [1e-8, 1e3, 1.0, 5.0, 1e-3, 1e2, 1.0, 1.0],
    "zero": [0.0] * 20,
    "not finite": [1.0] * 10 + [math.inf, math.nan, math.inf] + [1.0] * 5,
}


@pytest.mark.parametrize("name", QUIET)
def test_what_is_no_spike_is_none(name):
    guard = Guard("fp32", None, CPU, "skip")
    judged(guard, *QUIET[name])
    assert guard.noticed().count == 0
    assert guard.usual.isfinite()


def test_norms_that_stay_high_are_the_usual_ones_after_a_few_steps():
    guard = Guard("fp32", None, CPU, "skip")
    skipped = [verdict.skip.item() for verdict in judged(guard, *[1.0] * 40, *[100.0] * 40)]
    assert Counter(skipped[40:])[True] < 16
    assert not any(skipped[60:])


def test_the_usual_norm_is_a_part_of_the_state():
    guard, other = Guard("fp16", None, CPU, "skip"), Guard("fp16", None, CPU, "skip")
    judged(guard, *[1.0, 2.0, 3.0] * 5)
    other.load_state_dict({name: tensor.clone() for name, tensor in guard.state_dict().items()})
    for norm in (3.0, 40.0, 2.0):
        assert judged(guard, norm) == judged(other, norm)
    assert other.noticed().count == 1


@pytest.mark.parametrize("name", ["skipped", "spikes", "usual", "seen", "scale", "good"])
def test_a_state_that_is_not_the_guards_is_refused(name):
    state = Guard("fp16", None, CPU).state_dict()
    for changed in (
        {key: tensor for key, tensor in state.items() if key != name},
        state | {name: torch.ones(2)},
        state | {name: torch.ones(1, dtype=torch.float64)},
        state | {"another": torch.ones(1)},
    ):
        with pytest.raises(FitError, match="of engine, "):
            Guard("fp16", None, CPU).load_state_dict(changed)


# ---- fit -------------------------------------------------------------------------------------------------------------


def test_what_would_be_broadcast_or_rounded_does_not_fit():
    ours = {"w": torch.zeros(6, 4)}
    check_fit("optim", {"w": torch.ones(6, 4)}, ours)
    for theirs, said in (
        (
            {"w": torch.ones(4)},
            r"of optim, w: in the checkpoint it has the shape \[4\], here it has the shape \[6, 4\]",
        ),
        ({"w": torch.ones(6, 4).double()}, "it has the dtype float64, here it has the dtype float32"),
        ({}, r"in the checkpoint there is none, here it has the shape \[6, 4\]"),
        ({"w": torch.ones(6, 4), "v": torch.ones(())}, r"of optim, v: .* it has the shape \[\], here there is none"),
    ):
        with pytest.raises(FitError, match=said):
            check_fit("optim", theirs, ours)


# ---- replicas --------------------------------------------------------------------------------------------------------


def weights():
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (5, 3), "b": (8,), "c": (), "empty": (0,)}
    tensors = [torch.randn(shape, generator=generator) for shape in shapes.values()]
    return [*tensors, torch.randn(4, 6, generator=generator).t(), torch.ones(3).bfloat16(), torch.ones(2).double()]


def summed(processes):
    return sum(replicas.slots(tensors, rank, len(processes)) for rank, tensors in enumerate(processes))


@pytest.mark.parametrize("size", [2, 3, 64])
def test_equal_weights_pass(size):
    replicas.check(summed([weights() for _ in range(size)]))


def bit(tensor, position):
    def flip(tensors):
        words = replicas._words(tensors[tensor])
        sign = position == 8 * words.element_size() - 1
        words[2] ^= -(2**position) if sign else 1 << position

    return flip


DRIFTS = {
    "three times": lambda tensors: tensors[1].mul_(3.0),
    "a scalar": lambda tensors: tensors[2].add_(1.0),
    "NaN": lambda tensors: tensors[1].fill_(math.nan),
    "minus zero": lambda tensors: tensors[1].zero_() * -1,
    "two tensors swapped": lambda tensors: tensors.insert(0, tensors.pop(1)),
    "a transposed one": lambda tensors: tensors[4][0, 0].add_(1e-6),
    "16 bit": lambda tensors: tensors[5][1].add_(0.01),
    "64 bit": lambda tensors: tensors[6][1].add_(1e-15),
    **{f"bit {position} of 32": bit(0, position) for position in (0, 7, 22, 23, 30, 31)},
    **{f"bit {position} of 64": bit(1, position) for position in (0, 31, 32, 47, 48, 62, 63)},
}


@pytest.mark.parametrize("name", DRIFTS)
def test_any_difference_is_found_and_its_process_named(name):
    processes = [weights() for _ in range(3)]
    DRIFTS[name](processes[1])
    with pytest.raises(
        DriftError, match="3 processes do not have the same weights any more: those of process 1 differ"
    ):
        replicas.check(summed(processes))
    with pytest.raises(DriftError, match=r"the 2 processes do not have the same weights any more$"):
        replicas.check(summed(processes[:2]))
