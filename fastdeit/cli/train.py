"""`fastdeit train`."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from fastdeit.cli.parser import Verb, add_overlays, add_trust, is_override, lay_over, natural, one, path, positive
from fastdeit.errors import UsageError
from fastdeit.text import one_line

if TYPE_CHECKING:
    from fastdeit.run.request import Request

DEFAULT_RECIPE = "digits"
IMAGENET_EXAMPLE = "fastdeit train deit_base_distilled --data /path/to/imagenet --nproc 8"


def _train(args: argparse.Namespace, argv: list[str]) -> int:
    from fastdeit.launch import launch

    processes = launch.Processes(args.nproc, args.nnodes or 1, args.rdzv, args.max_restarts)
    with launch.process_of_a_run(processes):
        _read_resume(args)
        args.named = one(args.words, "recipe")
        args.recipe = args.named or DEFAULT_RECIPE
        by_directory = args.resume == "" and args.run_dir is not None and not args.named
        of_a_run = args.origin is not None or args.resume or by_directory
        if args.overlays and of_a_run:
            raise UsageError(
                f"--as {args.overlays[0]} is laid over a recipe, and none is named here: a run that is there, or a "
                "fork, has its own"
            )
        first = "RANK" not in os.environ
        if first and (args.named or of_a_run):
            print(one_line(f"starting: {args.named or args.origin or args.resume or args.run_dir}"), flush=True)
        elif first:
            example = f"ImageNet: {IMAGENET_EXAMPLE}"
            print(f"no recipe named: training {DEFAULT_RECIPE!r}, which needs no data. {example}", flush=True)
        if not of_a_run:
            lay_over(args, args.recipe, say=True)
        if args.dry_run or first:
            asked = _checked(args)
        if args.dry_run:
            from fastdeit.verbs import dry_run

            dry_run.show(asked, (args.nproc or 1) * processes.nnodes)
            return 0
        return launch.run(args, argv, _work, processes)


def _checked(args: argparse.Namespace) -> "Request":
    """The run that is asked for. It is checked before torch is loaded and before any worker exists, so that a mistake
    is reported at once, and once."""
    from fastdeit.recipe import resolve as recipe
    from fastdeit.run import directory, request

    asked = request.read(args, lambda text: None)
    recipe.check_complete(asked.recipe)
    directory.check_free(asked.run_dir, resume=asked.resume)
    if not asked.goes_on:
        from fastdeit.run import places  # with Pillow, which a mistake in the recipe need not wait for

        places.check(asked.recipe)
    return asked


def _work(args: argparse.Namespace) -> None:
    from fastdeit import training

    training.main(args)


def _read_resume(args: argparse.Namespace) -> None:
    """The word behind `--resume` is a run; if it cannot be one it is what it would be elsewhere: override or recipe."""
    word = args.resume
    if not word or Path(word).expanduser().is_dir():
        return
    from fastdeit.recipe import resolve as recipe

    if is_override(word):
        args.overrides, args.resume = [*args.overrides, word], ""
    elif word in recipe.names() or word.endswith((".yaml", ".yml")):
        args.words, args.resume = [*args.words, word], ""


TRAIN = Verb(
    "train",
    "train a model by a recipe",
    "[RECIPE] [section.field=value ...] [--as NAME ...] [--data DIR] [--nproc N] [--run-dir DIR]\n"
    "       [--resume [RUN]] [--from RUN] [--trust] [--dry-run] [--max-restarts N]\n"
    "       [--nnodes N --rdzv HOST:PORT]",
    _train,
    examples=[
        "fastdeit train  # the quick start: handwritten digits, no data and no GPU needed",
        "fastdeit train deit_base --data /path/to/imagenet --nproc 8 train.epochs=100",
        "fastdeit train deit_base --data /path/to/imagenet --nproc 8 --dry-run  # what that would be",
        "fastdeit train deit_base --data /path/to/imagenet --nproc 8 --as public-code  # every setting as theirs",
        "fastdeit train deit_base --data /path/to/imagenet --nproc 8 --nnodes 2 --rdzv node1:29500  # on each of 2",
        "fastdeit train --resume runs/mine  # go on after an interruption",
        "fastdeit train --from runs/mine@best optim.lr=1e-4  # a new run that begins where that one was best",
    ],
)
_add = TRAIN.parser.add_argument
_add(
    "words",
    nargs="*",
    metavar="RECIPE",
    help=f"name of a recipe or a YAML file (default: {DEFAULT_RECIPE}), and overrides",
)
_add("--data", type=path, metavar="DIR", help="the data set's folder, whose kind is detected; short for data.root=DIR")
_add("--nproc", type=positive, metavar="N", help="processes on this machine, one per GPU (default: 1)")
_add("--nnodes", type=positive, metavar="N", help="machines, on each of which this command is given (default: 1)")
_add("--rdzv", metavar="HOST:PORT", help="where several machines meet: the name of one, and a port that is free there")
_add(
    "--max-restarts",
    type=natural,
    default=0,
    metavar="N",
    help="how often to start all processes anew, from the newest checkpoint, after one has failed (default: 0)",
)
_add("--run-dir", type=path, metavar="DIR", help="where the run is kept (default: a new dated directory in runs/)")
_add(
    "--resume",
    nargs="?",
    const="",
    metavar="RUN",
    help="go on with this run, by its own recipe, from its newest intact checkpoint; without RUN, with the one in "
    "--run-dir, or else with the newest of RECIPE under runs/",
)
_add(
    "--from",
    dest="origin",
    metavar="RUN",
    help="begin a new run with the weights and the optimizer of this one: RUN, RUN@best, RUN@step=N or a checkpoint "
    "directory. Overrides may change its recipe",
)
add_overlays(TRAIN.parser)
add_trust(TRAIN.parser)
_add("--dry-run", action="store_true", help="train nothing: say what would run, and check what can be checked")

VERBS = (TRAIN,)
