"""Augmentation policies: timm's notation in, a frozen `Policy` out, which `operations.draw` draws from.

A policy draws rows of operations, and each operation of a drawn row is applied with its probability p at the magnitude

    level = clip(N(m, mstd), 0, mmax)        (mstd 0: m itself; above 100: uniform in [0, m])
    value = form(level / 10, u)              u uniform: the sign, where an operation has one

RandAugment (Cubuk et al., 2019) draws n rows of one operation, AutoAugment (Cubuk et al., 2018) one row of two,
TrivialAugment (Mueller and Hutter, 2021) and 3-Augment (Touvron et al., "DeiT III", 2022) one row of one. Colour jitter
follows: its components in an order drawn uniformly. Names, tables, forms and defaults are those of timm 1.0.31
(`timm/data/auto_augment.py`) and torchvision (TrivialAugmentWide, ColorJitter). Four differences: a posterize that
would keep 0 bits keeps 1, because Pillow refuses 0; whatever geometry uncovers is FILL and resampling is bicubic in
every policy; TrivialAugment translates by 16 pixels where torchvision's float32 makes it 15; and a string of which timm
would ignore a part is an error.

Recipes are checked by this module, so it imports neither numpy nor scipy: they take as long as the rest of a check.
"""

import math
import re
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Op:
    """An operation a policy may draw: its name in `operations.FORMS`, the probability that it is applied, and its mean
    magnitude."""

    name: str
    probability: float = 1.0
    magnitude: float = 10.0


@dataclass(frozen=True)
class Policy:
    """What is drawn for each sample: `draws` of `rows`, then colour jitter.

    size: output (height, width) in pixels, of which translations are fractions. rows: the alternatives, equally long;
    drawn uniformly with replacement, or by `weights` and without. mstd, mmax: noise and upper limit of the magnitude.
    bins: number of equidistant magnitudes from 0 to the operation's own, one of which is drawn uniformly instead of the
    noise; 0 is off. jitter: strengths of brightness, contrast, saturation and hue.
    """

    size: tuple[int, int] = (224, 224)
    rows: tuple[tuple[Op, ...], ...] = ()
    draws: int = 0
    weights: tuple[float, ...] | None = None
    mstd: float = 0.0
    mmax: float = 10.0
    bins: int = 0
    jitter: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)

    @property
    def layers(self) -> int:
        """Operations drawn for a sample, without the jitter."""
        return self.draws * len(self.rows[0]) if self.draws else 0

    @property
    def choices(self) -> int:
        """Uniforms that decide the rows."""
        return self.draws if self.weights is None else len(self.weights)

    @property
    def uniforms(self) -> int:
        """Uniforms a sample's operations need, without the jitter."""
        return self.choices + 3 * self.layers

    @property
    def jitter_uniforms(self) -> int:
        """Uniforms a sample's jitter needs."""
        return 2 * sum(strength > 0 for strength in self.jitter)


NO_POLICY = Policy()


# ---- tables ----------------------------------------------------------------------------------------------------------

_RAND = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd"),
    *("Color", "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"),
)
_HAS_INCREASING = ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")
_RAND_INCREASING = tuple(name + "Increasing" if name in _HAS_INCREASING else name for name in _RAND)
_RAND_3A = ("SolarizeIncreasing", "Desaturate", "GaussianBlur")
_WEIGHTED = {
    "weights": {
        3: "Rotate",
        2: "ShearX ShearY",
        1: "TranslateXRel TranslateYRel",
        0.25: "ColorIncreasing SharpnessIncreasing AutoContrast",
        0.05: "SolarizeIncreasing SolarizeAdd ContrastIncreasing BrightnessIncreasing Equalize PosterizeIncreasing "
        "Invert",
    },
    "3aw": {
        6: "SolarizeIncreasing Desaturate GaussianBlur",
        3: "Rotate",
        2: "ShearX ShearY",
        1: "PosterizeIncreasing AutoContrast ColorIncreasing SharpnessIncreasing ContrastIncreasing "
        "BrightnessIncreasing Equalize Invert",
    },
}
_TRIVIAL = (
    *("Identity", "WideShearX", "WideShearY", "WideTranslateX", "WideTranslateY", "WideRotate", "WideBrightness"),
    *("WideColor", "WideContrast", "WideSharpness", "WidePosterize", "WideSolarize", "AutoContrast", "Equalize"),
)
_TRIVIAL_BINS = 31

