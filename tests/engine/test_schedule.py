"""Learning-rate schedules against the values of the public DeiT code and against their own definition."""

import math
from itertools import pairwise

import numpy as np
import pytest

from fastdeit.engine.schedule import decay_factor, learning_rate

DEIT = {"epochs": 300, "lr": 1e-3, "warmup_epochs": 5, "warmup_lr": 1e-6, "min_lr": 1e-5}


def rate(step, schedule, steps_per_epoch=1251):
    return learning_rate(step, schedule=schedule, steps_per_epoch=steps_per_epoch, **DEIT)


@pytest.mark.parametrize(("epoch", "expected"), [(0, 1e-6), (1, 1e-6), (5, 8.002e-4), (6, 9.993e-4), (299, 1.01e-5)])
def test_deit_exact_lags_one_epoch(epoch, expected):
    """Values printed by the public code at global batch 1024."""
    for step in (epoch * 1251, epoch * 1251 + 1250):
        assert rate(step, "deit-exact") == pytest.approx(expected, rel=1e-3)


def test_cosine_warms_up_per_step_and_is_continuous():
    assert rate(0, "cosine") == 1e-6
    assert rate(1, "cosine") > 1e-6
    peak = 5 * 1251
    assert rate(peak, "cosine") == pytest.approx(1e-3)
    assert rate(peak - 1, "cosine") == pytest.approx(1e-3, rel=1e-3)
    assert rate(300 * 1251, "cosine") == pytest.approx(1e-5)
    rates = [rate(step, "cosine") for step in range(peak, 300 * 1251, 997)]
    assert all(a > b for a, b in pairwise(rates))


def test_cosine_formula_in_the_middle():
    step = 100 * 1251
    expected = 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * 95 / 295))
    assert rate(step, "cosine") == pytest.approx(expected)


def test_the_rates_of_a_run_add_up_to_more_than_the_public_codes():
    """As the field's docstring says: the cosine begins anew after the warm-up, instead of being cut into by it."""
    total = {name: math.fsum(rate(step, name, 10) for step in range(3000)) for name in ("cosine", "deit-exact")}
    assert total["cosine"] / total["deit-exact"] - 1 == pytest.approx(0.017, abs=0.001)


def test_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="'linear'"):
        rate(0, "linear")


def test_weight_decay_follows_the_schedule_of_dino():
    """From 0.04 to 0.4 in 300 steps: the values of its `cosine_scheduler`."""
    expected = 0.4 + 0.5 * (0.04 - 0.4) * (1 + np.cos(np.pi * np.arange(300) / 300))
    found = [0.04 * decay_factor(step, total=300, end=0.4 / 0.04) for step in range(300)]
    assert found == pytest.approx(expected, rel=1e-12)
