"""`fastdeit bench step` and `bench forward`: one cell of the grid, ours and the peers in turn, as one row.

A cell says what is computed: model, batch, resolution, precision, online teacher, average of weights. A side says who
computes it; ours are here, the peers in `peers.py`. A side that cannot be built or run is noted in the row with
its reason, and the others are measured.

step     forward, loss, backward, AdamW, and the average of the weights where it is asked for, with DeiT's drop-path.
         The loss is cross-entropy with mixed targets; with a teacher, DeiT's hard distillation, the teacher's forward
         included. Ours starts from uint8 images and mixes them, and keeps the engine's guard and sums; peers start from
         finished floats.
forward  inference of finished floats in eval mode, the same for all sides
"""

import gc
import statistics
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdeit import kernels, methods, models, rng
from fastdeit.batch import Batch, Labels, Step
from fastdeit.bench import watching
from fastdeit.bench.measure import (
    CLASSES,
    MEAN,
    STD,
    CannotRun,
    Timer,
    clocks,
    copy_timer,
    flops_of_products,
    interleave,
    noting,
    products_timer,
    timed,
)
from fastdeit.bench.names import CAPTURES
from fastdeit.engine.capture import WARM_STEPS, GraphedStep
from fastdeit.engine.dist import World
from fastdeit.engine.ema import Ema, EmaTeacher
from fastdeit.engine.groups import default_groups, refined
from fastdeit.engine.optim import Optimizer
from fastdeit.engine.optimizers import AdamW
from fastdeit.engine.step import Engine, autocast
from fastdeit.errors import UsageError
from fastdeit.fields import size_pair
from fastdeit.kernels.dtypes import DTYPES
from fastdeit.methods.base import Context
from fastdeit.methods.frozen import freeze
from fastdeit.methods.teacher import Teacher
from fastdeit.models.layers import hidden_matrices
from fastdeit.run.precision import has_bf16

DROP_PATH, EMA_DECAY, WEIGHT_DECAY, LR = 0.1, 0.99996, 0.05, 1e-4


@dataclass(frozen=True)
class Cell:
    """What every side computes. image_size: pixels of a square's side; teacher: a model of timm."""

    what: str
    model: str
    batch: int
    image_size: int
    precision: str
    teacher: str | None = None
    ema: bool = False

    @property
    def drop_path(self) -> float:
        """Rate of drop-path: DeiT's in a step, none in inference."""
        return DROP_PATH if self.what == "step" else 0.0

    @property
    def options(self) -> dict[str, Any]:
        """Of the student, ours and timm's."""
        return {"num_classes": CLASSES, "image_size": self.image_size, "drop_path": self.drop_path}

    def __str__(self) -> str:
        extra = [f"teacher {self.teacher}"] if self.teacher else []
        extra += ["EMA"] if self.ema else []
        return ", ".join([f"{self.what} of {self.model}", f"batch {self.batch}", f"{self.image_size} px", *extra])


class Side(NamedTuple):
    """One step or forward to be timed, the FLOPs of it by the model's own count, the calls before the first that is
    like all others, and what has to be entered around its calls, which is not timed."""

    run: Callable[[], Any]
    flops: float
    warm: int = 0
    around: Callable[[], AbstractContextManager] = nullcontext


def cell(
    what: str,
    model: str,
    device: torch.device,
    *,
    batch: int,
    image_size: int | None = None,
    precision: str | None = None,
    teacher: str | None = None,
    ema: bool = False,
) -> Cell:
    """A cell with defaults filled in: the model's own size, and 16 bit on a GPU. UsageError for what cannot be."""
    chosen = default_precision(device) if precision is None else precision
    if chosen == "bf16" and device.type == "cuda" and not has_bf16(device):
        raise UsageError(f"--precision bf16: {torch.cuda.get_device_name(device)} has no bf16 products; use fp16")
    return Cell(what, model, batch, _side_of(model, image_size, teacher), chosen, teacher, ema)


@cache
def _side_of(model: str, image_size: int | None, teacher: str | None) -> int:
    """Pixels of the side of the model's square images. UsageError where model or teacher cannot be built for them."""
    try:
        with torch.device("meta"):
            built = models.build(model, num_classes=CLASSES, **({"image_size": image_size} if image_size else {}))
            if teacher is not None:
                models.build_timm(teacher)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if built.patch_size is None:
        raise UsageError(f"--model {model} is no vision transformer; bench step and bench forward measure those")
    height, width = size_pair(built.config.image_size, "image_size")
    if height != width:
        raise UsageError(f"--model {model} takes images of {height} x {width} pixels; the benchmark's are square")
    return height


def default_precision(device: torch.device) -> str:
    """bf16 on a GPU that has it, fp16 on an older one, fp32 on a CPU."""
    if device.type == "cpu":
        return "fp32"
    return "bf16" if has_bf16(device) else "fp16"


# ---- one row ---------------------------------------------------------------------------------------------------------


