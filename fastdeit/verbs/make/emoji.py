"""`emoji`: the same emoji in two drawing styles, trained on one and validated on the other."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastdeit.errors import UsageError
from fastdeit.verbs.make.made import MadeSet, Picture
from fastdeit.verbs.make.packages import Found, Npm
from fastdeit.verbs.make.picture import on_white

_SIDE = 64  # pixels, as the packages have them
_VERSION = "16.0.0"
_STYLES = {"train": "google", "val": "twitter"}
# The tenth category of the packages, Component, is five patches of skin colour.
_LABELS = {
    "Activities": "activities",
    "Animals & Nature": "animals_and_nature",
    "Flags": "flags",
    "Food & Drink": "food_and_drink",
    "Objects": "objects",
    "People & Body": "people_and_body",
    "Smileys & Emotion": "smileys_and_emotion",
    "Symbols": "symbols",
    "Travel & Places": "travel_and_places",
}
_COUNTS = {
    "activities": 85,
    "animals_and_nature": 159,
    "flags": 270,
    "food_and_drink": 131,
    "objects": 264,
    "people_and_body": 2261,
    "smileys_and_emotion": 169,
    "symbols": 224,
    "travel_and_places": 218,
}


_PEOPLE = _COUNTS["people_and_body"] / sum(_COUNTS.values())


def _package(style: str) -> str:
    return f"emoji-datasource-{style}"


def _pictures(found: Found) -> Iterator[Picture]:
    for split, style in _STYLES.items():
        folder = found.folders[_package(style)]
        for file, category in sorted(_listed(folder / "emoji.json", style)):
            if category in _LABELS:
                image = on_white(folder / "img" / style / "64" / file, _SIDE)
                yield Picture(split, _LABELS[category], Path(file).stem, image)


def _listed(path: Path, style: str) -> Iterator[tuple[str, str]]:
    """(file, category) of every emoji that `style` has drawn, with its variants of skin colour."""
    try:
        entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        for entry in entries:
            for drawn in (entry, *entry.get("skin_variations", {}).values()):
                if drawn[f"has_img_{style}"]:
                    yield str(drawn["image"]), str(entry["category"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: this list of emoji cannot be read ({error!r}); install its package again") from error


def _licence(found: Found) -> str:
    files = {_package(style): found.folders[_package(style)] / "LICENSE" for style in _STYLES.values()}
    texts = [f"==== {name} ====\n\n{path.read_text(encoding='utf-8').strip()}\n" for name, path in files.items()]
    return _PICTURES + "\n".join(texts)


_PICTURES = """\
The pictures in train/ are Google's (Noto Emoji), under the Apache License 2.0:
https://github.com/googlefonts/noto-emoji/blob/main/LICENSE

The pictures in val/ are Twitter's (Twemoji), copyright Twitter, Inc and other contributors, under the licence Creative
Commons Attribution 4.0: https://creativecommons.org/licenses/by/4.0/

All were laid on white. The packages that bring them, with the list of categories, are under the MIT licence:

"""


SET = MadeSet(
    packages=tuple(Npm(_package(style), _VERSION) for style in _STYLES.values()),
    expected=dict.fromkeys(_STYLES, _COUNTS),
    origin=f"""
Emoji with all their variants, {_SIDE} x {_SIDE} pixels on white, in nine categories of Unicode. The same emoji are in
both splits: `train` has Google's drawings, `val` has Twitter's. So the accuracy says how well what was learned from one
style holds for the other.

The classes differ in size: {_PEOPLE:.1%} of the pictures are people, many of them one person in six colours of skin.
Who always answers `people_and_body` reaches that accuracy.
""",
    licence=_licence,
    pictures=_pictures,
)
