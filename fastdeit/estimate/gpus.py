"""The GPUs that the estimate knows: their datasheets, what kernels are expected to reach of them, and which kernels of
this package are taken there.

Only the standard library is imported.
"""

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class GPU:
    """A kind of GPU: datasheet figures, and the shares of them that kernels are expected to reach.

    arch                   its architecture, as `kernels/choices.json` names it
    memory                 bytes
    flops, tf32, fp32      peak FLOP/s: dense products of 16 bit, of float32 on tensor cores (of plain float32 where
                           there is none), and without tensor cores
    bandwidth              of the memory, bytes/s
    link, network          bytes/s in one direction from a GPU to others of its node, and out of the node
    gemm, narrow           share of the peak that library products reach, from 768 channels and below
    pointwise, reduction   share of the bandwidth: element-wise kernels and row reductions; column sums
    library, ours          shares of the peak of attention's (forward, backward), padding counted as work
    epilogue               slowdown of a product with GELU in its epilogue
    gap                    seconds between two kernels on a busy stream
    triton_products        whether Triton uses its tensor cores
    fp8                    how many times as fast products of e4m3 with row-wise scales are as those of 16 bit; 0 where
                           there are none
    """

    name: str
    arch: str
    memory: float
    flops: float
    tf32: float
    fp32: float
    bandwidth: float
    link: float
    network: float
    gemm: float
    narrow: float
    pointwise: float
    reduction: float
    library: tuple[float, float]
    ours: tuple[float, float]
    epilogue: float
    gap: float
    triton_products: bool = True
    fp8: float = 0.0


# Datasheets: NVIDIA V100 SXM2 (NVLink 2, DGX-1's four EDR adapters for eight GPUs), A100 SXM 80 GB (NVLink 3, an HDR
# adapter a GPU), H100 SXM and H200 (NVLink 4, an NDR adapter a GPU), GeForce RTX 3090 (PCIe 4; the peak with float32
# accumulation).
_H100 = GPU("H100", "sm_90", 80e9, 989e12, 494.5e12, 67e12, 3.35e12, 450e9, 50e9,
            .60, .48, .88, .60, (.36, .28), (.34, .24), .12, 1.2e-6, fp8=1.5)  # fmt: skip
"""The datasheet has twice the peak for FP8. Row-wise products that add up in float32 reach less of it."""
GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("V100", "sm_70", 32e9, 125e12, 15.7e12, 15.7e12, 0.90e12, 150e9, 6.25e9,
            .68, .60, .85, .60, (.25, .18), (.25, .18), .0, 2.0e-6, triton_products=False),
        GPU("A100", "sm_80", 80e9, 312e12, 156e12, 19.5e12, 2.04e12, 300e9, 25e9,
            .76, .64, .86, .60, (.42, .36), (.50, .38), .08, 1.5e-6),
        _H100,
        # A copy of large tensors was measured at 4.3 of the 4.8 TB/s.
        replace(_H100, name="H200", memory=141e9, bandwidth=4.8e12, pointwise=.83, reduction=.56),
        GPU("RTX3090", "sm_86", 24e9, 71e12, 35.6e12, 35.6e12, 0.936e12, 32e9, 12.5e9,
            .88, .80, .88, .65, (.60, .50), (.60, .50), .08, 1.5e-6),
    )
}  # fmt: skip
DEFAULT_GPUS = "V100", "A100", "H100", "H200"
GPUS_PER_NODE = 8


@cache
def _choices() -> dict[str, dict[str, dict[str, Any]]]:
    """`kernels/choices.json`, as `kernels._op` reads it; importing that would import torch."""
    return json.loads((Path(__file__).parents[1] / "kernels" / "choices.json").read_text())


def backend(gpu: GPU, op: str, width: int) -> str:
    """The backend that `fastdeit.kernels` asks first for an op on that GPU, `width` being the last dimension of its
    first tensor: "triton" where the table has none."""
    row = _choices().get(gpu.arch, {}).get(op, {})
    return row.get("widths", {}).get(str(width), row).get("backend", "triton")
