"""`fastdeit train`."""

import argparse
import os

from fastdeit.cli.parser import Verb, one, positive

DEFAULT_RECIPE = "digits"
IMAGENET_EXAMPLE = "fastdeit train deit_small_distilled --data /path/to/imagenet --nproc 8"


def _train(args: argparse.Namespace, argv: list[str]) -> int:
    from fastdeit.launch import launch

    with launch.process_of_a_run():
        args.recipe = one(args.words, "recipe") or DEFAULT_RECIPE
        if args.data is not None:
            from fastdeit.verbs import data as data_verbs

            args.overrides += data_verbs.implied(args.recipe, args.overrides, args.data)
        if "RANK" not in os.environ:
            if not args.words:
                print(
                    f"no recipe named: training {DEFAULT_RECIPE!r}, which needs no data. ImageNet: {IMAGENET_EXAMPLE}",
                    flush=True,
                )
            from fastdeit.recipe import resolve as recipe

            # Before any worker exists, so that a mistake is reported at once, and once.
            recipe.load(args.recipe, args.overrides)
        return launch.run(args, argv, _work)


def _work(args: argparse.Namespace) -> None:
    from fastdeit import train

    train.main(args)


TRAIN = Verb(
    "train",
    "train a model by a recipe",
    "[RECIPE] [section.field=value ...] [--data DIR] [--nproc N] [--run-dir DIR] [--resume]",
    _train,
)
_add = TRAIN.parser.add_argument
_add(
    "words",
    nargs="*",
    metavar="RECIPE",
    help=f"name of a recipe or a YAML file (default: {DEFAULT_RECIPE}), and overrides",
)
_add("--data", metavar="DIR", help="the data set's folder, whose kind is detected; short for data.root=DIR")
_add("--nproc", type=positive, metavar="N", help="processes on this machine, one per GPU (default: 1)")
_add("--run-dir", metavar="DIR", help="where the run is kept (default: a new dated directory in runs/)")
_add("--resume", action="store_true", help="continue the run from its newest intact checkpoint")

VERBS = {"train": TRAIN}
