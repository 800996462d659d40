"""The engine's step: accumulation, processes, clipping, guard and EMA against one plain update in float64."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdeit.batch import Step, map_tensors
from fastdeit.engine.dist import World
from fastdeit.engine.ema import Ema, EmaTeacher
from fastdeit.engine.groups import GradientError, default_groups
from fastdeit.engine.guard import Guard
from fastdeit.engine.optimizers import AdamW
from fastdeit.engine.parallel import Replicated
from fastdeit.engine.step import Engine
from tests.toys import toy_batch

CPU = torch.device("cpu")
X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


class Toy(nn.Module):
    """A method to the engine: mean squared output of a small network."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2))

    def forward(self, x):
        loss = self.model(x).float().square().mean()
        return SimpleNamespace(loss=loss, parts={"half": loss.detach() / 2})

    def step(self, batch, engine):
        with engine.micro():
            engine.backward(engine.run(batch).loss)

    def after_step(self, engine):
        pass


def make(precision="fp32", accumulate=1, clip_grad=None, ema_decay=None, world=None, **others):
    toy = Toy()
    optimizer = AdamW(default_groups(toy.named_parameters(), 0.05))
    ema = Ema(optimizer.params, ema_decay, toy) if ema_decay is not None else None
    options = {"precision": precision, "accumulate": accumulate, "clip_grad": clip_grad, "ema": ema}
    return Engine(toy, optimizer, world or World(CPU), **options, **others)


def weights(engine):
    return {name: p.detach().clone() for name, p in engine.method.named_parameters()}


def plain(steps=3, clip_grad=None, decays=(1.0, 1.0, 1.0)):
    """The same updates by torch.optim.AdamW in float64, with a factor on the weight decay in each step."""
    toy = Toy().double()
    groups = default_groups(toy.named_parameters(), 0.05)
    optimizer = torch.optim.AdamW(
        [{"params": list(g.params.values()), "weight_decay": g.weight_decay} for g in groups], betas=(0.9, 0.999)
    )
    norms = []
    for step in range(steps):
        for own, group in zip(optimizer.param_groups, groups, strict=True):
            own.update(lr=0.01 * (step + 1), weight_decay=group.weight_decay * decays[step])
        toy.model(X.double()).square().mean().backward()
        limit = float("inf") if clip_grad is None else clip_grad
        norm = torch.nn.utils.clip_grad_norm_(toy.parameters(), limit).item()
        optimizer.step()
        optimizer.zero_grad()
        norms.append(norm)
    return dict(toy.named_parameters()), sum(norms) / steps


