"""`fastdeit experiments list` and `experiments run`."""

import argparse

from fastdeit.cli.parser import Verb, add_recipe, path, positive, required


def _list(args: argparse.Namespace, argv: list[str]) -> None:
    from fastdeit.experiments import command

    command.show_list(_FOLDER if args.folder is None else args.folder, args.folder is not None)


def _run(args: argparse.Namespace, argv: list[str]) -> None:
    otherwise = "name an experiment: fastdeit experiments run NAME; `fastdeit experiments list` shows them"
    args.name = required(args.words, "experiment", otherwise)
    from fastdeit.experiments import command

    command.run(args)


_FOLDER = "runs/experiments"

LIST = Verb(
    "experiments list",
    "the paper's claims, and the experiments that check them",
    "[DIR]",
    _list,
    examples=["fastdeit experiments list", "fastdeit experiments list docs/experiments  # with what lies there"],
)
LIST.parser.add_argument("folder", nargs="?", type=path, metavar="DIR", help=f"default: {_FOLDER}")

RUN = Verb(
    "experiments run",
    "train the variants of an experiment with several seeds, and write its page",
    "NAME [section.field=value ...] [--data DIR] [--seeds N] [--out DIR]",
    _run,
    examples=[
        "fastdeit experiments run distillation --seeds 5  # goes on where it was interrupted",
        "fastdeit experiments run tokens --data glyphs data.source=folder train.epochs=30 --out glyphs_tokens",
    ],
)
add_recipe(RUN, "NAME", "name of an experiment")
_add = RUN.parser.add_argument
_add("--seeds", type=positive, default=5, metavar="N", help="trainings of each variant (default: 5)")
_add("--out", type=path, default=_FOLDER, metavar="DIR", help=f"rows, pages and runs (default: {_FOLDER})")

VERBS = LIST, RUN
