"""What the parts of a run say: a line for a user."""

from collections.abc import Callable

Report = Callable[[str], None]
"""Takes a line for the user."""
