"""The part of a recipe's header that lists its differences from public code, as `fastdeit.recipe.differences` has them.

`python -m tests.recipe.headers --write` writes it into every recipe that comes with the package.
"""

import sys

from fastdeit.recipe import differences
from fastdeit.recipe import resolve as recipes

BEGINS = "# Differs from "


def expected(recipe: recipes.Recipe) -> list[str]:
    """The lines that say how the recipe differs; none where it follows no public code."""
    told = differences.lines(recipe)
    return ["#", *(f"# {line[0].upper()}{line[1:]}" for line in told)] if told else []


def split(text: str) -> tuple[list[str], list[str], str]:
    """The header of a recipe's file up to its differences, these, and the rest of the file."""
    lines = text.splitlines(keepends=True)
    length = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    header = [line.rstrip("\n") for line in lines[:length]]
    begin = next((number for number, line in enumerate(header) if line.startswith(BEGINS)), length)
    if begin < length:
        begin -= 1  # the empty line of comment before it
    return header[:begin], header[begin:], "".join(lines[length:])


if __name__ == "__main__" and "--write" in sys.argv[1:]:
    for name in recipes.names():
        before, _, after = split(recipes.text(name))
        lines = [*before, *expected(recipes.load(name))]
        (recipes.SHIPPED / f"{name}.yaml").write_text("\n".join(lines) + "\n" + after, encoding="utf-8")
