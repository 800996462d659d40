"""`fastdeit cache`."""

import argparse
import re
from pathlib import Path

from fastdeit.cli.parser import Verb, add_overlays, add_recipe, add_trust, lay_over, path, positive, required


def _cache(args: argparse.Namespace, argv: list[str]) -> int:
    from fastdeit.launch import launch

    processes = launch.Processes(args.nproc)
    with launch.process_of_a_run(processes):
        otherwise = "name the recipe whose images the teacher is to judge: fastdeit cache RECIPE"
        args.recipe = required(args.words, "recipe", otherwise)
        lay_over(args, args.recipe)
        args.out = Path(args.out or f"caches/{Path(args.recipe).stem}")
        return launch.run(args, argv, _work, processes)


def _work(args: argparse.Namespace) -> None:
    from fastdeit.verbs import cache

    cache.main(args)


def epochs(text: str) -> range:
    """The epochs of `A:B`, from A up to but without B; a `type` of argparse."""
    match = re.fullmatch(r"(\d{1,6}):(\d{1,6})", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text} is not A:B, the epochs from A up to but without B, counted from 0")
    return range(int(match[1]), int(match[2]))


CACHE = Verb(
    "cache",
    "store a teacher's logits of every image of a run",
    "RECIPE [section.field=value ...] [--data DIR] [--as NAME ...] [--teacher ADDRESS] [--top-k K]\n"
    "       [--out DIR] [--epochs A:B] [--nproc N] [--trust]",
    _cache,
    examples=[
        "fastdeit cache deit_small_distilled --teacher timm:regnety_160 --data /path/to/imagenet --nproc 8",
        "fastdeit cache deit_small_distilled --teacher timm:regnety_160 --epochs 0:150  # one half, on this machine",
    ],
)
add_recipe(CACHE)
add_overlays(CACHE.parser)
_add = CACHE.parser.add_argument
_add("--teacher", metavar="ADDRESS", help="address of the teacher's weights (default: method.teacher of the recipe)")
_add(
    "--top-k",
    type=positive,
    default=10,
    metavar="K",
    help="logits kept of each image, with an even share of the rest for all others; as many as there are classes: all "
    "of them, in float32 (default: 10)",
)
_add("--out", type=path, metavar="DIR", help="the cache (default: caches/RECIPE); what is there already is kept")
_add("--epochs", type=epochs, metavar="A:B", help="epochs from A up to but without B (default: all of the recipe)")
_add("--nproc", type=positive, metavar="N", help="processes on this machine, one per GPU (default: 1)")
add_trust(CACHE.parser)

VERBS = (CACHE,)
