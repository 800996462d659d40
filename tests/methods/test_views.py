"""Views: what a method asks for, what a recipe changes of it, and a method of two views through the whole loop."""

import json
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

from fastdeit import methods
from fastdeit.batch import Batch
from fastdeit.engine.dist import World
from fastdeit.methods.base import Out
from fastdeit.methods.config import LabelConfig, SupervisedConfig
from fastdeit.methods.supervised import Supervised
from fastdeit.recipe import resolve as recipes
from fastdeit.recipe.config import DataConfig
from fastdeit.recipe.resolve import RecipeError
from fastdeit.run import build
from fastdeit.training import train
from fastdeit.views import View, ViewSettings, overridden, resolved
from tests.toys import toy_batch

RECIPE = """\
model: {name: convnet_digits, image_size: 32}
method: {use: "tests.methods.test_views:Pair"}
data:
  {source: synthetic, synthetic_samples: 64, synthetic_classes: 10, flip: 0.0, mixup: 0.2, group_size: 8, repeats: 1,
   threads: 1, erase: 0.25, eval_crop_ratio: 1.0, views: {jitter: {erase: 0.5}}}
optim: {lr: 1e-3, warmup_epochs: 0.5, min_lr: 1e-5}
train: {epochs: 1, batch_size: 16}
engine: {device: cpu, log_every: 1}
"""
CPU = World(torch.device("cpu"))


class Pair(Supervised):
    """The label of a clean view, and agreement with the same pixels under colour jitter."""

    class Config(SupervisedConfig):
        def views(self):
            return View("clean"), View("jitter", crop_of="clean", color_jitter=0.4)

    def forward(self, batch: Batch) -> Out:
        out = super().forward(batch)
        other = self.model(batch.pixels(view=1), noise=batch.noise["drop_path"])
        agreement = F.mse_loss(other, out.logits.detach())
        return Out(out.loss + agreement, out.logits, out.parts | {"agreement": agreement.detach()})


class Crops(Supervised):
    """Two large crops and as many small ones as the recipe says."""

    class Config(LabelConfig):
        local_crops: int = 2
        local_size: int | tuple[int, int] = 16

        def views(self):
            large = [View(f"global_{i}", crop_scale=(0.4, 1.0)) for i in range(2)]
            small = {"size": self.local_size, "crop_scale": (0.05, 0.4), "augment": "none"}
            return [*large, *(View(f"local_{i}", **small) for i in range(self.local_crops))]


def test_what_a_view_leaves_open_is_as_below():
    data = DataConfig(crop="simple", flip=0.25, erase=0.1, augment="three_augment", color_jitter=0.2)
    (whole,) = resolved([View("a", size=96, flip=0.0)], data, (224, 160))
    assert whole == View(
        "a",
        size=(96, 96),
        crop="simple",
        crop_scale=data.crop_scale,
        crop_ratio=data.crop_ratio,
        flip=0.0,
        augment="three_augment",
        color_jitter=0.2,
        erase=0.1,
    )
    assert resolved([View()], data, (224, 160))[0].size == (224, 160)
    below = View("b", size=64, erase=0.5, crop_of="c")
    assert View("a", erase=0.0).over(below) == View("a", size=64, erase=0.0, crop_of="c")


def test_a_shared_crop_is_that_of_the_other_view():
    views = View("a", crop_scale=(0.4, 1.0), crop_ratio=(1.0, 1.0), flip=0.0), View("b", size=96, crop_of="a")
    a, b = resolved(views, DataConfig(), 224)
    assert (b.crop, b.crop_scale, b.crop_ratio, b.flip, b.size) == (a.crop, (0.4, 1.0), (1.0, 1.0), 0.0, (96, 96))


def test_colour_jitter_goes_with_the_policy():
    data = DataConfig(augment="three_augment", color_jitter=0.2)
    assert View(augment="none").over(data).color_jitter is None
    assert View(augment="none", color_jitter=0.4).over(data).color_jitter == 0.4
    assert View(color_jitter=0.4).over(data).augment == "three_augment"
    assert View(color_jitter=0.4).over(data).color_jitter == 0.4


def test_a_recipe_overrides_the_views_it_names():
    views = View("a", size=64, erase=0.5), View("b", crop_of="a"), View("c")
    changed = overridden(views, {"a": ViewSettings(size=96), "b": ViewSettings(augment="trivial", color_jitter=None)})
    assert changed == (View("a", size=96, erase=0.5), View("b", crop_of="a", augment="trivial"), View("c"))


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 0},
        {"size": (96, 0)},
        {"crop_scale": (0.5, 1.5)},
        {"augment": "randaug"},
        {"zise": 96},
        {"flip": 2},
        {"augment": "rand-m9", "color_jitter": 0.4},
    ],
)
def test_settings_that_cannot_be_are_refused_where_they_are_written(settings):
    with pytest.raises(ValueError, match=list(settings)[-1]):
        View("a", **settings)


