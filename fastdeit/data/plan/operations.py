"""The operations of each sample: a policy and uniforms in, `Ops` out. What a policy means is in `policy.py`."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from fastdeit.data.pixel_ops import KINDS
from fastdeit.data.plan.policy import Policy

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Ops:
    """Pixel operations on B samples after crop and flip: up to L each, applied in the order of the second axis.

    kind uint8 `[B, L]`: index in `pixel_ops.KINDS`, 0 does nothing. value float32 `[B, L]`: the operation's argument,
    see `pixel_ops.PIXEL_OPS`.
    """

    kind: NDArray[np.uint8]
    value: NDArray[np.float32]


def draw(policy: Policy, uniforms: Floats, jitter_uniforms: Floats) -> Ops:
    """Operations of B samples from uniforms in [0, 1), `[B, policy.uniforms]` and `[B, policy.jitter_uniforms]`.

    L is `policy.layers` plus the components of the jitter.
    """
    kind, value = _drawn(policy, uniforms)
    jitter_kind, jitter_value = _jittered(policy.jitter, jitter_uniforms)
    return Ops(
        np.concatenate((kind, jitter_kind), axis=1).astype(np.uint8),
        np.concatenate((value, jitter_value), axis=1).astype(np.float32),
    )


def _drawn(policy: Policy, uniforms: Floats) -> tuple[NDArray[np.int64], Floats]:
    batch, layers = len(uniforms), policy.layers
    kind, value = np.zeros((batch, layers), np.int64), np.zeros((batch, layers))
    if not layers:
        return kind, value
    ops = [op for row in policy.rows for op in row]
    width = len(policy.rows[0])
    chosen = (_rows(policy, uniforms[:, : policy.choices])[:, :, None] * width + np.arange(width)).reshape(batch, -1)
    apply, noise, u = uniforms[:, policy.choices :].reshape(batch, 3, layers).swapaxes(0, 1)
    applied = apply < np.array([op.probability for op in ops])[chosen]
    level = _levels(policy, np.array([op.magnitude for op in ops], float)[chosen], noise)
    names = list(dict.fromkeys(op.name for op in ops))
    name = np.array([names.index(op.name) for op in ops])[chosen]
    for index, (kind_name, form) in enumerate(FORMS[name] for name in names):
        at = applied & (name == index)
        kind[at] = _KIND[kind_name]
        if form is not None:
            value[at] = form(level[at] / 10, u[at], policy.size)
    return kind, value


def _rows(policy: Policy, u: Floats) -> NDArray[np.int64]:
    """Rows drawn, `[B, draws]`.

    By weight and without replacement: the order of E_i / w_i with E_i exponential is that of successive draws
    (Efraimidis and Spirakis, 2006).
    """
    if policy.weights is None:
        return (u * len(policy.rows)).astype(np.int64)
    return np.argsort(-np.log1p(-u) / np.array(policy.weights), axis=1, kind="stable")[:, : policy.draws]


def _levels(policy: Policy, magnitude: Floats, u: Floats) -> Floats:
    if policy.bins:
        return magnitude * np.floor(u * policy.bins) / (policy.bins - 1)
    if policy.mstd == np.inf:
        magnitude = magnitude * u
    elif policy.mstd:
        magnitude = magnitude + policy.mstd * ndtri(u)
    return np.clip(magnitude, 0, policy.mmax)


_JITTERED = ("brightness", "contrast", "color", "hue")


def _jittered(strengths: tuple[float, ...], u: Floats) -> tuple[NDArray[np.int64], Floats]:
    """torchvision's ColorJitter: factors uniform in [max(0, 1 - s), 1 + s], of hue in [-s, s]; the order is uniform."""
    on = [(_KIND[name], strength) for name, strength in zip(_JITTERED, strengths, strict=True) if strength]
    kinds = np.array([kind for kind, _ in on], np.int64)
    low = np.array([-s if kind == _KIND["hue"] else max(0.0, 1 - s) for kind, s in on])
    high = np.array([s if kind == _KIND["hue"] else 1 + s for kind, s in on])
    order = np.argsort(u[:, : len(on)], axis=1, kind="stable")
    factors = low + u[:, len(on) :] * (high - low)
    return kinds[order], np.take_along_axis(factors, order, axis=1)


# ---- forms: (level / 10, uniform, size) to the operation's argument --------------------------------------------------

