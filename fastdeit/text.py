"""Words for messages that people read."""

import difflib
from collections.abc import Collection, Iterable


def did_you_mean(word: str, known: Iterable[str], *, cutoff: float = 0.5) -> str:
    """The end of an error message, `; did you mean X or Y?`, or "" where nothing known is like `word`.

    Named are up to three of `known`, the closest first, whose `difflib` ratio with `word` (0 to 1) is at least
    `cutoff`.
    """
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=cutoff)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def some(names: Collection[str]) -> str:
    """The first three of `names`, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(list(names)[:3]) + more


def printable(text: str) -> str:
    """`text` with what a terminal cannot print, or would obey, written out: the name of a file may hold any byte."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
