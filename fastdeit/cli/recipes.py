"""`fastdeit recipes`."""

import argparse

from fastdeit.cli.parser import Verb
from fastdeit.errors import UsageError


def _recipes(args: argparse.Namespace, argv: list[str]) -> None:
    if args.action == "show" and args.name is None:
        raise UsageError("name a recipe: fastdeit recipes show NAME")
    from fastdeit.recipe import resolve as recipe

    if args.action == "show":
        print(recipe.text(args.name), end="")
        return
    summaries = recipe.summaries()
    width = max((len(name) for name, _ in summaries), default=0)
    for name, summary in summaries:
        print(f"{name:{width}}  {summary}")


RECIPES = Verb("recipes", "list the recipes, or show one", "[show NAME]", _recipes)
_add = RECIPES.parser.add_argument
_add("action", nargs="?", choices=("show",), help="without it, list the recipes")
_add("name", nargs="?", metavar="NAME", help="recipe whose file to print")

VERBS = {"recipes": RECIPES}
