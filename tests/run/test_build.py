"""The way of an augmentation from the recipe to the model's input."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from fastdeit import models
from fastdeit.data.plan import plan
from fastdeit.data.sources.packed import pack
from fastdeit.data.sources.source import DataError
from fastdeit.data.sources.synthetic import SyntheticSource
from fastdeit.engine.clip import UnitClipping
from fastdeit.engine.dist import World
from fastdeit.errors import UsageError
from fastdeit.methods.config import SupervisedConfig
from fastdeit.methods.evaluators import HeldOutLoss, Knn
from fastdeit.methods.supervised import Supervised
from fastdeit.recipe import resolve as recipes
from fastdeit.run import build
from fastdeit.views import View

RECIPE = """\
model: {name: deit_tiny_patch16_224, image_size: 32}
method: {use: supervised}
data: {source: synthetic, synthetic_samples: 32, synthetic_classes: 4, group_size: 8, repeats: 1, threads: 1}
optim: {lr: 1e-3}
train: {epochs: 10, batch_size: 16}
"""
CPU = World(torch.device("cpu"))


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE)
    return str(file)


@pytest.fixture
def batch_of(path):
    """The first batch under these overrides."""

    def batch_of(*overrides):
        recipe = recipes.load(path, overrides)
        source, _ = build.sources(recipe)
        loader = build.train_loader(recipe, source, CPU, {}, warnings.warn)
        ((batch,),) = loader.batches(0, 1)
        return batch

    return batch_of


def inside(boxes, height, width):
    y, x = torch.arange(height)[:, None], torch.arange(width)
    y0, x0, y1, x1 = (side[:, None, None] for side in boxes.unbind(1))
    return (y >= y0) & (y < y1) & (x >= x0) & (x < x1)


def test_erased_pixels_are_noise_and_the_rest_is_untouched(batch_of):
    batch = batch_of("data.erase=1", "data.mixup=0", "data.cutmix=0")
    plain = batch_of("data.mixup=0", "data.cutmix=0")
    assert plain.erase == (None,)
    assert torch.equal(batch.images[0], plain.images[0])
    where = inside(batch.erase[0][0], 32, 32)[:, None].expand(-1, 3, -1, -1)
    assert 0.02 < where.float().mean() < 0.34
    x = batch.pixels()
    assert torch.equal(x[~where], plain.pixels()[~where])
    noise = x[where]
    assert abs(noise.mean()) < 5 / len(noise) ** 0.5
    assert abs(noise.std() - 1) < 5 / (2 * len(noise)) ** 0.5


def test_a_teacher_sees_the_same_erasure(batch_of):
    batch = batch_of("data.erase=1", "data.mixup=0", "data.cutmix=0")
    where = inside(batch.erase[0][0], 32, 32)[:, None].expand(-1, 3, -1, -1)
    student, teacher = batch.pixels(), batch.pixels(mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5))
    assert torch.equal(student[where], teacher[where])
    assert not torch.equal(student[~where], teacher[~where])
    patches = batch.patches(16).reshape(16, 2, 2, 3, 16, 16).permute(0, 3, 1, 4, 2, 5).reshape(16, 3, 32, 32)
    assert torch.equal(patches, student)


def test_every_field_reaches_the_plan(path):
    overrides = ["data.crop=simple", "data.augment=three_augment", "data.color_jitter=0.2", "data.mix_mode=pair"]
    recipe = recipes.load(path, [*overrides, "data.erase=0.1", "model.image_size=[48, 32]"])
    (augment,) = build.augmentations(recipe)
    assert (augment.crop, augment.erase) == ("simple", 0.1)
    assert build.mixing(recipe) == plan.Mixing(group_size=8, mix_mode="pair")
    assert (augment.policy.size, augment.policy.layers, augment.policy.jitter) == ((48, 32), 1, (0.2, 0.2, 0.2, 0.0))


class MultiCrop(Supervised):
    class Config(SupervisedConfig):
        def views(self):
            return (
                View("global_0", crop_scale=(0.4, 1.0)),
                View("global_1", crop_scale=(0.4, 1.0), erase=0.2),
                View("local_0", size=16, crop_scale=(0.05, 0.4), augment="none"),
                View("local_1", size=16, crop_scale=(0.05, 0.4), augment="none"),
                View("teacher", crop_of="local_1"),
            )


def test_views_of_a_method_reach_the_plan(path):
    augment = ["data.augment=three_augment", "data.color_jitter=0.2", "data.erase=0.1", "data.flip=0.3"]
    views = ["data.views.local_0={size: 24, flip: 0.5}", "data.views.global_0.erase=0"]
    made = build.augmentations(recipes.load(path, ["method.use=tests.run.test_build:MultiCrop", *augment, *views]))
    assert [view.size for view in made] == [(32, 32), (32, 32), (24, 24), (16, 16), (32, 32)]
    assert [view.crop_scale for view in made] == [(0.4, 1.0)] * 2 + [(0.05, 0.4)] * 3
    assert [view.flip for view in made] == [0.3, 0.3, 0.5, 0.3, 0.3]
    assert [view.erase for view in made] == [0, 0.2, 0.1, 0.1, 0.1]
    assert [view.policy.jitter[0] for view in made] == [0.2, 0.2, 0, 0, 0.2]
    assert [view.policy.size for view in made] == [view.size for view in made]
    assert [view.stream for view in made] == ["", "global_1", "local_0", "local_1", "teacher"]
    assert [view.crop_stream for view in made] == ["", "global_1", "local_0", "local_1", "local_1"]


def test_views_of_a_method_reach_the_model(batch_of):
    batch = batch_of("method.use=tests.run.test_build:MultiCrop")
    assert [batch.pixels(view).shape[-1] for view in range(5)] == [32, 32, 16, 16, 32]
    assert [erase is None for erase in batch.erase] == [True, False, True, True, True]
    assert batch.box.shape == (5, 16, 4)
    assert torch.equal(batch.images[0], batch_of("data.crop_scale=[0.4, 1.0]").images[0])


def test_a_simple_crop_is_shared_at_its_size_only(path):
    simple = ["method.use=tests.run.test_build:MultiCrop", "data.crop=simple"]
    with pytest.raises(
        recipes.RecipeError, match=r"teacher.crop_of: gives a view of 32 x 32 pixels the crop of view local_1, a simple"
    ):
        recipes.load(path, simple)
    assert len(build.augmentations(recipes.load(path, [*simple, "data.views.teacher.size=16"]))) == 5


def test_the_batch_holds_the_planned_mixing_and_erasure(batch_of):
    batch = batch_of("data.erase=0.5", "data.mix_mode=element", "data.augment=rand-m9-mstd0.5-inc1")
    augment, mixing = plan.Augment(size=(32, 32), erase=0.5), plan.Mixing(group_size=8, mix_mode="element")
    size = torch.full((16,), 32)
    view = plan.samples(augment, 0, 0, batch.index.numpy(), torch.zeros(16).long().numpy(), size, size)
    assert batch.erase[0][0].tolist() == view.erase_box.tolist()
    assert batch.erase[0][1].tolist() == view.erase_key.tolist()
    assert batch.targets.lam.tolist() == plan.mix(mixing, (32, 32), 0, 0, slice(0, 2)).lam.tolist()
    assert len(set(batch.targets.lam.tolist())) > 8


FOLDER = RECIPE.replace("source: synthetic, synthetic_samples: 32, synthetic_classes: 4", "source: folder")


@pytest.fixture
def data(tmp_path):
    """(recipe, root) with 8 training and 4 held-out images as class folders."""
    (tmp_path / "r.yaml").write_text(FOLDER)
    source = SyntheticSource(8, classes=4, size=(16, 16))
    for split, count in (("train", 8), ("val", 4)):
        for i in range(count):
            path = tmp_path / "images" / split / source.classes[source.label(i)] / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(source.read(i)))
    return str(tmp_path / "r.yaml"), tmp_path / "images"


def test_a_packed_data_set_is_read_as_the_folder_it_was_made_of(data, tmp_path):
    path, root = data
    before = build.sources(recipes.load(path, [f"data.root={root}"]))
    for split, source in zip(("train", "val"), before, strict=True):
        pack(source, tmp_path / f"{split}.pack")
    after = build.sources(recipes.load(path, ["data.source=packed", f"data.root={tmp_path}"]))
    assert [source.fingerprint for source in after] == [source.fingerprint for source in before]
    assert [len(source) for source in after] == [8, 4]


def own_reader(root, split):
    return SyntheticSource({"fit": 8, "val": 4}[split], classes=4, size=(16, 16))


def test_a_reader_of_ones_own_is_named_by_its_import_path(data):
    path, root = data
    own = ["data.source=tests.run.test_build:own_reader", "data.train=fit"]
    train, held_out = build.sources(recipes.load(path, [*own, f"data.root={root}"]))
    assert (len(train), len(held_out)) == (8, 4)
    with pytest.raises(DataError, match=r"data\.source tests.run.test_build:own_reader: nowhere: no such directory"):
        build.sources(recipes.load(path, [*own, "data.root=nowhere"]))
    with pytest.raises(
        DataError,
        match=r"data\.source tests.run.test_build:no: .* cannot be imported: module 'tests.run.test_build' has no",
    ):
        build.sources(recipes.load(path, ["data.source=tests.run.test_build:no", f"data.root={root}"]))


def test_splits_of_other_names(data):
    path, root = data
    (root / "train").rename(root / "fit")
    train, _ = build.sources(recipes.load(path, [f"data.root={root}", "data.train=fit"]))
    assert len(train) == 8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.root=nowhere"], "data.source folder: nowhere: no such directory; the expected layout is ROOT/train/"),
        (["data.root=images", "data.val=test"], "data.source folder: images: no subfolder 'test'"),
        (["data.root=images", "data.source=packed"], "it looks like folder: add data.source=folder"),
        (["data.root=empty", "data.source=tar"], "data.source tar: empty: no tar file train/*.tar or train-*.tar"),
        (["data.root=empty", "data.source=tar"], "; expected are ROOT/train/*.tar and ROOT/val/*.tar"),
        (["data.root=empty", "data.source=cifar10", "data.train=fit"], "has the splits train and val, not 'fit'"),
        (["data.root=packed"], "it looks like packed: add data.source=packed"),
    ],
)
def test_what_is_no_data_set_names_field_path_and_layout(data, tmp_path, monkeypatch, overrides, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "train.pack").touch()
    with pytest.raises(DataError) as refused:
        build.sources(recipes.load(data[0], overrides))
    assert message in str(refused.value)


def test_no_data_at_all_names_field_and_layout(data):
    with pytest.raises(
        UsageError, match=r"add --data ROOT, which sets data\.root; data\.source is tar, expected are ROOT"
    ):
        build.sources(recipes.load(data[0], ["data.source=tar"]))


class JudgedByItsLoss(MultiCrop):
    def evaluators(self):
        return {"loss": HeldOutLoss()}


class WithExtras(Supervised):
    evaluators = JudgedByItsLoss.evaluators

    @classmethod
    def needs(cls, config):
        return {"answers": None}


@pytest.mark.parametrize(("kind", "what"), [("JudgedByItsLoss", r"5 views"), ("WithExtras", r"extras \(answers\)")])
def test_a_loss_that_held_out_images_cannot_have_is_refused_at_the_start(path, student, kind, what):
    recipe = recipes.load(path, [f"method.use=tests.run.test_build:{kind}"])
    with pytest.raises(UsageError, match=f"HeldOutLoss, but its loss wants {what} of a sample"):
        build.method(recipe, student(), 4, 10, None)


class JudgedByNeighbours(Supervised):
    def evaluators(self):
        return {"neighbours": Knn()}


class WithFeatures(JudgedByNeighbours):
    def features(self, x):
        return x.flatten(1)


def test_features_that_nothing_has_are_missed_at_the_start(path):
    def made(kind):
        recipe = recipes.load(path, [f"method.use=tests.run.test_build:{kind}"])
        return build.method(recipe, models.build("convnet_digits"), 10, 10, None)

    with pytest.raises(UsageError, match=r"Knn, which reads features, but ConvNet has no tokens .* override features"):
        made("JudgedByNeighbours")
    made("WithFeatures")


def test_metrics_of_a_model_without_linear_heads_are_not_known_before(path):
    recipe, model = recipes.load(path), models.build("convnet_digits")
    model.head_names = ()
    assert build.known_metrics(build.method(recipe, model, 4, 10, None)) is None


class Averages(Supervised):
    """A method with two averaged teachers, kept as `keep` has it."""

    keep = list

    def __init__(self, model, config, context):
        super().__init__(model, config, context)
        self.averages = self.keep([context.ema_teacher(model, 0.9), context.ema_teacher(model.head, 0.99)])


class Kept(Averages):
    keep = torch.nn.ModuleList


def test_an_averaged_teacher_that_the_engine_would_not_find_is_refused(path):
    def made(name):
        recipe = recipes.load(path, [f"method.use=tests.run.test_build:{name}"])
        return build.method(recipe, build.model(recipe, 4, print), 4, 1, None)

    with pytest.raises(
        UsageError, match=r"tests.run.test_build:Averages: what ema_teacher\(\) returns must be an attribute"
    ):
        made("Averages")
    assert len(made("Kept").averages) == 2


def test_a_batch_knows_its_place_in_the_run(path):
    """Ten epochs of two steps."""
    recipe = recipes.load(path, ["train.accumulate=2"])
    source, _ = build.sources(recipe)
    for batch in next(build.train_loader(recipe, source, CPU, {}, warnings.warn).batches(13, 14)):
        assert (batch.step.number.item(), batch.step.epoch.item(), batch.step.progress.item()) == (13, 6, 13 / 20)


# ---- noise in the model, and activations -----------------------------------------------------------------------------


@pytest.fixture
def student(path):
    """The model of the recipe under these overrides."""
    return lambda *overrides: build.model(recipes.load(path, overrides), 4, lambda line: None)


def test_the_model_gets_what_the_recipe_says_of_its_noise(student):
    config = student("model.drop_path=0.3", "model.drop_path_mode=constant", "model.dropout=0.2").config
    assert (config.drop_path, config.drop_path_mode, config.dropout) == (0.3, "constant", 0.2)
    third = "model.name=deit3_tiny_patch16_224", "model.image_size=16", "model.drop_path=0.3"
    cases = ["model.drop_path=0.3"], third, [*third, "model.drop_path_mode=linear"]
    modes = [student(*overrides).config.drop_path_mode for overrides in cases]
    assert modes == ["linear", "constant", "linear"]  # the model's own, unless the recipe says another
    of_timm = student("model.timm=test_vit", "model.dropout=0.2", "model.drop_path=0.3")
    assert of_timm.inner.head_drop.p == 0.2
    assert of_timm.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)


def test_blocks_are_computed_again_where_the_recipe_says_so(student):
    ours, timms = (student("engine.checkpoint_blocks=true", *more) for more in ((), ("model.timm=test_vit",)))
    for made in (ours, timms):
        calls = []
        made.train().blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        made(torch.randn(1, 3, 32, 32)).sum().backward()
        assert len(calls) == 2


def test_the_residual_stream_has_the_type_of_the_recipe(student):
    for words, dtype in (((), torch.float32), (("engine.precision=bf16", "engine.residual=bf16"), torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16):
            assert student(*words).tokens(torch.randn(1, 3, 32, 32), stop=1).dtype == dtype


def test_products_of_training_are_of_8_bits_where_the_recipe_says_so(student, monkeypatch):
    """In all blocks but the last one, of which the head reads one token."""
    layers = []
    monkeypatch.setattr(
        "fastdeit.kernels.fp8_linear", lambda x, weight, bias: layers.append(1) or F.linear(x, weight, bias)
    )
    monkeypatch.setattr("fastdeit.kernels.fp8_mlp", lambda x, *_: layers.append(2) or x)
    for words, expected in (((), []), (("engine.products=fp8", "engine.precision=bf16"), [1, 1, 2])):
        made = student(*words)
        for training in (False, True):
            made.train(training)(torch.zeros(1, 3, *made.config.image_size))
            assert layers == (expected * (made.config.depth - 1) if training else [])
        layers.clear()


def test_dropped_samples_are_skipped_in_groups_of_the_recipe(student):
    words = "model.drop_path=0.4", "data.group_size=6", "data.mixup=0", "data.cutmix=0", "train.batch_size=12"
    for made, expected in ((student(*words, "model.drop_path_skip=true"), 8), (student(*words), 12)):
        computed = []
        made.train().blocks[-1].mlp.register_forward_pre_hook(
            lambda _, args, found=computed: found.append(len(args[0]))
        )
        made(torch.zeros(12, 3, *made.config.image_size), torch.rand(12, made.noise_per_sample))
        assert computed == [expected]  # of 6 samples round(2.4) drop the last branches


def test_activations_are_kept_where_the_recipe_says_so(student, monkeypatch):
    asked = []
    monkeypatch.setattr("fastdeit.kernels.mlp", lambda x, *_, recompute: asked.append(recompute) or x)
    for made in (student(), student("engine.keep_activations=true")):
        made(torch.randn(1, 3, 32, 32))
    depth = len(asked) // 2
    assert asked == [True] * depth + [False] * depth


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.name=convnet_digits", "model.dropout=0.1"], "model: convnet_digits has no option 'dropout'"),
        (["model.name=convnet_digits", "model.drop_path_mode=constant"], "has no option 'drop_path_mode'"),
        (
            ["model.name=convnet_digits", "engine.checkpoint_blocks=true"],
            r"engine.checkpoint_blocks: ConvNet has no set_grad_checkpointing\(enable\)",
        ),
        (
            ["model.name=convnet_digits", "engine.keep_activations=true"],
            r"engine.keep_activations: ConvNet has no set_keep_activations\(enable\): nothing of it is made again",
        ),
        (
            ["model.name=convnet_digits", "engine.residual=bf16", "engine.precision=bf16"],
            r"engine.residual bf16: ConvNet has no set_residual\(dtype\); use fp32",
        ),
        (
            ["model.name=convnet_digits", "engine.products=fp8", "engine.precision=bf16"],
            r"engine.products fp8: ConvNet has no set_fp8_products\(enable\); use engine.products=precision",
        ),
        (
            ["model.drop_path_skip=true", "model.drop_path=0.01"],
            r"model.drop_path_skip: with groups of data.group_size, of \d+ samples none would lose a branch at "
            r"drop_path 0.01; use larger groups",
        ),
        (
            ["model.timm=test_vit", "engine.checkpoint_blocks=true", "engine.capture=graph"],
            "engine.checkpoint_blocks: timm's models .* use none or compile",
        ),
    ],
)
def test_what_a_model_cannot_do_is_refused(student, overrides, words):
    with pytest.raises(UsageError, match=words):
        student(*overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["engine.residual=bf16", "engine.precision=fp32"], "bf16 needs engine.precision bf16, not fp32"),
        (["engine.capture=graph", "engine.device=cpu"], "engine.capture: graph needs a GPU, and engine.device is cpu"),
        (
            ["engine.products=fp8", "engine.precision=fp16"],
            "products in bf16: it needs engine.precision bf16, not fp16",
        ),
        (
            ["engine.products=fp8", "engine.precision=fp32"],
            "products in bf16: it needs engine.precision bf16, not fp32",
        ),
        (
            ["engine.products=fp8", "engine.precision=bf16", "engine.keep_activations=true"],
            "engine.products: fp8 makes the activations of the MLPs again; use engine.keep_activations=false",
        ),
        (
            ["engine.keep_activations=true", "engine.checkpoint_blocks=true"],
            "engine.keep_activations: has no effect beside engine.checkpoint_blocks",
        ),
    ],
)
def test_settings_of_the_engine_that_exclude_each_other_are_refused_with_the_recipe(path, overrides, words):
    """So that a plan and a dry run refuse them as well."""
    with pytest.raises(recipes.RecipeError, match=words):
        recipes.load(path, overrides)


def test_a_model_without_checkpointing_in_timm_is_refused(student, monkeypatch):
    monkeypatch.setattr("timm.models.vision_transformer.VisionTransformer.set_grad_checkpointing", _cannot)
    with pytest.raises(UsageError, match="timm's test_vit cannot compute its activations again: not supported"):
        student("model.timm=test_vit", "engine.checkpoint_blocks=true")


def _cannot(self, enable=True):
    assert not enable, "not supported"


def test_clipping_is_by_norm_or_by_unit_without_the_heads(path, student):
    def clipping(*overrides):
        recipe = recipes.load(path, overrides)
        return build.clipping(recipe, student("model.name=deit_tiny_distilled_patch16_224"))

    assert clipping() == {"clip_grad": None}
    assert clipping("optim.clip_grad=2.0") == {"clip_grad": 2.0}
    agc = clipping("optim.clip_mode=agc", "optim.clip_grad=0.01")
    assert agc == {"clip_units": UnitClipping(0.01, ["model.head", "model.head_dist"])}
