"""What a set is, and how it becomes a folder: written aside, counted, and renamed into its place."""

import hashlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import PIL
from PIL import Image, features

from fastdeit.errors import FastdeitError, UsageError
from fastdeit.text import some
from fastdeit.verbs.make.packages import Found, Package

SPLITS = "train", "val"

Counts = Mapping[str, Mapping[str, int]]
"""Split -> class -> number of pictures."""


@dataclass(frozen=True)
class Picture:
    """One picture of a set, to be `SPLIT/LABEL/NAME.png`."""

    split: str
    label: str
    name: str
    image: Image.Image


@dataclass(frozen=True)
class MadeSet:
    """One set.

    packages  what it is made from
    expected  how many pictures the expected versions of the packages give
    origin    what the pictures are, how they were made and split: the text of the set's README
    licence   the text of its LICENCE, taken from the packages. Raises OSError if a file is missing
    pictures  the pictures, in an order that depends on the packages alone. Raises UsageError for a damaged package
    """

    packages: tuple[Package, ...]
    expected: Counts
    origin: str
    licence: Callable[[Found], str]
    pictures: Callable[[Found], Iterator[Picture]]

    @property
    def size(self) -> int:
        """Number of pictures expected, both splits together."""
        return sum(sum(classes.values()) for classes in self.expected.values())


@dataclass(frozen=True)
class Result:
    """What was made: pictures of every split and class, the SHA-256 of all names and pixels, and what differs from what
    was expected, as sentences."""

    counts: Counts
    fingerprint: str
    differences: tuple[str, ...]


def write(name: str, wanted: MadeSet, found: Found, out: Path, progress: Callable[[int, int], None]) -> Result:
    """Make the set `name` into the folder `out`, which appears complete or not at all.

    Raises UsageError if `out` exists, a package is damaged, or packages of the expected versions give other counts;
    FastdeitError if the folder cannot be written.
    """
    try:
        if out.exists() or out.is_symlink():
            raise UsageError(f"{out}: already there; name a folder that does not exist, or remove it first")
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name[:100]}-", dir=out.parent))
        try:
            result = _fill(scratch, name, wanted, found, progress)
            scratch.chmod(0o755)
            scratch.rename(out)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or error
        raise FastdeitError(f"{out}: the set cannot be written there: {reason}; nothing of it is left") from error
    return result


def _fill(root: Path, name: str, wanted: MadeSet, found: Found, progress: Callable[[int, int], None]) -> Result:
    counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    digest = hashlib.sha256()
    licence = _licence(wanted, found)
    for done, picture in enumerate(wanted.pictures(found), start=1):
        folder = root / picture.split / picture.label
        if not counts[picture.split][picture.label]:
            folder.mkdir(parents=True)
        picture.image.save(folder / f"{picture.name}.png")
        counts[picture.split][picture.label] += 1
        digest.update(f"{picture.split}/{picture.label}/{picture.name} {picture.image.size}".encode())
        digest.update(picture.image.tobytes())
        progress(done, max(done, wanted.size))
    differences = _other_versions(wanted, found)
    other_counts = tuple(_other_counts(wanted.expected, counts))
    if other_counts and not differences:
        raise UsageError(
            f"{name}: the packages have the expected versions, but not the expected pictures: "
            f"{some(other_counts)}. Install them again"
        )
    result = Result(counts, digest.hexdigest(), (*differences, *other_counts))
    (root / "LICENCE").write_text(licence, encoding="utf-8")
    (root / "README.md").write_text(_readme(name, wanted, found, result), encoding="utf-8")
    return result


def _licence(wanted: MadeSet, found: Found) -> str:
    try:
        return wanted.licence(found)
    except OSError as error:
        raise UsageError(
            f"{error.filename}: the licence of the package cannot be read: {error.strerror}; install it again"
        ) from error


def _other_versions(wanted: MadeSet, found: Found) -> tuple[str, ...]:
    versions = [(package, found.versions[package.name]) for package in wanted.packages]
    return tuple(
        f"{package.name} has version {version or '(unknown)'}, expected is {package.version}"
        for package, version in versions
        if version != package.version
    )


def _other_counts(expected: Counts, counts: Counts) -> Iterator[str]:
    for split in SPLITS:
        classes = expected[split]
        for label in sorted({*classes, *counts[split]}):
            if classes.get(label, 0) != counts[split].get(label, 0):
                yield (
                    f"{split}/{label} has {counts[split].get(label, 0):,} pictures, expected are "
                    f"{classes.get(label, 0):,}"
                )


def _readme(name: str, wanted: MadeSet, found: Found, result: Result) -> str:
    totals = "\n".join(
        f"* `{split}`: {sum(classes.values()):,} pictures in {len(classes)} classes"
        for split, classes in result.counts.items()
    )
    versions = Counter(f"version {version or 'unknown'}" for version in found.versions.values())
    packages = (
        ", ".join(f"`{package.name}` {found.versions[package.name]}" for package in wanted.packages)
        if len(wanted.packages) <= 3
        else f"{len(wanted.packages)} packages, `{wanted.packages[0].name}` to `{wanted.packages[-1].name}` "
        f"({', '.join(f'{count} of {version}' for version, count in versions.items())})"
    )
    differs = "".join(f"* Differs from the set as documented: {text}.\n" for text in result.differences)
    return (
        f"# {name}\n\n{wanted.origin.strip()}\n\n{totals}\n* Made by `fastdeit data make {name}` from {packages}.\n"
        f"* Drawn by Pillow {PIL.__version__} with FreeType {features.version('freetype2') or '(none)'}.\n"
        f"* SHA-256 of all names and pixels: `{result.fingerprint}`.\n{differs}\nThe licence is in `LICENCE`.\n"
    )
