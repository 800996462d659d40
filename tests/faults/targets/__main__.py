"""`python -m tests.faults.targets` prints the table of docs/reliability.md; with `--write` the page gets it."""

import sys

from tests.faults.targets.page import PAGE, page, table

if "--write" in sys.argv[1:]:
    PAGE.write_text(page(PAGE.read_text()))
else:
    print(table(), end="")
