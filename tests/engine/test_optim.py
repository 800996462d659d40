"""Optimizers: parity with torch.optim over phases of training, state by name, one norm for all groups."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastdeit.engine import optimizers
from fastdeit.engine.dist import World
from fastdeit.engine.fit import FitError
from fastdeit.engine.groups import GradientError, ParamGroup, default_groups
from fastdeit.engine.guard import Guard, Verdict
from fastdeit.engine.optim import Optimizer, Update
from fastdeit.engine.optimizers import AdamW, Lamb, Muon, Sgd
from fastdeit.engine.options import OPTIMIZERS, OptimizerOptions, SgdOptions
from fastdeit.engine.step import Engine

CPU = torch.device("cpu")
SHAPES = {"a": (3, 4), "b": (4,), "c": (2, 3)}
PASS = Verdict(torch.ones(()), torch.tensor(False), torch.ones(()))
SKIP = Verdict(torch.ones(()), torch.tensor(True), torch.ones(()))
TORCHS = {
    AdamW: (torch.optim.AdamW, {"betas": (0.9, 0.999), "eps": 1e-8}),
    Sgd: (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
}
ALL = AdamW, Lamb, Sgd


@pytest.fixture(params=ALL)
def kind(request):
    return request.param


def values(dtype=torch.float64):
    """Parameters a, b and c, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def group(params, names, weight_decay=0.1, lr_scale=1.0):
    return ParamGroup({name: params[name] for name in names}, weight_decay, lr_scale)


def give_gradients(params, names, number):
    """Gradients of step `number` to the named parameters; the others have none."""
    for name, p in params.items():
        generator = torch.Generator().manual_seed(100 * number + ord(name))
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) if name in names else None


def walk(optimizer, params, numbers, verdict=PASS, lr=0.01):
    """Updates with the gradients of steps `numbers` to what the optimizer trains."""
    for number in numbers:
        give_gradients(params, optimizer.params, number)
        optimizer.step(lr, verdict)


def copied(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same_bits(mine, theirs):
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


# ---- phases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TORCHS)
def test_two_phases_are_optimizers_of_torch_for_each_parameter(kind):
    """First a and b are trained, then b and c, which share a group but not a count of updates."""
    mine, theirs = values(), values()
    optimizer = kind([group(mine, "a", 0.5), group(mine, "b")])
    walk(optimizer, mine, range(3))
    optimizer.regroup([group(mine, "bc")])
    walk(optimizer, mine, range(3, 6))

    make, numbers = TORCHS[kind]
    decays = {"a": 0.5, "b": 0.1, "c": 0.1}
    numbers = {"lr": 0.01, "foreach": False, **numbers}
    own = {name: make([p], weight_decay=decays[name], **numbers) for name, p in theirs.items()}
    for number, names in enumerate(("ab", "ab", "ab", "bc", "bc", "bc")):
        give_gradients(theirs, names, number)
        for name in names:
            own[name].step()
    for name in SHAPES:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-12, atol=1e-12)
    if kind is AdamW:
        counts = {name: optimizer.state_dict()[f"step.{name}"].item() for name in "bc"}
        assert counts == {"b": 6, "c": 3}


def test_a_parameter_keeps_its_state_in_another_group(kind):
    """Regrouping among others, with the same factors, changes no bit."""
    apart, together = values(), values()
    one, other = kind([group(apart, "ab"), group(apart, "c")]), kind([group(together, "abc")])
    for optimizer, params in ((one, apart), (other, together)):
        walk(optimizer, params, range(2))
    one.regroup([group(apart, "cb"), group(apart, "a")])
    for optimizer, params in ((one, apart), (other, together)):
        walk(optimizer, params, range(2, 4))
    assert_same_bits(apart, together)


def test_what_comes_back_starts_anew(kind):
    params, fresh = values(), values()
    optimizer = kind([group(params, "ab")])
    walk(optimizer, params, range(2))
    optimizer.regroup([group(params, "b")])
    optimizer.regroup([group(params, "ab")])
    fresh["a"].data.copy_(params["a"])
    give_gradients(params, "ab", 7)
    give_gradients(fresh, "a", 7)
    optimizer.step(0.01, PASS)
    kind([group(fresh, "a")]).step(0.01, PASS)
    assert torch.equal(params["a"], fresh["a"])


def test_another_tensor_of_the_same_name_is_new(kind):
    params = values()
    optimizer = kind([group(params, "ab")])
    walk(optimizer, params, range(2))
    params["a"] = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer.regroup([group(params, "ab")])
    state = optimizer.state_dict()
    for moment in optimizer.state_names:
        assert state[f"{moment}.a"].shape == (5,)
        assert not state[f"{moment}.a"].any()
        assert state[f"{moment}.b"].any()


