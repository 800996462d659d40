"""`fastdeit submit`."""

import argparse
from pathlib import Path

from fastdeit.cli.parser import Verb, add_overlays, add_recipe, add_trust, lay_over, path, positive, required


def _submit(args: argparse.Namespace, argv: list[str]) -> None:
    from fastdeit.recipe import resolve as recipe
    from fastdeit.run import directory, places

    name = required(args.words, "recipe", "name the recipe to train: fastdeit submit RECIPE --hours H")
    lay_over(args, name)
    found = recipe.load(name, args.overrides)
    recipe.check_complete(found)
    places.check(found)
    args.run_dir = (Path(args.run_dir) if args.run_dir else directory.dated_name(found.name)).absolute()
    # The job goes on with its own run, whose files name the code that the user names here.
    trust = ["--trust"] if args.trust or directory.names_code(found) else []
    args.train = ["train", name, *args.overrides, *trust]
    from fastdeit.verbs import submit

    submit.main(args)


def setting(text: str) -> tuple[str, str]:
    """`KEY=VALUE` as a pair; a `type` of argparse."""
    key, equals, value = text.partition("=")
    if not equals or not key or "\n" in text:
        raise argparse.ArgumentTypeError(f"{text} is not KEY=VALUE, such as partition=gpu")
    return key.removeprefix("--"), value


SUBMIT = Verb(
    "submit",
    "train on a SLURM cluster, and go on after time limits and preemption",
    "RECIPE [section.field=value ...] --hours H [--as NAME ...] [--data DIR] [--nproc N] [--nnodes N]\n"
    "       [--run-dir DIR] [--slurm KEY=VALUE ...] [--trust]",
    _submit,
    examples=[
        "fastdeit submit deit_base --data /path/to/imagenet --nproc 8 --nnodes 2 --hours 24 --slurm partition=gpu "
        "--slurm gpus-per-node=8",
    ],
)
add_recipe(SUBMIT)
add_overlays(SUBMIT.parser)
_add = SUBMIT.parser.add_argument
_add("--hours", type=positive, required=True, metavar="H", help="time limit of one job; a longer run takes several")
_add("--nproc", type=positive, default=1, metavar="N", help="processes on each machine, one per GPU (default: 1)")
_add("--nnodes", type=positive, default=1, metavar="N", help="machines (default: 1)")
_add("--run-dir", type=path, metavar="DIR", help="where the run is kept (default: a new dated directory in runs/)")
_add(
    "--slurm",
    type=setting,
    action="append",
    default=[],
    metavar="KEY=VALUE",
    help="an option of sbatch, such as partition=gpu, account=vision or gpus-per-node=8; may be repeated",
)

add_trust(SUBMIT.parser)

VERBS = (SUBMIT,)
