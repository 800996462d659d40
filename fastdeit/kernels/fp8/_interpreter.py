"""Casts to e4m3 in Triton's interpreter, as a card makes them.

That of Triton 3.8 loses the carry of a mantissa that is rounded up to 2, so that 127 becomes 64, and makes noise of
what is below the least normal number. PyTorch's cast rounds and saturates as `cvt.rn.satfinite.e4m3x2.f32` does.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def mend() -> None:
    """Let the interpreter of this process cast float32 to e4m3 by PyTorch; all else as before."""
    convert = interpreter._convert_float

    def mended(values: np.ndarray, of: Any, to: Any, rounding: Any) -> np.ndarray:
        if (of, to) != (tl.float32, tl.float8e4nv):
            return convert(values, of, to, rounding)
        floats = np.frombuffer(values.tobytes(), np.float32).copy()
        return torch.from_numpy(floats).to(torch.float8_e4m3fn).view(torch.uint8).numpy().reshape(values.shape)

    interpreter._convert_float = mended
