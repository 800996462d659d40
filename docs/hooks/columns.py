"""Docstrings on the site: lines in columns, a name and its meaning, become a list.

In the source, a docstring explains arguments, fields and metrics in columns:

    x      float `[B, N, D]`: the tokens
    noise  uniforms in [0, 1), which only training reads,
           one row for each sample

Markdown would run these lines together.
"""

import re
from collections.abc import Iterator
from typing import Any

import griffe

# Names, such as `mean, std`, then two spaces or more, then their meaning.
_ENTRY = re.compile(r"^(?P<names>[\w.*/\"`]+(?:, [\w.*/\"`]+)*) {2,}(?P<meaning>\S.*)$")


class Columns(griffe.Extension):
    """Rewrites every docstring that griffe finds."""

    def on_object(self, *, obj: griffe.Object, **others: Any) -> None:
        """Called by griffe with each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = with_lists(obj.docstring.value)


def with_lists(text: str) -> str:
    """The docstring `text` with each block of columns as a Markdown list."""
    return "\n".join(_lines(text.split("\n")))


def _lines(lines: list[str]) -> Iterator[str]:
    inside = False
    for number, line in enumerate(lines):
        entry = _ENTRY.match(line)
        # Columns begin a paragraph, or continue one of columns: two spaces in a sentence are no column.
        if entry and (inside or number == 0 or not lines[number - 1].strip()):
            if not inside:
                yield ""
            inside = True
            names = ", ".join(f"`{name.strip('`')}`" for name in entry["names"].split(", "))
            yield f"- {names}: {entry['meaning']}"
        elif inside and line.startswith(" "):
            yield f"    {line.strip()}"
        else:
            inside = inside and not line.strip()
            yield line
