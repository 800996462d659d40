"""The table of docs/reliability.md, made from the targets."""

from pathlib import Path

from tests.faults.targets import bad_input, exactness, kernels, load, survival

TARGETS = (*exactness.TARGETS, *survival.TARGETS, *bad_input.TARGETS, *load.TARGETS, *kernels.TARGETS)
PAGE = Path(__file__).parents[3] / "docs" / "reliability.md"
HEADING = "## The targets\n"
"""What stands above it on the page is written by hand, what stands below it is made from `TARGETS`."""


def table() -> str:
    """What stands below the heading: the number of targets in each state, and a row for each."""
    states = [target.held for target in TARGETS]
    lines = [
        "",
        f"Of {len(TARGETS)} targets {states.count('yes')} are held, {states.count('in part')} in part, and "
        f"{states.count('no')} not. `python -m tests.faults.targets --write` writes this table from",
        "`tests/faults/targets/`, and a test holds that the tests exist. Whether they pass is what `pytest` and "
        "`pytest -m slow` say.",
        "",
        "| | target | held | what is missing | tests |",
        "|---|---|---|---|---|",
    ]
    for target in TARGETS:
        tests = "<br>".join(f"`{name}`" for name in target.tests)
        lines.append(f"| {target.number} | {target.what} | {target.held} | {target.why_not} | {tests} |")
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """The page `text` with the table as it should be. Raises ValueError where the page has no heading for it."""
    above, heading, _ = text.partition(HEADING)
    if not heading:
        raise ValueError(f"{PAGE} has no heading {HEADING.strip()!r}; put it where the table shall begin")
    return above + heading + table()
