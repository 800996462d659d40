"""Pixel operations in C++ (`pixels.cpp`), where `pip install` found a C++ compiler. They make the bytes of `pixel_ops`.

numpy and Pillow make an operation in many short calls. After each of them a thread waits for the interpreter's lock,
which the other threads that render pictures want as well. Here an operation is one call, which does not hold that lock.
"""

import ctypes
import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
LIBRARY, SOURCE = (Path(__file__).with_name(name) for name in ("pixels.compiled.so", "pixels.cpp"))
_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
_ARGUMENTS = {
    "grey": (_POINTER, _POINTER, _LONG),
    "three": (_POINTER, _POINTER, _LONG),
    "sum": (_POINTER, _LONG),
    "blend_level": (_POINTER, _POINTER, _LONG, _FLOAT, _FLOAT),
    "color": (_POINTER, _POINTER, _LONG, _FLOAT),
    "flip": (_POINTER, _POINTER, _LONG, _LONG),
    "blur": (_POINTER, _POINTER, _LONG, _LONG, _FLOAT),
    "sharpness": (_POINTER, _POINTER, _LONG, _LONG, _FLOAT),
    "move_rows": (_POINTER, _POINTER, _LONG, _LONG, *(_POINTER,) * 5),
    "move_columns": (_POINTER, _POINTER, _LONG, _LONG, *(_POINTER,) * 5),
}


@cache
def missing() -> str | None:
    """Why the library is not used, in a clause; None where it is."""
    if not LIBRARY.exists():
        return f"there is no {LIBRARY.name}, which `pip install` makes where it finds a C++ compiler that works"
    try:
        library = ctypes.CDLL(str(LIBRARY))
        library.fastdeit_source.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:  # AttributeError: there is nothing of that name in it
        return f"{LIBRARY.name} cannot be used: {error}"
    source = library.fastdeit_source().decode()
    if SOURCE.exists() and source != hashlib.sha256(SOURCE.read_bytes()).hexdigest():
        return f"{LIBRARY.name} was made before {SOURCE.name} was changed; run `pip install` again"
    return None


def status() -> str:
    """What makes the pixel operations, in words."""
    return "C++" if missing() is None else f"numpy and Pillow: {missing()}"


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, f"fastdeit_{name}")
        function.argtypes, function.restype = arguments, _LONG if name == "sum" else None
    return library


def _made(function: Callable[..., None], image: Pixels, *arguments: float) -> Pixels:
    """What `function` makes of a contiguous picture, of its form."""
    out = np.empty_like(image)
    if out.size:  # the library looks at the edges of a picture, so there have to be some
        function(image.ctypes.data, out.ctypes.data, *arguments)
    return out


def grey(image: Pixels) -> Pixels:
    """uint8 `[H, W, 1]`; a picture of one channel is its own."""
    if image.shape[2] == 1:
        return image
    out = np.empty((*image.shape[:2], 1), np.uint8)
    _library().fastdeit_grey(image.ctypes.data, out.ctypes.data, out.size)
    return out


def three(image: Pixels) -> Pixels:
    """`[H, W, 3]`, of one channel as of three."""
    if image.shape[2] == 3:
        return image
    out = np.empty((*image.shape[:2], 3), np.uint8)
    _library().fastdeit_three(image.ctypes.data, out.ctypes.data, image.size)
    return out


def color(image: Pixels, factor: float) -> Pixels:
    """Between grey and the picture, and beyond."""
    # A grey picture lies on its base.
    return _made(_library().fastdeit_color, image, image.size // 3, factor) if image.shape[2] == 3 else image


def contrast(image: Pixels, factor: float) -> Pixels:
    """Between the mean grey and the picture, and beyond."""
    level = grey(image)
    mean = _library().fastdeit_sum(level.ctypes.data, level.size) / level.size
    return _made(_library().fastdeit_blend_level, image, image.size, int(mean + 0.5), factor)


def brightness(image: Pixels, factor: float) -> Pixels:
    """Between black and the picture, and beyond."""
    return _made(_library().fastdeit_blend_level, image, image.size, 0, factor)


def sharpness(image: Pixels, factor: float) -> Pixels:
    """Between the smoothed picture and the picture, and beyond."""
    return _made(_library().fastdeit_sharpness, image, *image.shape[:2], factor)


def blurred(image: Pixels, radius: float) -> Pixels:
    """After Pillow's `ImageFilter.GaussianBlur(radius)`."""
    return _made(_library().fastdeit_blur, image, *image.shape[:2], radius)


def flipped(image: Pixels) -> Pixels:
    """Left to right."""
    return _made(_library().fastdeit_flip, image, *image.shape[:2])


def moved(
    image: Pixels, by: NDArray[np.float64], first: NDArray[np.int64], last: NDArray[np.int64], fill: Pixels, axis: int
) -> Pixels:
    """Pixel i of line j is the input's at i + by[j] where first[j] <= i < last[j], and `fill` (three bytes) elsewhere;
    lines are rows (axis 1) or columns (axis 0)."""
    whole = np.floor(by)
    beyond = (by - whole).astype(np.float32)
    # Of what moves further than the picture is long nothing is left, however far. Floats reach further than integers.
    length = image.shape[axis]
    lines = whole.clip(-length - 1, length).astype(np.int64), beyond, first, last, fill
    function = _library().fastdeit_move_rows if axis == 1 else _library().fastdeit_move_columns
    return _made(function, image, *image.shape[:2], *(line.ctypes.data for line in lines))
