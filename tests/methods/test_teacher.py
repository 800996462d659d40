"""Teachers in a method and in a run: compiled, resumed, of features, and built when they are first asked."""

import copy
import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from fastdeit import methods, models
from fastdeit.bench.step import Cell, batch
from fastdeit.engine.dist import World
from fastdeit.errors import Interrupted, UsageError
from fastdeit.methods.config import FeatureTeacherConfig, TeacherConfig
from fastdeit.methods.frozen import freeze
from fastdeit.methods.teacher import DeferredTeacher, Teacher
from fastdeit.models import tokens as tokens_of
from fastdeit.recipe import resolve as recipes
from fastdeit.run import build
from fastdeit.training import train
from tests.methods.batch_norms import norms_of, with_statistics
from tests.toys import toy_context

# ---- in a method and in a run ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [("test_resnet", torch.float32), ("test_vit", torch.bfloat16)])
def test_a_method_is_compiled_through_its_teacher(name, dtype):
    torch.manual_seed(0)
    network = freeze(models.build_timm(name, num_classes=1000, image_size=32), (32, 32), dtype)
    teacher = Teacher(network, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2))
    config = methods.config("distill")(teacher={"timm": name})
    student = models.build("deit_digits_distilled_patch8_32", num_classes=1000)
    method = methods.find("distill")(student, config, toy_context(1000, teacher)).eval()
    samples = batch(Cell("step", "", 2, 32, "fp32"), method.noise(), torch.device("cpu"))
    compiled = torch.compile(method, fullgraph=True, dynamic=False, backend="eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        torch.testing.assert_close(compiled(samples).loss, method(samples).loss)


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    network = with_statistics(models.build_timm("test_resnet", num_classes=10))
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_teacher_of_a_recipe_is_ready_for_its_precision(weights, tmp_path, precision, dtype):
    config = TeacherConfig(timm="test_resnet", weights=str(weights), image_size=48)
    teacher = build.teacher(config, (32, 32), 10, tmp_path, precision)
    assert teacher.size == (48, 48)
    assert not norms_of(teacher.model)
    assert {parameter.dtype for parameter in teacher.model.parameters()} == {dtype}
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        assert teacher.logits(torch.randn(2, 3, 32, 32).to(dtype)).shape == (2, 10)


RECIPE = """\
model: {name: deit_digits_distilled_patch8_32, image_size: 32, drop_path: 0.1}
method: {use: distill, teacher: {timm: test_resnet, weights: WEIGHTS}}
data: {source: synthetic, synthetic_samples: 64, synthetic_classes: 10, group_size: 8, repeats: 1}
optim: {lr: 1e-3, warmup_epochs: 0.5, min_lr: 1e-5}
train: {epochs: 2, batch_size: 16}
engine: {device: cpu, precision: bf16}
"""


@pytest.mark.slow
def test_a_run_with_a_teacher_is_resumed_bit_by_bit_and_saves_none_of_it(weights, tmp_path, monkeypatch):
    class StopAt(World):
        def stop_requested(self):
            self.asked = getattr(self, "asked", 0) + 1
            return self.asked == 3

    made, original = [], build.teacher
    monkeypatch.setattr(build, "teacher", lambda *args, **options: made.append(original(*args, **options)) or made[-1])
    (tmp_path / "r.yaml").write_text(RECIPE.replace("WEIGHTS", str(weights)))
    recipe, cpu = recipes.load(str(tmp_path / "r.yaml"), []), torch.device("cpu")
    train(recipe, tmp_path / "whole", World(cpu), resume=False)
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "resumed", StopAt(cpu), resume=False)
    train(recipe, tmp_path / "resumed", World(cpu), resume=True)
    assert {p.dtype for teacher in made for p in teacher.model.parameters()} == {torch.bfloat16}
    last = "checkpoints/step_00000008"
    whole, resumed = (sorted((tmp_path / run / last).iterdir()) for run in ("whole", "resumed"))
    student = set(models.build("deit_digits_distilled_patch8_32", image_size=32).state_dict())
    for mine, theirs in zip(whole, resumed, strict=True):
        if mine.suffix == ".safetensors":
            tensors, others = load_file(mine), load_file(theirs)
            assert tensors.keys() == others.keys()
            assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
            assert mine.stem != "model" or set(tensors) == student
            assert not any("conv" in name or "teacher" in name for name in tensors)
    losses = [
        [json.loads(line).get("loss") for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()][-3:]
        for run in ("whole", "resumed")
    ]
    assert losses[0] == losses[1]


