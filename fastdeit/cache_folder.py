"""Where fastdeit keeps what it can make again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$FASTDEIT_CACHE, else ~/.cache/fastdeit; `~` in either is the user's home. It need not exist."""
    return Path(os.path.expanduser(os.environ.get("FASTDEIT_CACHE") or "~/.cache/fastdeit"))
