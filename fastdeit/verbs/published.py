"""`fastdeit published`: weights that timm publishes, on your ImageNet, beside their published accuracy."""

import argparse
import json
import os
import sys
from typing import Any

from fastdeit.engine import rendezvous
from fastdeit.engine.dist import World
from fastdeit.engine.dist import world as join_world
from fastdeit.errors import FastdeitError, UsageError
from fastdeit.recipe import resolve as recipes
from fastdeit.run import bare, build
from fastdeit.run.published import Published, published
from fastdeit.run.settings import kind_of_data, settings
from fastdeit.run.weights import open_weights
from fastdeit.verbs.evaluate import judge, known_classes

IMAGES = 50_000
"""Of ImageNet's validation; accuracy on another number of images is not the published one."""


def main(args: argparse.Namespace) -> None:
    """Evaluate the models that are asked for, and print a row for each as it is known.

    Raises UsageError for data that cannot be read, before any weights are looked for, and FastdeitError at the end
    where some models could not be evaluated.
    """
    left_out = []
    with rendezvous.before(os.environ):
        wanted, stand_in = published(args.words), bare.stand_in()
        recipe = recipes.override(stand_in, [*kind_of_data(stand_in, args.overrides, args.data), *args.overrides])
        build.held_out(recipe)
    engine = recipe.engine
    with join_world(engine.device, engine.timeout_s) as world:
        for index, row in enumerate(wanted):
            try:
                facts = measure(row, args.data, args.overrides, world)
            except UsageError as error:  # such as weights that are not here, where there is no network
                left_out.append(row.model)
                if world.main:
                    print(f"{row.model}: {str(error).removeprefix(f'timm:{row.model}: ')}", file=sys.stderr)
                continue
            if world.main and args.json:
                print(json.dumps(facts, allow_nan=False), flush=True)
            elif world.main:
                _print(facts, header=index == len(left_out))
    if left_out:
        raise FastdeitError(f"{len(left_out)} of {len(wanted)} could not be evaluated: {', '.join(left_out)}")


def measure(row: Published, root: str, overrides: list[str], world: World) -> dict[str, Any]:
    """What the weights of `row` reach on the held-out images of `root`, at the size and crop of the published number.

    A row of `--json`: the fields of `Published` for the model, its size and crop; `published` and `here` with top1 and
    top5 in per cent; the number of images and of unreadable ones; the precision. Call it on every process.

    Raises UsageError for weights that cannot be had.
    """
    weights = open_weights(f"timm:{row.model}")
    shown = f"model.image_size={row.image_size}", f"data.eval_crop_ratio={row.crop_ratio:g}"
    recipe = settings(weights, None, [*shown, *overrides], root)
    source = known_classes(weights, build.held_out(recipe), say=world.main)
    result = judge(weights, recipe, source, world)[0].result
    return {
        "model": row.model,
        "image_size": build.image_size(recipe)[0],
        "crop_ratio": recipe.data.eval_crop_ratio,
        "published": {"top1": row.top1, "top5": row.top5},
        "here": {name: result.metrics[f"{name}_class"] for name in ("top1", "top5")},
        "images": result.images,
        "unreadable": result.bad,
        "precision": recipe.engine.precision,
    }


def _print(facts: dict[str, Any], *, header: bool) -> None:
    if header:
        print(f"{'':44}  pixels   crop  published     here  difference")
        if facts["images"] != IMAGES:
            told = f"ImageNet's validation has {IMAGES:,}: the published accuracy is of other images"
            print(f"{facts['images']:,} images, but {told}", file=sys.stderr)
    theirs, ours = facts["published"]["top1"], facts["here"]["top1"]
    print(
        f"{facts['model']:44}  {facts['image_size']:6}  {facts['crop_ratio']:5g}  {theirs:7.2f} %  {ours:5.2f} %  "
        f"{ours - theirs:+10.2f}",
        flush=True,
    )
