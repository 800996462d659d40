"""One test a hook: that the loop, the engine and the optimizer do what a method, a model or a recipe asks of them.

The runs are whole ones of `train`, with four steps of two micro-batches each over two epochs of synthetic images.
"""

import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastdeit import kernels, models
from fastdeit.engine import checkpoint
from fastdeit.engine.dist import World
from fastdeit.engine.groups import ParamGroup
from fastdeit.engine.guard import Verdict
from fastdeit.engine.optimizers import AdamW
from fastdeit.errors import Interrupted
from fastdeit.methods.config import TeacherConfig
from fastdeit.methods.supervised import Supervised
from fastdeit.methods.teacher import Teacher
from fastdeit.recipe import resolve as recipes
from fastdeit.run import build
from fastdeit.run.groups import decay_groups
from fastdeit.training import train
from tests.small_runs import StopAt
from tests.toys import toy_batch

RECIPE = """\
model: {name: deit_digits_distilled_patch8_32, image_size: 32}
method: {use: "tests.test_hooks:Spy"}
data:
  {source: synthetic, synthetic_samples: 32, synthetic_classes: 4, flip: 0, mixup: 0, cutmix: 0, group_size: 4,
   repeats: 1, mean: [0.3, 0.4, 0.5], std: [0.2, 0.25, 0.3]}
optim: {lr: 1e-3, warmup_epochs: 0, ema_decay: null}
train: {epochs: 2, batch_size: 16, accumulate: 2, eval_every: 2}
engine: {device: cpu, precision: fp32, checkpoint_every: 10}
"""
EPOCHS, STEPS_PER_EPOCH, TOTAL = 2, 2, 4
HEAD, SLOW = "model.head.bias", "model.head_dist.weight"


class Spy(Supervised):
    """A method that notes every call, and whose weights depend on each of them."""

    calls: list
    """What was called, in order: ("epoch", number), "micro" and "after" for each of the hooks."""
    draws: list[float]
    """A number of torch's generator in every micro-batch."""

    def __init__(self, model, config, context):
        super().__init__(model, config, context)
        self.calls, self.draws, self.noise_shapes, self.evaluated = [], [], set(), 0
        self.register_buffer("boost", torch.zeros(()))
        Spy.last = self

    def noise(self):
        return super().noise() | {"mine": 5}

    def param_groups(self, base):
        """All as they are, but one parameter is left alone and another's learning rate is 0."""
        picked = {name: p for group in base for name, p in group.params.items() if name == SLOW}
        rest = [
            replace(group, params={name: p for name, p in group.params.items() if name not in (HEAD, SLOW)})
            for group in base
        ]
        return [*rest, ParamGroup(picked, weight_decay=0.5, lr_scale=0.0)]

    def on_epoch(self, epoch, engine):
        self.calls.append(("epoch", epoch))
        self.boost.fill_(epoch + 1.0)  # a function of the epoch alone: a resumed run begins its epoch again

    def step(self, batch, engine):
        self.calls.append("micro")
        self.draws.append(torch.rand(()).item())
        self.noise_shapes.add(tuple(batch.noise["mine"].shape))
        super().step(batch, engine)

    def forward(self, batch):
        out = super().forward(batch)
        out.loss = out.loss * self.boost
        return out

    def after_step(self, engine):
        self.calls.append("after")
        with torch.no_grad():
            self.model.head_dist.bias.add_(1.0)

    def predict(self, x):
        self.evaluated += len(x)
        return {"mine": torch.ones(len(x), 4)}


def one_epoch(number):
    return [("epoch", number), *(["micro", "micro", "after"] * STEPS_PER_EPOCH)]


def load(folder, *overrides):
    path = folder / "hooks.yaml"
    mine = path.with_suffix(f".{os.getpid()}")  # two processes write it at the same time
    mine.write_text(RECIPE)
    mine.replace(path)
    return recipes.load(str(path), list(overrides))


