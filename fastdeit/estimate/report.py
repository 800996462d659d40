"""`fastdeit plan`: a recipe as time, memory, communication and money on GPUs that need not be there.

The report is one plain dictionary, which `--json` prints and `_show` renders. Networks are built on the meta device,
without storage; no data set is opened. What the figures mean, and how far they can be trusted, is in docs/plan.md.
"""

import argparse
import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdeit import methods
from fastdeit.engine.progress import table
from fastdeit.estimate import activations, duration, memory
from fastdeit.estimate import designs as estimate_designs
from fastdeit.estimate import interval as estimate_interval
from fastdeit.estimate import model as estimate
from fastdeit.estimate import options as estimate_options
from fastdeit.estimate import presets as estimate_presets
from fastdeit.estimate import rows as estimate_rows
from fastdeit.estimate.designs import DESIGNS, FUSED, TIMM_COMPILE, Design
from fastdeit.estimate.machines import Machine
from fastdeit.estimate.memory import GIB
from fastdeit.estimate.networks import Network
from fastdeit.estimate.rows import MODELLED
from fastdeit.estimate.subject import IMAGENET, Subject, network, subject

if TYPE_CHECKING:
    from fastdeit.recipe.resolve import Recipe

_HELP = {name: design.help for name, design in DESIGNS.items()} | {estimate_presets.NAME: estimate_presets.HELP}


def main(args: argparse.Namespace, recipe: "Recipe", on: Sequence[Machine], prices: Mapping[str, float]) -> None:
    """`fastdeit plan`: print the report of a recipe, as tables or as JSON."""
    found = report(recipe, on, prices=prices, images=args.images)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        _show(found)


# ---- the report ------------------------------------------------------------------------------------------------------


