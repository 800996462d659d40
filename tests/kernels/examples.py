"""The examples that ops bring (`fastdeit/kernels/_example.py`), as tests run them."""

from typing import Any

import torch
from torch import Tensor

from fastdeit.kernels._example import FEW, Example, Maker, Sizes
from fastdeit.kernels._op import OPS, Backend, Op
from fastdeit.kernels.lint.cases import backends

REFUSED = {("attention", "fused_backward", "key mask"), ("attention", "flash", "key mask")}
"""(op, backend, example) of calls that a backend refuses."""
ONLY_FLOAT16 = {"fused_backward", "epilogue", "epilogue_forward", "epilogue_backward"}
"""Backends that take operands of 16 bit alone."""


def every_example() -> dict[str, tuple[Op, Example]]:
    """Each example of each op, by "op" or "op-example"."""
    return {f"{name}-{example.name}".rstrip("-"): (op, example) for name, op in OPS.items() for example in op.examples}


def dry_calls() -> dict[str, tuple[Op, Backend, Example, Sizes, torch.dtype]]:
    """Each example by each backend of its op that launches Triton kernels, in the first two forms that the lint
    compiles: both 16-bit dtypes of DeiT-B, where an example has them."""
    return {
        f"{name}-{backend.name}-{str(dtype).removeprefix('torch.')}": (op, backend, example, sizes, dtype)
        for name, (op, example) in every_example().items()
        for owner, backend in backends()
        if owner == op.name and (op.name, backend.name, example.name) not in REFUSED
        for sizes, dtype in example.compiled[:2]
    }


def few(example: Example, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Arguments of a few elements, on the CPU."""
    return example.build(Maker(FEW, dtype, torch.device("cpu")))


def leaves(args: list[Any]) -> list[Tensor]:
    """The arguments that require a gradient."""
    return [a for a in args if isinstance(a, Tensor) and a.requires_grad]


def differentiable(result: Any) -> list[Tensor]:
    """The results of an op that have a gradient."""
    results = result if isinstance(result, tuple) else (result,)
    return [t for t in results if isinstance(t, Tensor) and t.requires_grad]