def test_a_later_phase_is_loaded_without_those_before(kind):
    """What was saved in the second phase goes on bit for bit in an optimizer that was made for that phase alone."""
    params = values()
    optimizer = kind([group(params, "ab")])
    walk(optimizer, params, range(3))
    optimizer.regroup([group(params, "b", 0.0), group(params, "ca")])
    walk(optimizer, params, range(3, 5))
    saved, weights = copied(optimizer.state_dict()), copied(params)
    walk(optimizer, params, range(5, 7))

    resumed = values()
    for name, p in resumed.items():
        p.data.copy_(weights[name])
    other = kind([group(resumed, "b", 0.0), group(resumed, "ca")])
    other.load_state_dict(saved)
    assert_same_bits(other.state_dict(), saved)
    walk(other, resumed, range(5, 7))
    assert_same_bits(resumed, params)
    assert_same_bits(other.state_dict(), optimizer.state_dict())


def test_a_skipped_step_changes_neither_state_nor_counts(kind):
    params = values()
    optimizer = kind([group(params, "ab"), group(params, "c")])
    walk(optimizer, params, range(2))
    before = copied(optimizer.state_dict()), copied(params)
    walk(optimizer, params, [2], SKIP)
    assert_same_bits(optimizer.state_dict(), before[0])
    assert_same_bits(params, before[1])


# ---- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01, dtype=torch.float64)], ids=["host", "device"])
def test_each_group_has_its_decay_and_its_factor_on_the_rate(kind, lr):
    params, plain = values(), values()
    walk(kind([group(params, "a", 0.0, 0.5), group(params, "bc", 0.2)]), params, range(2), lr=lr)
    walk(kind([group(plain, "a", 0.0)]), plain, range(2), lr=0.005)
    walk(kind([group(plain, "bc", 0.2)]), plain, range(2), lr=0.01)
    assert_same_bits(params, plain)


DECOUPLED = {
    "adamw": AdamW,
    "sgd": lambda groups: Sgd(groups, SgdOptions(decoupled_decay=True)),
    "muon": lambda groups: Muon([replace(groups[0], matrix=True), *groups[1:]]),
}


@pytest.mark.parametrize("number", [float, lambda x: torch.tensor(x, dtype=torch.float64)], ids=["host", "device"])
@pytest.mark.parametrize("make", DECOUPLED.values(), ids=DECOUPLED)
def test_a_factor_on_the_decay_is_that_decay(make, number):
    """In every step another one; with each group's factor on the rate, in the average too, and not where decay is 0."""
    params, plain = values(), values()
    averages = [{name: p.detach().clone() for name, p in tensors.items()} for tensors in (params, plain)]
    optimizer = make([group(params, "ac", 0.5, 0.5), group(params, "b", 0.0)])
    reference = make([group(plain, "ac", 0.5, 0.5), group(plain, "b", 0.0)])
    for step, factor in enumerate((1.0, 0.25, 10.0)):
        give_gradients(params, "abc", step)
        give_gradients(plain, "abc", step)
        optimizer.step(number(0.1), PASS, averages[0], 0.75, decay=number(factor))
        decayed = [replace(own, weight_decay=own.weight_decay * factor) for own in reference.groups]
        reference.regroup(decayed)
        reference.step(0.1, PASS, averages[1], 0.75)
        reference.regroup([replace(own, weight_decay=own.weight_decay / factor) for own in decayed])
    for mine, theirs in ((params, plain), averages):
        for name in SHAPES:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-12, atol=1e-12)
    before = copied(params)
    give_gradients(params, "abc", 3)
    optimizer.step(number(0.1), SKIP, averages[0], 0.75, decay=number(10.0))
    assert_same_bits(copied(params), before)


@pytest.mark.parametrize("kind", [Lamb, Sgd])
def test_a_decay_that_is_no_factor_of_the_parameters_takes_none(kind):
    params = values()
    with pytest.raises(ValueError, match=f"the weight decay of {kind.__name__} is not decoupled"):
        kind([group(params, "abc")]).step(0.1, PASS, decay=2.0)


def test_an_average_follows_in_the_same_pass(kind):
    params = values()
    ema = {name: torch.ones_like(p) for name, p in params.items()}
    optimizer = kind([group(params, "ab"), group(params, "c")])
    give_gradients(params, "abc", 0)
    optimizer.step(0.01, PASS, ema, 0.75)
    for name, p in params.items():
        torch.testing.assert_close(ema[name], 0.75 + 0.25 * p.detach())


def test_groups_that_make_no_sense():
    params = values()
    with pytest.raises(ValueError, match="'b' is in more than one group"):
        AdamW([group(params, "ab"), group(params, "bc")])
    with pytest.raises(ValueError, match="nothing to train"):
        AdamW([group(params, "")])
    assert AdamW([group(params, "a"), group(params, "")]).params.keys() == {"a"}


