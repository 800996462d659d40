"""Means over seeds and what they say, against numbers computed by hand."""

import pytest

from fastdeit.experiments.experiment import Expectation, Term
from fastdeit.experiments.rows import Row
from fastdeit.experiments.statistics import interval, judge, values

A, B = Term("a", "top1"), Term("b", "top1")


def rows(**by_variant):
    """A row for each seed of each variant, whose metric top1 is given."""
    return [
        Row(variant, seed, (), {} if value is None else {"top1": value})
        for variant, found in by_variant.items()
        for seed, value in enumerate(found)
    ]


def test_an_interval_is_students():
    """1, 2, 3, 4: s = sqrt(5 / 3), t(0.975, 3) = 3.182446."""
    found = interval([1.0, 2.0, 3.0, 4.0])
    assert (found.mean, found.count) == (2.5, 4)
    assert found.half == pytest.approx(3.182446 * (5 / 3) ** 0.5 / 2, rel=1e-6)
    assert found.low == pytest.approx(2.5 - found.half)
    pair = interval([10.0, 12.0])  # t(0.975, 1) = 12.7062, s = sqrt(2)
    assert pair.high == pytest.approx(11 + 12.7062, rel=1e-5)


def test_one_value_has_no_interval_and_none_no_mean():
    found = interval([7.0])
    assert (found.mean, found.low, found.high, found.half) == (7.0, None, None, None)
    with pytest.raises(ValueError, match="no values"):
        interval([])


def test_differences_are_those_of_a_seed():
    """The means overlap widely, but every seed says the same."""
    found = judge(Expectation(1, "", A, B), rows(a=[50.0, 10.0, 90.0], b=[48.9, 9.0, 89.1]))
    assert found.difference.mean == pytest.approx(1.0)
    assert found.difference.half == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-5)  # t(0.975, 2)
    assert found.verdict == "shown"


def test_seeds_that_one_side_lacks_are_left_out():
    found = rows(a=[1.0, None, 3.0], b=[0.0, 0.0])
    assert values(found, A) == {0: 1.0, 2: 3.0}
    assert judge(Expectation(1, "", A, B), found).difference.count == 1


@pytest.mark.parametrize(
    ("a", "b", "options", "verdict"),
    [
        ([3.0, 3.1, 3.2], [1.0, 1.0, 1.0], {}, "shown"),
        ([1.0, 1.0, 1.0], [3.0, 3.1, 3.2], {}, "the opposite is shown"),
        ([1.0, 3.0, 5.0], [2.0, 2.0, 2.0], {}, "not shown at this scale"),
        ([1.0, 1.0], [1.0, 1.0], {}, "not shown at this scale"),
        ([1.0, 1.0], [1.0, 1.0], {"slack": 0.1}, "shown"),
        ([1.0, 1.0], [2.0, 2.0], {"slack": 0.1}, "the opposite is shown"),
        ([9.0], [1.0], {}, "not shown at this scale"),
        ([], [1.0], {}, "not run"),
        ([1.0, 1.0, 1.1], [1.0, 1.0, 1.0], {"within": 1.0}, "shown"),
        ([1.0, 1.0, 3.0], [1.0, 1.0, 1.0], {"within": 1.0}, "not shown at this scale"),
        ([5.0, 5.0, 5.1], [1.0, 1.0, 1.0], {"within": 1.0}, "the opposite is shown"),
        ([1.0, 1.0, 1.1], [5.0, 5.0, 5.0], {"within": 1.0}, "the opposite is shown"),
    ],
)
def test_the_verdict_is_that_of_the_whole_interval(a, b, options, verdict):
    assert judge(Expectation(1, "", A, B, **options), rows(a=a, b=b)).verdict == verdict


def test_a_number_may_stand_on_either_side():
    found = rows(a=[0.995, 0.996, 0.997])
    assert judge(Expectation(1, "", A, 0.99), found).verdict == "shown"
    assert judge(Expectation(1, "", 0.99, A), found).verdict == "the opposite is shown"
    assert Expectation(1, "", 2.0, A, slack=0.5).formula == "2.0 > top1 of a - 0.5"
    assert Expectation(1, "", A, B, within=1.0).formula == "top1 of a within 1 of top1 of b"
