"""The way of an augmentation from the recipe to the model's input."""

import warnings

import pytest
import torch

from fastdeit import build
from fastdeit import recipe as recipes
from fastdeit.data import plan
from fastdeit.engine.dist import World

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
    """The first batch under these overrides, and the samples it was made of."""

    def batch_of(*overrides):
        recipe = recipes.load(path, overrides)
        source, _ = build.sources(recipe)
        loader = build.train_loader(recipe, source, CPU, 0, warnings.warn)
        ((samples,),) = loader.batches(0, 1)
        return build.to_batch(samples, recipe, CPU.device), samples

    return batch_of


def inside(boxes, height, width):
    y, x = torch.arange(height)[:, None], torch.arange(width)
    y0, x0, y1, x1 = (side[:, None, None] for side in boxes.unbind(1))
    return (y >= y0) & (y < y1) & (x >= x0) & (x < x1)


def test_erased_pixels_are_noise_and_the_rest_is_untouched(batch_of):
    batch, samples = batch_of("data.erase=1", "data.mixup=0", "data.cutmix=0")
    plain, _ = batch_of("data.mixup=0", "data.cutmix=0")
    assert plain.erase is None
    assert torch.equal(batch.images[0], plain.images[0])
    where = inside(samples.erase_box, 32, 32)[:, None].expand(-1, 3, -1, -1)
    assert 0.02 < where.float().mean() < 0.34
    x = batch.pixels()
    assert torch.equal(x[~where], plain.pixels()[~where])
    noise = x[where]
    assert abs(noise.mean()) < 5 / len(noise) ** 0.5
    assert abs(noise.std() - 1) < 5 / (2 * len(noise)) ** 0.5


def test_a_teacher_sees_the_same_erasure(batch_of):
    batch, samples = batch_of("data.erase=1", "data.mixup=0", "data.cutmix=0")
    where = inside(samples.erase_box, 32, 32)[:, None].expand(-1, 3, -1, -1)
    student, teacher = batch.pixels(), batch.pixels(mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5))
    assert torch.equal(student[where], teacher[where])
    assert not torch.equal(student[~where], teacher[~where])
    patches = batch.patches(16).reshape(16, 2, 2, 3, 16, 16).permute(0, 3, 1, 4, 2, 5).reshape(16, 3, 32, 32)
    assert torch.equal(patches, student)


def test_every_field_reaches_the_plan(path):
    overrides = ["data.crop=simple", "data.augment=three_augment", "data.color_jitter=0.2", "data.mix_mode=pair"]
    augment = build.augmentation(recipes.load(path, [*overrides, "data.erase=0.1", "model.image_size=[48, 32]"]))
    assert (augment.crop, augment.erase, augment.mix_mode) == ("simple", 0.1, "pair")
    assert (augment.policy.size, augment.policy.layers, augment.policy.jitter) == ((48, 32), 1, (0.2, 0.2, 0.2, 0.0))


def test_the_batch_holds_the_planned_mixing_and_erasure(batch_of):
    batch, samples = batch_of("data.erase=0.5", "data.mix_mode=element", "data.augment=rand-m9-mstd0.5-inc1")
    augment = plan.Augment(size=(32, 32), group_size=8, erase=0.5, mix_mode="element")
    size = torch.full((16,), 32)
    view = plan.samples(augment, 0, 0, samples.index.numpy(), torch.zeros(16).long().numpy(), size, size)
    assert batch.erase[0].tolist() == view.erase_box.tolist()
    assert batch.erase[1].tolist() == view.erase_key.tolist()
    assert batch.lam.tolist() == plan.mix(augment, 0, 0, slice(0, 2)).lam.tolist()
    assert len(set(batch.lam.tolist())) > 8
