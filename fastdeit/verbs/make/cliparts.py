"""`cliparts`: drawings of the Open Clip Art Library, as Debian packages them."""

import hashlib
import re
from collections.abc import Iterator

from fastdeit.verbs.make.made import MadeSet, Picture
from fastdeit.verbs.make.packages import Debian, Found
from fastdeit.verbs.make.picture import on_white, png_pixels

_SIDE = 64  # pixels
_PACKAGE = Debian("openclipart-png", "1:0.18+dfsg-19")
_FOLDERS = {
    "animals": "animals",
    "flags": "signs_and_symbols/flags",
    "food": "food",
    "people": "people",
    "tools": "tools",
    "transportation": "transportation",
}
_LARGEST = 50_000_000  # pixels: thirteen drawings have 105 to 623 million, 3 GB of memory each
_HELD_OUT = 5  # one series of drawings in so many is for validation
_TRAINED = {"animals": 218, "flags": 387, "food": 261, "people": 261, "tools": 97, "transportation": 140}
_VALIDATED = {"animals": 68, "flags": 109, "food": 58, "people": 84, "tools": 26, "transportation": 29}
_NUMBER = re.compile(r"[-_.\d]+[a-z]?$")


def _pictures(found: Found) -> Iterator[Picture]:
    clips = found.folders[_PACKAGE.name] / "usr/share/openclipart/png"
    for label, folder in _FOLDERS.items():
        for path in sorted((clips / folder).rglob("*.png")):
            # A link shows a drawing a second time, often in another class.
            if not path.is_symlink() and png_pixels(path) <= _LARGEST:
                name = "-".join(path.relative_to(clips / folder).with_suffix("").parts)
                yield Picture(_split(path.stem), label, name, on_white(path, _SIDE, trim=True))


def _split(stem: str) -> str:
    """The split of a drawing. Those of a series, `car_01` and `car_02`, are on the same side: they are much alike."""
    series = _NUMBER.sub("", stem)
    return "val" if hashlib.sha256(series.encode()).digest()[0] % _HELD_OUT == 0 else "train"


def _licence(found: Found) -> str:
    folder = found.folders[_PACKAGE.name]
    return (folder / "usr/share/doc" / _PACKAGE.name / "copyright").read_text(encoding="utf-8", errors="replace")


SET = MadeSet(
    packages=(_PACKAGE,),
    expected={"train": _TRAINED, "val": _VALIDATED},
    origin=f"""
Drawings of the Open Clip Art Library in six classes, without their margins, scaled to fit {_SIDE} x {_SIDE}
pixels, on white. All are in the public domain. Left out are links, which show a drawing a second time, and drawings of
more than {_LARGEST:,} pixels.

About one series of drawings in {_HELD_OUT} is for validation. A series is what has one name but for a number at its
end: two drawings that are almost the same are not on both sides.
""",
    licence=_licence,
    pictures=_pictures,
)
