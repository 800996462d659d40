"""BatchNorm under averages of weights, skipped steps, several processes and frozen teachers."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from timm.layers import BatchNormAct2d, SyncBatchNormAct
from torch import nn

from fastdeit.engine import batchnorm
from fastdeit.engine.buffers import Buffers
from fastdeit.engine.dist import DeviceError, World
from fastdeit.engine.ema import Ema, EmaTeacher
from fastdeit.engine.groups import default_groups
from fastdeit.engine.optimizers import Sgd
from fastdeit.engine.step import Engine
from fastdeit.methods.evaluators import HeldOutLoss
from fastdeit.methods.teacher import Teacher
from fastdeit.run.evaluate import evaluate
from fastdeit.training import Loop
from tests.toys import batch_norm_convnet

CPU = torch.device("cpu")
INFINITE, CONSTANT = torch.tensor([-float("inf"), 0.0]), torch.linspace(0.1, 1, 100)


class Normalised(nn.Module):
    """A method to the engine: a network with BatchNorm, an averaged teacher, and buffers that its forward moves."""

    def __init__(self, network=None):
        super().__init__()
        torch.manual_seed(0)
        self.model = network or nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Linear(6, 2))
        self.teacher = EmaTeacher(self.model, 0.5)
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))
        self.register_buffer("centre", torch.zeros(4))

    def forward(self, x):
        self.forwards += 1
        self.centre.lerp_(x.flatten(1)[:, :4].mean(0), 0.1)
        return SimpleNamespace(loss=self.model(x).square().mean(), parts={})

    def step(self, batch, engine):
        with engine.micro():
            engine.backward(engine.run(batch).loss)

    def after_step(self, engine):
        pass


def make(method=None, world=None, accumulate=1, ema_decay=0.9):
    method = method or Normalised()
    optimizer = Sgd(default_groups(method.named_parameters(), 0.0))
    ema = Ema(optimizer.params, ema_decay, method)
    options = {"precision": "fp32", "accumulate": accumulate, "ema": ema}
    return Engine(method.train(), optimizer, world or World(CPU), **options)


def batches(count, rows=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 4, generator=generator) + number for number in range(count)]


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


# ---- statistics of the averaged weights ------------------------------------------------------------------------------


def averaged_engine():
    engine = make()
    for x in batches(4):
        engine.step([x], 0.5)
    return engine


def test_averaged_weights_have_the_statistics_that_pytorch_measures_for_them():
    engine = averaged_engine()
    peer = Normalised()
    peer.load_state_dict(engine.method.state_dict())
    peer.load_state_dict({name: engine.ema.average[name] for name in engine.ema.params}, strict=False)
    data = batches(3, seed=1)
    torch.optim.swa_utils.update_bn(data, peer.model)
    before = state(engine.method)
    engine.measure_average([data[:1], data[1:]])
    assert_same(state(engine.method), before)  # its own statistics, the teacher's, and what the forward counts
    assert engine.method.model[1].momentum == 0.1
    with engine.ema.applied():
        assert_same(state(engine.method.model), state(peer.model))
    assert_same(state(engine.method), before)
    names = {"model.1.running_mean", "model.1.running_var", "model.1.num_batches_tracked"}
    assert engine.ema.average.keys() == engine.ema.params.keys() | names


def test_a_frozen_layer_keeps_its_statistics_under_averaged_weights():
    engine = averaged_engine()
    engine.method.model[1].eval()
    engine.measure_average([batches(1)])
    assert_same({"": engine.ema.average["model.1.running_mean"]}, {"": engine.method.model[1].running_mean})


def test_statistics_are_stale_after_a_step_until_they_are_measured_or_loaded():
    engine = make()
    assert not engine.ema.stale
    for catch_up in (lambda: engine.measure_average([batches(1)]), lambda: engine.ema.load(engine.ema.average)):
        engine.step(batches(1), 0.1)
        assert engine.ema.stale
        catch_up()
        assert not engine.ema.stale
    without = make(Normalised(nn.Linear(4, 2)))
    without.step(batches(1), 0.1)
    assert not without.ema.stale


# ---- tied tensors, and what is made for eval mode --------------------------------------------------------------------


def test_an_average_is_there_under_every_name_of_its_tensor():
    """A network that reads its weights by name would else find averages under one, and the weights under the other."""
    shared = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    engine = make(Normalised(nn.Sequential(shared, nn.GELU(), shared)))
    engine.step(batches(1), 0.5)
    found, names = engine.ema.state(), engine.method.model.state_dict()
    assert {name.removeprefix("model.") for name in found} == set(names)
    for name, tensor in found.items():
        assert torch.equal(tensor, found[name.replace("model.2", "model.0")])
    assert not torch.equal(found["model.2.0.weight"], names["2.0.weight"])
    before = state(engine.method)
    others = {name: tensor + 1 for name, tensor in found.items()}
    engine.ema.load(others)
    assert_same(engine.ema.state(), others)
    assert_same(state(engine.method), before)


class Table(nn.Linear):
    """Makes what it computes with when it is put into eval mode, as timm's LeViT and TinyViT do."""

    def train(self, mode=True):
        super().train(mode)
        self.made = None if mode else 2 * self.weight.detach()
        return self

    def forward(self, x):
        return nn.functional.linear(x, 2 * self.weight if self.made is None else self.made, self.bias)


