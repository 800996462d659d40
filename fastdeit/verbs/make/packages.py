"""Packages that pictures are made from: where they lie, in which version, and how to get one that is missing.

Nothing here downloads. A package is looked for where the package manager puts it, or where `--from` says.
"""

import gzip
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastdeit.errors import UsageError
from fastdeit.text import some


@dataclass(frozen=True)
class Package(ABC):
    """A package of a registry, in the version that a set is defined by."""

    name: str
    version: str

    @property
    @abstractmethod
    def spec(self) -> str:
        """Name and version as the package manager's install command takes them."""

    @abstractmethod
    def folder(self, root: Path | None) -> Path | None:
        """Folder with the package's files: below `root`, or where the manager installs it by default if that is None.
        None if it is not there."""

    @abstractmethod
    def place(self, root: Path | None) -> str:
        """Where `folder` looks, for a message."""

    @abstractmethod
    def command(self, made: str) -> str:
        """The command that brings it, with all others of the set `made`, into the folder FOLDER."""

    @abstractmethod
    def found_version(self, folder: Path) -> str | None:
        """Version of the package in `folder`; None if nothing there says it."""


class Npm(Package):
    """A package of npm. `root` is the folder that has `node_modules`, or `node_modules` itself; by default the current
    folder."""

    @property
    def spec(self) -> str:
        return f"{self.name}@{self.version}"

    def folder(self, root: Path | None) -> Path | None:
        root = root or Path()
        places = root / "node_modules" / self.name, root / self.name
        return next((place for place in places if (place / "package.json").is_file()), None)

    def place(self, root: Path | None) -> str:
        return f"in {root or 'this folder'} or its node_modules"

    def command(self, made: str) -> str:
        return f"fastdeit data make {made} --packages | xargs npm install --no-save --prefix FOLDER"

    def found_version(self, folder: Path) -> str | None:
        try:
            return str(json.loads((folder / "package.json").read_text(encoding="utf-8"))["version"])
        except (OSError, ValueError, KeyError, TypeError):
            return None


class Debian(Package):
    """A package of Debian or Ubuntu. `root` is the root of the file system (by default: /) or the folder into which
    `dpkg-deb -x` unpacked it; the folder of the package is `root`, too."""

    @property
    def spec(self) -> str:
        return f"{self.name}={self.version}"

    def folder(self, root: Path | None) -> Path | None:
        root = root or Path("/")
        return root if (root / "usr/share/doc" / self.name / "copyright").is_file() else None

    def place(self, root: Path | None) -> str:
        return f"below {root or '/'}"

    def command(self, made: str) -> str:
        # Without the version: a release has one, and with another the set is made and what differs is told.
        return f"apt-get install {self.name}; or apt-get download {self.name} && dpkg-deb -x {self.name}_*.deb FOLDER"

    def found_version(self, folder: Path) -> str | None:
        """From dpkg's list of what is installed, or else from the package's own list of changes."""
        try:
            for entry in (folder / "var/lib/dpkg/status").read_text(encoding="utf-8").split("\n\n"):
                fields = dict(line.partition(": ")[::2] for line in entry.splitlines() if not line.startswith(" "))
                if fields.get("Package") == self.name and fields.get("Status", "").endswith(" installed"):
                    return fields["Version"]
        except (OSError, ValueError, KeyError):
            pass
        try:
            with gzip.open(
                folder / "usr/share/doc" / self.name / "changelog.Debian.gz", "rt", encoding="utf-8"
            ) as file:
                return file.readline().partition("(")[2].partition(")")[0] or None
        except (OSError, EOFError, ValueError):
            return None


@dataclass(frozen=True)
class Found:
    """The packages of a set, all of them there. `folders` and `versions` are by name; a version may be None."""

    folders: Mapping[str, Path]
    versions: Mapping[str, str | None]


def find(name: str, packages: Sequence[Package], root: Path | None) -> Found:
    """Where the packages of the set `name` lie, below `root` or where they are installed by default.

    Raises UsageError if one is missing; the message has the commands that get it.
    """
    if root is not None and not root.is_dir():
        raise UsageError(f"--from {root}: no such folder")
    folders = {package.name: package.folder(root) for package in packages}
    missing = [package for package in packages if folders[package.name] is None]
    if missing:
        raise UsageError(_how_to_get(name, packages, missing, root))
    here = {package.name: folder for package in packages if (folder := folders[package.name]) is not None}
    return Found(here, {package.name: package.found_version(here[package.name]) for package in packages})


def _how_to_get(name: str, packages: Sequence[Package], missing: Sequence[Package], root: Path | None) -> str:
    first = missing[0]
    which = f"{len(missing)} of them are" if len(packages) > 1 else "it is"
    return (
        f"{name} is made from {len(packages)} package{'s' * (len(packages) > 1)}, and {which} not {first.place(root)}: "
        f"{some([package.name for package in missing])}. This command downloads nothing. Get what is missing with: "
        f"{first.command(name)}. Then say where it lies: --from FOLDER"
    )
