"""`fastdeit predict`, and `fastdeit eval --images`: classes of pictures that are in no data set."""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdeit.batch import Batch
from fastdeit.data.loader import EvalLoader
from fastdeit.data.sources.folder import FileSource
from fastdeit.data.sources.index import Strings
from fastdeit.data.sources.source import EXTENSIONS, DataError
from fastdeit.engine.dist import World, pick_device
from fastdeit.engine.step import autocast
from fastdeit.errors import FastdeitError, UsageError
from fastdeit.methods.evaluators import images
from fastdeit.recipe.resolve import Recipe
from fastdeit.run import build
from fastdeit.run.classification import named_scores
from fastdeit.run.settings import doubt, settings
from fastdeit.run.weights import Weights, network, open_weights
from fastdeit.text import one_line

_WORDNET = re.compile(r"n\d{8}")


def main(args: argparse.Namespace) -> None:
    """`fastdeit predict ADDRESS PICTURE ...`: the likeliest classes of each picture, and how sure the network is.

    Raises FastdeitError after the answers if some picture could not be read, or got scores that are not finite.
    """
    weights = open_weights(args.address)
    recipe = settings(weights, args.model, args.overrides)
    model, device = network_of(weights, recipe, args.model)
    if (note := doubt(weights)) is not None:
        print(one_line(f"{weights.origin}: {note}"), file=sys.stderr)
    files = picture_files(args.images)
    loader = pictures(files, recipe, device)
    names = class_names(weights)
    answers: dict[int, list[dict[str, Any]]] = {}
    for batch, sure in log_probabilities(model, loader, recipe, device):
        best = sure.exp().topk(min(args.top, sure.shape[1]))
        for index, shares, classes in zip(batch.index.tolist(), *(part.tolist() for part in best), strict=True):
            if isnan(shares[0]):  # topk ranks nan first
                print(f"{one_line(files[index])}: the network's scores are not finite", file=sys.stderr)
                continue
            answers[index] = [
                {"class": names[number] if names else f"class {number}", "probability": share}
                for number, share in zip(classes, shares, strict=True)
            ]
    _print([(files[index], answers[index]) for index in sorted(answers)], as_json=args.json)
    if missing := len(files) - len(answers):
        raise FastdeitError(f"there is no answer for {missing} of {len(files)} pictures")


def network_of(weights: Weights, recipe: Recipe, model: str | None) -> tuple[nn.Module, torch.device]:
    """The network of the weights for the input that `recipe` describes, in eval mode, and the device it is on."""
    device = pick_device(recipe.engine.device)
    for note in weights.notes:
        print(one_line(f"{weights.origin}: {note}"), file=sys.stderr)
    made = network(
        weights,
        name=model,
        image_size=build.image_size(recipe),
        grid=recipe.model.weights_grid,
        say=lambda note: print(one_line(note), file=sys.stderr),
    )
    return made.to(device), device


def picture_files(paths: Sequence[str]) -> list[str]:
    """These files, and the pictures in those of `paths` that are folders, by name.

    Raises UsageError for a path where nothing is, and for a folder without pictures.
    """
    return [name for path in paths for name in _files(Path(path).expanduser())]


def _files(path: Path) -> list[str]:
    if path.is_dir():
        found = sorted(str(file) for file in path.iterdir() if file.name.lower().endswith(EXTENSIONS))
        if not found:
            raise UsageError(f"{path}: there is no picture in this folder (known endings: {', '.join(EXTENSIONS)})")
        return found
    if not path.exists():
        raise UsageError(f"{path}: there is no such picture")
    return [str(path)]


def pictures(files: Sequence[str], recipe: Recipe, device: torch.device) -> EvalLoader:
    """A loader of these files as evaluation sees them; what cannot be read is reported and left out."""
    source = FileSource("", ["?"], Strings.of(files), np.zeros(len(files), dtype=np.int64))

    def unreadable(path: str, reason: str) -> None:
        print(f"{path}: {reason}", file=sys.stderr)

    # Whoever names a picture wants to hear of that one; no number of bad ones ends the rest.
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_bad_fraction": 1.0})})
    return build.eval_loader(recipe, source, World(device), {}, unreadable)


def readable(loader: EvalLoader) -> Iterator[Batch]:
    """The batches of a loader of `pictures`: none where no picture can be read, each of which was then reported."""
    try:
        yield from loader.batches()
    except DataError:
        if len(loader.bad.reasons) < loader.share:
            raise


@torch.no_grad()
def log_probabilities(
    model: nn.Module, loader: EvalLoader, recipe: Recipe, device: torch.device
) -> Iterator[tuple[Batch, Tensor]]:
    """(batch, float32 `[B, K]`) of every batch; two heads are fused as the method of the recipe says."""
    fuse = recipe.method.fuse
    for batch in readable(loader):
        batch = batch.to(device)
        with autocast(device, recipe.engine.precision):
            logits = model(images(batch))
        _, sure = next(iter(named_scores(logits, fuse).values()))
        yield batch, sure


def class_names(weights: Weights) -> Sequence[str] | None:
    """Names of the classes for a person: those of ImageNet in words; None where nothing is known of them."""
    names = weights.known.classes
    if names is None or not all(_WORDNET.fullmatch(name) for name in names):
        return names
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-22k")  # has the classes of every smaller part of ImageNet
    return [info.label_name_to_description(name) for name in names]


def _print(answers: Sequence[tuple[str, list[dict[str, Any]]]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps([{"picture": file, "answers": found} for file, found in answers]))
        return
    for file, found in answers:
        said = ", ".join(f"{answer['class']} {100 * answer['probability']:.1f} %" for answer in found)
        print(one_line(f"{file}: {said}"))
