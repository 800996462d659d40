"""Errors the command line turns into an exit code and one line on stderr.

Only the modules at the top of the package use them. `recipe`, `data` and `engine` define their own exception classes,
because dependencies point down; `cli.exit_code` knows what those mean.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class FastdeitError(Exception):
    """A failure with a message for the person at the terminal; shown without a traceback."""

    exit_code = 1


class UsageError(FastdeitError):
    """The command cannot be carried out as it was given."""

    exit_code = 2


class NonFiniteError(FastdeitError):
    """Training was stopped because losses or gradients stayed non-finite."""

    exit_code = 3


class Interrupted(FastdeitError):
    """The run was asked to stop and did, with nothing lost; `fastdeit train --resume RUN` continues it.

    75 is EX_TEMPFAIL of sysexits.h, "try again later", which schedulers can be told to requeue.
    """

    exit_code = 75


@contextmanager
def naming(what: object, kind: type[Exception] = UsageError) -> Iterator[None]:
    """Errors of this kind in the block are UsageErrors, and say what they are about, such as a field of the recipe."""
    try:
        yield
    except kind as error:
        raise UsageError(f"{what}: {error}") from error


COMMON_CODES = frozenset({UsageError.exit_code, NonFiniteError.exit_code, Interrupted.exit_code})
"""All processes of a run come to these ends together, so the one of rank 0 says why for all."""
