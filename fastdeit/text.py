"""Words for messages that people read."""

import difflib
from collections.abc import Collection, Iterable


def one_line(value: object) -> str:
    """`value` as text that can be printed among other text, on one line.

    Names of files, classes and tensors come from others, and a name may hold a line break, the codes that clear a
    terminal, or a mark that turns the direction of writing. Such characters are written as in Python: "\\n", "\\x1b".
    """
    text = str(value)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def lines(text: str) -> list[str]:
    """The lines of a text that was written as several, each as `one_line` has it."""
    return [one_line(line) for line in text.split("\n")]


def shorten(text: str, limit: int) -> str:
    """`text`, cut off where it has more than `limit` characters."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def for_picture(name: object, limit: int = 60) -> str:
    """A name for a picture: one line of at most `limit` characters, and no dollars, which matplotlib takes for TeX."""
    text = shorten(one_line(name), limit).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text  # which would be left out of a legend


def did_you_mean(word: str, known: Iterable[str], *, cutoff: float = 0.5) -> str:
    """The end of an error message, `; did you mean X or Y?`, or "" where nothing known is like `word`.

    Named are up to three of `known`, the closest first, whose `difflib` ratio with `word` (0 to 1) is at least
    `cutoff`.
    """
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=cutoff)
    return f"; did you mean {' or '.join(map(one_line, close))}?" if close else ""


def some(names: Collection[str]) -> str:
    """The first three of `names`, each of a hundred characters at most, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(shorten(one_line(name), 100) for name in list(names)[:3]) + more