def close(ours, expected, rtol=1e-4):
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor.double(), expected[name].detach(), rtol=rtol, atol=2e-6)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("clip_grad", [None, 0.01])
@pytest.mark.parametrize("decays", [None, (0.1, 40.0, 20.0)], ids=["decay", "scheduled decay"])
def test_step_equals_plain_adamw(accumulate, clip_grad, decays):
    engine = make(accumulate=accumulate, clip_grad=clip_grad)
    for step in range(3):
        engine.step(X.chunk(accumulate), 0.01 * (step + 1), *(decays or ())[step : step + 1])
    expected, norm = plain(clip_grad=clip_grad, decays=decays or (1.0, 1.0, 1.0))
    close(weights(engine), expected)
    # Adam does not see the scale of a gradient; its norm does.
    assert engine.means()["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_only_gradients_above_the_limit_are_clipped():
    guard = Guard("fp32", 2.0, CPU)
    for length, factor in ((1.0, 1.0), (2.0, 1.0), (8.0, 0.25)):
        found, bad, norm = guard.judge([torch.tensor([length])])
        assert (found.item(), bad.item(), norm.item()) == (pytest.approx(factor, rel=1e-5), False, length)


def two_ranks(rank, size):
    engine = make(accumulate=2, world=World(CPU, rank, size))
    for step in range(3):
        engine.step(X.chunk(size)[rank].chunk(2), 0.01 * (step + 1))
    return {name: p.numpy() for name, p in weights(engine).items()}, engine.means()


def test_two_processes_equal_one(ranks):
    (first, means), (second, other_means) = ranks(2, two_ranks)
    assert all((first[name] == second[name]).all() for name in first)
    assert means == other_means
    close({name: torch.from_numpy(p) for name, p in first.items()}, plain()[0])
    engine = make()
    for step in range(3):
        engine.step([X], 0.01 * (step + 1))
    assert means["loss"] == pytest.approx(engine.means()["loss"], rel=1e-5)


def sums_of_rank(rank, size):
    """This process's sum before and after a restart, and what one process or three go on from."""
    engine, again = (make(world=World(CPU, rank, size)) for _ in range(2))
    engine.sums = {"loss": torch.tensor([1.0, 2.0**-24][rank]), "steps": torch.tensor(3.0)}
    saved = engine.state_dict()
    again.load_state_dict(saved)
    others = []
    for world in (World(CPU, 0, 1), World(CPU, 0, 3), World(CPU, 1, 3)):
        other = make()
        other.world = world
        other.load_state_dict(saved)
        others.append({name: total.item() for name, total in other.sums.items()})
    return engine.sums["loss"].item(), again.sums["loss"].item(), others


def test_each_process_goes_on_from_its_own_sums(ranks):
    """Sums in another order would round otherwise: the mean of a line into which a resume falls would differ."""
    for rank, (before, after, others) in enumerate(ranks(2, sums_of_rank)):
        assert before == after == [1.0, 2.0**-24][rank]
        assert others == [{"loss": 1.0, "steps": 6.0}] * 2 + [{"loss": 0.0, "steps": 0.0}]


def gradients_of_rank(rank, size, reduce):
    """By name the gradients of this process alone, and those that the update gets."""
    world = World(CPU, rank, size)
    engine = make(world=world, parallel=Replicated(world, reduce))
    part = X.chunk(size)[rank]
    with engine.micro(last=False):
        engine.backward(engine.run(part).loss)
    alone = {name: p.grad.clone().numpy() for name, p in engine.method.named_parameters()}
    engine.optimizer.zero_grad()
    with engine.micro():
        engine.backward(engine.run(part).loss)
    return alone, {name: p.grad.clone().numpy() for name, p in engine.method.named_parameters()}


@pytest.mark.parametrize("reduce", ["bf16", "fp16"])
def test_gradients_that_travel_in_16_bit_are_rounded_sums_of_rounded_shares(ranks, reduce):
    (first, given), (second, given_to_second) = ranks(2, gradients_of_rank, reduce)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[reduce]
    for name in first:
        shares = [torch.from_numpy(alone[name]).to(dtype) / 2 for alone in (first, second)]
        assert np.array_equal(given[name], (shares[0] + shares[1]).float().numpy())
        assert np.array_equal(given[name], given_to_second[name])
        assert not np.array_equal(given[name], (first[name] + second[name]) / 2)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_gradient_changes_nothing(poison):
    engine = make(ema_decay=0.9)
    engine.step([X], 0.01)
    before = weights(engine), {k: v.clone() for k, v in engine.optimizer.state_dict().items()}, dict(engine.ema.average)
    before = (*before[:2], {k: v.clone() for k, v in before[2].items()})
    engine.step([X * poison], 0.01)
    for old, new in zip(before, (weights(engine), engine.optimizer.state_dict(), engine.ema.average), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)
    assert engine.guard.skipped.item() == 1
    engine.step([X], 0.01)
    assert not engine.guard.in_row()
    assert engine.guard.trip() is None
    assert not torch.equal(weights(engine)["model.0.weight"], before[0]["model.0.weight"])


def poisoned_rank(rank, size):
    engine = make(world=World(CPU, rank, size))
    before = weights(engine)
    engine.step([X * (float("nan") if rank == 1 else 1.0)], 0.01)
    return engine.guard.skipped.item(), all(torch.equal(before[k], v) for k, v in weights(engine).items())


def test_one_bad_process_makes_all_skip(ranks):
    assert ranks(2, poisoned_rank) == [(1.0, True), (1.0, True)]


def test_guard_gives_up_after_three_in_a_row():
    guard = Guard("fp32", None, CPU)
    bad, good = [torch.tensor([float("nan")])], [torch.ones(1)]
    for gradients, trip in ((bad, None), (bad, None), (good, None), (bad, None), (bad, None), (bad, 6), (good, 6)):
        guard.judge(gradients)
        assert guard.trip() == trip, "the step at which it tripped, for ever"
        assert guard.in_row() is (gradients is bad or trip is not None)


@pytest.mark.parametrize("after", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("before", ["fp32", "bf16", "fp16"])
def test_a_guard_that_tripped_is_restored_with_its_scale_and_without_its_row(before, after):
    tripped, fresh = Guard(before, None, CPU), Guard(after, None, CPU)
    for _ in range(tripped.limit):
        tripped.judge([torch.tensor([float("nan")])])
    fresh.load_state_dict(tripped.state_dict())
    assert (fresh.trip(), fresh.in_row(), fresh.skipped.item()) == (None, False, tripped.limit)
    first = Guard(after, None, CPU).scale.item()
    assert fresh.scale.item() == (tripped.scale.item() if before == after == "fp16" else first)


def test_fp16_scale_halves_on_overflow_and_doubles_after_2000_good_steps():
    guard = Guard("fp16", None, CPU)
    factor, bad, _ = guard.judge([torch.tensor([float("inf")])])
    assert (factor.item(), bad.item(), guard.scale.item()) == (2.0**-16, True, 2.0**15)
    for _ in range(1999):
        guard.judge([torch.ones(1)])
    assert guard.scale.item() == 2.0**15
    guard.judge([torch.ones(1)])
    assert guard.scale.item() == 2.0**16


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_sixteen_bit_follows_fp32(precision):
    engine = make(precision=precision)
    for step in range(3):
        engine.step([X], 0.01 * (step + 1))
    assert engine.guard.skipped.item() == 0
    # Adam's first steps have the size of the learning rate whatever the gradient, so weights may differ by sign flips
    # of tiny gradients; 16-bit rounding must stay well below the 0.06 that was walked.
    expected, _ = plain()
    for name, tensor in weights(engine).items():
        assert (tensor.double() - expected[name]).abs().mean() < 0.006


def test_ema_follows_its_formula_and_swaps_in_place():
    engine = make(ema_decay=0.75)
    expected = weights(engine)
    for step in range(3):
        engine.step([X], 0.01 * (step + 1))
        expected = {name: 0.75 * e + 0.25 * engine.optimizer.params[name].detach() for name, e in expected.items()}
    raw = weights(engine)
    with engine.ema.applied():
        for name, p in engine.method.named_parameters():
            torch.testing.assert_close(p.detach(), expected[name])
    assert all(torch.equal(raw[name], p) for name, p in engine.method.named_parameters())


def test_weights_come_back_when_an_evaluation_fails():
    engine = make(ema_decay=0.75)
    engine.step([X], 0.01)
    raw = weights(engine)

    def fail():
        with engine.ema.applied():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(torch.equal(raw[name], p) for name, p in engine.method.named_parameters())


def test_a_parameter_without_gradient_is_named():
    engine = make()
    engine.method.unused = nn.Parameter(torch.zeros(2))
    engine.optimizer.params["unused"] = engine.method.unused
    with pytest.raises(GradientError, match="'unused'"):
        engine.step([X], 0.01)


def test_a_gradient_that_no_update_takes_is_named():
    engine = make()
    engine.enter(engine.optimizer.groups[:1])  # without biases
    with pytest.raises(GradientError, match=r"'model\.0\.bias' has a gradient, but the optimizer does not train it"):
        engine.step([X], 0.01)


def test_state_round_trip_continues_bit_for_bit():
    engine = make(precision="fp16", ema_decay=0.9)
    for _ in range(2):
        engine.step([X], 0.01)
    other = make(precision="fp16", ema_decay=0.9)
    other.method.load_state_dict(engine.method.state_dict())
    other.optimizer.load_state_dict({k: v.clone() for k, v in engine.optimizer.state_dict().items()})
    other.ema.load(engine.ema.average)
    other.load_state_dict({k: v.clone() for k, v in engine.state_dict().items()})
    for one in (engine, other):
        one.step([X], 0.02)
    assert all(torch.equal(a, b) for a, b in zip(weights(engine).values(), weights(other).values(), strict=True))
    assert engine.means() == other.means()


def test_groups_follow_deit():
    names = [
        ("gamma", torch.zeros(2)),
        ("w", torch.zeros(2, 2)),
        ("w.bias", torch.zeros(2)),
        ("pos", torch.zeros(1, 2, 2)),
        ("frozen", torch.zeros(2, 2)),
    ]
    named = [(n, nn.Parameter(t, requires_grad=n != "frozen")) for n, t in names]
    decayed, undecayed = default_groups(named, 0.05, {"pos"})
    assert (list(decayed.params), decayed.weight_decay) == (["w"], 0.05)
    assert (list(undecayed.params), undecayed.weight_decay) == (["gamma", "w.bias", "pos"], 0.0)


# ---- inner loops -----------------------------------------------------------------------------------------------------


class Pixels(nn.Module):
    """A method on images: a linear layer on the pixels of the first view, which it may run several times a step."""

    def __init__(self, runs=1):
        super().__init__()
        torch.manual_seed(0)
        self.model, self.runs = nn.Linear(12, 1), runs

    def forward(self, batch):
        loss = self.model(batch.pixels().flatten(1)).float().square().mean()
        return SimpleNamespace(loss=loss, parts={})

    def step(self, batch, engine):
        for number in range(self.runs):
            with engine.micro(last=number == self.runs - 1):
                engine.backward(engine.run(batch).loss)

    def after_step(self, engine):
        pass


def pixel_engine(method, world=None, accumulate=1, precision="fp32"):
    optimizer = AdamW(default_groups(method.named_parameters(), 0.0))
    return Engine(method, optimizer, world or World(CPU), precision=precision, accumulate=accumulate)


def image_batch(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return toy_batch(
        torch.randint(0, 256, (count, 2, 2, 3), dtype=torch.uint8, generator=generator), torch.arange(count)
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_method_that_runs_twice_logs_its_loss_once(accumulate):
    found = []
    for runs in (1, 2):
        engine = pixel_engine(Pixels(runs), accumulate=accumulate)
        engine.step([image_batch(seed=seed) for seed in range(accumulate)], 1e-3)
        found.append(engine.means()["loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_run_that_is_not_logged_is_not():
    engine = pixel_engine(Pixels())
    engine.run(image_batch(), log=False)
    assert engine.means() == {}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_gradient_of_the_input_is_that_of_the_loss_and_touches_nothing_else(precision):
    method = Pixels()
    engine, batch = pixel_engine(method, accumulate=4, precision=precision), image_batch()
    x = batch.pixels()
    gradient = engine.input_gradient(batch, x)
    expected = x.double().requires_grad_()
    F.linear(expected.flatten(1), *(p.detach().double() for p in method.model.parameters())).square().mean().backward()
    torch.testing.assert_close(gradient.double(), expected.grad, rtol=2e-2 if precision == "fp16" else 1e-5, atol=1e-5)
    assert all(p.grad is None for p in method.parameters())
    assert engine.means() == {}
    assert not x.requires_grad


def test_backward_returns_the_plain_gradient_of_an_input_besides():
    method = Pixels()
    engine, batch = pixel_engine(method, accumulate=4, precision="fp16"), image_batch()
    x = batch.pixels().requires_grad_()
    with engine.micro():
        gradient = engine.backward(engine.run(batch.rendered_as(x)).loss, wrt=x)
    torch.testing.assert_close(gradient, engine.input_gradient(batch, x), rtol=1e-2, atol=1e-4)
    share = engine.guard.scale / 4
    alone = torch.autograd.grad(method(batch).loss * share, list(method.parameters()))
    for parameter, expected in zip(method.parameters(), alone, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=2e-2, atol=1e-2 * expected.abs().max().item())
    assert x.grad is None


@pytest.mark.parametrize("leaf", [True, False])
def test_an_input_that_the_loss_does_not_depend_on_has_no_gradient(leaf):
    engine, batch = pixel_engine(Pixels()), image_batch()
    x = batch.pixels().requires_grad_(leaf)
    with pytest.raises(
        GradientError, match=r"the loss does not depend on x, or x is no leaf .* batch.rendered_as\(x\)"
    ):
        engine.backward(engine.run(batch if leaf else batch.rendered_as(x)).loss, wrt=x)


def inner_rank(rank, size):
    engine = pixel_engine(Pixels(runs=2), World(CPU, rank, size))
    batch = image_batch()
    part = map_tensors(lambda t: t[rank * 2 : rank * 2 + 2] if t.ndim and len(t) == 4 else t, batch)
    part = replace(part, partner=torch.arange(2), box=batch.box[:, :2])
    gradient = engine.input_gradient(part, part.pixels())
    engine.step([part], 1e-2)
    return gradient.numpy(), [p.detach().numpy() for p in engine.method.parameters()]


def test_inner_loops_on_two_processes_are_those_of_one(ranks):
    (first, weights_of_first), (second, weights_of_second) = ranks(2, inner_rank)
    engine, batch = pixel_engine(Pixels(runs=2)), image_batch()
    whole = engine.input_gradient(batch, batch.pixels()).numpy()
    np.testing.assert_allclose(np.concatenate((first, second)) / 2, whole, rtol=1e-5)
    engine.step([batch], 1e-2)
    for one, two, alone in zip(weights_of_first, weights_of_second, engine.method.parameters(), strict=True):
        assert np.array_equal(one, two)
        np.testing.assert_allclose(one, alone.detach().numpy(), rtol=1e-5)


# ---- averaged teachers -----------------------------------------------------------------------------------------------


class Taught(Pixels):
    """The same, with an average of the layer whose momentum is a function of the step."""

    def __init__(self, momentum=lambda step: 0.5 + 0.1 * step.number):
        super().__init__()
        self.teacher = EmaTeacher(nn.Sequential(self.model, nn.BatchNorm1d(1)), momentum)
        self.seen = []

    def after_step(self, engine):
        self.seen.append(engine.now.number.item())


def test_a_teacher_follows_its_formula_and_its_schedule():
    method = Taught()
    engine = pixel_engine(method)
    expected = method.model.weight.detach().clone()
    for number in range(3):
        engine.step([replace(image_batch(), step=Step.at(number, 10, 100))], 1e-2)
        momentum = 0.5 + 0.1 * number
        expected = momentum * expected + (1 - momentum) * method.model.weight.detach()
    torch.testing.assert_close(method.teacher.module[0].weight.detach(), expected)
    assert method.seen == [0, 1, 2]


def test_a_teacher_answers_without_gradients_in_eval_mode_and_float32():
    teacher = EmaTeacher(nn.Sequential(nn.Linear(12, 1), nn.Dropout()).half(), 0.9).train()
    out = teacher(torch.ones(2, 12, requires_grad=True))
    assert (out.requires_grad, out.dtype) == (False, torch.float32)
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_a_teacher_is_part_of_the_state_and_its_source_is_not_twice():
    names = list(Taught().state_dict())
    assert [name for name in names if name.startswith("teacher")][:2] == [
        "teacher.module.0.weight",
        "teacher.module.0.bias",
    ]
    assert not any("source" in name for name in names)


def test_a_skipped_step_leaves_the_teacher():
    method = Taught(0.5)
    engine = pixel_engine(method)
    engine.step([image_batch()], 1e-2)  # or else student and teacher would be the same
    before = method.teacher.module[0].weight.clone()
    bad = image_batch()
    engine.step([bad.rendered_as(torch.full((4, 3, 2, 2), float("nan")))], 1e-2)
    assert engine.guard.skipped.item() == 1
    assert torch.equal(method.teacher.module[0].weight, before)
    engine.step([bad], 1e-2)
    assert not torch.equal(method.teacher.module[0].weight, before)


def test_after_step_sees_what_became_of_the_update(monkeypatch):
    seen = []
    monkeypatch.setattr(Toy, "after_step", lambda method, engine: seen.append(engine.skipped.item()))
    engine = make()
    for x in (X, X * float("nan"), X):
        engine.step([x], 1e-3)
    assert seen == [False, True, False]


def test_a_teacher_of_a_frozen_half_precision_source_goes_on_in_float32_with_its_buffers():
    source = nn.BatchNorm1d(3).bfloat16().requires_grad_(False)
    teacher = EmaTeacher(source, 0.5)
    with torch.no_grad():
        source.weight.fill_(2.0)
        source.running_mean.fill_(3.0)
        source.num_batches_tracked.fill_(7)
    teacher.follow(None, torch.tensor(False))
    assert (teacher.module.weight.dtype, teacher.module.running_mean.dtype) == (torch.float32, torch.float32)
    assert teacher.module.weight.tolist() == [1.5] * 3
    assert teacher.module.running_mean.tolist() == [3.0] * 3
    assert teacher.module.num_batches_tracked.item() == 7
    assert source.weight.tolist() == [2.0] * 3


def taught_rank(rank, size):
    engine = pixel_engine(Taught(), World(CPU, rank, size), accumulate=2)
    parts = [image_batch(2, seed) for seed in range(2 * size)][rank::size]
    for number in range(3):
        engine.step([replace(part, step=Step.at(number, 10, 100)) for part in parts], 1e-2)
    return engine.method.teacher.module[0].weight.numpy()


def test_a_teacher_of_two_processes_is_that_of_one(ranks):
    first, second = ranks(2, taught_rank)
    assert np.array_equal(first, second)
    engine = pixel_engine(Taught(), accumulate=4)
    for number in range(3):
        engine.step([replace(image_batch(2, seed), step=Step.at(number, 10, 100)) for seed in range(4)], 1e-2)
    np.testing.assert_allclose(first, engine.method.teacher.module[0].weight.numpy(), rtol=1e-5)


class Trials:
    """Stands for `kernels.Tuning`: notes what the engine does around a step."""

    def __init__(self, changed, left):
        self.changed, self.left, self.did = changed, left, []

    @contextmanager
    def trying(self):
        self.did.append("begins")
        yield
        self.did.append("ends")

    rehearses = False

    def reopen(self):
        self.did.append("reopens")

    def left_to_compiler(self):
        return self.left


@pytest.mark.parametrize("capture", [pytest.param("none", marks=pytest.mark.slow), "compile"])
@pytest.mark.parametrize(("changed", "left"), [(True, True), (True, False), (False, True)])
def test_kernels_are_tried_around_a_whole_step_and_compiled_anew_only_where_that_gains(
    capture, changed, left, monkeypatch
):
    trials = Trials(changed, left)
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    monkeypatch.setattr(torch.compiler, "reset", lambda: trials.did.append("reset"))
    engine = make(capture=capture, tuning=trials)
    before = weights(engine)
    monkeypatch.setattr(engine.method, "after_step", lambda engine: trials.did.append("update"))
    engine.step([X], 0.01)
    again = ["reset"] if capture == "compile" and changed and left else []
    assert trials.did == ["begins", "update", "ends", *again]
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(engine).items())
    trials.did.clear()
    engine.enter(default_groups(engine.method.named_parameters(), 0.05))
    assert "reopens" in trials.did


class Rehearsing:
    """A tuning that has the forward and backward of the first step made three times."""

    changed = False

    def __init__(self):
        self.rehearses, self.seen = True, []

    @contextmanager
    def trying(self):
        yield

    def rehearse(self, run):
        self.rehearses = False
        self.seen += [run() for _ in range(3)]


class Drawing(Toy):
    """With running statistics, and draws of torch's own generator."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_rehearsal_changes_nothing(accumulate, monkeypatch):
    monkeypatch.setitem(globals(), "Toy", Drawing)
    tuning, found = Rehearsing(), []
    for engine in (make(accumulate=accumulate), make(accumulate=accumulate, tuning=tuning)):
        torch.manual_seed(1)
        for _ in range(2):
            engine.step(X.chunk(accumulate), 0.01)
        found.append(engine.method.state_dict() | engine.means())
    assert len(tuning.seen) == 3
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(found[1][name])) for name, a in found[0].items())
