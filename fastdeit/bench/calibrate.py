"""`fastdeit bench calibrate`: the rates that `estimate.gpus.GPUS` judges, measured, and that the design rests on.

gemm        the library's products of a block's four linear layers: forward, and the two of backward
attention   forward and backward from packed queries, keys and values: the library's kernels by name, and ours
layer_norm  forward and backward: PyTorch and ours
mlp         the products with GELU beside them or in their epilogue: every backend
teacher     inference of a convolutional network: eager, channels last, compiled, both

DeiT-B's shapes with 256 images in 16 bit on a GPU; small ones on a CPU.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdeit import models
from fastdeit.bench import kernels, measure, step, suite
from fastdeit.bench.measure import CLASSES, CannotRun, Timer, interleave, median, noting, repeated, timed

_SHAPES = {"cuda": ("deit_base_distilled_patch16_224", 256), "cpu": ("deit_tiny_distilled_patch16_224", 2)}
_LIBRARY = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


class Side(NamedTuple):
    """A call, with its FLOPs and the bytes it moves at best, where they are known. whole: timed with its launches."""

    call: Callable[[], Any]
    flops: float | None = None
    bytes: float | None = None
    whole: bool = False


def main(args: argparse.Namespace, device: torch.device) -> None:
    """Print a table for each part and append its row to `--out`."""
    name, batch = _SHAPES[device.type]
    batch = args.batch or batch
    config, precision = models.build(name, num_classes=CLASSES).config, step.default_precision(device)
    parts = {
        "gemm": _products,
        "attention": _attention,
        "layer_norm": partial(_op_sides, "layer_norm"),
        "mlp": partial(_op_sides, "mlp"),
        "teacher": _teacher,
    }
    for part, sides in parts.items():
        row = {"what": "calibrate", "part": part, "model": name, "batch": batch, "precision": precision}
        row |= _measure(sides(config, batch, step.DTYPES[precision], device), args.rounds, device)
        row["environment"] = measure.environment()
        print(sentence(row), flush=True)
        measure.append(row, args.out)
        suite.forget(device)


def _measure(sides: Iterator[tuple[str, Callable[[], Side]]], rounds: int, device: torch.device) -> dict[str, Any]:
    timers: dict[str, Timer] = {}
    work: dict[str, Side] = {}
    failed: dict[str, str] = {}
    for name, build in sides:
        with noting(failed, name):
            side = build()
            timers[name] = timed(side.call, device) if side.whole else repeated([side.call], device)
            work[name] = side
    timers["copy"], copied = measure.copy_timer(device)
    found = interleave(timers, rounds, device, failed, discard=int(device.type == "cuda"))
    return found | {
        "flops": {name: side.flops for name, side in work.items() if name in found["seconds"]},
        "bytes": {name: side.bytes for name, side in work.items() if name in found["seconds"]} | {"copy": copied},
        "failed": failed,
        "clocks": measure.clocks(device),
    }


def _products(
    config: Any, batch: int, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Callable[[], Side]]]:
    rows = batch * (config.grid[0] * config.grid[1] + 2)
    for layer, (n, k) in step.linear_layers(config).items():
        for direction in ("forward", "input_gradient", "weight_gradient"):
            yield f"{layer}_{direction}", partial(_product, direction, rows, n, k, dtype, device)


def _product(direction: str, m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Side:
    x, weight, out = (torch.randn(*shape, device=device).to(dtype) for shape in ((m, k), (n, k), (m, n)))
    call = {
        "forward": lambda: x @ weight.t(),
        "input_gradient": lambda: out @ weight,
        "weight_gradient": lambda: out.t() @ x,
    }[direction]
    return Side(call, 2.0 * m * n * k, float(dtype.itemsize * (m * k + n * k + m * n)))


def _attention(
    config: Any, batch: int, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Callable[[], Side]]]:
    work = kernels.work_of("attention", config, batch, dtype, device)
    qkv, heads = work.args[0], config.heads
    tokens, width = qkv.shape[1], config.dim // heads
    flops = 7 * 2.0 * batch * heads * tokens * tokens * width  # two products forward, five backward

    def library(backend: SDPBackend) -> Side:
        if device.type == "cpu":
            raise CannotRun("the CPU has one attention kernel, which is the side library")
        return Side(lambda: _trained(qkv, heads, backend), flops, work.bytes)

    for name, backend in _LIBRARY.items():
        yield name, partial(library, backend)
    yield "library", lambda: Side(lambda: _trained(qkv, heads, None), flops, work.bytes)
    for name, call in kernels._sides("attention", device):
        yield name, lambda call=call: Side(lambda: call(work), flops, work.bytes)


def _trained(qkv: Tensor, heads: int, backend: SDPBackend | None) -> Tensor:
    """Attention of packed `[B, N, 3C]` and its gradient, as timm calls it; None is torch's choice of kernel."""
    batch, tokens, _ = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    if backend is None:
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v)
    out = out.transpose(1, 2).reshape(batch, tokens, -1)
    return torch.autograd.grad(out, qkv, out.detach())[0]


def _op_sides(
    op: str, config: Any, batch: int, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Callable[[], Side]]]:
    """Every backend of an op of ours, the reference, and that compiled."""
    work = kernels.work_of(op, config, batch, dtype, device)
    flops = None
    if op == "mlp":
        x, weight = work.args[0], work.args[1]
        flops = 6 * 2.0 * x.numel() * len(weight)
    for name, call in kernels._sides(op, device):
        yield name, lambda call=call: Side(lambda: call(work), flops, work.bytes)


def _teacher(
    config: Any, batch: int, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Callable[[], Side]]]:
    name, size = suite.TEACHERS[device.type], config.image_size

    def side(layout: torch.memory_format, compiled: bool) -> Side:
        network = models.build_timm(name, num_classes=CLASSES).eval().requires_grad_(False)
        flops = float(batch * network.flops(size))
        placed = network.inner.to(device=device, dtype=dtype, memory_format=layout)
        images = torch.randn(batch, 3, *size, device=device).to(dtype=dtype, memory_format=layout)
        called = torch.compile(placed, dynamic=False) if compiled else placed
        return Side(torch.inference_mode()(lambda: called(images)), flops, whole=True)

    for compiled in (False, True):
        for layout, word in ((torch.contiguous_format, ""), (torch.channels_last, "_channels_last")):
            yield ("compile" if compiled else "eager") + word, partial(side, layout, compiled)


def sentence(row: dict[str, Any]) -> str:
    """A row as lines: time, TFLOP/s and GB/s of each side."""
    lines = [f"{row['part']} of {row['model']} on {row['device']}, batch {row['batch']}, {row['precision']}"]
    for name in row["seconds"]:
        seconds = median(row, name)
        spread = max(row["seconds"][name]) / min(row["seconds"][name])
        line = f"  {name:22} {1e6 * seconds:12.1f} us"
        flops, moved = row["flops"].get(name), row["bytes"].get(name)
        line += f" {flops / seconds / 1e12:9.3f} TFLOP/s" if flops else " " * 18
        line += f" {moved / seconds / 1e9:9.1f} GB/s" if moved else ""
        lines.append(f"{line}  (slowest round {spread:.2f}x the fastest)")
    return "\n".join([*lines, *(f"  {name:22} cannot run: {why}" for name, why in row["failed"].items())])
