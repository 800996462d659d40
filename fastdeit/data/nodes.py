"""What the pixel operations of DALI's graph are built from: DALI's modules, the operands of a layer, common formulas.

A module of its own, because it imports DALI, and the table of operations (`pixel_ops.py`) has to do without.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali import math as dmath
from nvidia.dali.data_node import DataNode


@dataclass(frozen=True)
class Nodes:
    """The operands of one layer of operations, and DALI's modules `fn`, `types` and `math`.

    value: the operation's argument, float32 on the images' device; host_value: the same on the CPU, where DALI wants
    named arguments; matrix: float32 `[3, 3]` of the warp, on the CPU; inside: float32 `[H, W, 1]`, 0 in the one-pixel
    border and 1 elsewhere; smooth: float32 `[3, 3]`, Pillow's SMOOTH filter. Images are uint8 `[H, W, 3]`.
    """

    fn: ClassVar = fn
    types: ClassVar = types
    math: ClassVar = dmath

    value: DataNode
    host_value: DataNode
    matrix: DataNode
    inside: DataNode
    smooth: DataNode

    def float(self, image: DataNode) -> DataNode:
        """`image` as float32."""
        return fn.cast(image, dtype=types.FLOAT)

    def byte(self, levels: DataNode) -> DataNode:
        """`levels` as uint8; they have to be whole numbers from 0 to 255."""
        return fn.cast(levels, dtype=types.UINT8)

    def truncated(self, levels: DataNode) -> DataNode:
        """Float levels as uint8: clipped to 0 to 255, the fraction cut off, as Pillow does."""
        return self.byte(dmath.floor(dmath.clamp(levels, 0.0, 255.0)))

    def all_bits(self) -> DataNode:
        """The constant 255 of type uint8."""
        return types.Constant(np.uint8(255))

    def blend(self, base: "DataNode | float", image: DataNode, factor: DataNode) -> DataNode:
        """Pillow's blend: uint8 base + factor (image - base)."""
        return self.truncated(base + (self.float(image) - base) * factor)

    def channels(self, image: DataNode) -> list[DataNode]:
        """Red, green and blue, int32 `[H, W, 1]` each."""
        return [fn.cast(image[:, :, c : c + 1], dtype=types.INT32) for c in range(3)]

    def grey(self, image: DataNode) -> DataNode:
        """Pillow's convert("L"), float32 `[H, W, 1]`."""
        red, green, blue = self.channels(image)
        return self.float((red * 19595 + green * 38470 + blue * 7471 + 32768) // 65536)
