"""Where the pixels of a picture lie in a view: what boxes, masks and key points follow.

Coordinates are continuous, in pixels: pixel i of a row covers [i, i + 1].
"""

import numpy as np
from numpy.typing import NDArray

from fastdeit.data.pixel_ops import PIXEL_OPS, Warp
from fastdeit.data.plan.operations import Ops
from fastdeit.data.plan.plan import Plan


def geometry(plan: Plan, size: tuple[int, int]) -> NDArray[np.float32]:
    """float32 `[B, 2, 3]`: the place (x, y, 1) of a decoded picture to its place (x, y) in a view of `size` (height,
    width). Crop, resize, flip and the operations that move pixels, such as a rotation, are in it."""
    corner, extent = plan.box[:, 1::-1].astype(np.float64), plan.box[:, :1:-1]
    # Everything as (x, y): the resized box, and the window in it.
    resize = np.array(size)[None, ::-1] if plan.resize is None else plan.resize[:, ::-1]
    start = 0 if plan.start is None else plan.start[:, ::-1]
    scale = resize / extent
    found = np.tile(np.eye(3), (len(corner), 1, 1))
    found[:, [0, 1], [0, 1]] = scale
    found[:, :2, 2] = -corner * scale - start
    found[plan.flip, 0] *= -1
    found[plan.flip, 0, 2] += size[1]
    return (_moved(plan.ops, size) @ found)[:, :2].astype(np.float32)


def _moved(ops: Ops, size: tuple[int, int]) -> NDArray[np.float64]:
    """`[B, 3, 3]`: what the operations do to places in the view."""
    found = np.tile(np.eye(3), (len(ops.kind), 1, 1))
    for kinds, values in zip(ops.kind.T, ops.value.T, strict=True):
        for kind in np.unique(kinds[kinds > 0]):
            warp = PIXEL_OPS[kind - 1].gpu
            if isinstance(warp, Warp):  # from output to input
                rows = kinds == kind
                found[rows] = np.linalg.inv(warp.matrix(values[rows], size)) @ found[rows]
    return found