def finish(folder, run, world=None, resume=False, *overrides):
    """A run to its end: its method, its summary and its last checkpoint."""
    summary = train(load(folder, *overrides), run, world or World(torch.device("cpu")), resume=resume)
    return Spy.last, summary, checkpoint.newest(run / "checkpoints", lambda path, why: pytest.fail(f"{path}: {why}"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hooks")
    method, summary, saved = finish(folder, folder / "run")
    return folder, method, summary, saved


@pytest.fixture(scope="module")
def initial(whole):
    """The student's weights before the first step."""
    student = build.model(load(whole[0]), 4, lambda line: None)
    return {f"model.{name}": parameter.detach() for name, parameter in student.named_parameters()}


# ---- hooks of a method -------------------------------------------------------------------------------------------


def test_hooks_are_called_in_this_order(whole):
    """`on_epoch` before the first step of an epoch, `step` for every micro-batch, `after_step` once for both."""
    assert whole[1].calls == one_epoch(0) + one_epoch(1)


def test_after_step_comes_after_the_update(whole, initial):
    """Four times 1.0 remains, on top of at most four updates by the learning rate."""
    moved = whole[1].model.head_dist.bias.detach() - initial["model.head_dist.bias"]
    assert (moved - TOTAL).abs().max() < 0.01


def test_param_groups_decides_what_is_trained_and_how_fast(whole, initial):
    _, method, _, saved = whole
    parameters = dict(method.named_parameters())
    assert torch.equal(parameters[HEAD], initial[HEAD])
    assert f"exp_avg.{HEAD}" not in saved.tensors["optim"]
    assert torch.equal(parameters[SLOW], initial[SLOW])
    assert saved.tensors["optim"][f"exp_avg.{SLOW}"].abs().max() > 0  # it got gradients
    assert not torch.equal(parameters["model.head.weight"], initial["model.head.weight"])


def test_predict_is_what_is_evaluated(whole):
    _, method, summary, _ = whole
    assert method.evaluated == 3  # a tenth of the training images, once
    assert "top1_mine" in summary


def test_noise_has_the_width_that_the_method_asks_for(whole):
    assert whole[1].noise_shapes == {(8, 5)}


@pytest.fixture(
    scope="module",
    params=[1, *(pytest.param(n, marks=pytest.mark.slow) for n in (STEPS_PER_EPOCH, STEPS_PER_EPOCH + 1))],
    ids=lambda step: f"at {step}",
)
def interrupted(request, whole, tmp_path_factory):
    """The step at which a run was stopped, its method until then, and the method and checkpoint of its resumed half."""
    folder, run = whole[0], tmp_path_factory.mktemp("interrupted")
    with pytest.raises(Interrupted, match=f"step {request.param} of {TOTAL}"):
        train(load(folder), run, StopAt(request.param), resume=False)
    first = Spy.last
    second, _, saved = finish(folder, run, resume=True)
    return request.param, first, second, saved


def test_hooks_across_a_resume(whole, interrupted):
    """An epoch that is gone on with is begun again; nothing else happens twice, and the weights are the same."""
    _, uninterrupted, _, saved = whole
    stop, first, second, resumed = interrupted
    epoch, done = divmod(stop, STEPS_PER_EPOCH)
    again = [("epoch", epoch), *(["micro", "micro", "after"] * (STEPS_PER_EPOCH - done))]
    assert second.calls == again + [call for number in range(epoch + 1, EPOCHS) for call in one_epoch(number)]
    assert first.calls == uninterrupted.calls[: len(first.calls)]
    assert resumed.tensors["model"].keys() == saved.tensors["model"].keys()
    assert all(torch.equal(tensor, saved.tensors["model"][name]) for name, tensor in resumed.tensors["model"].items())


def test_torchs_generator_is_a_function_of_the_step(whole, interrupted):
    draws, (stop, first, second, _) = whole[1].draws, interrupted
    assert len(set(draws)) == 2 * TOTAL
    assert first.draws + second.draws == draws
    assert len(first.draws) == 2 * stop


def one_of_two(rank, size, folder):
    method, _, saved = finish(folder, folder / "two", World(torch.device("cpu"), rank, size))
    return method.calls, method.draws, method.noise_shapes, {n: t.numpy() for n, t in saved.tensors["model"].items()}


@pytest.mark.slow
def test_hooks_on_two_processes(ranks, whole, tmp_path):
    """Every process makes the same calls; its noise is its own; the weights are those of one process."""
    _, _, _, alone = whole
    first, second = ranks(2, one_of_two, tmp_path)
    assert first[0] == second[0] == one_epoch(0) + one_epoch(1)
    assert not set(first[1]) & set(second[1])
    assert first[2] == second[2] == {(4, 5)}
    for name, tensor in alone.tensors["model"].items():
        torch.testing.assert_close(torch.from_numpy(first[3][name]), tensor, rtol=1e-3, atol=1e-4)


def with_other_kernels(rank, size, folder):
    first, *others = kernels.info()
    other = [first._replace(backend=f"of process {rank}"), *others]
    kernels.info = lambda: other
    with pytest.raises(RuntimeError, match="the processes differ in the kernels that they choose") as error:
        finish(folder, folder / "two", World(torch.device("cpu"), rank, size))
    return str(error.value)


def test_processes_that_choose_other_kernels_are_refused(ranks, tmp_path):
    first, second = ranks(2, with_other_kernels, tmp_path)
    assert first == second
    assert "of process 0" in first
    assert "of process 1" in first


# ---- fields of a recipe, and of a group ----------------------------------------------------------------------------


def test_lr_scale_is_a_factor_on_the_learning_rate():
    """Adam's first step is the learning rate in size, whatever the gradient."""
    groups = [ParamGroup({str(scale): nn.Parameter(torch.zeros(3))}, 0.0, scale) for scale in (1.0, 0.25)]
    optimizer = AdamW(groups)
    for parameter in optimizer.params.values():
        parameter.grad = torch.tensor([1.0, -2.0, 3.0])
    optimizer.step(0.1, Verdict(torch.ones(()), torch.tensor(False), torch.ones(())))
    torch.testing.assert_close(optimizer.params["1.0"].detach(), torch.tensor([-0.1, 0.1, -0.1]))
    torch.testing.assert_close(optimizer.params["0.25"].detach(), torch.tensor([-0.025, 0.025, -0.025]))


@pytest.mark.parametrize("decayed", [False, True])
def test_decay_dist_token_decays_the_distillation_token(tmp_path, decayed):
    recipe = load(tmp_path, f"optim.decay_dist_token={str(decayed).lower()}", "optim.weight_decay=0.05")
    method = build.method(recipe, build.model(recipe, 4, lambda line: None), 4, TOTAL, lambda config: None)
    decay = {name: group.weight_decay for group in decay_groups(method, recipe) for name in group.params}
    assert decay["model.dist_token"] == (0.05 if decayed else 0.0)
    assert decay["model.cls_token"] == 0.0


# ---- the teacher's normalisation -----------------------------------------------------------------------------------

OWN = {"mean": (0.6, 0.5, 0.1), "std": (0.1, 0.15, 0.35)}


def normalised(x, mean, std):
    """Pixels `[B, 3, H, W]` in [0, 1] with a mean and a standard deviation for each channel."""
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


class Mirror(nn.Module):
    """Its logits are the pixels it is shown."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x.flatten(1)


def test_a_teacher_is_shown_images_in_its_own_normalisation():
    images = torch.randint(0, 256, (2, 2, 2, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch, pixels = toy_batch(images, torch.arange(2)), images.permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(Teacher(Mirror(), **OWN)(batch), normalised(pixels, **OWN).flatten(1))
    torch.testing.assert_close(Teacher(Mirror())(batch), normalised(pixels, batch.mean, batch.std).flatten(1))


def test_a_teacher_is_built_with_its_own_normalisation(whole, tmp_path):
    save_file(
        models.build("convnet_digits", image_size=32, num_classes=4).state_dict(), tmp_path / "teacher.safetensors"
    )
    config = TeacherConfig(model="convnet_digits", weights=str(tmp_path / "teacher.safetensors"), **OWN)
    teacher = build.teacher(config, (32, 32), 4, tmp_path)
    assert (tuple(teacher.mean), tuple(teacher.std)) == (OWN["mean"], OWN["std"])