# ---- features --------------------------------------------------------------------------------------------------------


class OfViews:
    """A batch of two views that says what it was asked to render."""

    def pixels(self, view=0, mean=None, std=None):
        return torch.full((2, 3, 8, 8), 100.0 * view + 10 * mean + std)


def test_a_teacher_renders_each_view_in_its_own_normalisation():
    teacher = Teacher(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), mean=3, std=7)
    assert teacher.pixels(OfViews(), view=1).unique().tolist() == [137]
    assert teacher(OfViews()).tolist() == [[37.0] * 3] * 2


TRANSFORMERS = {
    "ours": lambda: models.build("deit_digits_patch8_32", image_size=32),
    "timm's": lambda: models.build_timm("test_vit", image_size=32, num_classes=0),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_features_of_a_teacher_are_its_networks(name):
    """In eval mode, without gradient, at the teacher's resolution."""
    torch.manual_seed(0)
    network = TRANSFORMERS[name]().train()
    teacher, x = Teacher(copy.deepcopy(network), image_size=32), torch.randn(2, 3, 48, 48, requires_grad=True)
    seen = F.interpolate(x.detach(), size=(32, 32), mode="bicubic", antialias=True)
    keep = torch.tensor([[0, 3], [2, 1]])
    network.eval().requires_grad_(False)
    read = teacher.taps(x, blocks=(0,), qkv=(1,), keep=keep)
    expected = tokens_of.taps(network, seen, blocks=(0,), qkv=(1,), keep=keep)
    answers = [teacher.tokens(x), teacher.tokens(x, stop=1, keep=keep), read.tokens[0], *read.qkv[1]]
    exact = [network.tokens(seen), network.tokens(seen, stop=1, keep=keep), expected.tokens[0], *expected.qkv[1]]
    for answer, own in zip(answers, exact, strict=True):
        torch.testing.assert_close(answer, own)
        assert not answer.requires_grad


@pytest.mark.parametrize("name", ["deit_digits_distilled_patch8_32", "deit_digits_patch8_32"])
def test_tokens_and_answer_of_a_teacher_are_of_one_pass(name):
    torch.manual_seed(0)
    teacher, x = Teacher(models.build(name, num_classes=10)), torch.randn(2, 3, 32, 32)
    answer = teacher.classify(teacher.tokens(x))
    assert not answer.requires_grad
    torch.testing.assert_close(answer, teacher.logits(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ask", [Teacher.tokens, partial(Teacher.taps, blocks=(0,))])
def test_a_teacher_without_tokens_says_so(ask):
    with pytest.raises(ValueError, match="the teacher is a ConvNet, which has no tokens; a method that reads tokens"):
        ask(Teacher(models.build("convnet_digits")), torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_features_are_compiled_in_one_graph(name):
    torch.manual_seed(0)
    teacher, x = Teacher(freeze(TRANSFORMERS[name](), (32, 32)), image_size=32), torch.randn(2, 3, 32, 32)

    def relation(x):
        read = teacher.taps(x, blocks=(0,), qkv=(1,))
        return read.tokens[0].sum() + (read.qkv[1][0] @ read.qkv[1][1].mT).sum() + teacher.tokens(x, stop=1).sum()

    compiled = torch.compile(relation, fullgraph=True, dynamic=False, backend="eager")
    torch.testing.assert_close(compiled(x), relation(x))


def saved(network, path):
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path)
    return str(path)


FEATURES = {
    # What the recipe names, and the networks whose weights will do for it.
    "timm": ("test_vit", lambda classes: models.build_timm("test_vit", image_size=32, num_classes=classes)),
    "model": ("deit_digits_patch8_32", lambda classes: models.build("deit_digits_patch8_32", num_classes=classes)),
}


@pytest.mark.parametrize("classes", [0, 7])
@pytest.mark.parametrize("origin", FEATURES)
def test_a_teacher_of_features_needs_no_head_for_the_data_set(origin, classes, tmp_path):
    name, make = FEATURES[origin]
    network = make(classes or 7)
    if classes == 0:
        state = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("head.")}
        network.state_dict = lambda: state
    options = {origin: name, "weights": saved(network, tmp_path / "w.safetensors")}
    teacher = build.teacher(FeatureTeacherConfig(**options), (32, 32), 10, tmp_path, "bf16")
    x = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        read, expected = teacher.taps(x, blocks=(1,), qkv=(2,)), network.eval().tokens(x, stop=2)
    assert next(iter(teacher.model.blocks)).attn.qkv.weight.dtype == torch.bfloat16
    torch.testing.assert_close(read.tokens[1].float(), expected.float(), rtol=0.05, atol=0.05)
    with pytest.raises(
        UsageError, match="head of the weights knows 7" if classes else "it needs head.weight, head.bias"
    ):
        build.teacher(TeacherConfig(**options), (32, 32), 10, tmp_path, "bf16")


@pytest.mark.parametrize("origin", FEATURES)
def test_a_teacher_of_features_still_needs_its_body(origin, tmp_path):
    name, make = FEATURES[origin]
    network = make(10)
    state = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("blocks.1.")}
    network.state_dict = lambda: state
    config = FeatureTeacherConfig(**{origin: name, "weights": saved(network, tmp_path / "w.safetensors")})
    with pytest.raises(UsageError, match=r"do not fit the model: it needs blocks\.1\."):
        build.teacher(config, (32, 32), 10, tmp_path)


METHOD = """\
import torch
from fastdeit.methods.base import Method, Out
from fastdeit.methods.config import FeatureTeacherConfig, MethodConfig
from fastdeit.models.tokens import taps


class Relations(Method):
    class Config(MethodConfig):
        teacher: FeatureTeacherConfig

    def __init__(self, model, config, context):
        super().__init__(model, config, context)
        self.teacher = context.teacher(config.teacher)
        unused = ("blocks.2.attn.proj", "blocks.2.norm2", "blocks.2.mlp", "blocks.3", "norm", "head")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(unused))

    def forward(self, batch):
        q, k, _ = self.teacher.taps(self.teacher.pixels(batch), qkv=(1,)).qkv[1]
        told = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)
        q, k, _ = taps(self.model, batch.pixels(), qkv=(2,), noise=batch.noise["drop_path"]).qkv[2]
        said = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)
        return Out((told - said).square().mean())
"""


def test_relations_are_learned_from_a_teacher_without_a_head(tmp_path, monkeypatch):
    """By a method of another package; the teacher is not scored."""
    (tmp_path / "relations_of_a_teacher.py").write_text(METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    path = saved(models.build_timm("test_vit", image_size=32, num_classes=0), tmp_path / "w.safetensors")
    text = RECIPE.replace("use: distill", "use: 'relations_of_a_teacher:Relations'").replace("test_resnet", "test_vit")
    # At 64 pixels the teacher has the student's grid.
    text = text.replace("WEIGHTS", f"{path}, image_size: 64").replace("bf16", "fp32").replace("_distilled", "")
    (tmp_path / "r.yaml").write_text(text)
    recipe = recipes.load(str(tmp_path / "r.yaml"), [])
    train(recipe, tmp_path / "run", World(torch.device("cpu")), resume=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert not any("teacher_top1" in line for line in lines)
    assert any(line.get("loss") is not None for line in lines)


def test_a_deferred_teacher_is_built_once_when_it_is_first_asked():
    made = []

    def make():
        made.append(Teacher(nn.Linear(2, 3), mean=(0.1,) * 3, std=(0.2,) * 3))
        return made[-1]

    deferred = DeferredTeacher(make)
    copy.copy(deferred)
    assert made == []
    assert deferred.mean == (0.1,) * 3
    assert deferred.logits(torch.ones(1, 2)).shape == (1, 3)
    assert len(made) == 1


def test_what_fails_while_a_deferred_teacher_is_built_is_what_is_raised():
    def make():
        raise AttributeError("the network has no head")

    with pytest.raises(AttributeError, match="the network has no head"):
        DeferredTeacher(make).logits(torch.ones(1, 2))
