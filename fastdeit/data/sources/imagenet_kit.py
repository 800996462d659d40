"""What ImageNet's development kit says: the classes, and which of them each held-out image has.

The kit is read as downloaded or unpacked. The class of a held-out image follows from the number in its name, never from
its place in a listing, which a file that is missing or added would shift.
"""

import re
import tarfile
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from fastdeit.data.sources.folder import DEVKIT, KIT_ARCHIVE
from fastdeit.data.sources.public import mat
from fastdeit.data.sources.source import DataError, contents, listed, unreadable
from fastdeit.data.sources.tar import Header

TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_MAT = "meta.mat"
_HELD_OUT = re.compile(r"ILSVRC2012_val_(\d{8})(?:\.jpe?g)?", re.IGNORECASE)
_HELD_OUT_NAME = "ILSVRC2012_val_{:08d}.JPEG"
_LARGEST = 64 << 20  # bytes of what the kit unpacks to: the official one has a few million

Truth = tuple[list[str], list[int]]
"""Class names, and the class numbers of held-out images 1, 2, ..."""


def truth(root: Path) -> Truth | None:
    """What the kit in `root` says, unpacked or as downloaded; None where there is none. DataError for another kit, or a
    damaged one."""
    folder, archive = root / DEVKIT / "data", root / KIT_ARCHIVE
    if folder.is_dir():
        return _said(folder, lambda name: contents(folder / name))
    return _said(archive, partial(_unpacked, archive)) if archive.is_file() else None


def _said(place: Path, read: Callable[[str], bytes]) -> Truth:
    try:
        synsets = [one for one in mat(place / _MAT, "synsets", read(_MAT)) if one["num_children"] == 0]
        classes = sorted(str(one["WNID"]) for one in synsets)
        label = {int(one["ILSVRC2012_ID"]): classes.index(str(one["WNID"])) for one in synsets}
        return classes, [label[int(line)] for line in read(TRUTH).split()]
    except DataError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{place}: not the development kit {DEVKIT}, or a damaged one: {error!r}") from error


def _unpacked(archive: Path, name: str) -> bytes:
    """A file of the kit's folder `data`, out of the archive."""
    try:
        with tarfile.open(archive, "r:*", tarinfo=Header) as opened:
            unpacked = 0
            while (info := opened.next()) is not None:
                unpacked += info.size
                if unpacked > _LARGEST:  # before what is packed of it is unpacked, to find the next one
                    raise tarfile.ReadError(f"it unpacks to more than {_LARGEST:,} bytes")
                file = opened.extractfile(info) if info.name == f"{DEVKIT}/data/{name}" else None
                if file is not None:
                    return file.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
        if isinstance(error, OSError):
            unreadable(error, archive)
        raise DataError(f"{archive}: cut short or damaged: {error}; download it anew") from error
    raise DataError(
        f"{archive}: it holds no {DEVKIT}/data/{name}, so it is not the development kit of tasks 1 and 2; download "
        f"{KIT_ARCHIVE}"
    )


def number(image: str) -> int:
    """The number in the name of a held-out image; 0 for any other name."""
    match = _HELD_OUT.fullmatch(image)
    return int(match[1]) if match else 0


def by_number(place: object, images: Sequence[str], count: int, labels: object, way_out: str) -> list[int]:
    """Where in `images` ImageNet's held-out images 1 to `count` are, by the number that each bears; `labels` has a line
    for each. DataError with `way_out` for an image that is missing, there twice, or none of these."""
    found: dict[int, int] = {}
    extra = []
    for at in sorted(range(len(images)), key=images.__getitem__):
        this = number(images[at])
        if not 1 <= this <= count or this in found:
            extra.append(images[at])
        else:
            found[this] = at
    missing = [_HELD_OUT_NAME.format(this) for this in range(1, count + 1) if this not in found]
    why = f"the label of an image is that of its number in {labels}, which has {count}"
    require_none(place, missing, extra, why, way_out)
    return [found[this] for this in range(1, count + 1)]


def require_none(place: object, missing: Sequence[str], extra: Sequence[str], why: str, way_out: str) -> None:
    """DataError where images are missing, or there though no label is theirs."""
    wrong = [f"{len(missing)} are missing, as {listed(missing)}"] if missing else []
    wrong += [f"{len(extra)} are none of them: {listed(extra)}"] if extra else []
    if wrong:
        raise DataError(f"{place}: {why}, but of the images {' and '.join(wrong)}; {way_out}")
