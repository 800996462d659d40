"""Where encoded images come from, and what is wrong with them before a decoder sees them.

A `Source` is random access: index in, encoded bytes out. Everything that restarts, shards or repeats samples needs no
more. `header` is the gate in front of the decoder: DALI 2.2 to 2.4 ends in a segmentation fault on bytes that are no
image at all (empty, text, HTML), so it only ever gets bytes that passed here.
"""

import io
import os
import warnings
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base as Tag

from fastdeit import rng
from fastdeit.data.index import Listed, Strings, digest, read_range

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_DECODABLE = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "JPEG2000")
# (format, Pillow's mode) of which DALI 2.4 makes other pixels, or none.
_MISREAD = {*(("TIFF", mode) for mode in ("1", "F", "I", "LA", "LAB")), ("PPM", "F"), ("JPEG2000", "LA")}
MAX_LABEL = 999_999  # beyond any image data set: a larger one is some other number
_SORT = (
    ". The images that lie in it directly have to be moved into one folder for each class; for the held-out images of "
    "ImageNet, unpack ILSVRC2012_devkit_t12 into ROOT instead and choose the data source imagenet"
)
_TAIL = 64
_MAX_PIXELS = 2 * 89_478_485  # where Pillow's decompression bomb check raises
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


class NamedSource(Source, Protocol):
    """A source that knows what its samples are called wherever the data set lies, and what it had to leave out:
    `skipped`, as (path, reason)."""

    skipped: Sequence[tuple[str, str]]

    def name(self, index: int) -> str: ...


class FileSource(Listed):
    """Images in files of their own: `names` are their paths relative to `root`."""

    def __init__(
        self,
        root: str | Path,
        classes: Sequence[str],
        names: Strings,
        labels: NDArray[np.int64],
        fingerprint: str | None = None,
    ) -> None:
        super().__init__(classes, names, labels, fingerprint or digest(names.blob, labels, classes))
        self._root = str(root)

    def read(self, index: int) -> NDArray[np.uint8]:
        return read_range(self.path(index))

    def path(self, index: int) -> str:
        return os.path.join(self._root, self.name(index))


class FolderSource(FileSource):
    """Images under `root/CLASS/`, by torchvision's ImageFolder rule: classes are the sorted names of the subfolders,
    images every file with a known extension at any depth, sorted by folder and name.

    The fingerprint covers the relative paths, and thereby the labels, not the contents: to read 1.3 million files at
    every start would take minutes. Listing them takes 1 us each, because a listing says which entries are folders; so
    the list is made anew at every start and never out of date.
    """

    def __init__(self, root: str | Path) -> None:
        root = Path(root)
        classes = _class_names(root)
        found = [Strings.of(_image_files(root, name)) for name in classes]
        counts = np.array([len(files) for files in found])
        extensions = ", ".join(EXTENSIONS)
        if not counts.any():
            raise DataError(
                f"{root}: {len(classes)} class folders, but no image in any of them (known extensions: "
                f"{extensions}); check that the data set was unpacked completely"
            )
        empty = [name for name, count in zip(classes, counts, strict=True) if not count]
        if empty:
            raise DataError(
                f"{root}: no image in class folder{'s' if len(empty) > 1 else ''} {_names(empty)} (known "
                f"extensions: {extensions}); add images or delete the folder"
            )
        names = Strings(b"\0".join(files.blob for files in found))
        fingerprint = blake2b(names.blob, digest_size=16).hexdigest()
        super().__init__(root, classes, names, np.repeat(np.arange(len(classes)), counts), fingerprint)


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
        self.skipped: Sequence[tuple[str, str]] = ()
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

    def name(self, index: int) -> str:
        return f"{index}.jpg"

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
    require_same_classes(root, (train, training), (val, held_out))
    return training, held_out


def require_same_classes(root: str | Path, training: tuple[str, Source], held_out: tuple[str, Source]) -> None:
    """DataError unless both (split name, source) pairs have the same classes in the same order: a head has one output
    for each."""
    (train, a), (val, b) = training, held_out
    extra, missing = sorted(set(a.classes) - set(b.classes)), sorted(set(b.classes) - set(a.classes))
    if extra or missing:
        only = [f"only in {part}: {_names(names)}" for part, names in ((train, extra), (val, missing)) if names]
        raise DataError(f"{root}: the classes of {train} and {val} differ ({'; '.join(only)}); make them the same")
    if list(a.classes) != list(b.classes):
        raise DataError(
            f"{root}: the classes of {train} and {val} are the same, but in another order, so that labels "
            "mean different classes; number them alike"
        )


