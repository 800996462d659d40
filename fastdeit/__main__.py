"""`python -m fastdeit`."""

import os
import sys
from pathlib import Path

_PYTHONS_OWN = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
_CHECKOUT = os.path.realpath(Path(__file__).parents[1])
if "-m" in _PYTHONS_OWN and not getattr(sys.flags, "safe_path", False) and os.path.realpath(sys.path[0]) != _CHECKOUT:
    # Python has put the current folder first, so that a random.py or pydantic.py that lies there would be executed.
    # The command `fastdeit` does not search it either.
    del sys.path[0]

from fastdeit.cli import main  # noqa: E402 - not before the path is mended

sys.exit(main())
