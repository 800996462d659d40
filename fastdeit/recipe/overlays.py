"""Overlays: settings that go together, under one name. `fastdeit train RECIPE --as NAME` lays them over a recipe.

Importing this module imports no torch.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from fastdeit.recipe import differences as public
from fastdeit.recipe import resolve
from fastdeit.recipe.yaml import format_value
from fastdeit.text import did_you_mean


class Setting(NamedTuple):
    """One field of an overlay: the override `field=value`, what it stands for, and in which recipes it is set."""

    field: str
    value: str
    why: str
    where: Callable[[resolve.Recipe], bool] = lambda recipe: True


class Overlay(NamedTuple):
    """What an overlay is for, in a few words, and what it sets."""

    meaning: str
    settings: tuple[Setting, ...]


def _augreg(level: str, mixup: str) -> Overlay:
    """A level of augmentation of AugReg (Steiner et al., arXiv:2106.10270): RandAugment and mixup."""
    why = f"level {level} of AugReg"
    settings = Setting("data.augment", f"augreg-{level}", why), Setting("data.mixup", mixup, why)
    return Overlay(f"the augmentation of AugReg's level {level}", settings)


def _as_text(value: object) -> str:
    """A value as an override has it."""
    return value if isinstance(value, str) else json.dumps(value)


OVERLAYS = {
    "public-code": Overlay(
        "every setting in which the recipe differs from the public code of DeiT and DeiT III",
        tuple(
            Setting(one.field, _as_text(one.value), one.theirs, one.is_of)
            for one in public.REFERENCES["deit"].differences
            if one.field
        ),
    ),
    "augreg-none": _augreg("none", "0.0"),
    "augreg-light1": _augreg("light1", "0.0"),
    "augreg-light2": _augreg("light2", "0.2"),
    "augreg-medium1": _augreg("medium1", "0.2"),
    "augreg-medium2": _augreg("medium2", "0.5"),
    "augreg-strong1": _augreg("strong1", "0.5"),
    "augreg-strong2": _augreg("strong2", "0.8"),
    "augreg-regularised": Overlay(
        "drop-path and dropout as in the regularised half of AugReg's grid",
        (
            Setting("model.drop_path", "0.1", "AugReg's stochastic depth"),
            Setting("model.dropout", "0.1", "AugReg's dropout; here in front of the head alone"),
        ),
    ),
}
"""By the name that `--as` takes."""


def overrides(recipe: str, names: Sequence[str], given: Sequence[str]) -> list[str]:
    """The overrides `field=value` that the overlays `names` stand for in a recipe with the overrides `given`, but for
    fields that `given` overrides itself.

    Raises RecipeError for an overlay that does not exist, where two of them set one field to different values, where
    `given` sets the whole section of such a field, and for a recipe that cannot be.
    """
    loaded = resolve.load(recipe, given)
    own = {text.partition("=")[0]: text for text in given}
    found: dict[str, tuple[str, str]] = {}
    for name in names:
        for setting in _overlay(name).settings:
            if not setting.where(loaded):
                continue
            value, by = found.setdefault(setting.field, (setting.value, name))
            if value != setting.value:
                raise resolve.RecipeError(
                    f"--as {name} and --as {by} do not go together: one sets {setting.field}={setting.value}, the "
                    f"other {setting.field}={value}"
                )
    for field, (_, name) in found.items():
        section, _, key = field.partition(".")
        if section in own:
            raise resolve.RecipeError(
                f"--as {name} sets {field}, but {own[section]!r} sets the whole section; give its fields one by one, "
                f"as in {section}.{key}=VALUE"
            )
    return [f"{field}={value}" for field, (value, _) in found.items() if field not in own]


def differences(recipe: str, names: Sequence[str], given: Sequence[str]) -> Iterator[str]:
    """A line for each field that the overlays `names` change in a recipe with the overrides `given`."""
    before = resolve.load(recipe, given)
    after = resolve.load(recipe, [*overrides(recipe, names, given), *given])
    why = {
        setting.field: (name, setting.why)
        for name in names
        for setting in _overlay(name).settings
        if setting.where(before)
    }
    for field, old, new in resolve.changes(before, after):
        name, reason = why[field]
        yield f"--as {name}: {field} is {format_value(new)}, in the recipe {format_value(old)}: {reason}"


def _overlay(name: str) -> Overlay:
    if name not in OVERLAYS:
        there_are = f"; there are {', '.join(OVERLAYS)}"
        raise resolve.RecipeError(f"--as {name}: there is no such overlay{did_you_mean(name, OVERLAYS) or there_are}")
    return OVERLAYS[name]
