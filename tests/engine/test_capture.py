"""Captured steps: what of them a CPU can show. The recording itself is in test_engine_gpu.py."""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop

from fastdeit import methods
from fastdeit.batch import map_tensors, tensors_of
from fastdeit.bench.measure import CLASSES
from fastdeit.bench.step import Cell, batch
from fastdeit.engine.capture import WARM_STEPS, CaptureError, GraphedStep, copy_tensors
from fastdeit.engine.dist import DeviceError, World
from fastdeit.engine.groups import default_groups
from fastdeit.engine.optimizers import AdamW
from fastdeit.engine.step import Engine, autocast
from fastdeit.methods.teacher import Teacher
from fastdeit.models.vit import VisionTransformer, ViTConfig
from tests.engine.test_step import CPU, X, make, weights
from tests.toys import toy_context


@dataclass(frozen=True)
class Pair:
    images: tuple[Tensor, ...]
    label: Tensor | None
    mean: tuple[float, ...] = (0.5,)


def pair(value):
    return Pair((torch.full((2,), value), torch.full((1,), value)), torch.tensor([int(value)]))


def test_batches_are_copied_into_tensors_that_stay():
    kept = map_tensors(torch.clone, pair(1.0))
    stays = tensors_of(kept)
    assert len(stays) == 3
    copy_tensors([kept], [pair(2.0)])
    assert all(mine is before for mine, before in zip(tensors_of(kept), stays, strict=True))
    assert [t.tolist() for t in stays] == [[2.0, 2.0], [2.0], [2]]
    assert kept.mean == (0.5,)


@pytest.mark.parametrize(
    "other", [Pair((torch.zeros(3), torch.zeros(1)), torch.tensor([0])), Pair((torch.zeros(2), torch.zeros(1)), None)]
)
def test_a_batch_of_another_shape_is_refused(other):
    with pytest.raises(ValueError, match="a recorded step takes batches like its first"):
        copy_tensors([pair(1.0)], [other])


