"""`fastdeit chaos`."""

import argparse

from fastdeit.cli.parser import Verb, add_recipe, natural, positive, required
from fastdeit.errors import UsageError


def _chaos(args: argparse.Namespace, argv: list[str]) -> int:
    from fastdeit.recipe import resolve as recipe
    from fastdeit.run import places

    otherwise = "name the recipe whose training is to be interrupted: fastdeit chaos RECIPE"
    args.recipe = required(args.words, "recipe", otherwise)
    found = recipe.load(args.recipe, args.overrides)
    recipe.check_complete(found)
    places.check(found)
    if any(teacher.recipe is not None for teacher in found.method.teachers()):
        raise UsageError(
            f"{args.recipe} trains a teacher first; chaos interrupts one training: train the teacher, and give its run "
            "as method.teacher.weights"
        )
    from fastdeit.chaos import command

    return command.main(args)


CHAOS = Verb(
    "chaos",
    "interrupt a training again and again, and see whether anything is lost",
    "RECIPE [section.field=value ...] [--data DIR] [--kills N] [--seed N] [--nproc N] [--keep] [--json]",
    _chaos,
    examples=[
        "fastdeit chaos digits train.epochs=4  # twenty kills, and hangs, full disks, signals, spoilt checkpoints",
        "fastdeit chaos my_recipe.yaml --kills 200 --seed 7 --nproc 2 --json",
    ],
)
add_recipe(CHAOS)
_add = CHAOS.parser.add_argument
_add(
    "--kills",
    type=positive,
    default=20,
    metavar="N",
    help="kills; hangs, signals, full disks and spoilt checkpoints come in proportion (default: 20)",
)
_add("--seed", type=natural, default=0, metavar="N", help="seed of the moments and kinds of interruptions (default: 0)")
_add("--nproc", type=positive, default=1, metavar="N", help="processes of the run (default: 1)")
_add("--keep", action="store_true", help="keep both runs and what they said; they are kept in any case if they differ")
_add("--json", action="store_true", help="print what was measured as JSON")

VERBS = (CHAOS,)
