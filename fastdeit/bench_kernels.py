"""`fastdeit kernels bench`: every backend of every op at the shapes of DeiT, side by side.

A measurement is one forward and, where there is a gradient, one backward. Sides: each backend that runs on the device,
the reference under native autograd, and that compiled by Inductor. On a GPU each side is captured in a CUDA graph over
copies of its inputs that together exceed the cache, so that neither launches nor the cache count; the copy that the
bandwidth is compared with is measured in the same rounds.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdeit import bench_measure, estimate_gpus, kernels, models
from fastdeit.engine.dist import pick_device
from fastdeit.errors import UsageError
from fastdeit.kernels import _op

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CHOICES = Path(kernels.__file__).parent / "choices.json"
_L2_BYTES = 128 * 2**20
_MOST_COPIES = 8
_NO_BACKENDS = {"copy", "compiled", "apex", "quack"}
"""Sides that are there to compare with, and cannot be an op's default."""


class Work(NamedTuple):
    """A call to measure: the op, its arguments (those that require a gradient get one), and the bytes it has to move at
    best, by the formula in the op's file, forward and backward."""

    op: str
    args: list[Any]
    bytes: float


def main(args: argparse.Namespace) -> None:
    """Print one line an op and side, append the rows to `--out`, and write the fastest into the shipped table."""
    device = pick_device(args.device)
    unknown = set(args.op or ()) - works_by_op().keys()
    if unknown:
        raise UsageError(f"there is no op {sorted(unknown)[0]!r} to measure; there are: {', '.join(works_by_op())}")
    try:
        config = models.build(args.model, num_classes=1000).config
    except ValueError as error:
        raise UsageError(str(error)) from error
    if args.predict:
        print(prediction(config, args))
        return
    bench_measure.check_out(args.out)
    rows = []
    for name, build in works_by_op().items():
        if not args.op or name in args.op:
            row = measure(name, lambda build=build: build(config, args.batch, DTYPES[args.dtype], device), args, device)
            print(_lines(row), flush=True)
            bench_measure.append(row, args.out)
            rows.append(row)
    if device.type == "cpu":
        print("These are figures of a CPU: they say nothing of a GPU.")
    if args.update_choices:
        update_choices(rows, CHOICES)
        print(f"the fastest of each op on {_op.card(device)} written to {CHOICES}")


# ---- what is measured ------------------------------------------------------------------------------------------------


def works_by_op() -> dict[str, Callable[[Any, int, torch.dtype, torch.device], Work]]:
    """Builders of the work of each op from a model's configuration, a batch size, a dtype and a device."""
    return {
        "attention": _attention,
        "query_attention": _query_attention,
        "add_layer_norm": _add_layer_norm,
        "layer_norm": _layer_norm,
        "mlp": _mlp,
        "layer_norm_mlp": _layer_norm_mlp,
        "distillation_loss": _distillation_loss,
        "cosub_loss": _cosub_loss,
        "patchify": _patchify,
        "global_norm": _global_norm,
        "fused_adamw": _fused_adamw,
        "fused_lamb": _fused_lamb,
        "fused_sgd": _fused_sgd,
    }


def _random(*shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0, grad: bool = True) -> Tensor:
    return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_(grad)


def _tokens(config: Any) -> int:
    return config.grid[0] * config.grid[1] + 2


def _attention(config: Any, batch: int, dtype: torch.dtype, device: torch.device) -> Work:
    qkv = _random(batch, _tokens(config), 3 * config.dim, dtype=dtype, device=device)
    bias = _random(3 * config.dim, dtype=torch.float32, device=device)
    return Work("attention", [qkv, config.heads, 0.125, bias], qkv.numel() / 3 * 22 * dtype.itemsize / 2)


def _query_attention(config: Any, batch: int, dtype: torch.dtype, device: torch.device) -> Work:
    q = _random(batch, 2, config.dim, dtype=dtype, device=device)
    kv = _random(batch, _tokens(config), 2 * config.dim, dtype=dtype, device=device)
    return Work("query_attention", [q, kv, config.heads, 0.125], kv.numel() * 3 * dtype.itemsize)