class Card:
    """Stands in for `torch.cuda`: a step under capture runs nothing, and a replay runs what was captured."""

    def __init__(self, monkeypatch):
        self.capturing, self.modes, self.ran = None, [], []
        for name in ("stream", "graph", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        for name in ("Stream", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, lambda device: self)

    def wait_stream(self, stream):
        pass

    def stream(self, stream):
        return nullcontext()

    def CUDAGraph(self):
        return SimpleNamespace()

    @contextmanager
    def graph(self, graph, stream, capture_error_mode):
        self.capturing = graph
        self.modes.append(capture_error_mode)
        yield
        self.capturing = None

    def step(self, batches, *numbers):
        def run():
            self.ran.append((float(batches[0].images[0][0]), batches[0].label.item(), *map(float, numbers)))

        if self.capturing is None:
            run()
        else:
            self.capturing.replay = run


def test_every_step_is_run_once_on_its_own_batch_and_numbers_before_and_after_the_recording(monkeypatch):
    card = Card(monkeypatch)
    graphed = GraphedStep(card.step, CPU)
    for number in range(WARM_STEPS + 4):
        given = pair(float(number))
        graphed([given], 0.1 * number, 1.0 + number)
        map_tensors(torch.zero_, given)  # the loader's memory is its own again
    assert card.ran == [(float(number), number, 0.1 * number, 1.0 + number) for number in range(WARM_STEPS + 4)]
    assert card.modes == ["thread_local"]


class Scheduled(nn.Module):
    """A method with values of Python's, some of them in a child."""

    def __init__(self):
        super().__init__()
        self.temperature, self.name, self.sizes, self.on = 0.04, "a", [1, 2], True
        self.by_name, self.cache, self.seen, self.nested = {"a": 1.0}, {}, [], ((1, 2), [3.0])
        self.child = nn.Dropout(0.1)
        self.weight = nn.Parameter(torch.zeros(1))


CHANGES = {
    "temperature": (lambda m: setattr(m, "temperature", 0.05), r"Scheduled\.temperature was 0\.04 .* and is 0\.05 now"),
    "text": (lambda m: setattr(m, "name", "b"), r"Scheduled\.name was 'a'"),
    "list": (lambda m: m.sizes.append(3), r"Scheduled\.sizes was \[1, 2\]"),
    "dict": (lambda m: m.by_name.update(a=2.0), r"Scheduled\.by_name was \{'a': 1\.0\} .* and is \{'a': 2\.0\} now"),
    "nested": (lambda m: m.nested[1].append(4.0), r"Scheduled\.nested was \(\(1, 2\), \[3\.0\]\)"),
    "tensor": (lambda m: setattr(m, "temperature", torch.ones(2)), r"Scheduled\.temperature was 0\.04 .* is tensor"),
    "child": (lambda m: setattr(m.child, "p", 0.2), r"Scheduled\.child\.p was 0\.1"),
    "mode": (lambda m: m.eval(), r"Scheduled\.training was True"),
    "gone": (lambda m: delattr(m, "on"), r"Scheduled\.on was True .* and is None now"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_value_that_changes_after_the_recording_is_an_error_that_names_it(monkeypatch, change):
    card, method = Card(monkeypatch), Scheduled()
    graphed = GraphedStep(card.step, CPU, method)
    act, words = CHANGES[change]
    method.temperature = 0.03
    for number in range(WARM_STEPS + 2):
        method.temperature = 0.04  # before the recording it may change
        graphed([pair(float(number))], 0.1)
    act(method)
    with pytest.raises(CaptureError, match=words):
        graphed([pair(0.0)], 0.1)
    assert len(card.ran) == WARM_STEPS + 2


def test_tensors_and_values_that_come_back_are_no_change(monkeypatch):
    card, method = Card(monkeypatch), Scheduled()
    graphed = GraphedStep(card.step, CPU, method)
    for number in range(WARM_STEPS + 3):
        graphed([pair(float(number))], 0.1)
        method.eval().train()  # an evaluation
        method.weight.data += 1
        method.cache[number] = method.seen = [torch.zeros(2)]  # what was empty in the recording is not watched
        if number > WARM_STEPS:
            method.later = number  # nothing that was recorded can have read it
    assert len(card.ran) == WARM_STEPS + 3


def test_a_graph_needs_a_card():
    with pytest.raises(DeviceError, match="graph needs a CUDA device, not cpu; use none or compile"):
        make(capture="graph")


class Stages(nn.Module):
    """A method of as many phases as layers, that notes when its forward runs without being compiled."""

    def __init__(self, count):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 2) for _ in range(count))
        self.stage, self.eager = 0, 0

    def forward(self, x):
        if not torch.compiler.is_compiling():
            self.eager += 1
        return SimpleNamespace(loss=self.layers[self.stage](x).square().mean(), parts={})

    def step(self, batch, engine):
        with engine.micro():
            engine.backward(engine.run(batch).loss)

    def after_step(self, engine):
        pass

    def groups(self, stage):
        self.stage = stage
        for number, layer in enumerate(self.layers):
            layer.requires_grad_(number == stage)
        return default_groups(self.named_parameters(), 0.0)


@pytest.mark.slow
def test_every_phase_is_compiled_however_many_there_are(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    method = Stages(4)
    options = {"precision": "fp32", "accumulate": 1, "capture": "compile"}
    engine = Engine(method, AdamW(method.groups(0)), World(CPU), **options)
    with torch._dynamo.config.patch(recompile_limit=2):  # as eight would, but sooner
        for stage in range(len(method.layers)):
            if stage:
                engine.enter(method.groups(stage))
            before = [layer.weight.detach().clone() for layer in method.layers]
            engine.step([X], 0.01)
            moved = [not torch.equal(w, layer.weight) for w, layer in zip(before, method.layers, strict=True)]
            assert moved == [number == stage for number in range(len(moved))]
    assert method.eager == 0


def method_and_batch(name, skip=False):
    """A method with drop-path on a small distilled model, which may skip what it drops, and a batch of two images."""
    torch.manual_seed(0)
    config = ViTConfig(32, 16, dim=8, depth=2, heads=2, num_classes=CLASSES, distilled=True, drop_path=0.5)
    teacher = Teacher(VisionTransformer(config), image_size=32, mean=(0.4, 0.4, 0.4), std=(0.2, 0.2, 0.2))
    settings = {"teacher": {"timm": "resnet18"}} if name == "distill" else {}
    context = toy_context(CLASSES, teacher)
    student = VisionTransformer(config)
    if skip:
        student.set_drop_path_skip(2)
    method = methods.find(name)(student, methods.config(name)(**settings), context).train()
    return method, batch(Cell("step", "", 2, 32, "fp32"), method.noise(), CPU)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [name if name == "distill" else pytest.param(name, marks=pytest.mark.slow) for name in methods.METHODS]
)
def test_a_method_compiles_to_one_graph_that_is_eager_mode(name, precision):
    """Of our ops, that graph has those alone which make the input."""
    torch.compiler.reset()
    method, images = method_and_batch(name)
    ours, outcomes = [], []

    def compiler(graph, inputs):
        ours.append({str(node.target) for node in graph.graph.nodes if "fastdeit" in str(node.target)})
        return boxed_nop(graph, inputs)

    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    for forward in (method, torch.compile(method, fullgraph=True, dynamic=False, backend=backend)):
        with autocast(CPU, precision):
            out = forward(images)
        gradients = torch.autograd.grad(out.loss, list(method.parameters()))
        outcomes.append((out.loss, out.logits, gradients))
    torch.testing.assert_close(*outcomes, rtol=1e-5, atol=1e-7)
    inputs = {"patchify", "pixels"} if name == "distill" else {"patchify"}
    assert ours == [{f"fastdeit.{op}.default" for op in inputs}, set()]


@pytest.mark.slow
def test_skipping_what_is_dropped_compiles_to_one_graph_that_is_eager_mode():
    torch.compiler.reset()
    method, images = method_and_batch("supervised", skip=True)
    compiled = torch.compile(method, fullgraph=True, dynamic=False, backend="aot_eager")
    outcomes = []
    for forward in (method, compiled):
        out = forward(images)
        outcomes.append((out.loss, torch.autograd.grad(out.loss, list(method.parameters()))))
    torch.testing.assert_close(*outcomes, rtol=1e-5, atol=1e-7)


def run(capture, world=None):
    torch.compiler.reset()
    engine = make(ema_decay=0.9, clip_grad=0.01, accumulate=2, capture=capture, world=world)
    found = []
    for step in range(50):
        engine.step(list(X.chunk(2)), 0.01 * (1 + step % 3))
        found.append(engine.means()["loss"])
    return torch.tensor(found), weights(engine)


@pytest.mark.slow
def test_a_compiled_step_learns_the_same():
    torch.testing.assert_close(run("compile"), run("none"), rtol=1e-3, atol=1e-6)


def compiled_rank(rank, size):
    return run("compile", World(CPU, rank, size))[0].tolist()


@pytest.mark.slow
def test_compiled_processes_learn_the_same(ranks):
    mine, theirs = ranks(2, compiled_rank)
    assert mine == theirs
    torch.testing.assert_close(torch.tensor(mine), run("none")[0], rtol=1e-3, atol=1e-6)
