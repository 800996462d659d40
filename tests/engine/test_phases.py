"""Phases: which an epoch belongs to, what is trained in it, and phases that do not make up a run."""

import pytest
from torch import nn

from fastdeit.engine import phases
from fastdeit.methods.base import Phase

NAMES = ["head.weight", "head.bias"]
TWO = Phase("warm", until=2, trains=["head"]), Phase("all")


@pytest.mark.parametrize(("epoch", "index"), [(0, 0), (1, 0), (2, 1), (9, 1)])
def test_an_epoch_belongs_to_one_phase(epoch, index):
    phases.check(TWO, 10, NAMES, NAMES)
    assert phases.index_at(TWO, epoch) == index


WRONG = {
    "none": ([], "at least one phase"),
    "one name twice": ([Phase("a", 1), Phase("a")], "two phases are called 'a'"),
    "an end too early": ([Phase("a", 3), Phase("b", 3), Phase("c")], "'b' ends at epoch 3, but must end after epoch 3"),
    "an end after the run": ([Phase("a", 10), Phase("b")], "before the end of the run, epoch 10"),
    "no end in the middle": ([Phase("a"), Phase("b")], "phase 'a' ends at epoch None"),
    "an end of the last": ([Phase("a", 3), Phase("b", 9)], "last phase, 'b', ends at epoch 9; leave its `until` None"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_phases_that_are_no_run_are_refused(case):
    found, words = WRONG[case]
    with pytest.raises(phases.PhaseError, match=words):
        phases.check(found, 10, NAMES, NAMES)


def network():
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2), "head_dist": nn.Linear(2, 2)})
    model["body"].bias.requires_grad_(False)
    return model, {name for name, p in model.named_parameters() if p.requires_grad}


def trained(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


def test_a_phase_trains_what_it_names_and_never_what_the_method_froze():
    model, trainable = network()
    phases.train_only(model, Phase("a", trains=["head", "body"]), trainable)
    assert trained(model) == ["body.weight", "head.weight", "head.bias"]
    phases.train_only(model, Phase("b", trains=["head_dist.bias"]), trainable)
    assert trained(model) == ["head_dist.bias"]
    phases.train_only(model, Phase("c"), trainable)
    assert set(trained(model)) == trainable


@pytest.mark.parametrize(
    ("trains", "words"),
    [
        (
            ["head", "haed"],
            "trains 'haed', but no parameter of the method has that name or lies below it",
        ),
        (["hea"], "phase 'later' trains 'hea', but"),
        (["body.bias"], "phase 'later' trains no parameter: the method or model.freeze has frozen all"),
        ([], "phase 'later' trains no parameter"),
    ],
)
def test_a_phase_that_does_not_train_what_it_names_is_refused_before_the_run(trains, words):
    model, trainable = network()
    names = [name for name, _ in model.named_parameters()]
    for first in ([Phase("all", 3)], []):
        with pytest.raises(phases.PhaseError, match=words):
            phases.check([*first, Phase("later", trains=trains)], 10, names, trainable)
    phases.check([Phase("later", trains=["head", "body.weight"])], 10, names, trainable)
