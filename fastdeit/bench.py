"""Measurements: ours and the peer's in turn, in one process, medians and ratios.

A round times both sides once, the order alternating, so that a machine whose speed drifts slows both. What is printed
and appended to a results file is the ratio of medians and the spread of the ratio over rounds, never a single time.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fastdeit import build, doctor, methods, models, rng
from fastdeit.data.loader import TrainLoader
from fastdeit.data.plan import Augment
from fastdeit.data.source import SyntheticSource, train_val
from fastdeit.engine.dist import World, pick_device
from fastdeit.engine.optim import AdamW, default_groups
from fastdeit.engine.step import Engine
from fastdeit.errors import UsageError
from fastdeit.methods.base import Batch, Context

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = 1000
DATA_IMAGES, DATA_SIDE = 512, (375, 500)
WARM_BATCHES, TIMED_BATCHES = 8, 16

Timer = Callable[[], float]


def main(args: argparse.Namespace) -> None:
    """`fastdeit bench`: print one comparison, and append its row to `--out`."""
    device = pick_device(args.device)
    measure = {"step": step, "data": data}[args.what]
    row = {"what": args.what, **measure(args, device)}
    row["ratio"] = {
        name: _median(row, name) / _median(row, "fastdeit") for name in row["seconds"] if name != "fastdeit"
    }
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
    sides = {"fastdeit": _our_step(args.model, args.batch, device)}
    if args.peer == "timm":
        sides["timm"] = _timm_step(args.model, args.batch, device)
    return _interleave(sides, args.rounds, device) | {"model": args.model, "batch": args.batch, "images": args.batch}


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
    """Seconds of one call, the device's work included; the first call, which allocates, is not measured."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def measure() -> float:
        wait()
        began = time.perf_counter()
        run()
        wait()
        return time.perf_counter() - began

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
        "box": torch.zeros(batch_size, 4, dtype=torch.int32),
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
    """Random resized crop and flip to 224 pixels: our replayable stream against a plain DALI pipeline.

    Each measurement opens the stream anew and first takes `WARM_BATCHES`: what a side has decoded ahead while nobody
    looked is used up, and the next `TIMED_BATCHES` come at the speed at which they are made.
    """
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as root:
        _write_images(Path(root))
        sides = {
            "fastdeit": _stream_timer(lambda: _our_stream(Path(root), args.batch, threads, device)),
            "dali": _stream_timer(lambda: _plain_stream(Path(root) / "train", args.batch, threads, device)),
        }
        row = _interleave(sides, args.rounds, device)
    return row | {"batch": args.batch, "images": TIMED_BATCHES * args.batch, "threads": threads, "side": DATA_SIDE}


def _stream_timer(open_stream: Callable[[], Iterator[Any]]) -> Timer:
    def measure() -> float:
        with closing(open_stream()) as stream:
            for _ in range(WARM_BATCHES):
                next(stream)
            began = time.perf_counter()
            for _ in range(TIMED_BATCHES):
                next(stream)
            return time.perf_counter() - began

    return measure


def _write_images(root: Path) -> None:
    source = SyntheticSource(DATA_IMAGES, classes=8, size=DATA_SIDE, seed=0)
    for split, count in (("train", DATA_IMAGES), ("val", 16)):
        for i in range(count):
            folder = root / split / f"class{source.label(i)}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i:05d}.jpg").write_bytes(bytes(source.read(i)))


def _our_stream(root: Path, batch_size: int, threads: int, device: torch.device) -> Iterator[Any]:
    source, _ = train_val(root)
    augment = Augment(mixup=0.0, cutmix=0.0, group_size=batch_size)
    loader = TrainLoader(
        source, augment, seed=0, batch_size=batch_size, threads=threads, device=build.loader_device(device)
    )
    return loader.batches(0, WARM_BATCHES + TIMED_BATCHES)


def _plain_stream(root: Path, batch_size: int, threads: int, device: torch.device) -> Iterator[Any]:
    from nvidia.dali import fn, pipeline_def, types

    on_cpu = device.type == "cpu"

    @pipeline_def(batch_size=batch_size, num_threads=threads, device_id=None if on_cpu else device.index or 0, seed=0)
    def pipeline():
        encoded, labels = fn.readers.file(file_root=str(root), random_shuffle=True)
        images = fn.decoders.image_random_crop(
            encoded, device="cpu" if on_cpu else "mixed", random_area=[0.08, 1.0], random_aspect_ratio=[0.75, 4 / 3]
        )
        images = fn.resize(images, size=(224, 224), interp_type=types.INTERP_CUBIC, antialias=True)
        return fn.flip(images, horizontal=fn.random.coin_flip()), labels

    pipe = pipeline()
    pipe.build()
    while True:
        images, _ = pipe.run()
        yield torch.from_dlpack(images.as_tensor())


def _interleave(sides: dict[str, Timer], rounds: int, device: torch.device) -> dict[str, Any]:
    """Seconds of every side in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides) if number % 2 == 0 else list(reversed(sides)):
            seconds[name].append(sides[name]())
    return {"seconds": seconds, "rounds": rounds, "device": device.type}


def _median(row: dict[str, Any], name: str) -> float:
    return statistics.median(row["seconds"][name])


def _sentence(row: dict[str, Any]) -> str:
    speeds = ", ".join(f"{name} {row['images'] / _median(row, name):.2f} images/s" for name in row["seconds"])
    text = (
        f"{row['what']} on {row['device']}, batch {row['batch']}, {row['rounds']} interleaved rounds, medians: {speeds}"
    )
    ours = row["seconds"]["fastdeit"]
    for peer, ratio in row["ratio"].items():
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
