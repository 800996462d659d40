"""One file, decoded as the executors decode it: what training and evaluation see of it, or why they see nothing."""

import threading
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastdeit.data.execute import pillow
from fastdeit.data.execute.route import Encoded, Route, routed
from fastdeit.data.execute.stream import Stream, graphs

REFUSED = "file that DALI refuses"
"""Why Pillow decodes what the header sent to DALI."""
_own = threading.local()


class Decoded(NamedTuple):
    """A picture. rgb: uint8 `[height, width, 3]`; route: as its file was read, of which `why` may be REFUSED."""

    rgb: NDArray[np.uint8]
    route: Route


def pixels(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The picture in the file with these bytes, uint8 `[n]`, in RGB: uint8 `[height, width, 3]`; see `decoded`."""
    return decoded(data).rgb


def decoded(data: NDArray[np.uint8]) -> Decoded:
    """The picture in the file with these bytes, uint8 `[n]`, in RGB, and who has decoded it.

    These are the pixels of which training and evaluation cut their boxes. BadImage where they take a substitute or go
    without. DataError without DALI. Each thread has a pipeline of its own, which takes one file at a time.
    """
    encoded = routed(data)
    if not encoded.route.by_pillow:
        try:
            return Decoded(_by_dali(encoded), encoded.route)
        except RuntimeError:
            encoded = encoded.by_pillow(REFUSED)
    return Decoded(pillow.pixels(encoded), encoded.route)


def _by_dali(encoded: Encoded) -> NDArray[np.uint8]:
    whole = {
        "encoded": [encoded.data],
        "corner": np.zeros((1, 2), np.int32),
        "extent": np.array([[encoded.route.height, encoded.route.width]], np.int32),
    }
    stream: Stream | None = getattr(_own, "stream", None)
    if stream is None:
        pipe = graphs().decoded_box(batch_size=1, num_threads=1, prefetch_queue_depth=1, device_id=None)
        pipe.build()
        stream = Stream(pipe, 1, whole)
    _own.stream = None  # a pipeline that has failed is invalid
    stream.push(whole)
    (images,) = stream.pop()
    rgb = np.array(images[0])
    _own.stream = stream
    return rgb
