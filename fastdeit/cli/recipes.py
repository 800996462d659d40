"""`fastdeit recipes` and `fastdeit recipes show`."""

import argparse

from fastdeit.cli.parser import Verb, add_overlays, lay_over, required
from fastdeit.errors import UsageError


def _recipes(args: argparse.Namespace, argv: list[str]) -> None:
    from fastdeit.recipe import resolve as recipe

    summaries = recipe.summaries()
    width = max((len(name) for name, _ in summaries), default=0)
    for name, summary in summaries:
        print(f"{name:{width}}  {summary}")


def _show(args: argparse.Namespace, argv: list[str]) -> None:
    name = required(args.words, "recipe", "name a recipe: fastdeit recipes show NAME")
    if args.overrides and not args.resolved:
        raise UsageError(f"{args.overrides[0]}: overrides need --resolved; without it the file is printed as it is")
    if args.overlays and not args.resolved:
        raise UsageError(f"--as {args.overlays[0]} needs --resolved; without it the file is printed as it is")
    lay_over(args, name)
    from fastdeit.recipe import resolve as recipe

    print(recipe.dump(recipe.load(name, args.overrides)) if args.resolved else recipe.text(name), end="")


RECIPES = Verb(
    "recipes",
    "list the recipes",
    "",
    _recipes,
    examples=["fastdeit recipes"],
)

SHOW = Verb(
    "recipes show",
    "print a recipe: its file, or every field with base, defaults and overrides applied",
    "RECIPE [--resolved [section.field=value ...] [--as NAME ...]]",
    _show,
    examples=[
        "fastdeit recipes show deit_tiny > mine.yaml  # a recipe of your own to start from",
        "fastdeit recipes show deit_base --resolved optim.lr=5e-4  # what a run would be",
    ],
)
_add = SHOW.parser.add_argument
_add("words", nargs="*", metavar="RECIPE", help="name of a recipe or a YAML file, and overrides")
_add("--resolved", action="store_true", help="every field, with the values that a run would have")

add_overlays(SHOW.parser)

VERBS = RECIPES, SHOW
