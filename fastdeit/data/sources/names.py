"""Which names in a data set are no samples: what file managers, editors and archives leave behind."""

import os
import warnings
from collections import Counter
from pathlib import PurePosixPath

from fastdeit.data.sources.source import EXTENSIONS

_LITTER = {"__macosx", "lost+found", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information"}
_SHOWN = 8

LeftOut = Counter[str]
"""How many entries were left out, by what they are called: ".txt", ".DS_Store", ".git/" for a folder."""


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name belongs to no data set: it is hidden, as ._1.jpg, .git and
    .ipynb_checkpoints are, or bears a name that only programs give, as __MACOSX, lost+found and Thumbs.db."""
    return name.startswith(".") or name.lower() in _LITTER


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return name.lower().endswith(EXTENSIONS) and not is_litter(name)


def group(name: str) -> str:
    """What a file that is left out is counted by: its extension, or what it is called where it has none."""
    if is_litter(name):
        return "._*" if name.startswith("._") else name
    return PurePosixPath(name).suffix.lower() or name


def tell(root: object, left_out: LeftOut) -> None:
    """Say what was left out of `root`, if anything was."""
    if left_out:
        shown = ", ".join(f"{count} {name}" for name, count in left_out.most_common(_SHOWN))
        more = f", {len(left_out) - _SHOWN} other kinds" if len(left_out) > _SHOWN else ""
        say(f"{root}: left out, because they are no images in a class folder: {shown}{more}")


def say(text: str) -> None:
    """Warn of something once: by the first process of a run."""
    if os.environ.get("RANK", "0") == "0":
        warnings.warn(text, stacklevel=3)
