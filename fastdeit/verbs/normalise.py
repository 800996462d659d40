"""`fastdeit data pack --normalise`: odd files encoded anew, with the pixels that training sees."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from fastdeit.data.examine import read_by_both
from fastdeit.data.sources.parts import renamed
from fastdeit.data.sources.source import BadImage, NamedSource, annotations_of


@dataclass(frozen=True)
class Rewritten:
    """A sample that was encoded anew: its path, what was odd about it, and its bytes before and after."""

    path: str
    odd: Sequence[str]
    before: int
    after: int

    def __str__(self) -> str:
        return f"{self.path}: {'; '.join(self.odd)}; {self.before:,} bytes, as PNG {self.after:,}"


class Normalised:
    """The samples of `source`, of which `read` encodes the odd ones as PNG, with the pixels that training sees, and
    names them so (`parts.renamed`). rewritten: those that were read so far, by number; unusable: (path, reason)
    likewise of files that training cannot use, whose bytes stay. Several threads may read."""

    def __init__(self, source: NamedSource) -> None:
        self._source = source
        self.classes, self.fingerprint, self.skipped = source.classes, source.fingerprint, source.skipped
        self.rewritten: dict[int, Rewritten] = {}
        self.unusable: dict[int, tuple[str, str]] = {}

    def __len__(self) -> int:
        return len(self._source)

    def label(self, index: int) -> int:
        """As that of the source."""
        return self._source.label(index)

    def path(self, index: int) -> str:
        """As that of the source."""
        return self._source.path(index)

    def name(self, index: int) -> str:
        """As that of the source, `parts.renamed` where the sample was encoded anew."""
        name = self._source.name(index)
        return renamed(name) if index in self.rewritten else name

    def annotations(self, index: int) -> Mapping[str, ArrayLike] | None:
        """As those of the source."""
        return annotations_of(self._source, index)

    def read(self, index: int) -> NDArray[np.uint8]:
        """The file, or a PNG file in its place: uint8 `[n]`. Raises what the source raises."""
        data = self._source.read(index)
        try:
            found = read_by_both(data, self._source.name(index))
        except BadImage as error:
            self.unusable[index] = self.path(index), str(error)
            return data
        odd = [one.kind for one in found.odd if one.rewritten]
        if not odd:
            return data
        made = _png(found.rgb)
        self.rewritten[index] = Rewritten(self.path(index), odd, len(data), len(made))
        return made


def _png(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    out = io.BytesIO()
    Image.fromarray(rgb).save(out, "PNG")
    return np.frombuffer(out.getvalue(), np.uint8)
