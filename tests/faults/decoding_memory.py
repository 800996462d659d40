"""Bytes that decoding a picture of each format takes at its peak, printed as JSON: {format: [bytes, size of the file]}.

Run by `test_bombs.py` in a process of its own, where no thread and no memory of another test takes part.
"""

import ctypes
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from fastdeit.data.execute import pillow, route

SIDE = 1024
SAVED = {
    "JPEG": ("CMYK", {"progressive": True, "subsampling": 0}),
    "WEBP": ("RGBA", {"method": 0}),
    "AVIF": ("RGBA", {"speed": 10, "subsampling": "4:4:4"}),
    "JPEG2000": ("RGBA", {"num_resolutions": 2}),
    "PNG": ("RGBA", {"compress_level": 1}),
    "TIFF": ("RGBA", {"compression": "tiff_lzw"}),
    "GIF": ("P", {}),
}
"""Of each format the kind that takes the most memory a pixel: (Pillow's mode, options of its file)."""


def saved(name, side):
    """The bytes of a square picture, uint8 `[n]`."""
    mode, options = SAVED[name]
    out = io.BytesIO()
    Image.radial_gradient("L").resize((side, side)).convert("RGB").convert(mode).save(out, name, **options)
    return np.frombuffer(out.getvalue(), np.uint8)


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
