"""Optimizer groups of a run: layer decay composes with what the method says, and what is in no group is not trained."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fastdeit.engine.dist import World
from fastdeit.engine.groups import ParamGroup
from fastdeit.engine.optimizers import AdamW
from fastdeit.engine.step import Engine
from fastdeit.errors import UsageError
from fastdeit.methods.supervised import Supervised
from fastdeit.recipe import resolve as recipes
from fastdeit.run import build
from fastdeit.run.groups import param_groups
from fastdeit.run.parts import PhaseSchedule

RECIPE = """\
model: {name: deit_digits_patch8_32, image_size: 32}
method: {use: supervised}
data: {source: synthetic, synthetic_samples: 32, synthetic_classes: 4, group_size: 8, repeats: 1, threads: 1}
optim: {lr: 1e-3, weight_decay: 0.5, layer_decay: 0.5}
train: {epochs: 10, batch_size: 16}
"""
HEAD, LAST = "model.head.weight", "model.blocks.3.attn.qkv.weight"


class Slow(Supervised):
    """Everything at half the rate, but a parameter of the method's own, at the full one; the token is left out."""

    def __init__(self, model, config, context):
        super().__init__(model, config, context)
        self.own = nn.Parameter(torch.zeros(3, 3))

    def param_groups(self, base):
        found = [
            replace(group, params={n: p for n, p in group.params.items() if n not in ("own", "model.cls_token")})
            for group in base
        ]
        return [*(replace(group, lr_scale=0.5) for group in found), ParamGroup({"own": self.own}, 0.0, 1.0)]


class Renamed(Supervised):
    def param_groups(self, base):
        return [replace(group, params={n.removeprefix("model."): p for n, p in group.params.items()}) for group in base]


class Twice(Supervised):
    def param_groups(self, base):
        return [*base, replace(base[0], lr_scale=0.1)]


class Nothing(Supervised):
    def param_groups(self, base):
        return []


@pytest.fixture
def made(tmp_path):
    """(method, recipe) under these overrides."""
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE)

    def made(*overrides):
        recipe = recipes.load(str(file), overrides)
        return build.method(recipe, build.model(recipe, 4, print), 4, 20, lambda config: None), recipe

    return made


def of_each(groups, field):
    return {name: getattr(group, field) for group in groups for name in group.params}


def test_layer_decay_is_a_factor_by_depth(made):
    groups = param_groups(*made())
    rates, decays = of_each(groups, "lr_scale"), of_each(groups, "weight_decay")
    assert (rates[HEAD], rates[LAST], rates["model.norm.weight"], rates["model.pos_embed"]) == (1, 0.5, 0.5, 0.5**5)
    assert (decays[HEAD], decays[LAST], decays["model.norm.weight"], decays["model.pos_embed"]) == (0.5, 0.5, 0, 0)
    assert len(groups) == 12  # six layers, each with and without decay


def test_without_layer_decay_there_are_two_groups(made):
    assert [group.lr_scale for group in param_groups(*made("optim.layer_decay=null"))] == [1, 1]


def test_it_multiplies_the_methods_own_factors(made):
    method, recipe = made("method.use=tests.run.test_groups:Slow")
    rates = of_each(param_groups(method, recipe), "lr_scale")
    assert (rates[HEAD], rates[LAST], rates["own"]) == (0.5, 0.25, 1)


def test_what_is_in_no_group_asks_for_no_gradient(made):
    method, recipe = made("method.use=tests.run.test_groups:Slow")
    grouped = of_each(param_groups(method, recipe), "lr_scale")
    assert "model.cls_token" not in grouped
    assert {name for name, p in method.named_parameters() if p.requires_grad} == grouped.keys()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("Renamed", "has 'patch_embed.proj.weight', which is not the name of .*: there that tensor is 'model.patch"),
        ("Twice", "'model.patch_embed.proj.weight' is in more than one group"),
        ("Nothing", "there is nothing to train"),
    ],
)
def test_groups_that_make_no_sense_name_the_method(made, kind, words):
    with pytest.raises(UsageError, match=f"method tests.run.test_groups:{kind}: .*{words}"):
        param_groups(*made(f"method.use=tests.run.test_groups:{kind}"))


class Toy(nn.Module):
    """A method to the engine that unfreezes a layer in its second step."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 2), nn.Linear(2, 2)
        self.first.requires_grad_(False)

    def step(self, batch, engine):
        self.last(self.first(batch)).sum().backward()

    def after_step(self, engine):
        self.first.requires_grad_(True)


def test_a_parameter_that_is_unfrozen_later_is_refused():
    toy = Toy()
    optimizer = AdamW([ParamGroup({name: p for name, p in toy.named_parameters() if p.requires_grad}, 0.0)])
    engine = Engine(toy, optimizer, World(torch.device("cpu")), precision="fp32", accumulate=1)
    engine.step([torch.ones(1, 2)], 0.1)
    with pytest.raises(RuntimeError, match=r"'first.weight' has a gradient, .*say in the method's phases\(\)"):
        engine.step([torch.ones(1, 2)], 0.1)


def test_muon_has_the_blocks_matrices_in_groups_of_their_own(made):
    method, recipe = made("optim.name=muon", "optim.lr=1e-3", "optim.layer_decay=0.5")
    groups = param_groups(method, recipe)
    matrices = {name for group in groups if group.matrix for name in group.params}
    ends = "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"
    assert matrices == {f"model.blocks.{block}.{end}.weight" for block in range(4) for end in ends}
    assert sorted(group.lr_scale for group in groups if group.matrix) == [0.5**power for power in (4, 3, 2, 1)]
    assert not any(group.matrix for group in param_groups(*made()))


def test_muon_without_matrices_is_refused(made):
    with pytest.raises(UsageError, match=r"optim.name muon is for 2-D weights .* the model has none; use adamw"):
        param_groups(*made("optim.name=muon", "optim.lr=1e-3", "model.name=convnet_digits"))


# ---- model.freeze ----------------------------------------------------------------------------------------------------


def test_frozen_parameters_are_in_no_group_and_in_no_average(made):
    """The phases of a run, and with them the EMA and DDP, know only what asks for gradients."""
    method, recipe = made("model.freeze=[all_but_attention]")
    schedule = PhaseSchedule(method, recipe, 10)
    names = {name for group in schedule.groups() for name in group.params}
    assert names == schedule.trainable.keys() == {name for name, p in method.named_parameters() if p.requires_grad}
    assert {name.split(".")[1] for name in names} == {"blocks", "head", "pos_embed"}
    assert all(".attn." in name for name in names if "blocks" in name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("[blokcs]", "model.freeze: 'blokcs': the model has no 'blokcs'; did you mean blocks"),
        ("[blocks.2-4]", "model.freeze: 'blocks.2-4': blocks has no '2-4'; there are 0 to 3"),
    ],
)
def test_words_that_name_nothing_are_refused(made, words, message):
    with pytest.raises(UsageError, match=message):
        made(f"model.freeze={words}")


def test_all_frozen_is_refused(made):
    with pytest.raises(UsageError, match=r"the method or model\.freeze has frozen all"):
        PhaseSchedule(*made("model.freeze=[embedding, blocks, norm, head]"), 10)
