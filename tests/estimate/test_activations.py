"""`engine.keep_activations: auto`: who keeps them, that it is said in a line, and that run and plan have the answer."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastdeit.engine.dist import World
from fastdeit.estimate import activations, report
from fastdeit.estimate.gpus import GPUS
from fastdeit.estimate.machines import Machine
from fastdeit.estimate.subject import subject
from fastdeit.recipe import resolve as recipes
from fastdeit.run import request
from tests.engine.test_optim import Sign


def card(name, memory):
    return SimpleNamespace(name=name, total_memory=memory)


H200, RTX = card("NVIDIA H200", 150_754_820_096), card("NVIDIA GeForce RTX 3090", 25_297_551_360)


def recipe(*words, name="deit_base", batch=256):
    return recipes.load(name, ["engine.precision=bf16", "data.group_size=64", f"train.batch_size={batch}", *words])


def gib(why):
    """(needed, there) of the words that say why."""
    needed, there = why.split(" takes ")[1].split(" GiB")[0].split(" of ")
    return float(needed), float(there)


@pytest.mark.parametrize(
    ("card", "batch", "words", "processes"),
    [
        (H200, 256, [], 1),
        (H200, 2048, [], 1),
        (H200, 2048, [], 4),
        (H200, 2048, ["train.accumulate=4"], 1),
        (RTX, 256, [], 1),
        (RTX, 256, ["model.name=deit_tiny_patch16_224"], 1),
    ],
)
def test_they_are_kept_where_a_fifth_of_the_memory_stays_free(card, batch, words, processes):
    keep, why = activations.chosen(recipe(*words, batch=batch), card, processes)
    needed, there = gib(why)
    assert keep == (needed <= 0.8 * there)


def test_both_answers_come_out_and_larger_images_and_teachers_count():
    one, four = (activations.chosen(recipe(batch=2048), H200, count) for count in (1, 4))
    assert (one[0], four[0]) == (False, True)
    found = subject(recipe(batch=256))
    taught = replace(found, teachers=(found.student,))
    grown = subject(recipe("data.size_schedule=[[0, 384], [10, 224]]"))
    plain, more, most = (gib(activations.fits(each, GPUS["H200"], 1, "bf16")[1])[0] for each in (found, taught, grown))
    assert plain + 4 * found.student.parameters / 2**30 < more
    assert 2 * plain < most
    other = replace(found, student=replace(found.student, vit=None))
    keep, why = activations.fits(other, GPUS["H200"], 1, "bf16")
    assert (keep, why) == (False, "since of deit_base_patch16_224 nothing is made again")


def test_the_memory_is_that_of_the_card_and_not_of_its_name():
    """But no more than plans count with, so that a run does what they say."""
    words = recipe(batch=512)
    whole, half = (activations.chosen(words, card(f"NVIDIA A100-SXM4-{gb}GB", gb * 1e9), 1) for gb in (80, 40))
    assert (whole[0], half[0]) == (True, False)
    assert gib(half[1])[1] == pytest.approx(37.3)
    assert activations.chosen(words, card("NVIDIA A100-SXM4-80GB", 85_094_825_984), 1) == whole


@pytest.mark.parametrize(
    ("words", "card", "why"),
    [
        ([], None, "since a CPU runs PyTorch's operations"),
        ([], card("NVIDIA H100 PCIe", 80e9), "since a step on NVIDIA H100 PCIe cannot be modelled"),
        (["engine.checkpoint_blocks=true"], H200, "since engine.checkpoint_blocks makes them again"),
        (["engine.products=fp8"], H200, "since engine.products fp8 makes them again"),
        (
            ["method.use=tests.plugins.dino:Dino"],
            H200,
            "since the memory of method tests.plugins.dino:Dino is not known",
        ),
        (["model.timm=deit_tiny_patch16_224", "model.name=null"], H200, "since timm's models run operations that keep"),
    ],
)
def test_where_nothing_is_gained_or_known_they_are_not(words, card, why):
    keep, said = activations.chosen(recipe(*words), card, 1)
    assert (keep, said.startswith(why)) == (False, True), said


class ReadsWeights(nn.Module):
    """Somebody else's model, which cannot be built without storage."""

    def __init__(self, **options):
        super().__init__()
        self.largest = nn.Linear(2, 2).weight.max().item()


class ReadsValues(Sign):
    """Somebody else's optimizer, which cannot either."""

    def __init__(self, groups, options):
        super().__init__(groups, options)
        self.largest = max(parameter.max().item() for group in groups for parameter in group.params.values())


@pytest.mark.parametrize(
    ("field", "name", "more"), [("model.name", "ReadsWeights", ()), ("optim.name", "ReadsValues", ("optim.lr=1e-3",))]
)
def test_what_somebody_else_wrote_ends_no_run_because_it_cannot_be_modelled(field, name, more):
    keep, said = activations.chosen(recipe(f"{field}={__name__}:{name}", *more), H200, 1)
    assert keep is False
    assert said.startswith(f"since the memory of a step cannot be modelled: {__name__}:{name} fails on the meta device")


def test_the_answer_is_said_and_kept_by_the_run(monkeypatch):
    said = []
    begun = activations.fixed(recipe(), World(torch.device("cpu")), said.append)
    assert (begun.engine.keep_activations, said) == (False, [])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: H200)
    on_card = SimpleNamespace(device=torch.device("cuda", 0), size=1, same=lambda value: value)
    kept = activations.fixed(recipe(), on_card, said.append)
    assert kept.engine.keep_activations is True
    assert said[0].startswith("engine.keep_activations auto: true, since a step with them takes ")
    assert activations.fixed(kept, on_card, said.append) is kept
    for before in (begun, kept):
        again = request.given_again(recipe(), before).engine.keep_activations
        assert again is before.engine.keep_activations
    asked = recipe("engine.keep_activations=false")
    assert request.given_again(asked, kept).engine.keep_activations is False


@pytest.mark.parametrize("gpu", ["H200", "RTX3090"])
def test_a_plan_is_of_what_a_run_would_do(gpu):
    def fused(keep):
        found = report.report(recipe(f"engine.keep_activations={keep}"), [Machine(GPUS[gpu], 1, 1)])
        return next(plan for plan in found["plans"] if plan["design"] == "fused")["memory"]["total"]

    assert fused("auto") == fused("true" if gpu == "H200" else "false")
    assert fused("true") > fused("false")


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ("engine.checkpoint_blocks=true", "keep_activations"),
        ("engine.products=fp8", "keep_activations"),
        ("engine.parallel=fsdp2", "capture"),
        ("engine.device=cpu", "capture"),
    ],
)
def test_an_answer_that_other_settings_exclude_is_found_anew(asked, field):
    """The run's recipe stays one that can be read again."""
    before = recipe("engine.keep_activations=true", "engine.capture=graph")
    again = request.given_again(recipe("engine.capture=auto", asked), before)
    assert getattr(again.engine, field) == "auto"
    assert recipes.override(again, []) == again


def test_the_answer_goes_with_the_precision_that_is_asked_for():
    before = recipes.load("deit_base", ["engine.precision=fp32"])
    again, rounded = (recipes.load("deit_base", words) for words in ([], ["engine.residual=bf16"]))
    assert request.given_again(again, before).engine.precision == "fp32"
    assert request.given_again(rounded, before).engine.precision == "auto"
