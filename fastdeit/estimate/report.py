"""`fastdeit plan`: a recipe as time, memory, communication and money on GPUs that need not be there.

The report is one plain dictionary, which `--json` prints and `_show` renders. Networks are built on the meta device,
without storage; no data set is opened. What the figures mean, and how far they can be trusted, is in docs/plan.md.
"""

import argparse
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastdeit import methods, models
from fastdeit.data.plan import order
from fastdeit.engine.progress import table
from fastdeit.errors import UsageError
from fastdeit.estimate import interval as estimate_interval
from fastdeit.estimate import model as estimate
from fastdeit.estimate import rows as estimate_rows
from fastdeit.estimate.gpus import DEFAULT_GPUS, GPU, GPUS, GPUS_PER_NODE
from fastdeit.estimate.model import DESIGNS, GIB, TIMM_COMPILE, Design, Network, Step, ViT, Work
from fastdeit.estimate.rows import MODELLED
from fastdeit.fields import size_pair
from fastdeit.recipe import resolve as recipes
from fastdeit.recipe.length import Length, LengthError, length
from fastdeit.run.address import parse
from fastdeit.run.weights import open_weights
from fastdeit.text import did_you_mean

if TYPE_CHECKING:
    from fastdeit.methods.config import TeacherConfig
    from fastdeit.recipe.resolve import Recipe

IMAGENET = 1_281_167, 50_000, 1000
_HIGHEST_PRICE = 1_000_000
# (training images, held-out images, classes) of sources that are the same everywhere, as their authors distribute them.
SIZES = {
    "imagenet": IMAGENET,
    "cifar10": (50_000, 10_000, 10),
    "cifar100": (50_000, 10_000, 100),
    "flowers102": (2_040, 6_149, 102),
    "stanford_cars": (8_144, 8_041, 196),
    "inat2018": (437_513, 24_426, 8_142),
    "inat2019": (265_213, 3_030, 1_010),
    "digits": (1_438, 359, 10),
}


def main(args: argparse.Namespace, recipe: "Recipe") -> None:
    """`fastdeit plan`: print the report of a recipe, as tables or as JSON."""
    machines = _machines(recipe, args)
    prices = _prices(args)
    found = report(recipe, machines, prices=prices, sharding=args.sharding, images=args.images)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        _show(found)


# ---- what is asked for -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """`count` GPUs in all, the same number in each of `nodes`."""

    gpu: GPU
    count: int
    nodes: int