def test_a_parameter_without_gradient_is_named_with_what_helps():
    params = values()
    optimizer = AdamW([group(params, "abc")])
    give_gradients(params, "ac", 0)
    with pytest.raises(GradientError) as caught:
        optimizer.gradients()
    for words in ("1 trained parameters", "'b'", "requires_grad_(False) in the method's __init__", "phases()"):
        assert words in str(caught.value)


def test_state_of_other_parameters_is_refused():
    params = values()
    with pytest.raises(
        FitError, match=r"of optim, step\.c: in the checkpoint it has the shape \[\], here there is none"
    ):
        AdamW([group(params, "ab")]).load_state_dict(AdamW([group(params, "abc")]).state_dict())


# ---- one norm for all groups -----------------------------------------------------------------------------------------


class Toy(nn.Module):
    """A method to the engine; its large loss has gradients far above any limit."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2))

    def forward(self, x):
        return SimpleNamespace(loss=100 * self.model(x).float().square().mean(), parts={})

    def step(self, batch, engine):
        with engine.micro():
            engine.backward(engine.run(batch).loss)

    def after_step(self, engine):
        pass


X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


def gradient_and_norm():
    """Of the toy's first step, in float64."""
    toy = Toy().double()
    toy(X.double()).loss.backward()
    norm = torch.stack([p.grad.norm() for p in toy.parameters()]).norm()
    return {name: p.grad for name, p in toy.named_parameters()}, norm


def test_lamb_clips_by_the_norm_over_all_groups():
    """The first moment after one step is a tenth of the gradient, whose norm over both groups was brought to 1."""
    toy = Toy()
    groups = default_groups(toy.named_parameters(), 0.05)
    assert len(groups) == 2
    optimizer = Lamb(groups)
    clip_grad = optimizer.options.clip_grad
    assert clip_grad == 1
    Engine(toy, optimizer, World(CPU), precision="fp32", accumulate=1, clip_grad=clip_grad).step([X], 0.01)
    exact, norm = gradient_and_norm()
    assert norm > 10
    for name, moment in optimizer.state["exp_avg"].items():
        torch.testing.assert_close(moment.double(), 0.1 * exact[name] / norm, rtol=1e-4, atol=1e-8)


class SignOptions(OptimizerOptions):
    power: float = 1.0


class Sign(Optimizer):
    """A third party's: the step is the sign of the gradient times its norm's power, in plain PyTorch."""

    Options = SignOptions
    state_names = ("last",)
    counts = False

    def update(self, lists: Update) -> None:
        for p, g, last in zip(lists.params, lists.grads, *lists.state, strict=True):
            move = (g * lists.verdict.factor).sign() * lists.verdict.norm**self.options.power
            p.copy_(torch.where(lists.verdict.skip, p, p - lists.lr * move))
            last.copy_(torch.where(lists.verdict.skip, last, move))


def test_an_optimizer_by_import_path_is_handed_the_norm_of_all_groups():
    toy = Toy()
    optimizer = optimizers.find("tests.engine.test_optim:Sign")(default_groups(toy.named_parameters(), 0.05))
    assert type(optimizer).__name__ == "Sign"
    Engine(toy, optimizer, World(CPU), precision="fp32", accumulate=1).step([X], 0.01)
    exact, norm = gradient_and_norm()
    for name, move in optimizer.state["last"].items():
        torch.testing.assert_close(move.double(), exact[name].sign() * norm, rtol=1e-4, atol=0)


def test_the_verdict_is_one_for_all_gradients():
    verdict = Guard("fp32", 1.0, CPU).judge([torch.tensor([3.0]), torch.tensor([4.0])])
    assert verdict.norm == 5
    assert verdict.factor.item() == pytest.approx(0.2, rel=1e-5)
    assert not verdict.skip


def test_groups_are_values():
    groups = default_groups(values().items(), 0.05)
    assert [(list(g.params), g.weight_decay) for g in groups] == [(["a", "c"], 0.05), (["b"], 0.0)]
    assert replace(groups[0], lr_scale=0.5).lr_scale == 0.5


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adam", "no optimizer named 'adam'; there are adamw, lamb, sgd"),
        ("adam:", "is not an import path"),
        ("fastdeit.engine.optim:Adam", "cannot be imported"),
        ("fastdeit.engine.optim:ParamGroup", "no subclass of"),
    ],
)
def test_optimizers_that_do_not_exist(name, words):
    with pytest.raises(ValueError, match=words):
        optimizers.find(name)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_table_names_the_options_of_the_optimizers(name):
    assert OPTIMIZERS[name].options is optimizers.find(name).Options
