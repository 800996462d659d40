"""What the parts of a run say: a line for a user, and errors that name the field of the recipe."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastdeit.errors import UsageError

Report = Callable[[str], None]
"""Takes a line for the user."""


@contextmanager
def naming(field: str) -> Iterator[None]:
    """Errors of usage inside say which field of the recipe they come from."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{field}: {error}") from error