def test_an_averaged_teacher_answers_with_its_weights_of_now():
    engine = make(Normalised(Table(4, 2)))
    x = batches(1)[0]
    engine.method.teacher(x)
    engine.step([x], 0.5)
    teacher, weights = engine.method.teacher, engine.method.teacher.module
    assert torch.equal(teacher(x), nn.functional.linear(x, 2 * weights.weight, weights.bias))


def test_what_an_averaged_teacher_makes_for_eval_mode_is_made_within_its_block():
    """There fsdp2 has gathered the weights, and not yet at the beginning of the teacher's forward."""
    order = []

    class Noted(Table):
        def train(self, mode=True):
            order.append("made")
            return super().train(mode)

    teacher = EmaTeacher(nn.Sequential(nn.Sequential(Noted(4, 2))), 0.9)
    teacher.module[0].register_forward_pre_hook(lambda *_: order.append("gathered"))
    order.clear()
    teacher(torch.ones(1, 4))
    assert order == ["gathered", "made", "made"]


def test_averaged_weights_are_judged_by_what_is_made_of_them_for_eval_mode():
    engine, found = make(Normalised(Table(4, 2))), {}
    x = batches(1)[0]
    engine.step([x], 0.5)
    loop, method = Loop.__new__(Loop), engine.method
    method.evaluators = dict
    log = SimpleNamespace(evaluation=lambda step, results, *rest: found.update(results))
    parts = {"method": method, "world": World(CPU), "log": log, "bad_images": list}
    loop._parts = SimpleNamespace(held_out=lambda evaluators, step: method.model(x).detach(), **parts)
    loop._engine, loop._record, loop.step = engine, None, 1
    loop.evaluate()
    for name, applied in (("", nullcontext()), ("_ema", engine.ema.applied())):
        with applied:
            assert torch.equal(found[name], nn.functional.linear(x, 2 * method.model.weight, method.model.bias))
    assert not torch.equal(found[""], found["_ema"])
    assert method.training


# ---- a skipped step --------------------------------------------------------------------------------------------------


def test_a_skipped_step_leaves_the_statistics_and_what_the_forward_of_the_method_has_moved():
    engine = make(accumulate=2)
    engine.step(batches(2), 0.1)
    before = state(engine.method)
    good, bad = batches(2)
    bad[0, 0] = float("nan")
    engine.step([good, bad], 0.1)
    assert engine.guard.skipped.item() == 1
    assert_same(state(engine.method), before)
    engine.step(batches(2), 0.1)
    assert not torch.equal(engine.method.model[1].running_mean, before["model.1.running_mean"])


# ---- several processes -----------------------------------------------------------------------------------------------


class Alike(World):
    """One of three processes that all hold the same."""

    def __init__(self):
        super().__init__(CPU, 0, 3)

    def sum(self, tensor):
        return tensor.copy_(tensor + tensor + tensor)

    def broadcast(self, tensor):
        return tensor


def test_a_buffer_that_does_not_change_keeps_its_bits():
    """A mask of minus infinity would become NaN, and a third of three times a number is not always the number."""
    method = Normalised()
    for name, tensor in (("mask", INFINITE), ("constant", CONSTANT), ("largest", torch.full((2,), -torch.inf))):
        method.model.register_buffer(name, tensor.clone())
    buffers = Buffers(method, Alike())
    before = buffers.copies()
    method.model[1].running_mean.fill_(0.25)
    method.model.largest[0] = 3.0
    buffers.settle(before, torch.tensor(False))
    assert torch.equal(method.model.mask, INFINITE)
    assert torch.equal(method.model.constant, CONSTANT)
    assert method.model[1].running_mean.tolist() == [0.25] * 6
    assert method.model.largest.tolist() == [3.0, -torch.inf]


class Ranked(Normalised):
    """Has set a buffer of its own by its process after every step."""

    def after_step(self, engine):
        self.forwards.fill_(7 + engine.world.rank)


def rank_of_two(rank, size):
    method = Ranked()
    if rank == 1:
        method.model[1].running_mean.add_(1.0)  # what the main process has counts
    engine = make(method, World(CPU, rank, size), accumulate=2)
    parts = batches(4)
    engine.step(parts[rank::2], 0.1)
    engine.measure_average([batches(2, seed=1)[rank::2]])
    found = state(engine.method) | {f"average {name}": tensor for name, tensor in engine.ema.average.items()}
    return {name: tensor.numpy() for name, tensor in found.items()}


def alone(parts):
    """The statistics of a network that has seen these batches, one after the other."""
    network = Normalised().model.train()
    for x in parts:
        network(x)
    return network[1]