WRONG_VIEWS = {
    "no name": (
        [("a b", {})],
        "view 'a b' of method tests.methods.test_views:Wrong: name must consist of letters, digits",
    ),
    "one name twice": ([("main", {}), ("main", {})], "view 'main' of method"),
    "crop of none": ([("main", {"crop_of": "b"})], "crop_of must name a view before main (it is the first), got 'b'"),
    "crop of a later one": ([("a", {}), ("b", {"crop_of": "c"}), ("c", {})], "a view before b (a), got 'c'"),
    "crop of itself": ([("a", {}), ("b", {"crop_of": "b"})], "a view before b (a), got 'b'"),
    "crop twice": (
        [("a", {}), ("b", {"crop_of": "a", "flip": 0.0})],
        "flip does not go with crop_of: crop and flip are",
    ),
    "size": ([("a", {"size": 0})], "asks for a view that cannot be: size must be at least 1, got 0"),
}


class Wrong(Supervised):
    class Config(SupervisedConfig):
        wanted: ClassVar = []

        def views(self):
            return [View(name, **settings) for name, settings in self.wanted]


@pytest.mark.parametrize("case", WRONG_VIEWS)
def test_a_method_whose_views_do_not_go_together_is_refused_at_its_line(load, monkeypatch, case):
    wanted, words = WRONG_VIEWS[case]
    monkeypatch.setattr(Wrong.Config, "wanted", wanted)
    with pytest.raises(RecipeError) as refused:
        load("method.use=tests.methods.test_views:Wrong")
    (message,) = str(refused.value).splitlines()
    assert message.startswith("override 'method.use=tests.methods.test_views:Wrong': method: ")
    assert words in message


def test_the_recipe_sets_number_and_size_of_crops(load):
    """And a further crop changes nothing of those before it."""

    def samples(*overrides):
        recipe = load("method.use=tests.methods.test_views:Crops", *overrides)
        loader = build.train_loader(recipe, build.sources(recipe)[0], CPU, {}, print)
        ((samples,),) = loader.batches(0, 1)
        return samples

    few, many = samples("method.local_size=[16, 24]"), samples("method.local_size=[16, 24]", "method.local_crops=5")
    assert [tuple(view.shape[1:3]) for view in few.images] == [(32, 32)] * 2 + [(16, 24)] * 2
    assert [tuple(view.shape[1:3]) for view in many.images] == [(32, 32)] * 2 + [(16, 24)] * 5
    assert all(torch.equal(*pair) for pair in zip(few.images, many.images[:4], strict=True))
    assert torch.equal(few.box, many.box[:4])
    assert len({view.numpy().tobytes() for view in many.images}) == 7
    (other, *_) = samples("method.local_crops=0", "data.views.global_1={size: [20, 40]}").images[1:]
    assert tuple(other.shape[1:3]) == (20, 40)


def test_a_view_that_the_configuration_leaves_out_is_refused_at_its_line(load):
    with pytest.raises(RecipeError) as refused:
        load("method.use=tests.methods.test_views:Crops", "method.local_crops=3", "data.views.local_3.size=24")
    assert str(refused.value).startswith("override 'data.views.local_3.size=24': data.views.local_3: is no view")
    assert "did you mean local_" in str(refused.value)


def test_shipped_methods_want_one_view():
    configs = [method.config.model_construct(use=name) for name, method in methods.METHODS.items()]
    assert [config.views() for config in configs] == [(View(),)] * len(methods.METHODS)


def test_each_view_is_rendered_with_its_own_box_and_erasure():
    generator = torch.Generator().manual_seed(0)
    images = tuple(
        torch.randint(0, 256, (4, side, side, 3), dtype=torch.uint8, generator=generator) for side in (16, 8)
    )
    boxes = torch.tensor([[[2, 2, 12, 16]] * 4, [[1, 1, 6, 8]] * 4], dtype=torch.int32)
    erase = torch.tensor([[0, 0, 4, 4]] * 4, dtype=torch.int32), torch.arange(4)
    lam = torch.full((4,), 0.6)
    there, back = torch.arange(4), torch.arange(4).flip(0)
    both = toy_batch(images, there, y2=back, lam=lam, partner=back, box=boxes, erase=(None, erase))
    for view in (0, 1):
        alone = replace(both, images=images[view : view + 1], box=boxes[view : view + 1], erase=(both.erase[view],))
        assert both.pixels(view).shape == (4, 3, *images[view].shape[1:3])
        assert torch.equal(both.pixels(view), alone.pixels())
        assert torch.equal(both.patches(4, view), alone.patches(4))
    assert not torch.equal(both.pixels(1), replace(both, erase=None).pixels(1))


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDEIT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "pair.yaml"
    path.write_text(RECIPE)
    return lambda *overrides: recipes.load(str(path), overrides)


def test_a_method_of_two_views_is_trained_by_the_loop(load, tmp_path):
    summary = train(load(), tmp_path / "run", CPU, resume=False)
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    agreement = [line["agreement"] for line in lines if line["kind"] == "train"]
    assert len(agreement) == 4
    assert min(agreement) > 0
    assert 0 < summary["train_loss"] < 3


@pytest.mark.parametrize(
    ("overrides", "same"), [(["views.jitter={augment: none, erase: 0}", "erase=0"], True), ([], False)]
)
def test_a_recipe_decides_how_views_differ(load, overrides, same):
    recipe = load(*(f"data.{override}" for override in overrides))
    loader = build.train_loader(recipe, build.sources(recipe)[0], CPU, {}, print)
    ((batch,),) = loader.batches(0, 1)
    assert torch.equal(batch.pixels(0), batch.pixels(1)) is same
