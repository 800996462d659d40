"""Who of the processes of a run tells what all of them find: the first of the run, or the first of each machine."""

import os
import warnings


def say(text: str) -> None:
    """Warn of something that every process of a run finds: by the first of them."""
    if is_first("RANK"):
        warnings.warn(text, stacklevel=3)


def say_here(text: str) -> None:
    """Warn of something that every process of a machine finds, and of another machine perhaps none: by the first."""
    if is_first("LOCAL_RANK"):
        warnings.warn(text, stacklevel=3)


def is_first(rank: str) -> bool:
    """Whether this is the first process of a run ("RANK"), or of those of it on this machine ("LOCAL_RANK")."""
    return os.environ.get("RANK") is None or os.environ.get(rank, "0") == "0"
