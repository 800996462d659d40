"""The formats of `fastdeit export`, as far as the command line has to know them. Nothing heavy is imported."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastdeit.errors import UsageError


@dataclass(frozen=True)
class Format:
    """A form of export.

    words    what it is, for a person
    suffix   of the file; "" for a folder
    program  whether it computes answers, so that it can fuse two heads
    """

    words: str
    suffix: str
    program: bool = False


FORMATS: Mapping[str, Format] = {
    "safetensors": Format("safetensors", ".safetensors"),
    "deit": Format("a checkpoint as DeiT's public code writes it", ".pth"),
    "timm": Format("a folder for timm and the Hugging Face hub", ""),
    "torch": Format("a program of torch.export", ".pt2", program=True),
    "onnx": Format("ONNX", ".onnx", program=True),
}


def check_place(out: Path, format: str, force: bool) -> None:
    """Raise UsageError where something has the name `out` that must not be replaced.

    With `force` a file is replaced by a file, and a folder by a folder if there is nothing in it but such an export.
    """
    if not out.exists() or (out.is_dir() and not FORMATS[format].suffix and not any(out.iterdir())):
        return
    if out.is_dir() == bool(FORMATS[format].suffix):
        there, wanted = ("a folder", "a file") if out.is_dir() else ("a file", "a folder")
        raise UsageError(f"{out} is {there}, and {FORMATS[format].words} is {wanted}")
    if not force:
        raise UsageError(f"{out} is there already; --force replaces it")
    others = sorted(path.name for path in out.iterdir() if path.name not in _OF_A_FOLDER) if out.is_dir() else []
    if others:
        raise UsageError(f"{out} has other things in it, such as {others[0]}; export into a folder of its own")


_OF_A_FOLDER = frozenset({"config.json", "model.safetensors"})


def by_name(out: str) -> str:
    """The format that the name of the file `out` says; a name without a suffix is that of a folder."""
    suffix = Path(out).suffix
    found = next((name for name, each in FORMATS.items() if each.suffix == suffix), None)
    if found is None:
        endings = ", ".join(f"{each.suffix or 'no ending'} ({each.words})" for each in FORMATS.values())
        raise UsageError(f"{out}: the ending {suffix} says no format; there are {endings}")
    return found
