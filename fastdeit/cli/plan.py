"""`fastdeit plan`."""

import argparse

from fastdeit.cli.parser import Verb, add_overlays, add_trust, lay_over, positive, required


def _plan(args: argparse.Namespace, argv: list[str]) -> None:
    args.recipe = required(args.words, "recipe", "name a recipe: fastdeit plan RECIPE")
    lay_over(args, args.recipe)
    from fastdeit.recipe import resolve as recipe

    # Before the import of torch, so that a mistake in the recipe is said at once.
    chosen = recipe.load(args.recipe, args.overrides)
    from fastdeit.estimate import machines

    asked = machines.machines(chosen, args), machines.prices(args)
    from fastdeit.estimate import report

    report.main(args, chosen, *asked)


PLAN = Verb(
    "plan",
    "modelled time, memory and cost of a recipe on any GPUs; needs no GPU",
    "RECIPE [section.field=value ...] [--as NAME ...] [--gpu NAME ...] [--count N ...] [--nodes M] [--price USD ...]\n"
    "       [--images N] [--json] [--trust]",
    _plan,
    examples=[
        "fastdeit plan deit_base --gpu H200 --gpu A100 --count 8",
        "fastdeit plan deit_small train.batch_size=4096 --count 64  # eight nodes of eight",
        "fastdeit plan deit3_huge engine.parallel=fsdp2 --gpu A100 --count 8",
    ],
)
_add = PLAN.parser.add_argument
_add("words", nargs="*", metavar="RECIPE", help="name of a recipe or a YAML file, and overrides")
add_overlays(PLAN.parser)
_add("--gpu", action="append", metavar="NAME", help="V100, A100, ...; may be repeated (default: V100 to H200)")
_add("--count", type=positive, action="append", metavar="N", help="GPUs in all; may be repeated (default: 1 and 8)")
_add("--nodes", type=positive, metavar="M", help="nodes that share them (default: as few as of 8 GPUs)")
_add("--price", type=float, action="append", metavar="USD", help="of a GPU for an hour, one for each --gpu in order")
_add("--images", type=positive, metavar="N", help="training images (default: what the data source tells)")
_add("--json", action="store_true", help="print everything as JSON")
add_trust(PLAN.parser)

VERBS = (PLAN,)
