"""Measurements: ours and the peer's in turn, in one process, medians and ratios.

A round times both sides once, the order alternating, so that a machine whose speed drifts slows both. What is printed
and appended to a results file is the ratio of medians and the spread of the ratio over rounds, never a single time.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fastdeit import bench_data, doctor, methods, models, rng
from fastdeit.engine.dist import World, pick_device
from fastdeit.engine.optim import AdamW, default_groups
from fastdeit.engine.step import Engine
from fastdeit.errors import UsageError
from fastdeit.methods.base import Batch, Context

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = 1000
BATCH = 16

Timer = Callable[[], tuple[float, float]]


def main(args: argparse.Namespace) -> None:
    """`fastdeit bench`: print one comparison, and append its row to `--out`."""
    device = pick_device(args.device)
    measure = {"step": step, "data": data}[args.what]
    row = {"what": args.what, **measure(args, device)}
    for ratio, of in (("ratio", "seconds"), ("cpu_ratio", "cpu_seconds")):
        peers = [name for name in row[of] if not name.startswith("fastdeit")]
        row[ratio] = {name: _median(row, name, of) / _median(row, bench_data.compared_to(name), of) for name in peers}
    row["environment"] = _environment()
    print(_sentence(row))
    if args.out:
        path = Path(args.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"row appended to {path}")


def step(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Training step in fp32: forward, loss, backward, AdamW. Ours starts from uint8 images, timm's from floats."""
    if args.peer not in ("timm", "none"):
        raise UsageError(f"--peer {args.peer} has no training step; bench step has the peers timm and none")
    batch = args.batch or BATCH
    sides = {"fastdeit": _our_step(args.model, batch, device)}
    if args.peer == "timm":
        sides["timm"] = _timm_step(args.model, batch, device)
    return _interleave(sides, args.rounds, device) | {"model": args.model, "batch": batch, "images": batch}


def _our_step(name: str, batch_size: int, device: torch.device) -> Timer:
    try:
        model = models.build(name, num_classes=CLASSES)
    except ValueError as error:
        raise UsageError(str(error)) from error
    config = methods.config("supervised")()
    method = methods.find("supervised")(model, config, Context(CLASSES, 1, 1, teacher=lambda config: None)).to(device)
    _, exempt = model.decay_groups()
    groups = default_groups(method.named_parameters(), 0.05, {f"model.{name}" for name in exempt})
    optimizer = AdamW(groups, (0.9, 0.999), 1e-8)
    engine = Engine(method, optimizer, World(device), precision="fp32", accumulate=1)
    batch = _batch(batch_size, model.config.image_size, device)
    method.train()
    return _timed(lambda: engine.step([batch], 1e-4), device)


def _timed(run: Callable[[], None], device: torch.device) -> Timer:
    """(seconds, CPU seconds) of one call, the device's work included; the first, which allocates, is not measured."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def measure() -> tuple[float, float]:
        wait()
        began, used = time.perf_counter(), time.process_time()
        run()
        wait()
        return time.perf_counter() - began, time.process_time() - used

    measure()
    return measure


def _batch(batch_size: int, size: tuple[int, int], device: torch.device) -> Batch:
    height, width = size
    words = rng.bits(rng.key(0, "bench"), range(batch_size), height * width)
    images = torch.from_numpy(words.view("uint8").reshape(batch_size, height, width, 4)[..., :3].copy())
    y1 = torch.arange(batch_size) % CLASSES
    tensors = {
        "y1": y1,
        "y2": y1.flip(0),
        "lam": torch.full((batch_size,), 0.7),
        "partner": torch.arange(batch_size).flip(0),
        "pixel_lam": torch.full((batch_size,), 0.7),
        "box": torch.zeros(1, batch_size, 4, dtype=torch.int32),
        "noise": torch.zeros(batch_size, 0),
        "index": y1,
    }
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    return Batch(images=(images.to(device),), mean=MEAN, std=STD, **tensors)


def _timm_step(name: str, batch_size: int, device: torch.device) -> Timer:
    import timm
    from timm.loss import SoftTargetCrossEntropy

    model = timm.create_model(name, num_classes=CLASSES).to(device).train()
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, *model.patch_embed.img_size, generator=generator).to(device)
    targets = torch.rand(batch_size, CLASSES, generator=generator).softmax(-1).to(device)
    loss_of = SoftTargetCrossEntropy()

    def run() -> None:
        out = model(images)
        heads = out if isinstance(out, tuple) else (out,)
        sum(loss_of(head, targets) for head in heads).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return _timed(run, device)


def data(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The input of a recipe from JPEG files on, against the peers' loaders; see `bench_data`."""
    with bench_data.sides(args, device) as (sides, facts):
        return _interleave(sides, args.rounds, device) | facts


def _interleave(sides: dict[str, Timer], rounds: int, device: torch.device) -> dict[str, Any]:
    """Seconds and CPU seconds of every side in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides) if number % 2 == 0 else list(reversed(sides)):
            wall, cpu = sides[name]()
            seconds[name].append(wall)
            cpu_seconds[name].append(cpu)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "rounds": rounds, "device": device.type}


def _median(row: dict[str, Any], name: str, of: str = "seconds") -> float:
    return statistics.median(row[of][name])


def _speed(row: dict[str, Any], name: str) -> str:
    text = f"{name} {row['images'] / _median(row, name):.2f} images/s"
    if row["what"] == "data":
        text += f" ({row['images'] / _median(row, name, 'cpu_seconds'):.2f} per CPU-second)"
    return text


def _sentence(row: dict[str, Any]) -> str:
    speeds = ", ".join(_speed(row, name) for name in row["seconds"])
    text = (
        f"{row['what']} on {row['device']}, batch {row['batch']}, {row['rounds']} interleaved rounds, medians: {speeds}"
    )
    for peer, ratio in row["ratio"].items():
        ours = row["seconds"][bench_data.compared_to(peer)]
        by_round = [theirs / mine for mine, theirs in zip(ours, row["seconds"][peer], strict=True)]
        text += f"; {ratio:.3f} times {peer} (by round {min(by_round):.3f} to {max(by_round):.3f})"
    return text


def _environment() -> dict[str, Any]:
    """What a reader needs to repeat a row; no paths, no host."""
    found = doctor.report()
    kept = {name: found[name] for name in ("fastdeit", "torch", "gpus", "driver", "packages", "dali")}
    processor = {"cores": len(os.sched_getaffinity(0)), "model": _cpu_model()}
    time_stamp = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return kept | {"python": found["python"]["version"], "processor": processor, "time": time_stamp}


def _cpu_model() -> str | None:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
