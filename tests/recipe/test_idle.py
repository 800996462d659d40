"""Settings that have no effect beside others are told, and told truly."""

import pytest
import torch

from fastdeit import models, rng, training
from fastdeit.batch import Batch, Labels, Step
from fastdeit.engine import optimizers
from fastdeit.engine.dist import World
from fastdeit.engine.groups import ParamGroup
from fastdeit.engine.guard import Verdict
from fastdeit.engine.options import OPTIMIZERS
from fastdeit.engine.schedule import learning_rate
from fastdeit.methods.config import METHODS, DistillConfig, TeacherConfig
from fastdeit.methods.distill import Distill
from fastdeit.recipe import config as sections
from fastdeit.recipe import describe, idle
from fastdeit.recipe import resolve as recipes
from fastdeit.run import build
from fastdeit.run.groups import decay_groups
from fastdeit.training import schedule_of
from fastdeit.views import ViewSettings

RECIPE = """\
model: {name: deit_digits_distilled_patch8_32, image_size: 32, drop_path: 0.4}
method: {use: supervised}
data: {source: synthetic, synthetic_samples: 32, synthetic_classes: 10, group_size: 8, repeats: 1, threads: 1}
optim: {lr: 1e-3, warmup_epochs: 1}
train: {epochs: 2, batch_size: 16}
engine: {device: cpu, threads: 1}
"""
DISTILL = "method={{use: distill, teacher: runs/x{}}}"
HARD, SOFT = DISTILL.format(""), DISTILL.format(", distillation: soft")
LEARNS_LABELS, LEARNS_TEACHER = DISTILL.format(", alpha: 0"), DISTILL.format(", alpha: 1")
UNMIXED = ("data.mixup=0", "data.cutmix=0")
SGD = "{name: sgd, lr: 1e-3, warmup_epochs: 1}"
ONE_HEAD = ("model.name=deit_digits_patch8_32",)


def of(method, **fields):
    """`method`, a whole section in braces, with more fields."""
    return method[:-1] + "".join(f", {name}: {value}" for name, value in fields.items()) + "}"


