"""Groups of parameters: every way in which they can make no sense, and how they are split."""

import pytest
import torch
from torch import nn

from fastdeit.engine.groups import GroupError, ParamGroup, check, check_owned, refined
from fastdeit.engine.optimizers import find
from fastdeit.engine.options import OPTIMIZERS


def tensors():
    """Parameters a to d; d is frozen."""
    made = {name: nn.Parameter(torch.ones(2, 2)) for name in "abcd"}
    made["d"].requires_grad_(False)
    return made


P = tensors()
WRONG = {
    "no group": ([], "nothing to train"),
    "empty groups": ([{}, {}], "nothing to train"),
    "one name twice": ([{"a": P["a"], "b": P["b"]}, {"b": P["b"]}], "'b' is in more than one group"),
    "one name of two tensors": ([{"a": P["a"]}, {"a": P["b"]}], "'a' is in more than one group"),
    "one tensor in two groups": ([{"a": P["a"]}, {"again": P["a"]}], "'a' and 'again' are one tensor"),
    "tied names in one group": ([{"a": P["a"], "tied": P["a"]}], "'a' and 'tied' are one tensor"),
    "all frozen": ([{"d": P["d"]}], "'d' is in a group of parameters but is frozen"),
    "one frozen": ([{"a": P["a"]}, {"d": P["d"]}], "'d' is in a group of parameters but is frozen"),
}
RIGHT = {
    "an empty group beside others": [{"a": P["a"]}, {}],
    "two groups": [{"a": P["a"]}, {"b": P["b"], "c": P["c"]}],
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_groups_that_make_no_sense_are_refused_in_a_sentence(case, optimizer):
    """When an optimizer is made, and when a phase of the run gives it other groups."""
    groups, words = [ParamGroup(params, 0.1) for params in WRONG[case][0]], WRONG[case][1]
    with pytest.raises(GroupError, match=words):
        check(groups)
    good = ParamGroup({"c": P["c"]}, 0.1)
    for make in (find(optimizer), find(optimizer)([good]).regroup):
        with pytest.raises(GroupError, match=words):
            make(groups)


@pytest.mark.parametrize("case", RIGHT)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_groups_that_make_sense(case, optimizer):
    groups = [ParamGroup(params, 0.1) for params in RIGHT[case]]
    assert find(optimizer)(groups).params == {name: p for params in RIGHT[case] for name, p in params.items()}


@pytest.mark.parametrize("field", ["weight_decay", "lr_scale"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_factors_that_make_no_sense(field, value):
    with pytest.raises(GroupError, match=f"the group that begins with 'a' has {field} {value}"):
        check([ParamGroup(**{"params": {"a": P["a"]}, "weight_decay": 0.1, field: value})])


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"x": P["a"]}, "'x', which is not the name of a parameter that is trained now: there that tensor is 'a'"),
        ({"a": P["b"]}, "'a', which is not .*: there that tensor is 'b'"),
        ({"a": nn.Parameter(torch.ones(2))}, "'a', which is not the name of a parameter that is trained now$"),
        ({"d": P["d"]}, "'d', which is not"),
    ],
)
def test_groups_of_what_is_not_the_methods(params, words):
    trained = {name: P[name] for name in "abc"}
    check_owned([ParamGroup({"c": P["c"]}, 0.1)], trained)
    with pytest.raises(GroupError, match=words):
        check_owned([ParamGroup(params, 0.1)], trained)


def test_refined_splits_by_factor_and_kind_and_keeps_the_rest():
    groups = [ParamGroup({name: P[name] for name in "abc"}, 0.1, 0.5), ParamGroup({"d": P["d"]}, 0.0)]
    found = refined(groups, {"a": 0.25, "c": 0.25}, matrices={"c"})
    assert [(list(group.params), group.weight_decay, group.lr_scale, group.matrix) for group in found] == [
        (["a"], 0.1, 0.125, False),
        (["b"], 0.1, 0.5, False),
        (["c"], 0.1, 0.125, True),
        (["d"], 0.0, 1.0, False),
    ]
    assert refined(groups, {}) == groups