# AutoAugment's sub-policies, one a line: operation, probability, magnitude, twice.
_ORIGINAL = """
PosterizeOriginal .4 8 Rotate .6 9
Solarize .6 5 AutoContrast .6 5
Equalize .8 8 Equalize .6 3
PosterizeOriginal .6 7 PosterizeOriginal .6 6
Equalize .4 7 Solarize .2 4
Equalize .4 4 Rotate .8 8
Solarize .6 3 Equalize .6 7
PosterizeOriginal .8 5 Equalize 1 2
Rotate .2 3 Solarize .6 8
Equalize .6 8 PosterizeOriginal .4 6
Rotate .8 8 Color .4 0
Rotate .4 9 Equalize .6 2
Equalize 0 7 Equalize .8 8
Invert .6 4 Equalize 1 8
Color .6 4 Contrast 1 8
Rotate .8 8 Color 1 2
Color .8 8 Solarize .8 7
Sharpness .4 7 Invert .6 8
ShearX .6 5 Equalize 1 9
Color .4 0 Equalize .6 3
Equalize .4 7 Solarize .2 4
Solarize .6 5 AutoContrast .6 5
Invert .6 4 Equalize 1 8
Color .6 4 Contrast 1 8
Equalize .8 8 Equalize .6 3
"""
_V0 = """
Equalize .8 1 ShearY .8 4
Color .4 9 Equalize .6 3
Color .4 1 Rotate .6 8
Solarize .8 3 Equalize .4 7
Solarize .4 2 Solarize .6 2
Color .2 0 Equalize .8 8
Equalize .4 8 SolarizeAdd .8 3
ShearX .2 9 Rotate .6 8
Color .6 1 Equalize 1 2
Invert .4 9 Rotate .6 0
Equalize 1 9 ShearY .6 3
Color .4 7 Equalize .6 0
Posterize .4 6 AutoContrast .4 7
Solarize .6 8 Color .6 9
Solarize .2 4 Rotate .8 9
Rotate 1 7 TranslateYRel .8 9
ShearX 0 0 Solarize .8 4
ShearY .8 0 Color .6 4
Color 1 0 Rotate .6 2
Equalize .8 4 Equalize 0 8
Equalize 1 4 AutoContrast .6 2
ShearY .4 7 SolarizeAdd .6 7
Posterize .8 2 Solarize .6 10
Solarize .6 8 Equalize .6 1
Color .8 6 Rotate .4 5
"""


def _sub_policies(table: str) -> tuple[tuple[Op, ...], ...]:
    words = (line.split() for line in table.strip().splitlines())
    return tuple((Op(a, float(p), float(m)), Op(b, float(q), float(n))) for a, p, m, b, q, n in words)


_AUTO = {
    "original": _sub_policies(_ORIGINAL),
    "originalr": _sub_policies(_ORIGINAL.replace("PosterizeOriginal", "PosterizeIncreasing")),
    "v0": _sub_policies(_V0),
    "v0r": _sub_policies(_V0.replace("Posterize", "PosterizeIncreasing")),
    "3a": ((Op("Solarize", magnitude=5.0),), (Op("Desaturate"),), (Op("GaussianBlurRand"),)),
}
_THREE_AUGMENT = ((Op("Grayscale"),), (Op("Solarize", magnitude=5.0),), (Op("GaussianBlurRand"),))
_THREE_AUGMENT_JITTER = (0.3, 0.3, 0.3, 0.0)
# RandAugment's part of AugReg's levels (Steiner et al., 2021; big_vision's vit_i1k.py), with p 1.
# light1 is not nothing: its magnitude is 0, where this set solarises and posterises most.
_AUGREG = {
    "augreg-none": "none",
    "augreg-light1": "rand-m0-p1-mmax20",
    "augreg-light2": "rand-m10-p1-mmax20",
    "augreg-medium1": "rand-m15-p1-mmax20",
    "augreg-medium2": "rand-m15-p1-mmax20",
    "augreg-strong1": "rand-m20-p1-mmax20",
    "augreg-strong2": "rand-m20-p1-mmax20",
}


# ---- notation --------------------------------------------------------------------------------------------------------

_INTEGER, _DECIMAL = r"\d{1,3}", r"\d{1,9}(\.\d{1,9})?"
_SECTIONS = {"m": _INTEGER, "n": r"[1-9]\d?", "p": r"0(\.\d{1,9})?|1(\.0+)?", "mstd": _DECIMAL, "mmax": r"[1-9]\d{0,2}"}
_SECTIONS |= {"inc": "[01]", "t": "weights|3a|3aw"}
_RAND_FORMS = (
    "m9 (magnitude), n2 (operations an image), p0.5 (probability of each), mstd0.5 (standard deviation of the "
    "magnitude), mmax10 (its upper limit), inc1 (severity grows with the magnitude), tweights, t3a or t3aw (the set of "
    "operations)"
)
_NAMES = (
    "none, rand-... as in rand-m9-mstd0.5-inc1, original, originalr, v0, v0r or 3a (AutoAugment, also with -mstd0.5), "
    "trivial, three_augment, augreg-none, augreg-light1, -light2, -medium1, -medium2, -strong1 or -strong2"
)


