"""Caches of a teacher's logits: what the records depend on, and whether they are those of a run.

A teacher judges the image that the student is given: cropped, flipped, augmented, erased and mixed. All of it is a
function of the data, of some fields of the recipe, and of the teacher. These make the fingerprint of a cache.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdeit.data.logits import Cache
from fastdeit.data.plan.plan import Mixing
from fastdeit.data.sources.source import DataError, Source
from fastdeit.errors import UsageError, naming
from fastdeit.methods.config import DistillConfig
from fastdeit.methods.teacher import Teacher
from fastdeit.recipe.length import Length
from fastdeit.recipe.resolve import Recipe
from fastdeit.run import build
from fastdeit.text import some
from fastdeit.views import AugmentSettings

TAU = "method.tau"
_NORMALISATION = "data.mean", "data.std"
_SCHEDULE = "data.size_schedule"
_OF_THE_TEACHER = "teacher."


def images_of(recipe: Recipe, source: Source) -> dict[str, Any]:
    """Everything that the images of a run depend on, by the name of the field, as JSON has it.

    The settings of the first view are called by their names in the data section, wherever the recipe sets them.
    """
    sizes = _sizes(recipe)
    view, data, train = build.views(recipe, None if sizes else 0)[0], recipe.data, recipe.train
    found = {
        "train.seed": train.seed,
        "train.batch_size": train.batch_size,
        "model.image_size": view.size,
        _SCHEDULE: sizes,
        "data.repeats": data.repeats,
        **{f"data.{name}": getattr(view, name) for name in AugmentSettings.model_fields},
        **{f"data.{field.name}": getattr(data, field.name) for field in fields(Mixing)},
        **{name: getattr(data, name.removeprefix("data.")) for name in _NORMALISATION},
        TAU: getattr(recipe.method, "tau", 1.0),
        "data (number of training images)": len(source),
        "data (training images)": source.fingerprint,
        "data (classes)": list(source.classes),
    }
    return json.loads(json.dumps(found))


def _sizes(recipe: Recipe) -> list[tuple[int, Any]]:
    """The entries of `data.size_schedule` if they change the size of the first view, which may have its own; one that
    only repeats the size before it is left out, and a square is said by its side."""
    found: list[tuple[int, Any]] = []
    before = None
    for epoch, _ in recipe.data.size_schedule:
        height, width = here = build.views(recipe, epoch)[0].size
        if here != before:
            found.append((epoch, height if height == width else here))
        before = here
    return found if len(found) > 1 else []


def fingerprint(
    recipe: Recipe, source: Source, teachers: Sequence[tuple[Teacher, Mapping[str, Tensor]]], exact: bool
) -> dict[str, Any]:
    """What the records depend on that the teachers, each with its weights, give in the recipe's precision.

    exact  whether all logits are stored: then they do not depend on a temperature

    A field of several teachers is the list of their values.
    """
    found = images_of(recipe, source)
    if exact:
        del found[TAU]
    if all(teacher.mean is not None for teacher, _ in teachers):
        for name in _NORMALISATION:  # the student's, which no teacher sees
            del found[name]
    own = {
        "weights": [digest(weights) for _, weights in teachers],
        "image_size": [teacher.size or found["model.image_size"] for teacher, _ in teachers],
        "mean": [teacher.mean for teacher, _ in teachers],
        "std": [teacher.std for teacher, _ in teachers],
    }
    of_them = {name: values if len(values) > 1 else values[0] for name, values in own.items()}
    of_them["precision"] = recipe.engine.precision
    return found | json.loads(json.dumps({f"{_OF_THE_TEACHER}{name}": value for name, value in of_them.items()}))


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of tensors on the CPU: of their names, shapes, dtypes and bytes."""
    found = blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def differences(
    cache: Mapping[str, Any], here: Mapping[str, Any], ignored: tuple[str, ...] = ()
) -> list[tuple[str, Any, Any]]:
    """(field, value in the fingerprint `cache`, value here) of the fields of a fingerprint that differ. An empty
    `cache` is that of a run without one, and differs in nothing."""
    known = {_SCHEDULE: [], **cache} if cache else {}  # caches of before there were schedules do not name them
    return [
        (name, value, here.get(name))
        for name, value in known.items()
        if not name.startswith(ignored) and value != here.get(name)
    ]


def lines(found: list[tuple[str, Any, Any]], here: str) -> str:
    """Differences for people to read, a line for each."""
    return "\n".join(f"  {name}: the cache has {_short(old)}, {here} {_short(new)}" for name, old, new in found)


def _short(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], str):
        return f"{len(value)} ({some(value)})"
    return json.dumps(value)


def checked(recipe: Recipe, source: Source, length: Length) -> Cache | None:
    """The cache that the recipe learns from, which has every record that the run needs; None if it names none.

    Raises UsageError, with the fields that differ, for a cache of other images, and for one that is not complete.
    """
    method = recipe.method
    if not isinstance(method, DistillConfig) or method.cached is None:
        return None
    folder = method.cached
    with naming("method.cached", DataError):
        cache = Cache.open(Path(folder))
    # The first of the classes is exact at any temperature.
    ignored = (_OF_THE_TEACHER, TAU) if method.distillation == "hard" else (_OF_THE_TEACHER,)
    found = differences(cache.fingerprint, images_of(recipe, source), ignored)
    if found:
        raise UsageError(
            f"method.cached {folder}: its records are not those of this run:\n{lines(found, 'this run')}\n"
            "Set the fields as the cache has them, or make another with `fastdeit cache`"
        )
    missing = [shard for shard in cache.layout.shards(range(length.epochs_begun)) if not cache.is_there(shard)]
    if missing:
        epochs = list(dict.fromkeys(shard.epoch for shard in missing))
        raise UsageError(
            f"method.cached {folder}: of the {length.epochs_begun} epochs of this run the cache lacks {len(epochs)}: "
            f"{some(list(map(str, epochs)))}; the `fastdeit cache` command that began it makes them, with the run's "
            "own train.epochs or train.steps"
        )
    return cache


def described(cache: Cache) -> str:
    """What the cache holds, in a line."""
    layout = cache.layout
    kept = "all" if layout.exact else f"the top {layout.top_k:,} of"
    return f"{kept} {layout.classes:,} logits of {cache.origin['teacher']}, cached in {cache.folder}"