CASES = [
    # field, its value, beside what it has no effect, beside what it has one
    ("data.crop_scale", "[0.5, 0.6]", ("data.crop=simple",), ()),
    ("data.crop_ratio", "[0.5, 0.6]", ("data.crop=simple",), ()),
    ("data.crop_scale", "[0.5, 0.6]", ("data.views={main: {crop_scale: [0.1, 0.2]}}",), ()),
    ("data.flip", "1.0", ("data.views={main: {flip: 0.0}}",), ()),
    ("data.color_jitter", "0.9", ("data.views={main: {augment: three_augment}}",), ()),
    ("data.views.main.crop_scale", "[0.5, 0.6]", ("data.crop=simple",), ()),
    ("data.mix_probability", "0.3", UNMIXED, ()),
    ("data.mix_switch", "0.9", UNMIXED, ()),
    ("data.mix_switch", "0.9", ("data.mixup=0",), ()),
    ("data.mix_switch", "0.9", ("data.cutmix=0",), ()),
    ("data.mix_mode", "pair", UNMIXED, ()),
    ("data.mixup", "0.3", ("data.mix_probability=0",), ()),
    ("data.mixup", "0.3", ("data.mix_switch=1",), ()),
    ("data.cutmix", "0.3", ("data.mix_switch=0",), ()),
    ("method.tau", "3.0", (HARD,), (SOFT,)),
    ("method.reduction", "batchmean", (HARD,), (SOFT,)),
    ("method.distillation", "soft", (LEARNS_LABELS,), (HARD,)),
    ("method.smoothing", "0.4", (LEARNS_TEACHER,), (HARD,)),
    ("method.fuse", "softmax", ONE_HEAD, ()),
    ("model.drop_path_mode", "constant", ("model.drop_path=0",), ()),
    ("optim.warmup_lr", "1e-4", ("optim.warmup_epochs=0",), ()),
    ("optim.decay_dist_token", "true", ("optim.weight_decay=0",), ()),
    ("optim.decay_dist_token", "true", ONE_HEAD, ()),
    ("optim.decoupled_decay", "true", (f"optim={SGD[:-1]}, weight_decay: 0}}",), (f"optim={SGD}",)),
    ("train.eval_every", "0.5", ("train.eval_every_steps=1",), ()),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("idle") / "small.yaml"
    file.write_text(RECIPE)
    return file


def load(path, field, value, beside):
    """The recipe with the field set, or with its default where `value` is None."""
    given, (section, _, name) = list(beside), field.partition(".")
    if value is not None and given and given[0].startswith(f"{section}="):
        given[0] = of(given[0], **{name: value})
    elif value is not None:
        given.append(f"{field}={value}")
    return recipes.load(str(path), given)


def told(recipe, processes=1, device="cpu", evaluations=2):
    distilled = "distilled" in recipe.model.name
    return idle.notes(recipe, idle.Facts(1 + distilled, distilled, processes, device, evaluations))


@pytest.mark.parametrize(("field", "value", "beside", "awake"), CASES)
def test_what_has_no_effect_is_told_in_a_sentence(path, field, value, beside, awake):
    others = told(load(path, field, None, beside))  # nobody has asked for a default
    assert all(note.startswith("method.teacher ") for note in others)
    (note,) = set(told(load(path, field, value, beside))) - set(others)
    assert note.startswith(f"{field} ")
    assert " has no effect: " in note
    assert told(load(path, field, value, awake)) == []


ENGINE = [
    # field, its value, the processes and device of which it tells nothing
    ("parallel", "fsdp2", 2, "cpu"),
    ("reduce", "bf16", 2, "cpu"),
    ("sync_batchnorm", "true", 2, "cpu"),
    ("timeout_s", "5.0", 2, "cpu"),
    ("autotune", "'off'", 1, "cuda"),
]


@pytest.mark.parametrize(("field", "value", "processes", "device"), ENGINE)
def test_what_has_no_effect_on_these_processes_is_told(path, field, value, processes, device):
    recipe = recipes.load(str(path), [f"engine.{field}={value}"])
    (note,) = told(recipe)
    assert note.startswith(f"engine.{field} ")
    assert " has no effect: " in note
    assert told(recipe, processes, device) == []


def test_the_distillation_token_is_asked_of_the_model(path):
    """Not of its heads: a network may have two and no token, and a token and one head."""
    recipe = recipes.load(str(path), ["optim.decay_dist_token=true"])
    assert idle.notes(recipe, idle.Facts(1, True, 1, "cpu", 2)) == []
    (note,) = idle.notes(recipe, idle.Facts(2, False, 1, "cpu", 2))
    assert note == "optim.decay_dist_token true has no effect: the model has no distillation token"
    for name, notes in {"deit_digits_distilled_patch8_32": [], "deit_digits_patch8_32": [note]}.items():
        student = models.build(name)
        assert build.notes(recipe, 32, student, 1, torch.device("cpu"), anew=True) == notes


@pytest.mark.parametrize(
    ("evaluations", "limit", "words"),
    [
        (4, 2, None),
        (4, 3, "the run has 4 evaluations, and ends with the last"),
        (1, 1, "the run has 1 evaluation, and"),
    ],
)
def test_a_limit_on_evaluations_that_nothing_can_reach_is_told(path, evaluations, limit, words):
    """The first evaluation is a new best: `limit` others have to follow it, and the run has to go on after them."""
    found = told(recipes.load(str(path), [f"train.stop_after={limit}"]), evaluations=evaluations)
    if words is None:
        assert found == []
    else:
        assert found[0].startswith(f"train.stop_after {limit} has no effect: {words}")


@pytest.mark.slow
def test_they_change_nothing_indeed(path, tmp_path):
    """Of one process on a CPU. The network has BatchNorm, which several processes would synchronise."""
    given = [f"engine.{field}={value}" for field, value, *_ in ENGINE]
    weights = []
    for name, overrides in {"plain": [], "given": given}.items():
        training.alone(
            recipes.load(str(path), ["model.name=convnet_digits", "model.drop_path=0", *overrides]), tmp_path / name
        )
        (last,) = (tmp_path / name / "checkpoints").glob("step_00000004")
        weights.append({file.name: file.read_bytes() for file in last.glob("*.safetensors")})
    assert weights[0]
    assert weights[0] == weights[1]


class Backwards(Distill):
    """Somebody else's method, with the fields of ours."""

    class Config(DistillConfig):
        use: str = "tests.recipe.test_idle:Backwards"


def test_of_the_fields_of_other_methods_nothing_is_told(path):
    fields = "teacher: runs/x, alpha: 0, tau: 3"
    assert told(recipes.load(str(path), [f"method={{use: 'tests.recipe.test_idle:Backwards', {fields}}}"])) == []
    tau, teacher = told(recipes.load(str(path), [f"method={{use: distill, {fields}}}"]))
    assert tau.startswith("method.tau 3.0 has no effect: ")
    assert teacher.startswith("method.teacher has no effect: ")


class Answers:
    """A teacher whose answers are a function of the image's number."""

    def __init__(self, classes):
        self.classes = classes

    def __call__(self, batch):
        return torch.randn(len(batch.index), self.classes, generator=torch.Generator().manual_seed(7))


def effects(recipe):
    """All that the fields of CASES can change: batches, loss and answer, rates, what is decayed, evaluations."""
    source, world = build.sources(recipe)[0], World(torch.device("cpu"))
    length = build.run_length(recipe, len(source))
    seen = []
    for (batch,) in build.train_loader(recipe, source, world, {}, print).batches(0, 4):
        seen += [batch.pixels(), batch.targets.y1, batch.targets.y2, batch.targets.lam]
    method = build.method(recipe, build.model(recipe, 10, print), 10, length.total, lambda config: None, source)
    if hasattr(method, "teacher") and recipe.method.use == "distill":
        method.teacher = Answers(10)
    images = torch.from_numpy(rng.uniform(rng.key(0, "x"), range(8), 3 * 32 * 32)).float().view(8, 3, 32, 32)
    noise = {name: torch.rand(8, n, generator=torch.Generator().manual_seed(1)) for name, n in method.noise().items()}
    y = torch.arange(8)
    batch = Batch.ready(
        images,
        Labels(y, y.flip(0), torch.full((8,), 0.7)),
        Step.at(0, 1, 1),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        noise=noise,
    )
    with torch.no_grad():
        seen.append(method.train()(batch).loss)
        seen.append(next(iter(method.eval().predict(images).values())))
    weight = torch.nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    group = ParamGroup({"weight": weight}, recipe.optim.weight_decay)
    optimizers.find(recipe.optim.name)([group], recipe.optim).step(
        0.1, Verdict(torch.ones(()), torch.tensor(False), torch.ones(()))
    )
    seen.append(weight.detach())
    rates = [learning_rate(step, **schedule_of(recipe, length)) for step in range(length.total)]
    return seen, rates, [group.weight_decay and sorted(group.params) for group in decay_groups(method, recipe)], length


def same(one, other):
    return all(map(torch.equal, one[0], other[0])) and one[1:] == other[1:]


@pytest.mark.slow
@pytest.mark.parametrize(("field", "value", "beside", "awake"), CASES)
def test_what_is_told_is_true(path, field, value, beside, awake):
    assert same(effects(load(path, field, value, beside)), effects(load(path, field, None, beside)))
    assert not same(effects(load(path, field, value, awake)), effects(load(path, field, None, awake)))


ALWAYS = {
    "about": {"no training depends on it": {"summary", "command", "hardware", "hours", "top1", "follows"}},
    "model": {
        "it is what is trained": {"image_size", "num_classes", "drop_path", "dropout", "weights", "freeze"},
        "one of the two is refused": {"name", "timm"},
        "refused without weights": {"needs_weights"},
        "refused without drop-path": {"drop_path_skip"},
    },
    "data": {
        "it says what is read": {"source", "classes", "max_bad_fraction", "threads"},
        "refused where the source has no such thing": {"root", "train", "val", "image_column", "label_column"},
        "it is what is seen": {"size_schedule", "views", "repeats", "mean", "std", "eval_crop_ratio", "group_size"},
    },
    "optim": {
        "it is in the formula of the update": {"name", "lr", "weight_decay", "betas", "eps", "momentum", "clip_grad"},
        "refused without what it changes": {"clip_mode", "nesterov", "weight_decay_end"},
        "it is in the rate": {"schedule", "warmup_epochs", "min_lr", "layer_decay"},
        "it makes the average": {"ema_decay"},
    },
    "train": {
        "it is in the length or the batches": {"epochs", "steps", "batch_size", "accumulate", "seed"},
        "it says when to look, and what then follows": {"eval_every_steps", "best_by"},
    },
    "method": {"it is in the loss": {"use", "alpha", "class_weights", "binarise"}},
    "engine": {
        "it is how numbers are computed": {"device", "threads", "precision"},
        "refused where it cannot be, and auto says what it chose": {"capture"},
        "refused where the model has no such thing": {"checkpoint_blocks", "keep_activations", "products", "residual"},
        "it is what is written, and when": {"log_every", "checkpoint_every", "keep_checkpoints", "async_checkpoints"}
        | {"on_save_error", "sinks"},
        "it is what becomes of a step": {"on_spike"},
    },
}
"""Fields that count in every recipe, by the reason."""
OF_A_CASE = {
    *("data.augment", "data.crop", "data.erase", "data.synthetic_samples", "data.synthetic_classes"),
    *("method.loss", "method.teacher", "method.cached", "model.weights_grid", "train.stop_after"),
}
"""Fields of which `notes` knows a case like one of those that are tried."""


def test_every_field_has_been_decided_on():
    choices = {
        "method": [shipped.config for shipped in METHODS.values()],
        "optim": [sections.OptimConfig, *(shipped.options for shipped in OPTIMIZERS.values())],
    }
    tried = {*OF_A_CASE, *(field for field, *_ in CASES), *(f"engine.{field}" for field, *_ in ENGINE)}
    for section in describe.SECTIONS:
        models = choices.get(section, [recipes.Recipe.model_fields[section].annotation])
        always = [field for fields in ALWAYS[section].values() for field in fields]
        cases = {field.partition(".")[2] for field in tried if field.startswith(f"{section}.")}
        assert sorted(always) == sorted({name for model in models for name in model.model_fields} - cases)
        assert not set(always) & cases


PARTS = {
    TeacherConfig: {
        "one of them says who teaches, and others beside it are refused": {"recipe", "timm", "model", "weights"},
        "refused without weights, and of those that have no grid or say another": {"weights_grid"},
        "it is what the teacher sees": {"image_size", "mean", "std"},
    },
    ViewSettings: {
        "told beside a simple crop": {"crop_scale", "crop_ratio"},
        "refused beside crop_of": {"crop", "flip"},
        "refused beside a policy that changes the colours itself": {"color_jitter"},
        "it is what is seen": {"size", "augment", "erase"},
        "refused where no such view comes before": {"crop_of"},
    },
}
"""The same of the fields within `method.teacher` and `data.views.NAME`."""


def test_every_field_of_a_part_has_been_decided_on():
    for part, reasons in PARTS.items():
        assert sorted(field for fields in reasons.values() for field in fields) == sorted(part.model_fields)


@pytest.mark.parametrize("name", recipes.names())
def test_no_recipe_that_is_shipped_has_any(name):
    assert told(recipes.load(name)) == []
