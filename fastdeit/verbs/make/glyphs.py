"""`glyphs`: letters and digits in many typefaces, drawn with Pillow from the packages of Fontsource."""

import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from fastdeit.errors import UsageError
from fastdeit.verbs.make.made import MadeSet, Picture
from fastdeit.verbs.make.packages import Found, Npm
from fastdeit.verbs.make.typefaces import HELD_OUT, TRAINED

_SIDE = 32  # pixels of a picture
_SIZE = 96  # pixels of an em when a glyph is drawn, before it is scaled down
_MARGIN = 0.06  # of the square, on each side
_VERSION = "5.3.0"
# Folders whose names differ in upper and lower case alone are one folder on macOS and Windows.
LABELS = {
    **{f"digit_{char}": char for char in string.digits},
    **{f"upper_{char}": char for char in string.ascii_uppercase},
    **{f"lower_{char}": char for char in string.ascii_lowercase},
}


def made(trained: Sequence[str], held_out: Sequence[str]) -> MadeSet:
    """The set of these typefaces, `trained` for training and `held_out` for validation."""
    splits = {"train": trained, "val": held_out}
    every = sorted((*trained, *held_out))
    return MadeSet(
        packages=tuple(Npm(_package(typeface), _VERSION) for typeface in every),
        expected={split: dict.fromkeys(LABELS, len(typefaces)) for split, typefaces in splits.items()},
        origin=f"""
The digits and the Latin letters in upper and lower case, drawn in {len(every)} typefaces of Fontsource (weight 400,
upright), black on white, {_SIDE} x {_SIDE} pixels. Each file is named after its typeface.

{len(trained)} typefaces are for training. The other {len(held_out)} are for validation, and none of them has a sibling,
such as a monospaced form, among those for training. In some typefaces characters are hard to tell apart: `0` and `O`;
`1`, `I` and `l`. So nobody can reach 100 %.
""",
        licence=lambda found: _licence(found, every),
        pictures=lambda found: _pictures(found, splits),
    )


def _package(typeface: str) -> str:
    return f"@fontsource/{typeface}"


def _pictures(found: Found, splits: Mapping[str, Sequence[str]]) -> Iterator[Picture]:
    for split, typefaces in splits.items():
        for typeface in typefaces:
            path = found.folders[_package(typeface)] / "files" / f"{typeface}-latin-400-normal.woff"
            try:
                drawn = list(_glyphs(path))
            except (OSError, ValueError) as error:
                raise UsageError(
                    f"{path}: this typeface cannot be drawn ({error}); install its package again"
                ) from error
            for label, image in drawn:
                yield Picture(split, label, typeface, image)


def _glyphs(path: Path) -> Iterator[tuple[str, Image.Image]]:
    """(label, picture) of every character: black on white, centred, on the typeface's own line.

    All characters of a typeface have one scale and one baseline, so that `c` is smaller than `C`; only characters that
    would be wider than the square are scaled on their own.
    """
    font = ImageFont.truetype(str(path), _SIZE, layout_engine=ImageFont.Layout.BASIC)
    boxes = {char: font.getbbox(char, anchor="ls") for char in LABELS.values()}
    top = min(box[1] for box in boxes.values())
    bottom = max(box[3] for box in boxes.values())
    for label, char in LABELS.items():
        left, _, right, _ = boxes[char]
        side = round(max(bottom - top, right - left) * (1 + 2 * _MARGIN))
        canvas = Image.new("L", (side, side), 255)
        at = (side - left - right) // 2, (side - top - bottom) // 2
        ImageDraw.Draw(canvas).text(at, char, fill=0, font=font, anchor="ls")
        yield label, canvas.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)


def _licence(found: Found, typefaces: Sequence[str]) -> str:
    """The licences of all typefaces, one after the other: each names the copyright of its own."""
    files = {typeface: found.folders[_package(typeface)] / "LICENSE" for typeface in typefaces}
    texts = [f"==== {name} ====\n\n{path.read_text(encoding='utf-8').strip()}\n" for name, path in files.items()]
    return "The pictures were drawn from typefaces under the SIL Open Font License 1.1.\n\n" + "\n".join(texts)


SET = made(TRAINED, HELD_OUT)