def parse(
    text: str, size: tuple[int, int] = (224, 224), color_jitter: float | tuple[float, ...] | None = None
) -> Policy:
    """The policy that `text` names in timm's notation, for outputs of `size` (height, width).

    none
    rand-m9-mstd0.5-inc1  RandAugment; sections m, n, p, mstd, mmax, inc and t in any order, defaults m10-n2-p0.5. A
                          magnitude above mmax (10) is clipped to it, as in timm
    original, originalr, v0, v0r, 3a, each also with -mstd0.5    AutoAugment
    trivial               TrivialAugment (wide): one operation of 14, one of 31 magnitudes
    three_augment         DeiT III: exactly one of grey, solarise (128) and blur (radius 0.1 to 2), then jitter 0.3
    augreg-LEVEL          RandAugment's part of AugReg's none, light1, light2, medium1, medium2, strong1, strong2; the
                          recipe sets the mixup that goes with it: 0, 0, 0.2, 0.2, 0.5, 0.5, 0.8

    color_jitter: one strength of brightness, contrast and saturation, or three, or four with that of the hue; None is
    the policy's own. Raises ValueError, a sentence without its subject: which section is wrong, and what is valid.
    """
    policy = replace(_named(text), size=tuple(size))
    if color_jitter is None:
        return policy
    if _AUGREG.get(text, text) not in ("none", "three_augment") and not text.startswith("3a"):
        # timm leaves colour jitter out beside these policies, without a word.
        raise ValueError(f"does not go with augment {text}, which changes the colours itself; set it to null")
    strengths = (color_jitter,) * 3 if isinstance(color_jitter, int | float) else tuple(color_jitter)
    if len(strengths) == 4 and strengths[3] > 0.5:
        raise ValueError("must have a hue of at most 0.5, which is half a turn of the colour circle")
    return replace(policy, jitter=(*strengths, 0.0)[:4])


def _named(text: str) -> Policy:
    name, *sections = _AUGREG.get(text, text).split("-")
    if name == "rand":
        return _rand(_numbers(sections, list(_SECTIONS), _RAND_FORMS))
    if name in _AUTO:
        mstd = _numbers(sections, ["mstd"], "mstd0.5 (standard deviation of the magnitude)").get("mstd", 0)
        return Policy(rows=_AUTO[name], draws=1, mstd=float(mstd))
    if name == "augmix":
        raise ValueError(
            "cannot be augmix, which blends several augmented copies of an image: a plan is one operation after the "
            f"other; valid are {_NAMES}"
        )
    if sections or name not in ("none", "trivial", "three_augment"):
        raise ValueError(f"must be one of {_NAMES}")
    if name == "trivial":
        return Policy(rows=tuple((Op(op),) for op in _TRIVIAL), draws=1, bins=_TRIVIAL_BINS)
    if name == "three_augment":
        return Policy(rows=_THREE_AUGMENT, draws=1, jitter=_THREE_AUGMENT_JITTER)
    return NO_POLICY


def _rand(given: dict[str, str]) -> Policy:
    probability, magnitude = float(given.get("p", 0.5)), float(given.get("m", 10))
    mstd, draws = float(given.get("mstd", 0)), int(given.get("n", 2))
    chosen, weights = given.get("t"), None
    names = _RAND_3A if chosen == "3a" else _RAND_INCREASING if given.get("inc") == "1" else _RAND
    if chosen in _WEIGHTED:
        weight = {name: weight for weight, group in _WEIGHTED[chosen].items() for name in group.split()}
        names, weights = tuple(weight), tuple(weight.values())
        if draws > len(names):
            raise ValueError(f"has a section n{draws}, but t{chosen} draws without repetition from {len(names)}")
    return Policy(
        rows=tuple((Op(name, probability, magnitude),) for name in names),
        draws=draws,
        weights=weights,
        mstd=math.inf if mstd > 100 else mstd,
        mmax=float(given.get("mmax", 10)),
    )


def _numbers(sections: list[str], keys: list[str], forms: str) -> dict[str, str]:
    """Sections as {key: value}, the value checked against the pattern of `_SECTIONS`."""
    found: dict[str, str] = {}
    for section in sections:
        key = next((key for key in keys if re.fullmatch(f"{key}({_SECTIONS[key]})", section)), None)
        if key is None:
            raise ValueError(f"has a section {section!r} that is not valid; valid are {forms}")
        if key in found:
            raise ValueError(f"has two sections {key!r}: {key}{found[key]} and {section}")
        found[key] = section[len(key) :]
    return found
