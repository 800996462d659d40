"""Weights that are noise around a number, of small models, and runs of them."""

from dataclasses import replace
from functools import cache

import torch

from fastdeit import models
from fastdeit.engine import checkpoint
from fastdeit.models.vit import VisionTransformer, ViTConfig
from fastdeit.recipe import resolve as recipes
from fastdeit.run import build

NAME, DISTILLED = "tests.run.noise_as_weights:small", "tests.run.noise_as_weights:small_distilled"
DIGITS = "deit_digits_patch8_32"
CLASSES = ("cat", "dog", "eel", "fox")
RECIPE = """\
model: {name: "NAME", image_size: SIZE}
method: {use: supervised}
data: {source: synthetic, synthetic_classes: 4, group_size: 8, mean: [0.1, 0.2, 0.3], std: [0.4, 0.5, 0.6],
       eval_crop_ratio: 0.9}
optim: {lr: 1e-3, warmup_epochs: 0}
train: {epochs: 1, batch_size: 16}
"""


def small(image_size=32, num_classes=4, drop_path=0.0, distilled=False):
    """A model that costs nothing, under its import path."""
    shape = ViTConfig(image_size, patch_size=8, dim=16, depth=2, heads=2, num_classes=num_classes, distilled=distilled)
    return VisionTransformer(replace(shape, drop_path=drop_path))


def small_distilled(**options):
    return small(distilled=True, **options)


def tensors(value, name=NAME, image_size=32, num_classes=4):
    """Of a model, each filled with noise around `value`."""
    size = tuple(image_size) if isinstance(image_size, list) else image_size
    return {key: value + tensor for key, tensor in noise(name, size, num_classes).items()}


@cache
def noise(name, image_size, num_classes):
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        state = models.build(name, image_size=image_size, num_classes=num_classes).state_dict()
    return {key: 0.05 * torch.randn(tensor.shape, generator=generator, device="cpu") for key, tensor in state.items()}


def is_around(value, some):
    return abs(some["pos_embed"].mean().item() - value) < 0.1


def make_run(folder, write, *, name=NAME, size=32, steps=(2, 4), record=None, ema=True, classes=CLASSES, **options):
    """A run with checkpoints of these steps: their weights are noise around the step, the averages 100 above."""
    recipe = recipes.load(write(RECIPE.replace("NAME", name).replace("SIZE", str(size))))
    record = {"best_step": steps[0], "best_by": "top1_class"} if record is None else record
    state = {
        "recipe": recipe.model_dump(mode="json"),
        "identity": {"train": "t", "val": "v", "classes": list(classes)},
        "record": record,
    }
    for step in steps:
        files = {"model": tensors(step, name, image_size=size, num_classes=len(classes), **options), "method": {}}
        if ema:
            files["ema"] = {f"model.{key}": tensor + 100 for key, tensor in files["model"].items()}
        checkpoint.save(folder / "checkpoints", step, files, state)
    return folder


def teacher(config, classes=CLASSES, trained=None, size=(32, 32)):
    said = []
    made = build.teacher(config, size, len(classes), trained, classes=classes, say=said.append)
    return made, said