def test_two_processes_have_the_mean_of_their_statistics(ranks):
    first, second = (
        {name: torch.from_numpy(array) for name, array in found.items()} for found in ranks(2, rank_of_two)
    )
    assert_same(first, second)
    parts = batches(4)
    both = [alone(parts[rank::2]) for rank in range(2)]
    for key in ("running_mean", "running_var"):
        mean = (getattr(both[0], key) + getattr(both[1], key)) / 2
        torch.testing.assert_close(first[f"model.1.{key}"], mean)
    assert first["model.1.num_batches_tracked"] == 2  # once a micro-batch
    assert first["forwards"] == 7
    torch.testing.assert_close(first["centre"], (centre(parts[0::2]) + centre(parts[1::2])) / 2)


def centre(parts):
    """The running mean that the method keeps of its input, after these batches."""
    found = torch.zeros(4)
    for x in parts:
        found = found.lerp(x.mean(0), 0.1)
    return found


# ---- SyncBatchNorm ---------------------------------------------------------------------------------------------------


def image_steps():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 3, 16, 16, generator=generator) * (1 + step) for step in range(3)]


def convnet(image_size=16):
    torch.manual_seed(0)
    return Normalised(batch_norm_convnet(image_size=image_size))


def synchronised_rank(rank, size, synchronised):
    method = convnet()
    if synchronised:
        assert batchnorm.synchronise(method, CPU)
    engine = make(method, World(CPU, rank, size))
    for x in image_steps():
        engine.step([x.chunk(size)[rank]], 0.1)
    return {name: tensor.numpy() for name, tensor in state(method).items()}


def one_process():
    engine = make(convnet())
    for x in image_steps():
        engine.step([x], 0.1)
    return state(engine.method)


def largest_difference(ours, expected):
    """The largest difference of a tensor, as a share of its largest value."""
    floats = [name for name, tensor in expected.items() if tensor.is_floating_point()]
    return max(
        ((torch.from_numpy(ours[name]) - expected[name]).abs().max() / expected[name].abs().max()).item()
        for name in floats
    )


@pytest.mark.slow
def test_two_processes_with_synchronised_batchnorm_equal_one(ranks):
    expected = one_process()
    for found in ranks(2, synchronised_rank, True):
        assert found.keys() == expected.keys()
        assert largest_difference(found, expected) < 1e-4
    assert largest_difference(ranks(2, synchronised_rank, False)[0], expected) > 1e-2


def test_a_synchronised_layer_is_a_batchnorm_where_there_is_one_process():
    method, peer = convnet(), convnet()
    batchnorm.synchronise(method, CPU)
    assert all(isinstance(norm, batchnorm.CpuSyncBatchNorm) for norm in method.model.norms)
    x = image_steps()[0]
    assert torch.equal(method.model.train()(x), peer.model.train()(x))
    assert torch.equal(method.model.eval()(x), peer.model.eval()(x))


def test_on_a_gpu_the_layers_are_pytorch_s_and_timm_s_with_the_same_tensors():
    method = Normalised(nn.Sequential(nn.BatchNorm2d(3), BatchNormAct2d(3)))
    before = dict(method.named_parameters()) | dict(method.named_buffers())
    assert batchnorm.synchronise(method, torch.device("cuda", 0))
    assert [type(layer) for layer in method.model] == [nn.SyncBatchNorm, SyncBatchNormAct]
    after = dict(method.named_parameters()) | dict(method.named_buffers())
    assert before.keys() == after.keys()
    assert all(after[name] is tensor for name, tensor in before.items())


def test_what_cannot_be_synchronised_is_said():
    assert not batchnorm.synchronise(Normalised(nn.Linear(4, 2)), CPU)
    with pytest.raises(DeviceError, match=r"model\.0 is a BatchNormAct2d, which can be synchronised on GPUs only"):
        batchnorm.synchronise(Normalised(nn.Sequential(BatchNormAct2d(3))), CPU)


# ---- teachers and evaluation -----------------------------------------------------------------------------------------


class Taught(Normalised):
    """Learns from a frozen teacher that has BatchNorm as well."""

    def __init__(self, frozen):
        super().__init__()
        self.frozen = Teacher(frozen)

    def forward(self, x):
        return SimpleNamespace(loss=(self.model(x) - self.frozen.logits(x)).square().mean(), parts={})


def test_training_leaves_the_statistics_of_a_frozen_teacher():
    frozen = Normalised().model
    before = state(frozen)
    engine = make(Taught(frozen))
    engine.step(batches(1), 0.1)
    assert_same(state(frozen), before)


def test_an_evaluation_leaves_the_statistics_and_what_the_forward_of_the_method_moves():
    engine = averaged_engine()
    before = state(engine.method)
    held_out = SimpleNamespace(
        batches=lambda: iter([Rows(batches(1)[0])]), bad=SimpleNamespace(reasons={}, check=print), share=8
    )
    evaluate(engine.method.eval(), {"loss": HeldOutLoss()}, held_out, None, World(CPU), "fp32")
    assert_same(state(engine.method), before)


class Rows:
    """A batch of evaluation that the method takes as the tensor it is."""

    def __init__(self, x):
        self.x = x

    def to(self, device):
        return self.x