def contents(path: Path) -> bytes:
    """A file of a data set that is no image: labels, lists. DataError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def class_numbers(labels: NDArray[np.int64], root: str | Path) -> list[str]:
    """Class names "0", "1", ... up to the largest label, where a data set has numbers only; DataError if fewer than
    two."""
    count = int(labels.max()) + 1
    if count < 2:
        raise DataError(f"{root}: every label is 0; classification needs two or more classes")
    return [str(number) for number in range(count)]


def _layout(train: str = "train", val: str = "val") -> str:
    return f"ROOT/{train}/CLASS/*.jpg and ROOT/{val}/CLASS/*.jpg"


def header(data: NDArray[np.uint8]) -> tuple[int, int]:
    """(width, height) of an encoded image, in microseconds for JPEG and PNG; BadImage if it is none that DALI
    decodes, or larger than Pillow decodes: a header of a few bytes may ask for gigabytes of pixels."""
    width, height = _size(memoryview(data))
    if width < 1 or height < 1:
        raise BadImage(f"the header is damaged: it says {width} x {height} pixels")
    if width * height > _MAX_PIXELS:
        raise BadImage(f"the header says {width} x {height} pixels; more than {_MAX_PIXELS} are not decoded")
    return width, height


def _size(view: memoryview) -> tuple[int, int]:
    if len(view) == 0:
        raise BadImage("the file is empty")
    if view[:2] == b"\xff\xd8":
        return _jpeg_size(view)
    if view[:16] == b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" and len(view) >= 33:
        return int.from_bytes(view[16:20], "big"), int.from_bytes(view[20:24], "big")
    try:
        with Image.open(io.BytesIO(view), formats=_DECODABLE) as image:
            kind, size = (image.format, image.mode), image.size
            if kind[0] == "TIFF":
                # Alone of a TIFF Pillow gives the size after the rotation that its orientation asks for.
                size = int(image.tag_v2[Tag.ImageWidth]), int(image.tag_v2[Tag.ImageLength])
    except UnidentifiedImageError:
        raise BadImage(f"not a JPEG, PNG, WebP, BMP, TIFF or PPM image: it starts with {bytes(view[:16])!r}") from None
    except Exception as error:
        raise BadImage(f"the header cannot be read: {error or type(error).__name__}") from error
    if kind in _MISREAD:
        raise BadImage("a {} image of mode {} cannot be decoded as Pillow does; convert it to RGB".format(*kind))
    return size


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
    except Exception as error:
        # Whatever the parser of a format trips over: besides OSError, ValueError and SyntaxError also struct.error,
        # EOFError, TypeError, KeyError, zlib.error, MemoryError.
        return str(error) or type(error).__name__
    return None


def quieten_pillow() -> None:
    """Ignore what Pillow warns of in files: their metadata, of which nothing is used, and sizes, which `header` limits.

    For the process, since `warnings.catch_warnings` is not for threads. Pillow's deprecations are still heard.
    """
    for category in (UserWarning, Image.DecompressionBombWarning):
        warnings.filterwarnings("ignore", category=category, module=r"PIL\.")


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
        flat = any(entry.name.lower().endswith(EXTENSIONS) for entry in os.scandir(root))
        raise DataError(f"{root}: no class folders; the expected layout is {_layout()}{_SORT if flat else ''}")
    if len(names) == 1:
        raise DataError(f"{root}: only one class folder, {names[0]!r}; classification needs two or more ({_layout()})")
    return names


def _image_files(root: Path, name: str) -> list[str]:
    top = os.path.join(root, name)
    folders = []
    for folder, subfolders, files in os.walk(top, onerror=_not_listed, followlinks=True):
        for subfolder in subfolders:
            _require_no_loop(Path(folder, subfolder))
        folders.append((folder, files))
    found = []
    for folder, files in sorted(folders):
        prefix = name + folder[len(top) :]
        found += [f"{prefix}/{file}" for file in sorted(files) if file.lower().endswith(EXTENSIONS)]
    return found


def _not_listed(error: OSError) -> None:
    raise DataError(f"{error.filename}: the folder cannot be listed: {error.strerror}") from error


def _require_no_loop(path: Path) -> None:
    if path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve()):
        raise DataError(f"{path}: a link to a folder that it lies in itself; remove the link")


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
