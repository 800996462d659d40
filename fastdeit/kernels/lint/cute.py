"""What CuTe DSL makes of QuACK's products with our GELU in their epilogues, without a card: part of `kernels lint`.

A process for each product calls `mlp/quack.py` on tensors without memory, as if an H200 were there: QuACK asks PyTorch
for the card, and is told what one says. CuTe DSL compiles at the first call and keeps the cubin. What comes after that
loads the program onto a card, fails, and is not looked at. Read from the cubin:

    registers, stack     of a thread, the latter in bytes (cuobjdump)
    instruction mix      SASS, each instruction once however often it runs (nvdisasm)

The mixes are in no golden file: a range of QuACK's releases is allowed, and CuTe DSL comes with them.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from torch._subclasses import FakeTensorMode

from fastdeit.kernels import _triton
from fastdeit.kernels.lint.disassembly import disassembled, mix

ARCH = 90
OPS = "mlp", "layer_norm_mlp"
"""Ops that have the backend `quack`."""
PRODUCTS = {
    "gelu": "forward",
    "gelu_backward": "backward, which keeps no activation",
    "gelu_backward_act": "backward, which makes the activation again",
}
TOKENS, WIDTH, HIDDEN = 256 * 198, 768, 3072
"""Of DeiT-B distilled, 256 images."""
_CARD = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=141 << 30)
_CARD.L2_cache_size = 50 << 20


@dataclass
class Facts:
    """What became of a product: `registers` and `stack` bytes of a thread, and the instructions by opcode."""

    error: str | None = None
    registers: int = 0
    stack: int = 0
    mix: dict[str, int] = field(default_factory=dict)


def missing() -> str | None:
    """Why there is nothing to compile; None where QuACK is installed."""
    try:
        version("quack-kernels")
    except PackageNotFoundError:
        return "QuACK's products are left out: pip install 'fastdeit[quack]' to have them compiled as well"
    return None


def compile_all() -> dict[str, Facts]:
    """Facts of every product, by its name in `PRODUCTS`."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return dict(zip(PRODUCTS, pool.map(compiled, PRODUCTS), strict=True))


def compiled(product: str) -> Facts:
    """Facts of one product, which a process of its own compiles: it pretends to be on another machine."""
    with tempfile.TemporaryDirectory() as folder:
        asked = {"QUACK_ARCH": str(ARCH), "CUTE_DSL_ARCH": f"sm_{ARCH}a", "QUACK_CACHE_ENABLED": "0"}
        asked |= {"CUTE_DSL_KEEP_CUBIN": "1", "CUTE_DSL_DUMP_DIR": folder}
        command = [sys.executable, "-m", __name__, product]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | asked)
        cubins = list(Path(folder).glob("*.cubin"))
        if len(cubins) != 1:
            said = done.stderr.strip().splitlines() or ["it said nothing"]
            return Facts(error=f"{len(cubins)} programs were made; {said[-1]}")
        usage = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubins[0]]
        told = subprocess.run(usage, capture_output=True, text=True, check=True)
        return read(told.stdout, disassembled(cubins[0].read_bytes()))


def read(usage: str, sass: str) -> Facts:
    """Facts from what cuobjdump and nvdisasm print of a cubin that has one kernel."""
    registers, stack = map(int, re.search(r"\bREG:(\d+) STACK:(\d+)", usage).groups())
    return Facts(registers=registers, stack=stack, mix=mix(sass))


def broken(facts: Facts) -> list[str]:
    """Limits that a product breaks, in words."""
    if facts.error is not None:
        return [f"does not compile: {facts.error}"]
    if not facts.mix.get("HGMMA"):
        return ["no HGMMA: it does not use the tensor cores of sm_90 by their own instructions"]
    return []


def cells(found: dict[str, Facts]) -> list[list[str]]:
    """Cells of a table, its head first, one product a line."""
    lines = [["product", "regs", "stack", "spill", "instr", "MUFU", "tensor cores"]]
    for product, facts in found.items():
        if facts.error is not None:
            lines.append([PRODUCTS[product], "does not compile", *[""] * 5])
            continue
        count = facts.mix.get
        spill = f"{count('STL', 0)}/{count('LDL', 0)}"
        numbers = [facts.registers, facts.stack, spill, count("all", 0), count("MUFU", 0), f"{count('HGMMA', 0)} HGMMA"]
        lines.append([PRODUCTS[product], *map(str, numbers)])
    return lines


# ---- in the process that compiles ------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> None:
    """Have QuACK compile the product `argv[0]`. Ends with an error after that, since there is no card."""
    from fastdeit.kernels.mlp import quack

    if quack._quack() is None:
        raise SystemExit("QuACK 0.6.5 or newer cannot be imported")
    (product,) = argv
    card = {
        "get_device_properties": lambda *device: _CARD,
        "get_device_capability": lambda *device: (_CARD.major, _CARD.minor),
        "current_device": lambda: 0,
        "is_available": lambda: True,
        "device_of": nullcontext,
    }
    with ExitStack() as pretended:
        pretended.enter_context(mock.patch.multiple(torch.cuda, **card))
        pretended.enter_context(mock.patch.object(quack, "_check"))  # it looks at addresses, which there are none of
        pretended.enter_context(_triton.recording(ARCH))
        pretended.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        x, w1, b1, w2, pre = (
            torch.empty(shape, dtype=torch.bfloat16, device="cuda")
            for shape in ((TOKENS, WIDTH), (HIDDEN, WIDTH), (HIDDEN,), (WIDTH, HIDDEN), (TOKENS, HIDDEN))
        )
        if product == "gelu":
            quack.product_gelu(x, w1, b1)
        else:
            quack.product_gelu_backward(x, w2, pre, act=product == "gelu_backward_act")


if __name__ == "__main__":
    main(sys.argv[1:])
