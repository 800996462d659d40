"""DALI's graphs: `decoded_box` for the CPU, and the whole plan for the GPU: decode, resize, window and flip, pixel
operations.

`inputs` turns a plan into the operands that the graph takes from outside; the graph itself decides nothing. The
formulas are those of `pixel_ops`, in float32 and truncated, so that the result is Pillow's except where DALI has an
operator of its own: the resize (floats between its passes), the bicubic warp, `equalize` (OpenCV's table), and the
Gaussian instead of Pillow's three box filters. Where arithmetic meets images, operands are moved to the images' device;
named arguments (sizes, regions, matrices) and conditions stay on the CPU.

That graph also runs on DALI's CPU backend, which is how it is tested.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode

from fastdeit.data.execute.render import shown
from fastdeit.data.nodes import Nodes
from fastdeit.data.pixel_ops import FILL, PIXEL_OPS, Warp
from fastdeit.data.plan.plan import Plan

_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


class Form(NamedTuple):
    """What the graph of a view depends on: its output `size` (height, width), the number `layers` of its operations,
    and whether it is `windowed`: its box is the whole image, and its plan has `resize` and `start`."""

    size: tuple[int, int]
    layers: int
    windowed: bool


def guarded(encoded: DataNode) -> DataNode:
    """The same bytes, available only once `peek_image_shape` has accepted them (cost: a copy of the encoded bytes).

    Their number is an integer: DALI computes relative shapes in float32, which lacks odd numbers above 16 MiB."""
    shape = fn.peek_image_shape(encoded, adjust_orientation=False)
    zero = fn.cast(shape[0:1] * 0, dtype=types.INT32)
    return fn.slice(encoded, start=zero, shape=fn.cast(encoded.shape(), dtype=types.INT32), axes=(0,))


@pipeline_def
def decoded_box() -> DataNode:
    """A box of each image: inputs `encoded`, `corner` (y, x) and `extent` (height, width)."""
    encoded = guarded(fn.external_source(name="encoded", no_copy=True))
    corner, extent = fn.external_source(name="corner"), fn.external_source(name="extent")
    return fn.decoders.image_slice(encoded, start=corner, shape=extent, axes=(0, 1), adjust_orientation=False)


def forms(sizes: Sequence[tuple[int, int]], views: Sequence[Plan]) -> list[Form]:
    """The form of each view."""
    return [
        Form(size, view.ops.kind.shape[1], view.resize is not None) for size, view in zip(sizes, views, strict=True)
    ]


@pipeline_def(enable_conditionals=True)
def whole(views: Sequence[Form], gpu: bool) -> tuple[DataNode, ...]:
    """The images of each view, from the `inputs` of the same name; every sample is decoded once."""
    encoded = guarded(fn.external_source(name="encoded", no_copy=True))
    images = fn.decoders.image(
        encoded, device="mixed" if gpu else "cpu", adjust_orientation=False, jpeg_fancy_upsampling=True
    )
    rendered = []
    for view, form in enumerate(views):
        rendered.append(_rendered(images, form, f"{view}_", gpu))
    return tuple(rendered)


def _rendered(images: DataNode, form: Form, prefix: str, gpu: bool) -> DataNode:
    """One view of the decoded images, from the inputs whose names begin with `prefix`."""
    size = form.size
    images = fn.resize(
        images,
        size=_input(prefix, "shown") if form.windowed else size,
        roi_start=_input(prefix, "roi_start"),
        roi_end=_input(prefix, "roi_end"),
        interp_type=types.INTERP_CUBIC,
        antialias=True,
    )
    if form.windowed:
        images = fn.experimental.warp_perspective(
            images,
            matrix=_input(prefix, "window"),
            size=size,
            border_mode="reflect_101",
            interp_type=types.INTERP_NN,
        )
    device = "gpu" if gpu else "cpu"
    inside = np.zeros((*size, 1), np.float32)
    inside[1:-1, 1:-1] = 1
    inside, smooth = types.Constant(inside, device=device), types.Constant(_SMOOTH, device=device)
    for layer in range(form.layers):
        branch, value = _input(prefix, f"branch{layer}"), _input(prefix, f"value{layer}")
        matrix = _input(prefix, f"matrix{layer}")
        nodes = Nodes(value.gpu() if gpu else value, value, matrix, inside, smooth)
        if branch > 0:
            images = _choose(1, len(_BRANCHES) - 1, branch, images, nodes)
    return images


def _input(prefix: str, name: str) -> DataNode:
    return fn.external_source(name=prefix + name)


def inputs(sizes: Sequence[tuple[int, int]], views: Sequence[Plan]) -> dict[str, NDArray[Any]]:
    """What `whole` takes beside `encoded`, by name."""
    return {
        f"{number}_{name}": value
        for number, (size, view) in enumerate(zip(sizes, views, strict=True))
        for name, value in _inputs_of(size, view).items()
    }


def _inputs_of(size: tuple[int, int], view: Plan) -> dict[str, NDArray[Any]]:
    flip = view.flip
    if view.resize is None:
        corner = view.box[:, :2].astype(np.float32)
        end = corner + view.box[:, 2:].astype(np.float32)
        corner[flip, 1], end[flip, 1] = end[flip, 1], corner[flip, 1]
        found = {"roi_start": corner, "roi_end": end}
    else:
        # Of the resized picture only what the window shows is made.
        low, high = shown(view.resize, view.start, size)
        corner, scale = view.box[:, :2], view.box[:, 2:] / view.resize
        window = np.tile(np.eye(3, dtype=np.float32), (len(flip), 1, 1))
        window[:, :2, 2] = (view.start - low)[:, ::-1]
        window[flip, 0, 0] = -1
        window[flip, 0, 2] += size[1]
        found = {
            "roi_start": (corner + scale * low).astype(np.float32),
            "roi_end": (corner + scale * (high + 1)).astype(np.float32),
            "shown": (high - low + 1).astype(np.float32),
            "window": window,
        }
    for layer, (kind, value) in enumerate(zip(view.ops.kind.T, view.ops.value.T, strict=True)):
        found |= {
            f"branch{layer}": _BRANCH_OF[kind],
            f"value{layer}": np.ascontiguousarray(value),
            f"matrix{layer}": _matrices(kind, value, size),
        }
    return found


def _matrices(kind: NDArray[np.uint8], value: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """float32 `[B, 3, 3]` of the warps (`pixel_ops.Warp`); the identity where nothing is warped."""
    matrices = np.tile(np.eye(3), (len(kind), 1, 1))
    for code, op in enumerate(PIXEL_OPS, start=1):
        rows = kind == code
        if isinstance(op.gpu, Warp) and rows.any():
            matrices[rows] = op.gpu.matrix(value[rows], size)
    return matrices.astype(np.float32)


def _choose(low: int, high: int, branch: DataNode, image: DataNode, nodes: Nodes) -> DataNode:
    """Bisection: a batch passes few splits, and each sample one branch."""
    if low == high:
        return _BRANCHES[low](image, nodes)
    middle = (low + high) // 2
    if branch <= middle:
        image = _choose(low, middle, branch, image, nodes)
    else:
        image = _choose(middle + 1, high, branch, image, nodes)
    return image


def _warp(image: DataNode, nodes: Nodes) -> DataNode:
    return fn.experimental.warp_perspective(
        image, matrix=nodes.matrix, border_mode="constant", fill_value=FILL, interp_type=types.INTERP_CUBIC
    )


# A branch is what a sample may pass through; 0 is nothing, and all geometry shares one warp.
_BRANCHES = (None, _warp, *(op.gpu for op in PIXEL_OPS if not isinstance(op.gpu, Warp)))
_BRANCH_OF = np.array([0, *(1 if isinstance(op.gpu, Warp) else _BRANCHES.index(op.gpu) for op in PIXEL_OPS)], np.int32)