def _add_layer_norm(config: Any, batch: int, dtype: torch.dtype, device: torch.device) -> Work:
    shape, full = (batch, _tokens(config), config.dim), torch.float32
    residual, branch = (_random(*shape, dtype=d, device=device) for d in (full, dtype))
    weight, bias, branch_bias = (_random(config.dim, dtype=full, device=device) for _ in range(3))
    keep = torch.ones(batch, device=device)
    args = [residual, branch, weight, bias, 1e-6, None, keep, branch_bias, None, None, dtype]
    return Work("add_layer_norm", args, residual.numel() * (16 + 6 * dtype.itemsize))


def _layer_norm(config: Any, batch: int, dtype: torch.dtype, device: torch.device) -> Work:
    x = _random(batch, _tokens(config), config.dim, dtype=torch.float32, device=device)
    weight, bias = (_random(config.dim, dtype=torch.float32, device=device) for _ in range(2))
    return Work("layer_norm", [x, weight, bias, 1e-6, dtype], x.numel() * (12 + 2 * dtype.itemsize))


def _weights(config: Any, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    hidden = int(config.dim * config.mlp_ratio)
    shapes = (hidden, config.dim), (hidden,), (config.dim, hidden), (config.dim,)
    return [_random(*shape, dtype=dtype, device=device, scale=shape[-1] ** -0.5) for shape in shapes]


def _mlp_bytes(rows: int, weights: Sequence[Tensor]) -> float:
    """Operands of the six products, each once: x, pre, act, out and their gradients, and the weights."""
    hidden, width = weights[0].shape
    return weights[0].itemsize * (rows * (5 * width + 6 * hidden) + 6 * width * hidden)


def _mlp(config: Any, batch: int, dtype: torch.dtype, device: torch.device) -> Work:
    x, weights = (
        _random(batch, _tokens(config), config.dim, dtype=dtype, device=device),
        _weights(config, dtype, device),
    )
    return Work("mlp", [x, *weights, True], _mlp_bytes(x.shape[0] * x.shape[1], weights))


def _layer_norm_mlp(config: Any, batch: int, dtype: torch.dtype, device: torch.device) -> Work:
    x, weight, bias, _, _ = _layer_norm(config, batch, dtype, device).args
    weights = _weights(config, dtype, device)
    moved = _mlp_bytes(x.shape[0] * x.shape[1], weights) + x.numel() * 12
    return Work("layer_norm_mlp", [x, weight, bias, 1e-6, *weights, True], moved)


def _targets(batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    y1 = torch.arange(batch, device=device) % 1000
    return y1, y1.flip(0), torch.full((batch,), 0.7, device=device)


def _distillation_loss(config: Any, batch: int, dtype: torch.dtype, device: torch.device) -> Work:
    cls, dist, teacher = (_random(batch, 1000, dtype=dtype, device=device, grad=i < 2) for i in range(3))
    settings = 0.1, "ce", "hard", 0.5, 1.0, "numel", True
    args = [cls, dist, *_targets(batch, device), teacher, *settings]
    return Work("distillation_loss", args, cls.numel() * (5 * dtype.itemsize + 16))


def _cosub_loss(config: Any, batch: int, dtype: torch.dtype, device: torch.device) -> Work:
    logits = _random(2 * batch, 1000, dtype=dtype, device=device)
    return Work(
        "cosub_loss", [logits, *_targets(batch, device), 0.0, False, True], logits.numel() * (2 * dtype.itemsize + 8)
    )


def _patchify(config: Any, batch: int, dtype: torch.dtype, device: torch.device) -> Work:
    height, width = config.image_size
    images = torch.randint(256, (batch, height, width, 3), dtype=torch.uint8, device=device)
    partner = torch.arange(batch, device=device).flip(0)
    lam = torch.full((batch,), 0.7, device=device)
    box = torch.zeros(batch, 4, dtype=torch.int32, device=device)
    mean, std = list(bench_measure.MEAN), list(bench_measure.STD)
    args = [images, config.patch_size, mean, std, partner, lam, box, None, None, dtype]
    return Work("patchify", args, images.numel() * (2 + dtype.itemsize))


def _optimizer_lists(config: Any, device: torch.device) -> tuple[list[list[Tensor]], int]:
    shapes = _weights(config, torch.float32, torch.device("meta"))
    lists = [[torch.rand(s.shape, device=device) for s in shapes * config.depth] for _ in range(5)]
    return lists, sum(tensor.numel() for tensor in lists[0])


def _global_norm(config: Any, batch: int, dtype: torch.dtype, device: torch.device) -> Work:
    (_, grads, *_), count = _optimizer_lists(config, device)
    return Work("global_norm", [grads], 4 * count)


def _fused_adamw(config: Any, batch: int, dtype: torch.dtype, device: torch.device) -> Work:
    (*lists, ema), count = _optimizer_lists(config, device)
    return Work("fused_adamw", [*lists, *_adam_numbers(device), ema, 0.9999, []], 36 * count)


def _adam_numbers(device: torch.device) -> list[Any]:
    """What stands between the lists and the average: step, lr, betas, eps, decay, grad_scale and found_inf."""
    step, lr, one, good = (torch.full((), value, device=device) for value in (0.0, 1e-9, 1.0, 0.0))
    return [step, lr, 0.9, 0.999, 1e-8, 0.05, one, good]


def _fused_lamb(config: Any, batch: int, dtype: torch.dtype, device: torch.device) -> Work:
    (*lists, ema), count = _optimizer_lists(config, device)
    return Work("fused_lamb", [*lists, *_adam_numbers(device), ema, 0.9999, []], 52 * count)


def _fused_sgd(config: Any, batch: int, dtype: torch.dtype, device: torch.device) -> Work:
    (*lists, _, ema), count = _optimizer_lists(config, device)
    lr, one, good = (torch.full((), value, device=device) for value in (1e-9, 1.0, 0.0))
    return Work("fused_sgd", [*lists, lr, 0.9, True, False, 0.05, one, good, ema, 0.9999, []], 28 * count)


# ---- how -------------------------------------------------------------------------------------------------------------


def measure(name: str, build: Callable[[], Work], args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One row: seconds of every side in every round, and of a copy."""
    torch.manual_seed(0)
    first = build()
    copies = 1
    if device.type == "cuda":
        copies = min(_MOST_COPIES, math.ceil(_L2_BYTES / first.bytes))
    works = [first, *(build() for _ in range(copies - 1))]
    sides, failed = {}, {}
    for side, call in _sides(name, device):
        try:
            calls = [lambda call=call, work=work: call(work) for work in works]
            sides[side] = bench_measure.repeated(calls, device)
        except Exception as error:  # a side that cannot run is told, and the others are measured
            failed[side] = bench_measure.reason(error)
    sides["copy"], copied = bench_measure.copy_timer(device)
    row = {"what": "kernel", "op": name, "model": args.model, "batch": args.batch, "dtype": args.dtype}
    row["width"] = _op.width(first.args)
    row |= bench_measure.interleave(sides, args.rounds, device) | {"bytes": first.bytes, "copy_bytes": copied}
    return row | {"card": _op.card(device), "failed": failed, "environment": bench_measure.environment()}


def _sides(name: str, device: torch.device) -> Iterator[tuple[str, Callable[[Work], Any]]]:
    """(name, call) of every backend that runs on the device, of the reference, and of that compiled."""
    op = _op.OPS[name]
    on_card = device.type == "cuda"
    for backend in op.backends:
        if backend.name == _op.REFERENCE:
            continue
        # Forced on a card, since apex and QuACK have to be; on a CPU that would be the interpreter.
        able, why = backend.capability(device, on_card)
        if able:
            yield backend.name, lambda work, chosen=backend.name: _chosen(op, chosen, work)
        elif on_card:
            yield backend.name, lambda work, why=why: _refuse(why)
    yield "reference", lambda work: _trained(op.native, work.args)
    compiled = torch.compile(op.native, fullgraph=True, dynamic=False)
    yield "compiled", lambda work: _trained(compiled, work.args)


def _refuse(why: str) -> None:
    raise bench_measure.CannotRun(why)


def _chosen(op: _op.Op, backend: str, work: Work) -> Any:
    with kernels.use(**{op.name: backend}):
        return _trained(op, work.args)


def _trained(function: Callable, args: list[Any]) -> Any:
    """One forward and backward with a gradient like each output."""
    free = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    results = function(*args)
    ends = [
        r for r in (results if isinstance(results, tuple) else (results,)) if isinstance(r, Tensor) and r.requires_grad
    ]
    if not ends:
        return results
    return torch.autograd.grad(ends, free, [end.detach() for end in ends])


# ---- what would be best ----------------------------------------------------------------------------------------------


def prediction(config: Any, args: argparse.Namespace) -> str:
    """A table of the bytes that each op moves at best, and the microseconds of that at the bandwidth of datasheets.

    Nothing is run. A product of matrices takes longer where it is bound by arithmetic.
    """
    gpus = [estimate_gpus.GPUS[name] for name in estimate_gpus.DEFAULT_GPUS]
    lines = [
        f"{args.model}, batch {args.batch}, {args.dtype}: predictions, not measurements; least bytes of a forward and "
        "backward, and their time at the bandwidth of the datasheet",
        f"{'op':18}{'MB':>10}" + "".join(f"{gpu.name + ' us':>12}" for gpu in gpus),
    ]
    for name, build in works_by_op().items():
        if not args.op or name in args.op:
            moved = build(config, args.batch, DTYPES[args.dtype], torch.device("meta")).bytes
            times = "".join(f"{1e6 * moved / gpu.bandwidth:12.1f}" for gpu in gpus)
            lines.append(f"{name:18}{moved / 1e6:10.1f}{times}")
    return "\n".join(lines)


# ---- what it says ----------------------------------------------------------------------------------------------------


def _lines(row: dict[str, Any]) -> str:
    medians = {name: statistics.median(seconds) for name, seconds in row["seconds"].items()}
    bandwidth = row["copy_bytes"] / medians.pop("copy")
    column = max(10, *map(len, (*medians, *row["failed"])))
    lines = [f"{row['op']}, {row['model']}, batch {row['batch']}, {row['dtype']}, on {row['card']}"]
    for name, seconds in sorted(medians.items(), key=lambda item: item[1]):
        share = row["bytes"] / seconds / bandwidth
        spread = max(row["seconds"][name]) / min(row["seconds"][name])
        faster = medians["reference"] / seconds if "reference" in medians else math.nan
        lines.append(
            f"  {name:{column}} {1e6 * seconds:10.1f} us  {row['bytes'] / seconds / 1e9:8.1f} GB/s  "
            f"{share:6.1%} of a copy  {faster:6.2f}x reference  (slowest round {spread:.2f}x the fastest)"
        )
    return "\n".join([*lines, *(f"  {name:{column}} cannot run: {why}" for name, why in row["failed"].items())])


def update_choices(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the fastest eager backend of each measured op into the table at `path`: at each width of its tensors, and
    over the models of the rows for all other widths. Widths measured earlier stay as they are.
    """
    table = json.loads(path.read_text())
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["card"], row["op"]), []).append(row)
    for (card, op), group in groups.items():
        ops = table.setdefault(card, {})
        widths = ops.get(op, {}).get("widths", {})
        for width in {row["width"] for row in group}:
            widths[str(width)] = _fastest([row for row in group if row["width"] == width])
        ops[op] = _fastest(group) | {"widths": widths}
    path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")


def _fastest(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Backend with the least geometric mean of the times, and what was measured. Sides that are no backends of ours do
    not count."""
    names = set.intersection(*(set(row["seconds"]) for row in rows)) - _NO_BACKENDS
    means = {name: statistics.geometric_mean(statistics.median(row["seconds"][name]) for row in rows) for name in names}
    best, *others = sorted(means, key=means.__getitem__)
    rest = ", ".join(f"{means[other] / means[best]:.2f} times {other}" for other in others) or "nothing else runs"
    shapes = ", ".join(sorted({f"{row['model']} batch {row['batch']} {row['dtype']}" for row in rows}))
    return {"backend": best, "because": f"measured: {rest} ({shapes})"}