def measure(
    wanted: Cell, builders: dict[str, Callable[[Cell, torch.device], Side]], rounds: int, device: torch.device
) -> dict[str, Any]:
    """The row of a cell, without its environment. On a GPU the first round warms it up and is thrown away."""
    failed: dict[str, str] = {}
    timers: dict[str, Timer] = {}
    flops: dict[str, float] = {}
    peaks: dict[str, int | None] = {}
    for name, build in builders.items():
        with noting(failed, name):
            timers[name], flops[name], peaks[name] = ready(build, wanted, device)
        release(device)
    shapes = products(wanted)
    copy, copied = copy_timer(device)
    rates = {"matrix": products_timer(shapes, DTYPES[wanted.precision], device), "copy": copy}
    found = interleave(timers | rates, rounds, device, failed, discard=int(device.type == "cuda"))
    matrix, copies = (found["seconds"].pop(name, None) for name in rates)
    watched = {}
    if wanted.what == "step" and device.type == "cpu" and name_of("none") in found["seconds"]:
        timers.clear()  # what the sides keep
        watched = _watched(wanted, rounds, device)
    for name in rates:
        found["cpu_seconds"].pop(name, None)
    return {
        **asdict(wanted),
        **found,
        "images": wanted.batch,
        "drop_path": wanted.drop_path,
        "threads": torch.get_num_threads(),
        "capture": {name: _capture_of(name) for name in builders if name.startswith("fastdeit")},
        "kernels": {item.name: item.backend for item in kernels.info()},
        "flops": {name: flops[name] for name in found["seconds"]},
        "peak_bytes": {name: peaks[name] for name in found["seconds"]},
        "matrix_flops_per_s": _rate(flops_of_products(shapes), matrix),
        "copy_bytes_per_s": _rate(copied, copies),
        "matrix_seconds": matrix,
        "copy_seconds": copies,
        "clocks": clocks(device),
        "watching_seconds": watched,
        "failed": failed,
    }


def _watched(wanted: Cell, rounds: int, device: torch.device) -> dict[str, float]:
    ours, _, _ = engine(wanted, device, "none")
    ours.step([batch(wanted, ours.method.noise(), device)], LR)
    return watching.seconds(ours, rounds)


def ready(
    build: Callable[[Cell, torch.device], Side], wanted: Cell, device: torch.device
) -> tuple[Timer, float, int | None]:
    """(timer, FLOPs, bytes at the peak of building and running it beyond what was allocated before; None on a CPU)."""
    torch.manual_seed(0)
    if device.type == "cpu":
        side = build(wanted, device)
        return _timed(side, device), side.flops, None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    side = build(wanted, device)
    timer = _timed(side, device)
    return timer, side.flops, torch.cuda.max_memory_allocated(device) - before


def _timed(side: Side, device: torch.device) -> Timer:
    with side.around():
        timer = timed(side.run, device, side.warm)

    def inside() -> tuple[float, float]:
        with side.around():
            return timer()

    return inside


def release(device: torch.device) -> None:
    """Free what a side that is gone has left behind."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def products(wanted: Cell) -> list[tuple[int, int, int]]:
    """(M, N, K) of the four linear layers of a block, forward: qkv, proj, fc1, fc2."""
    with torch.device("meta"):
        model = models.build(wanted.model, **wanted.options)
    rows = wanted.batch * (model.config.grid[0] * model.config.grid[1] + model.prefix_tokens)
    return [(rows, n, k) for n, k in linear_layers(model.config).values()]


def linear_layers(config: Any) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the linear layers of a block, in their order."""
    dim, hidden = config.dim, int(config.dim * config.mlp_ratio)
    return {"qkv": (3 * dim, dim), "proj": (dim, dim), "fc1": (hidden, dim), "fc2": (dim, hidden)}


def _rate(amount: float, seconds: list[float] | None) -> float | None:
    return amount / statistics.median(seconds) if seconds else None


# ---- what goes in ----------------------------------------------------------------------------------------------------


def random_images(wanted: Cell) -> Tensor:
    """uint8 `[B, H, W, 3]`, the same in every process."""
    size, count = wanted.image_size, wanted.batch
    words = rng.bits(rng.key(0, "bench"), range(count), size * size)
    return torch.from_numpy(words.view("uint8").reshape(count, size, size, 4)[..., :3].copy())


def batch(wanted: Cell, noise: Mapping[str, int], device: torch.device, images: Tensor | None = None) -> Batch:
    """These images, by default random ones, mixed in pairs with weight 0.7."""
    images, count = random_images(wanted) if images is None else images, wanted.batch
    y1 = torch.arange(count) % CLASSES
    weight = torch.full((count,), 0.7)
    return Batch(
        images=(images,),
        targets=Labels(y1, y1.flip(0), weight),
        partner=torch.arange(count).flip(0),
        pixel_lam=weight,
        box=torch.zeros(1, count, 4, dtype=torch.int32),
        index=y1,
        copy=torch.zeros_like(y1),
        step=Step.at(0, 1, 1),
        mean=MEAN,
        std=STD,
        noise={name: torch.rand(count, columns) for name, columns in noise.items()},
    ).to(device)


