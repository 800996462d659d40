"""Which files of a data set are samples: by their names, and by their headers where a name says nothing."""

import os
import re
from collections import Counter
from functools import cache
from pathlib import PurePosixPath

from PIL import Image, UnidentifiedImageError

from fastdeit.data.sources.faults import retried
from fastdeit.data.sources.notices import say
from fastdeit.data.sources.source import EXTENSIONS, quieten_pillow, unreadable

_LITTER = {"__macosx", "lost+found", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information"}
_SHOWN = 8
# A last dot with a letter behind it; none in "2024.01.31", "image.7" and "n01440764_10026".
_EXTENSION = re.compile(r".*\.[^\W\d_]\w*", re.DOTALL)

LeftOut = Counter[str]
"""How many entries were left out, by what they are called: ".txt", ".DS_Store", ".git/" for a folder."""


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name belongs to no data set: it is hidden, as ._1.jpg, .git and
    .ipynb_checkpoints are, or bears a name that only programs give, as __MACOSX, lost+found and Thumbs.db."""
    return name.startswith(".") or name.lower() in _LITTER


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return name.lower().endswith(EXTENSIONS) and not is_litter(name)


def has_no_extension(name: str) -> bool:
    """Whether the name of a file does not say what it is: "n01440764_10026", "image.7"."""
    return not (_EXTENSION.fullmatch(name) or is_litter(name))


def has_header(path: str) -> bool:
    """Whether a file begins as one with a known extension does. MachineError where it cannot be read and is not at
    fault."""
    if not os.path.isfile(path):
        return False  # opening a pipe would wait for ever
    quieten_pillow()
    try:
        retried(lambda: Image.open(path, formats=_formats()).close())
    except UnidentifiedImageError:
        return False
    except Image.DecompressionBombError:
        return True  # for the decoder to refuse
    except OSError as error:
        unreadable(error, path)
        return False
    except Exception:  # whatever the parser of a format trips over: no sound header
        return False
    return True


@cache
def _formats() -> tuple[str, ...]:
    """The formats that the extensions stand for."""
    known = Image.registered_extensions()
    return tuple({known[extension] for extension in EXTENSIONS if extension in known})


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
