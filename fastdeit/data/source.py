"""Where encoded images come from, and what is wrong with them before a decoder sees them.

A `Source` is random access: index in, encoded bytes out. Everything that restarts, shards or repeats samples needs no
more. `header` is the gate in front of the decoder: DALI 2.2 to 2.4 ends in a segmentation fault on bytes that are no
image at all (empty, text, HTML), so it only ever gets bytes that passed here.
"""

import io
import os
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fastdeit import rng

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_DECODABLE = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "JPEG2000")
_TAIL = 64
_POOL = 512


class DataError(ValueError):
    """The data set cannot be used; the message names the path and what to do."""


class BadImage(Exception):
    """One file cannot be decoded; the message is the reason, without the path."""


class Source(Protocol):
    """Labelled encoded images. `read` may raise OSError; equal fingerprints mean equal samples in equal order."""

    classes: Sequence[str]
    fingerprint: str

    def __len__(self) -> int: ...
    def read(self, index: int) -> NDArray[np.uint8]: ...
    def label(self, index: int) -> int: ...
    def path(self, index: int) -> str: ...


class FolderSource:
    """Images under `root/CLASS/`, by torchvision's ImageFolder rule: classes are the sorted names of the subfolders,
    images every file with a known extension at any depth, sorted by folder and name.

    The fingerprint covers the relative paths, and thereby the labels, not the contents: to read 1.3 million files at
    every start would take minutes.
    """

    def __init__(self, root: str | Path) -> None:
        self._root = Path(root)
        self.classes = _class_names(self._root)
        self._files: list[str] = []
        labels, empty = [], []
        for label, name in enumerate(self.classes):
            files = _image_files(self._root, name)
            self._files += files
            labels += [label] * len(files)
            empty += [] if files else [name]
        extensions = ", ".join(EXTENSIONS)
        if not self._files:
            raise DataError(
                f"{self._root}: {len(self.classes)} class folders, but no image in any of them (known extensions: "
                f"{extensions}); check that the data set was unpacked completely"
            )
        if empty:
            raise DataError(
                f"{self._root}: no image in class folder{'s' if len(empty) > 1 else ''} {_names(empty)} (known "
                f"extensions: {extensions}); add images or delete the folder"
            )
        self._labels = np.array(labels, dtype=np.int64)
        self.fingerprint = blake2b("\0".join(self._files).encode(errors="surrogateescape"), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> NDArray[np.uint8]:
        return np.fromfile(self.path(index), dtype=np.uint8)

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def path(self, index: int) -> str:
        return os.path.join(self._root, self._files[index])


class SyntheticSource:
    """`n` procedural JPEGs of `size` (height, width) in `classes` classes: a class is a hue and a stripe direction, so
    that a small model learns it, under noise that makes the files as large as photographs of that size.

    About 512 distinct pictures are rendered on first use and kept encoded; sample i has label i % classes.
    """

    def __init__(self, n: int, classes: int, size: tuple[int, int] = (375, 500), seed: int = 0) -> None:
        if n < 1 or classes < 2:
            raise DataError(f"a synthetic data set needs at least 1 sample and 2 classes, got {n} and {classes}")
        self._n, self._size, self._seed = n, size, seed
        self._variants = max(1, _POOL // classes)
        self._pool: dict[tuple[int, int], NDArray[np.uint8]] = {}
        self.classes = [f"class_{label:04d}" for label in range(classes)]
        self.fingerprint = f"synthetic-{n}-{classes}-{size[0]}x{size[1]}-{seed}"

    def __len__(self) -> int:
        return self._n

    def read(self, index: int) -> NDArray[np.uint8]:
        which = self.label(index), index // len(self.classes) % self._variants
        if which not in self._pool:
            self._pool[which] = _render(self._seed, *which, len(self.classes), self._size)
        return self._pool[which]

    def label(self, index: int) -> int:
        return index % len(self.classes)

    def path(self, index: int) -> str:
        return f"synthetic:{index}"


def train_val(root: str | Path, train: str = "train", val: str = "val") -> tuple[FolderSource, FolderSource]:
    """Sources of the subfolders `train` and `val` of `root`; DataError unless both exist and have the same classes."""
    root = Path(root)
    _require_directory(root)
    for part in (train, val):
        if not (root / part).is_dir():
            raise DataError(f"{root}: no subfolder {part!r}; the expected layout is {_layout(train, val)}")
    training, held_out = FolderSource(root / train), FolderSource(root / val)
    extra, missing = (sorted(set(a.classes) - set(b.classes)) for a, b in ((training, held_out), (held_out, training)))
    if extra or missing:
        only = [f"only in {part}: {_names(names)}" for part, names in ((train, extra), (val, missing)) if names]
        raise DataError(
            f"{root}: the class folders of {train} and {val} differ ({'; '.join(only)}); make them the same"
        )
    return training, held_out


def _layout(train: str = "train", val: str = "val") -> str:
    return f"ROOT/{train}/CLASS/*.jpg and ROOT/{val}/CLASS/*.jpg"


def header(data: NDArray[np.uint8]) -> tuple[int, int]:
    """(width, height) of an encoded image, in microseconds for JPEG and PNG; BadImage if it is none that DALI
    decodes."""
    if len(data) == 0:
        raise BadImage("the file is empty")
    view = memoryview(data)
    if view[:2] == b"\xff\xd8":
        return _jpeg_size(view)
    if view[:16] == b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" and len(view) >= 33:
        return int.from_bytes(view[16:20], "big"), int.from_bytes(view[20:24], "big")
    try:
        with Image.open(io.BytesIO(view), formats=_DECODABLE) as image:
            return image.size
    except UnidentifiedImageError:
        raise BadImage(f"not a JPEG, PNG, WebP, BMP, TIFF or PPM image: it starts with {bytes(view[:16])!r}") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImage(f"the header cannot be read: {error}") from error


def check(data: NDArray[np.uint8]) -> tuple[int, int]:
    """`header`, and a full decode of a JPEG or PNG that lacks its end marker: files cut short are found here, whatever
    part of them a crop needs, and not by a failed batch."""
    size = header(data)
    start, tail = data[:2].tobytes(), data[-_TAIL:].tobytes()
    cut = (start == b"\xff\xd8" and b"\xff\xd9" not in tail) or (start == b"\x89P" and b"IEND" not in tail)
    reason = undecodable(data) if cut else None
    if reason:
        raise BadImage(reason)
    return size


def undecodable(data: NDArray[np.uint8]) -> str | None:
    """Why PIL cannot decode `data` completely, or None if it can."""
    try:
        with Image.open(io.BytesIO(memoryview(data))) as image:
            image.convert("RGB")
    except UnidentifiedImageError:
        return "the header is damaged"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return str(error)
    return None


def _jpeg_size(view: memoryview) -> tuple[int, int]:
    at, end = 2, len(view)
    while at + 4 <= end:
        if view[at] != 0xFF:
            break
        marker = view[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if at + 9 > end:
                break
            height, width = int.from_bytes(view[at + 5 : at + 7], "big"), int.from_bytes(view[at + 7 : at + 9], "big")
            if height == 0 or width == 0:
                break
            return width, height
        at += 2 if marker == 0x01 or 0xD0 <= marker <= 0xD7 else 2 + int.from_bytes(view[at + 2 : at + 4], "big")
    raise BadImage("the JPEG header is cut off or damaged")


def _require_directory(path: Path) -> None:
    if not path.exists():
        raise DataError(f"{path}: no such directory; the expected layout is {_layout()}")
    if not path.is_dir():
        raise DataError(f"{path}: not a directory; give the folder that holds the images ({_layout()})")


def _class_names(root: Path) -> list[str]:
    _require_directory(root)
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not names:
        raise DataError(f"{root}: no class folders; the expected layout is {_layout()}")
    if len(names) == 1:
        raise DataError(f"{root}: only one class folder, {names[0]!r}; classification needs two or more ({_layout()})")
    return names


def _image_files(root: Path, name: str) -> list[str]:
    top = os.path.join(root, name)
    found = []
    for folder, _, files in sorted(os.walk(top, followlinks=True)):
        prefix = name + folder[len(top) :]
        found += [f"{prefix}/{file}" for file in sorted(files) if file.lower().endswith(EXTENSIONS)]
    return found


def _names(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more


def _render(seed: int, label: int, variant: int, classes: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """One picture: class stripes in the class hue on a random smooth background, plus fine grain; JPEG quality 90,
    4:2:0."""
    height, width = size
    key = rng.key(seed, "synthetic", label, variant)
    phase, pitch, *background = rng.uniform(key, 0, 2 + 4 * 4 * 3)[0]
    angle = np.pi * label / classes
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / max(size)
    stripes = np.sin(2 * np.pi * ((4 + 4 * pitch) * (x * np.cos(angle) + y * np.sin(angle)) + phase))
    hue = 2 * np.pi * label / classes + np.array([0, 2, 4]) * np.pi / 3
    small = (np.array(background).reshape(4, 4, 3) * 255).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC), np.float32)
    grain = rng.bits(key, np.arange(height), width, stream=1)[..., None] % 64
    picture = 0.4 * smooth + 60 * (1 + np.cos(hue)) * (1 + stripes[..., None]) / 2 + grain
    out = io.BytesIO()
    Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return np.frombuffer(out.getvalue(), dtype=np.uint8)