def report(
    recipe: "Recipe",
    machines: Sequence[Machine],
    *,
    prices: dict[str, float] | None = None,
    images: int | None = None,
    results: Path = estimate_rows.RESULTS,
) -> dict[str, Any]:
    """Everything `fastdeit plan` says, as plain values that JSON can hold: seconds, bytes, FLOPs, USD.

    results: directory of the project's own rows (`*.jsonl`), which calibrate the steps of a GPU that they name.
    """
    trained = subject(recipe, images)
    files = sorted(results.glob("*.jsonl"))
    measured = estimate_rows.calibrations(files, lambda name, size: network(name, None, size, IMAGENET[2]))
    plans = [
        plan
        for machine in machines
        for plan in _plans(trained, machine, measured, (prices or {}).get(machine.gpu.name))
    ]
    train = recipe.train
    return {
        "recipe": recipe.name,
        "model": _described(trained.student),
        "teachers": [_described(teacher) for teacher in trained.teachers],
        "data": {"images": trained.images, "held_out": trained.held_out, "assumed": trained.assumed},
        "run": {
            "epochs": trained.length.epochs,
            "steps": trained.steps,
            "batch_size": train.batch_size,
            "accumulate": train.accumulate,
            "group_size": recipe.data.group_size,
            "evaluations": trained.evaluations,
            "parallel": recipe.engine.parallel,
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
        "notes": [
            *_notes(trained, machines, {plan["basis"]["speed"] for plan in plans}),
            *_expected_presets(plans),
        ],
    }


def _described(network: Network) -> dict[str, Any]:
    return {name: getattr(network, name) for name in ("name", "parameters", "flops")}


def _designs(trained: Subject, machine: Machine, keep: bool) -> list[Design]:
    """`keep`: whether ours keep the activations of the MLPs."""
    recipe = trained.recipe
    found = estimate_designs.compared(machine.gpu, duration.precision(recipe, machine.gpu), trained.student)
    engine = recipe.engine
    options = {"keep_activations": keep, "residual": engine.residual, "products": engine.products}
    return [estimate_options.with_options(design, machine.gpu, **options) for design in found]


def _presets(trained: Subject, machine: Machine, keep: bool) -> list[estimate_presets.Preset]:
    """The presets that a trial would compare there, the expected one first; none where the run makes no trial."""
    if trained.recipe.engine.autotune == "off":
        return []
    work, student = duration.work(trained.largest, machine), trained.largest.student
    return estimate_presets.modelled(student, work, _designs(trained, machine, keep), machine.gpu)


def _keeps(trained: Subject, machine: Machine) -> bool:
    """Whether a run there would keep the activations of its MLPs."""
    keep = trained.recipe.engine.keep_activations
    if keep != "auto":
        return keep
    return activations.fits(trained, machine.gpu, machine.count, duration.precision(trained.recipe, machine.gpu))[0]


def _plans(
    trained: Subject, machine: Machine, measured: dict[Any, Any], price: float | None
) -> Iterator[dict[str, Any]]:
    """The rows of a machine, one for each design."""
    precision = duration.precision(trained.recipe, machine.gpu)
    keeps, asked = _keeps(trained, machine), trained.recipe.engine.keep_activations is True
    sides = []
    for keep in (keeps, asked):  # auto keeps none where memory ends
        presets = _presets(trained, machine, keep)
        sides.append((_designs(trained, machine, keep), presets))
    (designs, presets), (lean, lean_presets) = sides
    found = {
        design: measured.get((machine.gpu.name, design.name, precision), estimate_rows.NOT_CALIBRATED)
        for design in [*designs, *(preset.design for preset in presets)]
    }
    runs = {design: duration.run(trained, machine, design, calibration) for design, calibration in found.items()}
    leanest = {design.name: design for design in [*lean, *(preset.design for preset in lean_presets[:1])]}
    peer = runs.get(TIMM_COMPILE)
    for design in designs:
        yield _plan(trained, machine, design, leanest[design.name], found[design], runs[design], peer, price)
    if presets:
        design = presets[0].design
        run = _of_a_trial([runs[preset.design] for preset in presets])
        plan = _plan(trained, machine, design, leanest[design.name], found[design], run, peer, price)
        yield plan | {"preset": {"name": presets[0].name, **presets[0].forms}}


def _of_a_trial(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The run in the first of these presets, where it is not known how fast the card is: in each draw of the shares the
    trial takes the preset that is the fastest there."""
    drawn = [min(times) for times in zip(*(run["drawn"] for run in runs), strict=True)]
    return runs[0] | {"drawn": drawn, "interval": estimate_interval.interval(drawn)}


def _plan(
    trained: Subject,
    machine: Machine,
    design: Design,
    lean: Design,
    calibration: estimate_rows.Calibration,
    run: dict[str, Any],
    peer: dict[str, Any] | None,
    price: float | None,
) -> dict[str, Any]:
    """One row of the report; `peer` is the run that it is compared with, where there is one. Of `lean`, which takes no
    memory that is not asked for, are the batches that fit."""
    gpu, train, steps = machine.gpu, trained.recipe.train, trained.steps
    largest, work = trained.largest, duration.work(trained, machine)
    seconds = {name: run[name] for name in ("training", "evaluation", "teacher")}
    seconds["total"] = sum(seconds.values())
    student, options = largest.student, duration.shared(trained, machine) | {"teachers": largest.teachers}
    parts = memory.peak(student, work, design, **options)
    sizes, passes = (trained.recipe.data.group_size, 1), trained.recipe.method.passes
    fits, unmixed = (
        memory.largest_batch(student, work, lean, gpu, passes * size, **options) // passes for size in sizes
    )
    # With fsdp2, gradients of several micro-batches take more memory than those of one.
    several = options | {"accumulate": max(2, train.accumulate)}
    divided = memory.largest_batch(student, work, lean, gpu, passes * sizes[0], **several) // passes
    peak = gpu.tf32 if work.precision == "fp32" else gpu.flops
    flops = sum(count / steps * estimate.useful_flops(part.student, work) for count, part in trained.stages)
    flops *= passes * train.batch_size
    return {
        "gpu": gpu.name,
        "count": machine.count,
        "nodes": machine.nodes,
        "design": design.name,
        "preset": None,
        "precision": work.precision,
        "batch_per_gpu": work.batch // passes,
        "images_per_second": train.batch_size / run["step"],
        "interval": [train.batch_size / end for end in reversed(run["interval"])],
        "ratio": None if peer is None else _ratio(run, peer),
        "mfu": flops / (run["step"] * machine.count * peak),
        "step": {"seconds": run["step"], "teacher_seconds": run["teacher_step"]},
        "sizes": run["sizes"],
        "communication": run["communication"],
        "memory": {"total": memory.total(parts), "parts": parts, "available": gpu.memory},
        "largest_batch": fits,
        "largest_group": unmixed,
        "fits": work.batch // passes <= fits,
        "accumulate": _accumulate(trained.recipe, machine.count, divided),
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


def _notes(trained: Subject, machines: Sequence[Machine], bases: set[str]) -> Iterator[str]:
    """What somebody who reads a figure alone would miss."""
    if bases == {MODELLED}:
        yield "no row of benchmarks/results is of these GPUs: nothing here is measured"
    yield "input is assumed to keep up; compiling, checkpoints and start-up are left out"
    if trained.assumed is not None:
        yield trained.assumed
    yield from _notes_on_options(trained, machines)
    if trained.recipe.train.batch_size > trained.images:
        yield f"a batch has more than the {trained.images:,} training images: each is in it several times"
    yield from _notes_on_what_is_left_out(trained)


def _notes_on_options(trained: Subject, machines: Sequence[Machine]) -> Iterator[str]:
    recipe = trained.recipe
    if recipe.engine.precision == "bf16" and any(machine.gpu.name == "V100" for machine in machines):
        yield "V100 has no bf16: planned there with engine.precision=fp16, which train has to be told"
    yield from _kept_activations(trained, machines)
    if recipe.engine.products == "fp8":
        without = dict.fromkeys(machine.gpu.name for machine in machines if not machine.gpu.fp8)
        for name in without:
            yield f"{name} has no products of 8 bits: engine.products is planned there as precision"
        if len(without) < len(machines):
            yield "how fast products of 8 bits are is judged, and its range is not in 5 to 95 %"
    if recipe.data.size_schedule:
        yield "data.size_schedule: times of a step are means over the run, memory is that of the largest images"
    if recipe.engine.async_checkpoints:
        kept, averages = trained.trained, recipe.optim.ema_decay is not None
        numbers = trained.student.parameters + kept.states + averages * kept.parameters
        yield (
            f"engine.async_checkpoints takes {4 * numbers / GIB:,.2f} GiB of memory of the host more, in the process "
            "that writes"
        )


def _notes_on_what_is_left_out(trained: Subject) -> Iterator[str]:
    recipe, student = trained.recipe, trained.student
    if student.vit is None:
        yield f"{student.name} is not a plain vision transformer: its speed follows FLOPs alone, roughly"
        if recipe.engine.checkpoint_blocks:
            yield f"engine.checkpoint_blocks is left out of the figures of {student.name}"
    if recipe.optim.name not in ("adamw", "sgd"):
        yield f"of an update by {recipe.optim.name} only what it reads and writes once is counted"
    for teacher in trained.teachers:
        if teacher.vit is None:
            yield f"the speed of the teacher {teacher.name} follows its FLOPs alone, roughly"
    if recipe.method.use not in methods.METHODS:
        gathered = ", nor is what fsdp2 gathers of them" if recipe.engine.parallel == "fsdp2" else ""
        yield (
            f"modules that method {recipe.method.use} owns beside the student, such as averaged teachers, are not "
            f"counted{gathered}"
        )


def _kept_activations(trained: Subject, machines: Sequence[Machine]) -> list[str]:
    """What `engine.keep_activations` costs and saves, whether it is on or not, and what auto makes of it."""
    machine = machines[0]
    student, work = trained.largest.student, duration.work(trained, machine)
    engine = trained.recipe.engine
    each_way = (_designs(trained, machine, keep) for keep in (False, True))
    sides = [design for designs in each_way for design in designs if design.name == FUSED.name]
    if not sides or engine.checkpoint_blocks or engine.products == "fp8":
        return []
    options = duration.shared(trained, machine)
    less, more = (memory.total(memory.peak(student, work, design, **options)) / GIB for design in sides)
    slow, fast = (sum(estimate.step(student, work, design, machine.gpu)) for design in sides)
    cost = (
        f"engine.keep_activations=true takes {more - less:,.2f} GiB of a GPU more than false, and "
        f"{1 - fast / slow:.1%} less time for a fused step ({machine.count} {machine.gpu.name}, modelled)"
    )
    if engine.keep_activations != "auto":
        return [cost]
    answers: dict[bool, list[str]] = {}
    for each in machines:
        answers.setdefault(_keeps(trained, each), []).append(f"{each.count} {each.gpu.name}")
    planned = "; ".join(f"{str(keep).lower()} on {', '.join(names)}" for keep, names in answers.items())
    return [cost, f"engine.keep_activations=auto is planned as {planned}"]


def _expected_presets(plans: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a trial is expected to choose, on which GPUs."""
    answers: dict[str, list[str]] = {}
    for plan in plans:
        if (preset := plan["preset"]) is not None:
            words = f"{preset['name']} (attention={preset['attention']}, mlp={preset['mlp']})"
            answers.setdefault(words, []).append(_machine(plan))
    return [
        f"a trial is expected to choose the preset {words} on {', '.join(names)} (modelled; its 5 to 95 % take the "
        "fastest preset of each draw)"
        for words, names in answers.items()
    ]


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
        names = [name for name in _HELP if name in shown]
        batch = shown[names[0]]["batch_per_gpu"]
        print(f"\nmemory of a process in GiB, {batch:,} images, {count} GPU{'s' * (count > 1)} (modelled)")
        table(list(_memory_rows([shown[name]["memory"] for name in names])), ["", *names])
    print()
    for design in dict.fromkeys(plan["design"] for plan in found["plans"]):
        print(f"{design:12}  {_HELP[design]}")
    print("5 to 95 %     what a step's time makes of the ranges of the model's shares, not of what it leaves out")
    print("exposed       communication that no computation hides; fits: images of the largest micro-batch of a GPU")
    for note in found["notes"]:
        print(f"note          {note}")


def _head(found: dict[str, Any]) -> Iterator[str]:
    run, data = found["run"], found["data"]
    yield f"recipe    {found['recipe']}"
    yield f"model     {_sentence(found['model'])}"
    yield from (f"teacher   {_sentence(teacher)}, in every step" for teacher in found["teachers"])
    origin = " (assumed)" if data["assumed"] else ""
    yield f"data      {data['images']:,} training and {data['held_out']:,} held-out images{origin}"
    accumulated = f" in {run['accumulate']:,} micro-batches" if run["accumulate"] > 1 else ""
    yield (
        f"run       {run['epochs']:,.6g} epochs, {run['steps']:,} steps of {run['batch_size']:,} images{accumulated}, "
        f"{run['evaluations']:,} evaluations, {run['parallel']}"
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
    if not found["teachers"]:
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
