"""Tables as text."""

from collections.abc import Sequence


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of as many cells each, as text in columns."""
    columns = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, columns, strict=True)).rstrip() for line in lines
    )
