"""Several teachers, and teachers at a resolution that is not the one they were trained at."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from fastdeit import methods, models
from fastdeit.cli import main as cli
from fastdeit.engine.dist import World
from fastdeit.errors import Interrupted, UsageError
from fastdeit.estimate.report import subject
from fastdeit.methods.config import TeacherConfig
from fastdeit.methods.teacher import Ensemble, Teacher
from fastdeit.recipe import resolve as recipes
from fastdeit.run import build, fork
from fastdeit.training import train
from tests.recipe_texts import DISTILL, refusal
from tests.small_runs import StopAt, assert_same_weights, logged
from tests.toys import toy_batch, toy_context

B, K, SIDE = 4, 5, 8
CPU = torch.device("cpu")


class Linear(nn.Module):
    """A network of images that remembers their size."""

    noise_per_sample = 0

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.linear, self.size = nn.Linear(3, K), None

    def forward(self, x, noise=None):
        self.size = tuple(x.shape[2:])
        return 6 * self.linear(x[:, :, ::2].mean((2, 3)))


@pytest.fixture
def batch():
    images = torch.randint(0, 256, (B, SIDE, SIDE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    return toy_batch(images, torch.tensor([0, 1, 2, 3]), mean=(0.4,) * 3, std=(0.2,) * 3)


def taught_by(teachers, **options):
    """A distilled student, one of whose teachers answers for each of the configurations, in their order."""
    configs = [TeacherConfig(timm=str(number)) for number in range(len(teachers))]
    context = toy_context(K)
    context = type(context)(K, 1, 1, lambda config: teachers[int(config.timm)], context.ema_teacher)
    config = methods.config("distill")(teacher=configs, smoothing=0.0, alpha=1.0, reduction="batchmean", **options)
    return methods.find("distill")(Linear(9), config, context)


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_several_teachers_answer_with_the_mean_of_their_softmaxes(batch, kind, tau):
    """Each sees the image in its own normalisation and size."""
    networks = [Linear(seed) for seed in range(3)]
    teachers = [
        Teacher(net, image_size=size, mean=(0.1 * size / 4,) * 3, std=(0.5,) * 3)
        for net, size in zip(networks, (4, 8, 12), strict=True)
    ]
    method = taught_by(teachers, distillation=kind, tau=tau)
    loss = method(batch).loss
    assert [network.size for network in networks] == [(4, 4), (8, 8), (12, 12)]
    answers = [teacher(batch).double() for teacher in teachers]
    p = sum(answer.softmax(-1) for answer in answers) / 3
    student = method.model(batch.pixels()).double()
    if kind == "hard":
        expected = F.cross_entropy(student, p.argmax(-1))
    else:
        target = p ** (1 / tau) / (p ** (1 / tau)).sum(-1, keepdim=True)
        expected = (target * (target.log() - (student / tau).log_softmax(-1))).sum() * tau**2 / B
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_mean_is_that_of_probabilities_and_not_of_logits():
    sure, other = torch.tensor([[9.0, 0.0, 8.0]]), torch.tensor([[0.0, 4.0, 3.9]])
    fused = Ensemble([lambda batch: sure, lambda batch: other])(None)
    torch.testing.assert_close(fused.exp(), (sure.softmax(-1) + other.softmax(-1)) / 2)
    assert (fused.argmax().item(), (sure + other).argmax().item()) == (0, 2)


def test_one_teacher_in_a_list_is_that_teacher():
    teacher = Teacher(Linear(0))
    assert taught_by([teacher]).teacher is teacher


# ---- in a recipe -----------------------------------------------------------------------------------------------------

TWO = "method.teacher=[runs/x@best, {timm: resnet18, weights: w.safetensors, image_size: [96, 64]}]"


def test_a_list_of_teachers_is_read_and_written(write):
    path = write(DISTILL)
    recipe = recipes.load(path, [TWO])
    assert [(each.weights, each.timm, each.image_size) for each in recipe.method.teachers()] == [
        ("runs/x@best", None, None),
        ("w.safetensors", "resnet18", (96, 64)),
    ]
    assert recipes.load(write(recipes.dump(recipe), "two.yaml")).method == recipe.method
    assert recipes.override(recipe, ["method.tau=3"]).method.teacher == recipe.method.teacher
    alone = recipes.load(path)
    assert alone.model_dump(mode="json")["method"]["teacher"]["timm"] == "resnet18"
    assert recipes.load(path, ["method.teacher=[{timm: resnet18, weights: w.safetensors}]"]).method == alone.method
    assert recipes.load(path, ["method={use: supervised}"]).method.teachers() == ()


@pytest.mark.parametrize(("given", "problem"), [
    ("[]", "method.teacher: names no teacher, got []"),
    ("[a, b, a]", 'method.teacher: names the same teacher twice, got ["a", "b", "a"]'),
    ("[a, {wieghts: b}]", "method.teacher[1].wieghts: unknown field ('b'); did you mean weights or weights_grid?"),
    ("[a, 3]", "method.teacher[1]: must be a mapping, got 3"),
    ("[a, {timm: b, image_size: 0}]", "method.teacher[1].image_size: must be at least 1, got 0"),
])  # fmt: skip
def test_a_list_that_is_wrong_says_where(write, given, problem):
    (message,) = refusal(write(DISTILL), [f"method.teacher={given}"])
    assert message.endswith(problem) or problem in message


# ---- at the student's resolution -------------------------------------------------------------------------------------


def vit_of_ours():
    return "model", "deit_digits_patch8_32", models.build("deit_digits_patch8_32", num_classes=K)


def vit_of_timm():
    network = models.build_timm("test_vit", image_size=64, num_classes=K)
    return "timm", "test_vit", network


def convnet_of_timm():
    return "timm", "test_resnet", models.build_timm("test_resnet", num_classes=K)


def enlarged(name, network, size):
    """The network for another size, its positions interpolated as DeiT's public code does."""
    state = dict(network.state_dict())
    if "pos_embed" not in state:
        return network
    made = models.of(*((name, None) if name.startswith("deit") else (None, name)), image_size=size, num_classes=K)
    prefix, grid = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
    side, new = int(grid.shape[1] ** 0.5), made.grid
    cells = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    cells = F.interpolate(cells, size=new, mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(1, 2)
    made.load_state_dict(state | {"pos_embed": torch.cat((prefix, cells), 1)})
    return made


@pytest.mark.parametrize("make", [vit_of_ours, vit_of_timm, convnet_of_timm])
def test_a_teacher_answers_at_the_students_resolution(make, tmp_path):
    """Fine-tuning at a higher resolution with a teacher, which the public code refuses."""
    torch.manual_seed(0)
    kind, name, network = make()
    with torch.no_grad():
        network.state_dict().get("pos_embed", torch.zeros(1)).normal_()
    save_file({key: tensor.contiguous() for key, tensor in network.state_dict().items()}, tmp_path / "w.safetensors")
    weights = str(tmp_path / "w.safetensors")
    teacher = build.teacher(TeacherConfig(**{kind: name}, weights=weights), (96, 96), K, None)
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected = enlarged(name, copy.deepcopy(network), (96, 96)).eval()(x)
    torch.testing.assert_close(teacher.logits(x), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [vit_of_ours, vit_of_timm])
def test_a_size_that_is_no_grid_of_the_teachers_patches_is_refused_before_it_is_run(make, tmp_path):
    kind, name, network = make()
    save_file({key: tensor.contiguous() for key, tensor in network.state_dict().items()}, tmp_path / "w.safetensors")
    config = TeacherConfig(**{kind: name}, weights=str(tmp_path / "w.safetensors"))
    with pytest.raises(UsageError, match=r"^method\.teacher\.weights: .*36x36 is not a multiple of"):
        build.teacher(config, (36, 36), K, None)


DATA = """\
data: {source: synthetic, synthetic_samples: 16, synthetic_classes: 4, group_size: 4, repeats: 1}
optim: {lr: 1e-3, warmup_epochs: 0, min_lr: 1e-5}
train: {epochs: 1, batch_size: 8}
engine: {device: cpu, precision: fp32, threads: 1, log_every: 1}
"""


@pytest.mark.slow
def test_a_distilled_model_is_fine_tuned_at_a_higher_resolution_with_its_teacher(tmp_path, write, capsys, monkeypatch):
    teacher = write(
        "model: {name: deit_digits_patch8_32, image_size: 32}\nmethod: {use: supervised}\n" + DATA, "t.yaml"
    )
    small = "model: {name: deit_digits_distilled_patch8_32, image_size: 32}\n"
    small += f"method: {{use: distill, teacher: {{recipe: {teacher}}}}}\n"
    run = tmp_path / "small"
    assert cli(["train", write(small + DATA), "--run-dir", str(run)]) == 0
    assert "method.teacher.image_size" not in capsys.readouterr().out
    sizes, asked = [], Teacher.logits
    monkeypatch.setattr(Teacher, "logits", lambda self, x: sizes.append(self._sized(x).shape[-1]) or asked(self, x))
    words = [f"model.weights={run}", "model.image_size=48", f"method.teacher={run}/teacher"]
    assert cli(["train", write(small + DATA), *words, "--run-dir", str(tmp_path / "low")]) == 0
    assert "sees 32x32 pixels, the student 48x48 pixels (method.teacher.image_size)" in capsys.readouterr().out
    assert set(sizes) == {32}
    sizes.clear()
    words[2] = f"method.teacher={{recipe: null, weights: {run}/teacher, image_size: 48}}"
    assert cli(["train", write(small + DATA), *words, "--run-dir", str(tmp_path / "high")]) == 0
    assert set(sizes) == {48}
    assert "sees" not in capsys.readouterr().out


# ---- several that are trained first ----------------------------------------------------------------------------------

TINY = "model: {name: 'tests.small_runs:Tiny', image_size: 8}\n"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The recipe of a student with two teachers, each of which has a recipe of its own."""
    folder = tmp_path_factory.mktemp("recipes")
    for name, rate in (("first", "2e-3"), ("second", "3e-3")):
        (folder / f"{name}.yaml").write_text(TINY + "method: {use: supervised}\n" + DATA.replace("1e-3", rate, 1))
    teachers = f"[{{recipe: {folder}/first.yaml}}, {{recipe: {folder}/second.yaml}}]"
    (folder / "r.yaml").write_text(f"{TINY}method: {{use: distill, teacher: {teachers}}}\n{DATA}")
    return recipes.load(str(folder / "r.yaml"))


@pytest.fixture(scope="module")
def whole(two, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    train(two, run, World(CPU), resume=False)
    return run


def test_each_teacher_is_trained_into_a_run_of_its_own(whole):
    own = [json.loads((whole / name / "summary.json").read_text()) for name in ("teacher", "teacher_2")]
    assert [summary["recipe"] for summary in own] == ["first", "second"]
    scored = next(record for record in logged(whole) if record["kind"] == "teacher")
    # The teachers are Supervised and judged by the mean of their logits, as a teacher with two heads answers.
    assert [scored["teacher_1_top1"], scored["teacher_2_top1"]] == [summary["top1_fused"] for summary in own]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_a_run_that_is_cut_in_a_teacher_or_after_goes_on_bit_by_bit(two, whole, tmp_path, steps):
    with pytest.raises(Interrupted):
        train(two, tmp_path, StopAt(steps), resume=False)
    train(two, tmp_path, World(CPU), resume=True)
    for name in ("", "teacher", "teacher_2"):
        assert_same_weights(whole / name, tmp_path / name, 2)
    assert cli(["eval", str(tmp_path)]) == 0


@pytest.mark.slow
def test_a_fork_takes_all_teachers_of_its_parent(two, whole, tmp_path):
    origin = fork.opened(f"{whole}@step=2", lambda text: None)
    train(recipes.override(two, ["train.epochs=2"]), tmp_path, World(CPU), origin=origin)
    for name in ("teacher", "teacher_2"):
        assert_same_weights(whole / name, tmp_path / name, 2)


def test_a_plan_reckons_with_every_teacher(two):
    found = subject(two)
    assert len(found.teachers) == len(found.teacher_runs) == 2
    mixed = subject(recipes.override(two, ["method.teacher=[{timm: test_vit, image_size: 32}, timm:test_resnet]"]))
    assert [each.name for each in mixed.teachers] == ["test_vit", "test_resnet"]
    assert mixed.teacher_runs == ()


def test_a_dry_run_lists_every_teacher(two, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(recipes.dump(two))
    words = ["method.teacher=[timm:test_resnet, {recipe: first.yaml}]".replace("first", f"{tmp_path}/first")]
    (tmp_path / "first.yaml").write_text(TINY + "method: {use: supervised}\n" + DATA)
    more = ["data.repeats=1", "train.batch_size=32", "data.synthetic_classes=1000"]  # as many as timm's weights know
    assert cli(["train", str(tmp_path / "r.yaml"), *words, *more, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    teachers = [line.split()[1].rstrip(":,") for line in lines if line.startswith("teacher ")]
    assert teachers == ["test_resnet", "tests.small_runs:Tiny"]
    assert "trained first: 2 steps of first" in next(line for line in lines if "Tiny" in line and "teacher" in line)
    assert any(line.startswith("note      train.batch_size 32 is more than the 16 training images") for line in lines)