def floats(wanted: Cell, device: torch.device) -> Tensor:
    """Normal random images `[B, 3, H, W]`, float32."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(wanted.batch, 3, wanted.image_size, wanted.image_size, generator=generator).to(device)


def teacher(wanted: Cell) -> nn.Module | None:
    """timm's model in eval mode, its published weights where they are on disk and random ones where not."""
    if wanted.teacher is None:
        return None
    options = {"image_size": wanted.image_size, "num_classes": CLASSES}
    network = models.build_timm(wanted.teacher, pretrained=on_disk(wanted.teacher), **options)
    return network.eval().requires_grad_(False)


def on_disk(name: str) -> bool:
    """Whether timm's weights of a model that knows the benchmark's classes lie in the hub's cache."""
    import timm
    from huggingface_hub import try_to_load_from_cache

    known = timm.get_pretrained_cfg(name)
    if known is None or not known.hf_hub_id or known.num_classes != CLASSES:
        return False
    return isinstance(try_to_load_from_cache(known.hf_hub_id, "model.safetensors"), str)


def step_flops(network: nn.Module, judge: nn.Module | None, wanted: Cell) -> float:
    """FLOPs of a cell: forward, twice as much backward in a step, and the teacher's forward."""
    passes = 3 if wanted.what == "step" else 1
    judged = judge.flops(wanted.image_size) if judge is not None else 0
    return float(wanted.batch * (passes * network.flops() + judged))


# ---- our sides -------------------------------------------------------------------------------------------------------


def name_of(capture: str) -> str:
    """What our side with this `engine.capture` is called."""
    return "fastdeit" if capture == "none" else f"fastdeit_{capture}"


def _capture_of(name: str) -> str:
    return name.partition("_")[2] or "none"


def _ours(wanted: Cell, device: torch.device, *, capture: str) -> Side:
    build = _our_step if wanted.what == "step" else _our_forward
    return build(wanted, device, capture)


def _our_step(wanted: Cell, device: torch.device, capture: str) -> Side:
    ours, flops, warm = engine(wanted, device, capture)
    samples = batch(wanted, ours.method.noise(), device)
    return Side(lambda: ours.step([samples], LR), flops, warm)


def engine(
    wanted: Cell,
    device: torch.device,
    capture: str,
    tuning: kernels.Tuning | None = None,
    cached: Path | None = None,
    optimizer: type[Optimizer] = AdamW,
) -> tuple[Engine, float, int]:
    """(engine for the steps of a cell, their FLOPs, the steps before the first that is like all others)

    cached     a cache of a teacher's logits, from which the steps of a cell without a teacher then learn
    optimizer  of the student, with its own defaults
    """
    _check_capture(device, capture)
    model, judge = models.build(wanted.model, **wanted.options), teacher(wanted)
    if cached is not None:
        kind, config = methods.find("distill"), methods.config("distill")(cached=str(cached))
        context = Context(CLASSES, 1, 1, lambda config: None, EmaTeacher)
    elif judge is None:
        kind, config = methods.find("supervised"), methods.config("supervised")()
        context = Context(CLASSES, 1, 1, lambda config: None, EmaTeacher)
    else:
        kind, config = methods.find("distill"), methods.config("distill")(teacher={"timm": wanted.teacher})
        network = freeze(judge, (wanted.image_size, wanted.image_size), DTYPES[wanted.precision]).to(device)
        frozen = Teacher(network, mean=judge.mean, std=judge.std)
        context = Context(CLASSES, 1, 1, lambda config: frozen, EmaTeacher)
    method = kind(model, config, context).to(device).train()
    _, exempt = model.decay_groups()
    groups = default_groups(method.named_parameters(), WEIGHT_DECAY, {f"model.{name}" for name in exempt})
    if optimizer.tells_matrices:
        groups = refined(groups, {}, {f"model.{name}" for name in hidden_matrices(model)})
    updates = optimizer(groups)
    average = Ema(updates.params, EMA_DECAY, method) if wanted.ema else None
    options = {"precision": wanted.precision, "accumulate": 1, "ema": average, "capture": capture, "tuning": tuning}
    made = Engine(method, updates, World(device), **options)
    # A recorded step is like all others only when it is replayed.
    return made, step_flops(model, judge, wanted), WARM_STEPS + 2 if capture == "graph" else 0


def _check_capture(device: torch.device, capture: str) -> None:
    if capture == "graph" and device.type == "cpu":
        raise CannotRun("a CUDA graph needs a CUDA device")


def _our_forward(wanted: Cell, device: torch.device, capture: str) -> Side:
    _check_capture(device, capture)
    model = models.build(wanted.model, **wanted.options).to(device).eval()
    images, flops = floats(wanted, device), step_flops(model, None, wanted)
    called = torch.compile(model, dynamic=False) if capture == "compile" else model

    @torch.inference_mode()
    def run(x: Tensor) -> None:
        with autocast(device, wanted.precision):
            called(x)

    if capture == "graph":
        graphed = GraphedStep(lambda batches, lr: run(batches[0]), device)
        return Side(lambda: graphed([images], 0.0), flops, WARM_STEPS + 2)
    return Side(lambda: run(images), flops)


OURS: dict[str, Callable[[Cell, torch.device], Side]] = {
    name_of(capture): partial(_ours, capture=capture) for capture in CAPTURES
}
