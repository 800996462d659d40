"""Views: what a method asks for, what a recipe changes of it, and a method of two views through the whole loop."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from toys import toy_batch

from fastdeit import build, methods
from fastdeit import recipe as recipes
from fastdeit.batch import Batch
from fastdeit.config import DataConfig, ViewConfig
from fastdeit.engine.dist import World
from fastdeit.methods.base import Method, Out
from fastdeit.methods.supervised import Supervised
from fastdeit.train import train
from fastdeit.views import View, overridden

RECIPE = """\
model: {name: convnet_digits, image_size: 32}
method: {use: "test_methods_views:Pair"}
data:
  {source: digits, flip: 0.0, mixup: 0.2, group_size: 16, repeats: 1, threads: 1, erase: 0.25, eval_crop_ratio: 1.0,
   mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5], views: {jitter: {erase: 0.5}}}
optim: {lr: 1e-3, warmup_epochs: 0.5, min_lr: 1e-5}
train: {epochs: 1, batch_size: 256}
engine: {device: cpu, log_every: 1}
"""
CPU = World(torch.device("cpu"))


class Pair(Supervised):
    """The label of a clean view, and agreement with the same pixels under colour jitter."""

    views = (View("clean"), View("jitter", crop_of="clean", color_jitter=0.4))

    def forward(self, batch: Batch) -> Out:
        out = super().forward(batch)
        other = self.model(batch.pixels(view=1), noise=batch.noise["drop_path"])
        agreement = F.mse_loss(other, out.logits.detach())
        return Out(out.loss + agreement, out.logits, out.parts | {"agreement": agreement.detach()})


def test_what_a_view_leaves_open_is_as_below():
    data = DataConfig(crop="simple", flip=0.25, erase=0.1, augment="three_augment", color_jitter=0.2)
    said = View("a", size=96, flip=0.0).over(data)
    assert said == View("a", 96, "simple", (0.08, 1.0), 0.0, "three_augment", 0.2, 0.1)
    assert View("a", erase=0.0).over(View("b", size=64, erase=0.5, crop_of="c")) == View(
        "a", size=64, erase=0.0, crop_of="c"
    )


def test_colour_jitter_goes_with_the_policy():
    data = DataConfig(augment="three_augment", color_jitter=0.2)
    assert View(augment="none").over(data).color_jitter is None
    assert View(augment="none", color_jitter=0.4).over(data).color_jitter == 0.4
    assert View(color_jitter=0.4).over(data).augment == "three_augment"
    assert View(color_jitter=0.4).over(data).color_jitter == 0.4


def test_a_recipe_overrides_the_views_it_names():
    views = View("a", size=64, erase=0.5), View("b", crop_of="a"), View("c")
    changed = overridden(views, {"a": ViewConfig(size=96), "b": ViewConfig(augment="trivial", color_jitter=None)})
    assert changed == (View("a", size=96, erase=0.5), View("b", crop_of="a", augment="trivial"), View("c"))


WRONG_VIEWS = {
    "no name": ((View("a b"),), "view 'a b' of method Wrong: name must consist of letters, digits and _"),
    "one name twice": ((View(), View()), "view 'main' of method Wrong: name is that of an earlier view"),
    "crop of none": ((View(crop_of="b"),), r"crop_of must name a view before main \(it is the first\), got 'b'"),
    "crop of a later one": ((View("a"), View("b", crop_of="c"), View("c")), r"a view before b \(a\), got 'c'"),
    "crop of itself": ((View("a"), View("b", crop_of="b")), r"a view before b \(a\), got 'b'"),
    "crop twice": (
        (View("a"), View("b", crop_of="a", flip=0.0)),
        "flip has no place beside crop_of: crop and flip are",
    ),
}


@pytest.mark.parametrize("case", WRONG_VIEWS)
def test_views_that_do_not_go_together_are_refused_where_the_method_is_defined(case):
    views, words = WRONG_VIEWS[case]
    with pytest.raises(ValueError, match=words):
        type("Wrong", (Method,), {"views": views})


def test_shipped_methods_want_one_view():
    assert [methods.find(name).views for name in methods.METHODS] == [(View(),)] * len(methods.METHODS)


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
    assert len(agreement) == 5
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
