"""Bytes that decoding a picture of each format takes at its peak, printed as JSON: {format: [bytes, size of the file]}.

Run by `test_bombs.py` in a process of its own, where no thread and no memory of another test takes part.
"""

import ctypes
import gzip
import io
import json
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from fastdeit.data.execute import pillow, route
from tests.data import pictures

SIDE = 1024
SAVED = {
    "JPEG": ("CMYK", {"progressive": True, "subsampling": 0}),
    "WEBP": ("RGBA", {"method": 0}),
    "AVIF": ("RGBA", {"speed": 10, "subsampling": "4:4:4"}),
    "JPEG2000": ("RGBA", {"num_resolutions": 2}),
    "PNG": ("RGBA", {"compress_level": 1}),
    "GIF": ("P", {}),
    "TIFF": None,
    "PPM": None,
    "FITS": None,
}
"""Of each format the kind that takes the most memory a pixel: (Pillow's mode, options of its file); None for kinds that
Pillow does not write."""


def saved(name, side):
    """The bytes of a square picture, uint8 `[n]`."""
    if SAVED[name] is None:
        return np.frombuffer({"TIFF": deep_tiff, "PPM": plain_ppm, "FITS": packed_fits}[name](side), np.uint8)
    mode, options = SAVED[name]
    out = io.BytesIO()
    Image.radial_gradient("L").resize((side, side)).convert("RGB").convert(mode).save(out, name, **options)
    return np.frombuffer(out.getvalue(), np.uint8)


def deep_tiff(side):
    """RGBA of 16 bits in one strip, packed."""
    kind = {"BitsPerSample": (16,) * 4, "SamplesPerPixel": 4, "PhotometricInterpretation": 2, "ExtraSamples": 2}
    return pictures.tiff(side, side, zlib.compress(bytes(8 * side**2)), Compression=8, **kind)


def plain_ppm(side):
    """RGB in digits."""
    return b"P3\n%d %d\n255\n" % (side, side) + b"1 2 3 " * side**2


def packed_fits(side):
    """Greys of 16 bits in a table of one packed tile."""
    tile = gzip.compress(bytes(4 * side**2))
    table = {"XTENSION": "'BINTABLE'", "BITPIX": 8, "NAXIS": 2, "NAXIS1": 8, "NAXIS2": side, "PCOUNT": len(tile)}
    table |= {"ZIMAGE": "T", "ZCMPTYPE": "'GZIP_1  '", "ZBITPIX": 16, "ZNAXIS": 2, "ZNAXIS1": side, "ZNAXIS2": side}
    heads = ({"SIMPLE": "T", "BITPIX": 8, "NAXIS": 0}, table)
    cards = (b"".join(f"{key:8}= {value:>20}".encode().ljust(80) for key, value in head.items()) for head in heads)
    return b"".join((head + b"END").ljust(2880) for head in cards) + bytes(8 * side) + tile


def peak_of(work):
    """Bytes that this process needs for `work()` at its peak, beyond what it has before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before, _ = memory()
    work()
    return memory()[1] - before


def memory():
    """Bytes that this process has in memory now, and at its peak."""
    found = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(1024 * int(found[name].split()[0]) for name in ("VmRSS", "VmHWM"))


def main():
    pillow._PIXELS_AT_ONCE = 1 << 14  # as little of this picture as of the largest
    found = {}
    for name in SAVED:
        pillow.pixels(route.routed(saved(name, 32)))  # its decoder is there before memory is measured
        data = saved(name, SIDE)
        ctypes.CDLL(None).malloc_trim(0)  # and nothing lies about that could be used again
        found[name] = peak_of(lambda data=data: pillow.pixels(route.routed(data))), len(data)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