def _machines(recipe: "Recipe", args: argparse.Namespace) -> list[Machine]:
    gpus = [_gpu(name) for name in args.gpu or DEFAULT_GPUS]
    # Unless asked for: one GPU, and a node of eight where the batch can be shared by it.
    counts = args.count or [count for count in (1, GPUS_PER_NODE) if count == 1 or _unshared(recipe, count) is None]
    machines = []
    for count in counts:
        nodes = args.nodes or -(-count // GPUS_PER_NODE)
        if count % nodes or count // nodes > GPUS_PER_NODE:
            raise UsageError(
                f"--count {count} --nodes {nodes}: every node has the same number of GPUs, at most {GPUS_PER_NODE}"
            )
        if (problem := _unshared(recipe, count)) is not None:
            raise UsageError(f"recipe {recipe.name} on {count} GPUs: {problem}")
        machines += [Machine(gpu, count, nodes) for gpu in gpus]
    return machines


def _gpu(name: str) -> GPU:
    if name.upper() not in GPUS:
        raise UsageError(f"--gpu {name}: known are {', '.join(GPUS)}{did_you_mean(name.upper(), GPUS)}")
    return GPUS[name.upper()]


def _prices(args: argparse.Namespace) -> dict[str, float]:
    """USD an hour, by GPU."""
    if not args.price:
        return {}
    named = [_gpu(name).name for name in args.gpu or ()]
    if not all(0 < price <= _HIGHEST_PRICE for price in args.price):
        given = " ".join(f"{price:g}" for price in args.price)
        raise UsageError(f"--price {given}: a price is a positive number of USD an hour, at most {_HIGHEST_PRICE:,}")
    if len(named) != len(args.price):
        raise UsageError(f"--price has {len(args.price)} numbers for {len(named)} --gpu; give one for each, in order")
    return dict(zip(named, args.price, strict=True))


def _unshared(recipe: "Recipe", world: int) -> str | None:
    """Why the recipe's batch cannot be shared by so many processes."""
    train = recipe.train
    try:
        order.groups_per_batch(train.batch_size, recipe.data.group_size, train.accumulate, world)
    except ValueError as error:
        return str(error)
    return None


# ---- what is trained -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A recipe as the estimate sees it. `teacher_run`: the training of a teacher that has a recipe of its own."""

    recipe: "Recipe"
    student: Network
    teacher: Network | None
    images: int
    held_out: int
    assumed: str | None
    teacher_run: "Subject | None" = None

    @property
    def length(self) -> Length:
        """Steps and evaluations of the run. Raises UsageError where the warm-up does not fit."""
        try:
            return length(self.recipe, self.images, order.steps_per_epoch(self.images, self.recipe.train.batch_size))
        except LengthError as error:
            raise UsageError(f"recipe {self.recipe.name}: {error}") from error

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return self.length.total

    @property
    def evaluations(self) -> int:
        """How often the run is evaluated."""
        return self.length.evaluations


def subject(recipe: "Recipe", images: int | None = None) -> Subject:
    """The networks and the amount of data of a recipe; `images` replaces the number of training images."""
    train, held_out, classes, assumed = _data(recipe)
    if images is not None:
        train, assumed = images, None
    model = recipe.model
    classes = model.num_classes or classes
    student = _network(
        model.name, model.timm, size_pair(model.image_size, "model.image_size"), classes, model.drop_path
    )
    config, teacher, own = getattr(recipe.method, "teacher", None), None, None
    if config is not None and config.recipe is not None:
        own = subject(recipes.load(config.recipe), images)
        teacher = own.student
    elif config is not None:
        size = size_pair(config.image_size or model.image_size, "method.teacher.image_size")
        teacher = _network(*_teacher(config), size, classes)
    return Subject(recipe, student, teacher, train, held_out, assumed, own)


def _teacher(config: "TeacherConfig") -> tuple[str | None, str | None]:
    """(fastdeit's name, timm's name) of the teacher's network; its weights may tell it."""
    if config.model is not None or config.timm is not None:
        return config.model, config.timm
    address = parse(config.weights)
    if address.kind == "timm":
        return None, address.name  # nothing of it has to be downloaded to make a plan
    known = open_weights(config.weights).known
    if known.name is None and known.timm is None:
        raise UsageError(f"method.teacher: {address} does not tell which network it is of; add method.teacher.model")
    return known.name, known.timm


def _data(recipe: "Recipe") -> tuple[int, int, int, str | None]:
    """(training images, held-out images, classes, what is assumed)."""
    data = recipe.data
    if data.source == "synthetic":
        return data.synthetic_samples, max(data.synthetic_samples // 10, 1), data.synthetic_classes, None
    if data.source in SIZES:
        return *SIZES[data.source], None
    return *IMAGENET, f"data.source {data.source} does not tell; assumed are ImageNet-1k's numbers (see --images)"


@cache
def _network(
    name: str | None, timm: str | None, size: tuple[int, int] | None, classes: int, drop_path: float = 0.0
) -> Network:
    """A network built without storage, of its own image size for None; UsageError where it cannot be built, or its
    FLOPs not be counted."""
    options = {"num_classes": classes, "drop_path": drop_path} | ({"image_size": size} if size else {})
    if timm is not None:
        import_module("timm")  # inside torch.device its first import fails (torch 2.8)
    try:
        with torch.device("meta"):
            built = models.build(name, **options) if timm is None else models.build_timm(timm, **options)
    except ValueError as error:
        raise UsageError(f"recipe: {error}") from error
    size = size or built.config.image_size
    other = {}
    try:
        flops = built.flops()
        shape = _shape(built)
        if shape is None or shape.flops != flops:  # some other network, or a transformer with something more in it
            shape, other = None, _activations(built, size)
    except (NotImplementedError, RuntimeError) as error:
        raise UsageError(f"the FLOPs of {timm or name} cannot be counted on the meta device ({error})") from error
    parameters = sum(parameter.numel() for parameter in built.parameters())
    outputs = classes * len(built.head_names)
    return Network(timm or name, parameters, flops, 3 * size[0] * size[1], outputs, timm is None, shape, **other)


def _shape(built: nn.Module) -> ViT | None:
    if isinstance(built, models.vit.VisionTransformer):
        config = built.config
        rows, columns = config.grid
        hidden, values = int(config.dim * config.mlp_ratio), config.in_chans * config.patch_size**2
        shape = rows * columns, built.prefix_tokens, values, config.dim, config.depth, config.heads, hidden
        return ViT(*shape, config.num_classes)
    inner = getattr(built, "inner", None)
    mlp = getattr(getattr(inner, "blocks", [None])[0], "mlp", None)
    if type(inner).__name__ not in ("VisionTransformer", "VisionTransformerDistilled") or not hasattr(mlp, "fc1"):
        return None
    rows, columns = built.grid
    values, hidden = inner.patch_embed.proj.weight[0].numel(), mlp.fc1.out_features
    shape = rows * columns, inner.num_prefix_tokens, values, inner.embed_dim, len(inner.blocks)
    return ViT(*shape, inner.blocks[0].attn.num_heads, hidden, inner.num_classes, pruned=False)


def _activations(built: nn.Module, size: tuple[int, int]) -> dict[str, int]:
    """`saved`, `widest` and `layers` of a `Network`, counted on the meta device, where nothing is computed.

    The batch has two images, since batch norm wants more than one. Wide is a layer's input and output together.
    """
    kept: dict[int, torch.UntypedStorage] = {}
    weights = {parameter.untyped_storage()._cdata for parameter in built.parameters()}
    widths: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    def measure(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [tensor for tensor in (*inputs, output) if isinstance(tensor, torch.Tensor)]
        widths.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))

    hooks = [module.register_forward_hook(measure) for module in built.modules() if not list(module.children())]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        built(torch.empty(2, 3, *size, device="meta"))
    for hook in hooks:
        hook.remove()
    saved = sum(storage.nbytes() for storage in kept.values())
    return {"saved": saved // 2, "widest": max(widths) // 2, "layers": len(widths)}


# ---- the report ------------------------------------------------------------------------------------------------------


def report(
    recipe: "Recipe",
    machines: Sequence[Machine],
    *,
    prices: dict[str, float] | None = None,
    sharding: str = "ddp",
    images: int | None = None,
    results: Path = estimate_rows.RESULTS,
) -> dict[str, Any]:
    """Everything `fastdeit plan` says, as plain values that JSON can hold: seconds, bytes, FLOPs, USD.

    results: directory of the project's own rows (`*.jsonl`), which calibrate the steps of a GPU that they name.
    """
    trained = subject(recipe, images)
    files = sorted(results.glob("*.jsonl"))
    measured = estimate_rows.calibrations(files, lambda name, size: _network(name, None, size, IMAGENET[2]))
    plans = [
        plan
        for machine in machines
        for plan in _plans(trained, machine, sharding, measured, (prices or {}).get(machine.gpu.name))
    ]
    train = recipe.train
    return {
        "recipe": recipe.name,
        "model": _described(trained.student),
        "teacher": trained.teacher and _described(trained.teacher),
        "data": {"images": trained.images, "held_out": trained.held_out, "assumed": trained.assumed},
        "run": {
            "epochs": trained.length.epochs,
            "steps": trained.steps,
            "batch_size": train.batch_size,
            "accumulate": train.accumulate,
            "group_size": recipe.data.group_size,
            "evaluations": trained.evaluations,
            "sharding": sharding,
        },
        "published": [
            {
                **{name: getattr(row, name) for name in ("gpu", "model", "batch", "whole", "source")},
                "design": row.design.name,
                "published": row.speed,
                "modelled": estimate_rows.modelled_speed(row),
            }
            for row in estimate_rows.PUBLISHED
        ],
        "plans": plans,
        "notes": _notes(trained, machines, sharding, {plan["basis"]["speed"] for plan in plans}),
    }


def _described(network: Network) -> dict[str, Any]:
    return {name: getattr(network, name) for name in ("name", "parameters", "flops")}


def _precision(recipe: "Recipe", gpu: GPU) -> str:
    """V100 has no bf16 products."""
    asked = recipe.engine.precision
    return "fp16" if asked == "bf16" and gpu.name == "V100" else asked


def _work(trained: Subject, machine: Machine) -> Work:
    recipe = trained.recipe
    micro = recipe.train.batch_size // (machine.count * recipe.train.accumulate)
    precision = _precision(recipe, machine.gpu)
    return Work(micro, precision, recipe.model.drop_path > 0, recipe.optim.ema_decay is not None)


def _plans(
    trained: Subject, machine: Machine, sharding: str, measured: dict[Any, Any], price: float | None
) -> Iterator[dict[str, Any]]:
    """The rows of a machine, one for each design."""
    precision = _precision(trained.recipe, machine.gpu)
    designs = estimate.designs(machine.gpu, precision, trained.student)
    found = {
        design: measured.get((machine.gpu.name, design.name, precision), estimate_rows.NOT_CALIBRATED)
        for design in designs
    }
    runs = {design: _run(trained, machine, design, sharding, found[design]) for design in designs}
    for design in designs:
        yield _plan(trained, machine, design, sharding, found[design], runs[design], runs.get(TIMM_COMPILE), price)


def _plan(
    trained: Subject,
    machine: Machine,
    design: Design,
    sharding: str,
    calibration: estimate_rows.Calibration,
    run: dict[str, Any],
    peer: dict[str, Any] | None,
    price: float | None,
) -> dict[str, Any]:
    """One row of the report; `peer` is the run that it is compared with, where there is one."""
    gpu, train, student = machine.gpu, trained.recipe.train, trained.student
    work = _work(trained, machine)
    seconds = {name: run[name] for name in ("training", "evaluation", "teacher")}
    seconds["total"] = sum(seconds.values())
    options = {"world": machine.count, "sharding": sharding, "teacher": trained.teacher}
    parts = estimate.memory(student, work, design, **options)
    sizes = trained.recipe.data.group_size, 1
    fits, unmixed = (estimate.largest_batch(student, work, design, gpu, size, **options) for size in sizes)
    peak = gpu.tf32 if work.precision == "fp32" else gpu.flops
    flops = 3 * student.flops * train.batch_size
    return {
        "gpu": gpu.name,
        "count": machine.count,
        "nodes": machine.nodes,
        "design": design.name,
        "precision": work.precision,
        "batch_per_gpu": work.batch,
        "images_per_second": train.batch_size / run["step"],
        "interval": [train.batch_size / end for end in reversed(run["interval"])],
        "ratio": None if peer is None else _ratio(run, peer),
        "mfu": flops / (run["step"] * machine.count * peak),
        "step": {"seconds": run["step"], "teacher_seconds": run["teacher_step"]},
        "communication": run["communication"],
        "memory": {"total": estimate.total(parts), "parts": parts, "available": gpu.memory},
        "largest_batch": fits,
        "largest_group": unmixed,
        "fits": work.batch <= fits,
        "accumulate": _accumulate(trained.recipe, machine.count, fits),
        "seconds": seconds,
        "usd": None if price is None else price * machine.count * seconds["total"] / 3600,
        "basis": {"speed": str(calibration)} | dict.fromkeys(("teacher", "communication", "memory"), MODELLED),
    }


def _ratio(run: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    """How many times as fast a step is as the peer's, and the interval of that: the draws are the same for both."""
    drawn = [theirs / own for theirs, own in zip(peer["drawn"], run["drawn"], strict=True)]
    value = peer["step"] / run["step"]
    return {"to": TIMM_COMPILE.name, "value": value, **estimate_interval.interval(drawn)._asdict()}


def _accumulate(recipe: "Recipe", world: int, fits: int) -> int | None:
    """The least `train.accumulate` whose micro-batches fit and share the mixing groups evenly; None where none does."""
    size = recipe.data.group_size
    groups = recipe.train.batch_size // (size * world)
    return next(
        (groups // at_once for at_once in range(min(fits // size, groups), 0, -1) if groups % at_once == 0), None
    )


def _run(
    trained: Subject, machine: Machine, design: Design, sharding: str, calibration: estimate_rows.Calibration
) -> dict[str, Any]:
    """Seconds of a step and of the run; the calibration is of the student's computation, and of nothing else.

    drawn     the step's seconds in each draw of the shares
    interval  of these, or where the speed rests on measurements, of their rows
    """
    factor = calibration.factor
    gpu, train, teacher = machine.gpu, trained.recipe.train, trained.teacher
    work = _work(trained, machine)
    time = estimate.step(trained.student, work, design, gpu).scaled(factor)
    unseen = replace(work, drop_path=False)
    judged = 0.0
    if teacher is not None:
        usual = design if teacher.own and teacher.vit else estimate.EAGER
        judged = estimate.step(teacher, unseen, usual, gpu).forward
    ring = {"world": machine.count, "nodes": machine.nodes, "sharding": sharding}
    ring |= {"accumulate": train.accumulate, "width": work.bytes}
    spent = estimate.communication(trained.student, time, gpu, **ring)

    def whole(time: Step) -> float:
        return train.accumulate * (time.forward + time.backward + judged) + time.update + spent.exposed

    draws = estimate_interval.steps(trained.student, work, design, gpu)
    step, drawn = whole(time), [whole(draw.scaled(factor)) for draw in draws]
    if calibration.rows:
        low, high = (whole(time.scaled(end / factor)) for end in (calibration.low, calibration.high))
        interval = estimate_interval.Interval(low, high)
    else:
        interval = estimate_interval.interval(drawn)
    forward = factor * estimate.step(trained.student, unseen, design, gpu).forward
    share = trained.held_out / (machine.count * work.batch)
    own = 0.0
    if trained.teacher_run is not None:
        first = _run(trained.teacher_run, machine, estimate.EAGER, sharding, estimate_rows.NOT_CALIBRATED)
        own = first["training"] + first["evaluation"]
    return {
        "step": step,
        "drawn": drawn,
        "interval": interval,
        "teacher_step": train.accumulate * judged,
        "communication": spent._asdict(),
        "training": trained.steps * step,
        # The teacher is evaluated once, before the first step.
        "evaluation": share * (trained.evaluations * (1 + work.ema) * forward + judged),
        "teacher": own,
    }


def _notes(trained: Subject, machines: Sequence[Machine], sharding: str, bases: set[str]) -> list[str]:
    """What somebody who reads a figure alone would miss."""
    recipe = trained.recipe
    notes = ["no row of benchmarks/results is of these GPUs: nothing here is measured"] if bases == {MODELLED} else []
    notes += ["input is assumed to keep up; compiling, checkpoints and start-up are left out"]
    if trained.assumed is not None:
        notes.append(trained.assumed)
    if recipe.engine.precision == "bf16" and any(machine.gpu.name == "V100" for machine in machines):
        notes.append("V100 has no bf16: planned there with engine.precision=fp16, which train has to be told")
    if sharding == "fsdp":
        notes.append("train runs ddp; fsdp is what full sharding would change")
    if recipe.train.batch_size > trained.images:
        notes.append(f"a batch has more than the {trained.images:,} training images: each is in it several times")
    if trained.student.vit is None:
        notes.append(
            f"{trained.student.name} is not a plain vision transformer: its speed follows FLOPs alone, roughly"
        )
    if trained.teacher is not None and trained.teacher.vit is None:
        notes.append(f"the speed of the teacher {trained.teacher.name} follows its FLOPs alone, roughly")
    if recipe.method.use not in methods.METHODS:
        notes.append(f"modules that method {recipe.method.use} owns beside the student are not counted")
    return notes


# ---- for people ------------------------------------------------------------------------------------------------------


def _show(found: dict[str, Any]) -> None:
    for line in _head(found):
        print(line)
    print()
    rows = [_cells(plan, found) for plan in found["plans"]]
    table([list(row.values()) for row in rows], list(rows[0]))
    for line in _advice(found):
        print(line)
    for count in dict.fromkeys(plan["count"] for plan in found["plans"]):
        shown = {plan["design"]: plan for plan in reversed(found["plans"]) if plan["count"] == count}
        names = [name for name in DESIGNS if name in shown]
        batch = shown[names[0]]["batch_per_gpu"]
        print(f"\nmemory of a process in GiB, {batch:,} images, {count} GPU{'s' * (count > 1)} (modelled)")
        table(list(_memory_rows([shown[name]["memory"] for name in names])), ["", *names])
    print()
    for design in dict.fromkeys(plan["design"] for plan in found["plans"]):
        print(f"{design:12}  {DESIGNS[design].help}")
    print("5 to 95 %     what a step's time makes of the ranges of the model's shares, not of what it leaves out")
    print("exposed       communication that no computation hides; fits: images of the largest micro-batch of a GPU")
    for note in found["notes"]:
        print(f"note          {note}")


def _head(found: dict[str, Any]) -> Iterator[str]:
    run, data, teacher = found["run"], found["data"], found["teacher"]
    yield f"recipe    {found['recipe']}"
    yield f"model     {_sentence(found['model'])}"
    if teacher is not None:
        yield f"teacher   {_sentence(teacher)}, in every step"
    origin = " (assumed)" if data["assumed"] else ""
    yield f"data      {data['images']:,} training and {data['held_out']:,} held-out images{origin}"
    accumulated = f" in {run['accumulate']:,} micro-batches" if run["accumulate"] > 1 else ""
    yield (
        f"run       {run['epochs']:,} epochs, {run['steps']:,} steps of {run['batch_size']:,} images{accumulated}, "
        f"{run['evaluations']:,} evaluations, {run['sharding']}"
    )
    for whole, what in ((False, "steps on one GPU"), (True, "whole runs, whose input and communication it leaves out")):
        off = [row["modelled"] / row["published"] - 1 for row in found["published"] if row["whole"] == whole]
        yield (
            f"error     {min(off):+.0%} to {max(off):+.0%}, median {statistics.median(off):+.0%}: modelled against "
            f"{len(off)} published speeds of {what}"
        )


def _sentence(network: dict[str, Any]) -> str:
    size, flops = network["parameters"] / 1e6, network["flops"] / 1e9
    return f"{network['name']}: {size:,.2f} M parameters, {flops:,.2f} GFLOP an image"


def _cells(plan: dict[str, Any], found: dict[str, Any]) -> dict[str, str]:
    """A row of the table, by column."""
    hours = plan["seconds"]["total"] / 3600
    speed = {
        "images/s": f"{plan['images_per_second']:,.0f}",
        "5 to 95 %": "{:,.0f} to {:,.0f}".format(*plan["interval"]),
        f"x {TIMM_COMPILE.name}": _ratio_in_words(plan),
        "MFU": f"{plan['mfu']:.0%}",
        "step ms": f"{1e3 * plan['step']['seconds']:,.1f}",
        "teacher ms": f"{1e3 * plan['step']['teacher_seconds']:,.1f}",
        "exposed ms": f"{1e3 * plan['communication']['exposed']:,.1f}",
        "GiB": f"{plan['memory']['total'] / GIB:,.1f} of {plan['memory']['available'] / GIB:.0f}",
        "fits": f"{plan['largest_batch']:,}",
        "hours": f"{hours:,.0f}" if hours >= 1000 else f"{hours:.3g}",
        "USD": "" if plan["usd"] is None else f"{plan['usd']:,.2f}",
        "speed is": plan["basis"]["speed"],
    }
    if not plan["fits"]:  # the speed of what cannot run is not shown
        speed = {name: text if name in ("GiB", "fits") else "-" for name, text in speed.items()}
        speed["speed is"] = "does not fit"
    if found["teacher"] is None:
        del speed["teacher ms"]
    if all(other["usd"] is None for other in found["plans"]):
        del speed["USD"]
    nodes = f" / {plan['nodes']} nodes" if plan["nodes"] > 1 else ""
    return {"GPUs": _machine(plan) + nodes, "design": plan["design"], **speed}


def _ratio_in_words(plan: dict[str, Any]) -> str:
    ratio = plan["ratio"]
    if ratio is None or plan["design"] == ratio["to"]:
        return ""
    return f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _machine(plan: dict[str, Any]) -> str:
    return f"{plan['count']} {plan['gpu']}"


def _advice(found: dict[str, Any]) -> Iterator[str]:
    """What to do about plans that do not fit, in a line for all designs that it is true of."""
    designs: dict[tuple[str, str], list[str]] = {}
    for plan in found["plans"]:
        if not plan["fits"]:
            problem = f"{plan['batch_per_gpu']:,} images in a GPU do not fit; {_remedy(plan, found['run'])}"
            designs.setdefault((_machine(plan), problem), []).append(plan["design"])
    yield from (f"{machine}, {', '.join(names)}: {problem}" for (machine, problem), names in designs.items())


def _remedy(plan: dict[str, Any], run: dict[str, Any]) -> str:
    if plan["accumulate"] is not None:
        return f"with train.accumulate={plan['accumulate']} they do"
    if plan["largest_group"] == 0:
        return "nor does a single image: take a smaller model or smaller images"
    most = plan["largest_group"]
    return f"nor does one mixing group of {run['group_size']:,}: set data.group_size to at most {most:,}"


def _memory_rows(memories: list[dict[str, Any]]) -> Iterator[list[str]]:
    def row(name: str, values: Iterable[float]) -> list[str]:
        return [name, *(f"{value / GIB:,.2f}" for value in values)]

    for part in memories[0]["parts"]:
        values = [memory["parts"][part] for memory in memories]
        if part == "blocks":
            depth = len(values[0])
            if depth > 1:
                yield row(f"blocks 1 to {depth - 1}, each", (blocks[0] for blocks in values))
            yield row(f"block {depth}", (blocks[-1] for blocks in values))
        elif any(values):
            yield row(part, values)
    yield row("total", [memory["total"] for memory in memories])