Form = Callable[[Floats, Floats, tuple[int, int]], Floats]


def _signed(x: Floats, u: Floats) -> Floats:
    return np.where(u < 0.5, x, -x)


def _enhance(x: Floats, u: Floats, size: tuple[int, int]) -> Floats:
    return x * 1.8 + 0.1


def _enhance_increasing(x: Floats, u: Floats, size: tuple[int, int]) -> Floats:
    return np.maximum(0.1, 1 + _signed(x * 0.9, u))


def _shear(x: Floats, u: Floats, size: tuple[int, int]) -> Floats:
    return _signed(x * 0.3, u)


def _wide_enhance(x: Floats, u: Floats, size: tuple[int, int]) -> Floats:
    return 1 + _signed(x * 0.99, u)


def _wide_shear(x: Floats, u: Floats, size: tuple[int, int]) -> Floats:
    return _signed(x * 0.99, u)


def _wide_translate(x: Floats, u: Floats, size: tuple[int, int]) -> Floats:
    return _signed(np.trunc(x * 32), u)


def _solarize(x: Floats) -> Floats:
    return np.minimum(256, np.trunc(x * 256))


FORMS: dict[str, tuple[str, Form | None]] = {
    "Identity": ("none", None),
    "AutoContrast": ("auto_contrast", None),
    "Equalize": ("equalize", None),
    "Invert": ("invert", None),
    "Rotate": ("rotate", lambda x, u, size: _signed(x * 30, u)),
    "Posterize": ("posterize", lambda x, u, size: np.maximum(1, np.trunc(x * 4))),
    "PosterizeIncreasing": ("posterize", lambda x, u, size: np.maximum(1, 4 - np.trunc(x * 4))),
    "PosterizeOriginal": ("posterize", lambda x, u, size: 4 + np.trunc(x * 4)),
    "Solarize": ("solarize", lambda x, u, size: _solarize(x)),
    "SolarizeIncreasing": ("solarize", lambda x, u, size: 256 - _solarize(x)),
    "SolarizeAdd": ("solarize_add", lambda x, u, size: np.minimum(128, np.trunc(x * 110))),
    "Color": ("color", _enhance),
    "Contrast": ("contrast", _enhance),
    "Brightness": ("brightness", _enhance),
    "Sharpness": ("sharpness", _enhance),
    "ColorIncreasing": ("color", _enhance_increasing),
    "ContrastIncreasing": ("contrast", _enhance_increasing),
    "BrightnessIncreasing": ("brightness", _enhance_increasing),
    "SharpnessIncreasing": ("sharpness", _enhance_increasing),
    "ShearX": ("shear_x", _shear),
    "ShearY": ("shear_y", _shear),
    "TranslateXRel": ("translate_x", lambda x, u, size: _signed(x * 0.45, u) * size[1]),
    "TranslateYRel": ("translate_y", lambda x, u, size: _signed(x * 0.45, u) * size[0]),
    "Desaturate": ("color", lambda x, u, size: 1 - np.minimum(1, 0.5 + 0.5 * x)),
    "GaussianBlur": ("blur", lambda x, u, size: np.minimum(2, 0.1 + 1.9 * x)),
    "GaussianBlurRand": ("blur", lambda x, u, size: 0.1 + u * (2 * np.minimum(1, x) - 0.1)),
    "Grayscale": ("grayscale", None),
    "WideRotate": ("rotate", lambda x, u, size: _signed(x * 135, u)),
    "WidePosterize": ("posterize", lambda x, u, size: 8 - np.rint(x * 6)),
    "WideSolarize": ("solarize", lambda x, u, size: 255 * (1 - x)),
    "WideColor": ("color", _wide_enhance),
    "WideContrast": ("contrast", _wide_enhance),
    "WideBrightness": ("brightness", _wide_enhance),
    "WideSharpness": ("sharpness", _wide_enhance),
    "WideShearX": ("shear_x", _wide_shear),
    "WideShearY": ("shear_y", _wide_shear),
    "WideTranslateX": ("translate_x", _wide_translate),
    "WideTranslateY": ("translate_y", _wide_translate),
}
"""Of each operation that a policy may name: its name in `PIXEL_OPS`, and its form; None where it has no argument."""
_KIND = {name: index for index, name in enumerate(KINDS)}
