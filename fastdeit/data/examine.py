"""What training makes of files, found out by asking the executor of training itself, file by file.

`fastdeit data check` asks about every file, a resumed run about those that it could not use before.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastdeit.data.execute.dali import Executor, Work
from fastdeit.data.plan.plan import unaugmented
from fastdeit.data.sources.source import Checked, Source, checked

SIDE = 64
"""Height and width in pixels of the pictures of `rendered`."""
_BATCH, _PIXELS = 32, 64 << 20


@dataclass(frozen=True)
class Facts:
    """A file that training can use. format: Pillow's name of it, with its mode; width, height in pixels; picture: all
    of it, as training decodes it, shrunk to uint8 `[SIDE, SIDE, 3]`."""

    format: str
    width: int
    height: int
    picture: NDArray[np.uint8]


def examined(files: Sequence[Checked | str]) -> list[Facts | str]:
    """What training has of each file, or the reason why it cannot use it; a reason that is given already stays."""
    sound = [row for row, file in enumerate(files) if not isinstance(file, str)]
    results: list[Facts | str] = list(files)
    for row, picture in zip(sound, rendered([files[row] for row in sound]), strict=True):
        data, size = files[row]
        results[row] = picture if isinstance(picture, str) else Facts(_format(data), *size, picture)
    return results


def rendered(files: Sequence[Checked]) -> list[NDArray[np.uint8] | str]:
    """Each file as training decodes it, whole and shrunk to uint8 `[SIDE, SIDE, 3]`, or the reason why it cannot.
    DataError without DALI."""
    results: list[NDArray[np.uint8] | str] = [""] * len(files)

    def leave_out(work: Work, failures: dict[int, str]) -> Work:
        for row, reason in failures.items():
            results[work.owner[row]] = reason
        sound = [row for row in range(len(work.owner)) if row not in failures]
        return replace(work.take(sound), owner=[work.owner[row] for row in sound])

    def works() -> Iterator[Work]:
        for rows in _batches([width * height for _, (width, height) in files]):
            boxes = np.array([(0, 0, *files[row][1][::-1]) for row in rows], np.int32)
            yield Work([files[row][0] for row in rows], (unaugmented(boxes, None, None),), rows)

    executor = Executor([(SIDE, SIDE)], _BATCH, threads=1, device="cpu", repair=leave_out)
    with closing(executor.run(works())) as batches:
        for work, images in batches:
            for row, picture in zip(work.owner, () if images is None else images[0].numpy(), strict=True):
                results[row] = picture
    return results


def _batches(pixels: Sequence[int]) -> Iterator[list[int]]:
    """Rows in their order, a batch at a time, so few that their pixels fit into memory."""
    rows: list[int] = []
    for row, count in enumerate(pixels):
        if rows and (len(rows) == _BATCH or sum(pixels[one] for one in rows) + count > _PIXELS):
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


def fault(source: Source, index: int) -> str | None:
    """Why training cannot use a sample; None if it can."""
    (found,) = examined([checked(source, index)])
    return found if isinstance(found, str) else None


def _format(data: NDArray[np.uint8]) -> str:
    with Image.open(io.BytesIO(memoryview(data))) as image:
        return f"{image.format} {image.mode}"
