"""`fastdeit train --dry-run`: what would run, without running it.

What can be checked is: the recipe, the data set, the networks, the weights that they begin with, opened and compared as
a start would, and how processes share a batch. Nothing is downloaded, and nothing is written.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastdeit.data.sources.source import Source
from fastdeit.engine import checkpoint
from fastdeit.engine.dist import pick_device
from fastdeit.engine.metrics import check_sinks
from fastdeit.errors import UsageError
from fastdeit.estimate import memory, report
from fastdeit.estimate import model as estimate
from fastdeit.estimate.gpus import GPUS, GPUS_PER_NODE
from fastdeit.estimate.machines import Machine
from fastdeit.estimate.rows import known_gpu
from fastdeit.estimate.subject import Subject
from fastdeit.estimate.subject import subject as subject_of
from fastdeit.methods.config import METHODS
from fastdeit.recipe import resolve as recipes
from fastdeit.recipe.length import settled
from fastdeit.run import address, build, cached, directory, precision
from fastdeit.run.groups import param_groups
from fastdeit.run.request import Request
from fastdeit.run.weights import is_cached

if TYPE_CHECKING:
    from fastdeit.recipe.length import Length
    from fastdeit.recipe.resolve import Recipe


def show(asked: Request, processes: int) -> None:
    """Print what the run that is asked for would be on so many processes. Raises the errors of one that could not
    begin."""
    print("\n".join(lines(asked, processes)))


def lines(asked: Request, processes: int) -> Iterator[str]:
    """What `show` prints: facts first, then estimates, which are marked as such, then the resolved recipe."""
    recipe = precision.fixed(asked.recipe)
    precision.check_products(recipe)
    build.check_batch(recipe, processes)
    device = pick_device(recipe.engine.device)
    check_sinks(recipe.engine.sinks)
    training, held_out = build.sources(recipe)
    length = build.run_length(recipe, len(training))
    recipe = settled(recipe, length)
    cache = cached.checked(recipe, training, length)
    train = recipe.train
    classes = len(training.classes)
    if recipe.model.num_classes not in (None, classes):
        raise UsageError(f"model.num_classes is {recipe.model.num_classes}, but the data set has {classes} classes")
    known = recipe.model_copy(update={"model": recipe.model.model_copy(update={"num_classes": classes})})
    subject = replace(subject_of(known, len(training)), held_out=len(held_out))
    begins = _begins(asked, length)
    student, told = _opened(known, training, length, begins is None)

    yield f"recipe    {recipe.name}, method {recipe.method.use}: nothing is trained, this is what would run"
    yield f"device    {processes} process{'es' * (processes > 1)} on {_named(device)}, {recipe.engine.precision}"
    yield f"data      {len(training):,} training and {len(held_out):,} held-out images of {classes:,} classes"
    yield f"model     {_network(subject.student)}"
    trained_first = iter(subject.teacher_runs)
    for config, teacher in zip(recipe.method.teachers(), subject.teachers, strict=True):
        own = None if config.recipe is None else next(trained_first)
        first = "" if own is None else f", trained first: {own.steps:,} steps of {own.recipe.name}"
        yield f"teacher   {_network(teacher)}{first}"
    if cache is not None:
        yield f"teacher   {cached.described(cache)}"
    accumulated = f" in {train.accumulate} micro-batches" if train.accumulate > 1 else ""
    yield (
        f"run       {length.epochs:,.6g} epochs of {length.steps_per_epoch:,} steps, {length.total:,} in all, of "
        f"{train.batch_size:,} images{accumulated}; {subject.evaluations:,} evaluations"
    )
    notes = build.notes(recipe, len(training), student, processes, device)
    yield from (f"note      {note}" for note in notes)
    if begins is not None:
        yield f"begins    {begins}"
    yield from (f"weights   {note}" for note in told)
    yield from (f"estimate  {line}" for line in _estimates(known, subject, processes, device))
    yield f"\n# the recipe in full\n{recipes.dump(recipe)}".rstrip("\n")


def _begins(asked: Request, length: "Length") -> str | None:
    """Where a run that does not begin anew begins. Raises UsageError where a fork would have nothing left to train."""
    if asked.origin is not None:
        return f"at step {asked.origin.start(length):,}, as a fork of {asked.origin.run} at step {asked.origin.step:,}"
    if asked.resume and directory.has_checkpoint(asked.run_dir):
        step = checkpoint.steps(asked.run_dir / directory.CHECKPOINTS)[-1]
        return f"at step {step:,}: {asked.run_dir} goes on"
    return None


def _opened(recipe: "Recipe", source: Source, length: "Length", anew: bool) -> tuple[nn.Module, list[str]]:
    """Open what the student begins with and what the teacher is, as a start would; returns the student, without
    storage, and what is to be said.

    Raises the errors of parts and weights that do not fit.
    """
    told: list[str] = []
    count, classes = len(source.classes), build.compared_classes(recipe, source)
    with torch.device("meta"):  # without storage
        student = build.model(recipes.without_weights(recipe), count, told.append)
    if recipe.method.use in METHODS:  # what a method of somebody else does with its networks may need their storage
        method = build.method(recipe, student, count, length.total, lambda config: None, source)
        param_groups(method, recipe)
    if anew and recipe.model.weights is not None and not _is_far(recipe.model.weights, told):
        build.model(recipe, count, told.append, classes)
    for config in recipe.method.teachers():
        name = f"timm:{config.timm}" if config.weights is None else config.weights
        if config.recipe is None and not _is_far(name, told):
            options = {"classes": classes, "say": told.append}
            build.teacher(config, build.image_size(recipe), count, None, recipe.engine.precision, **options)
    return student, told


def _is_far(text: str, told: list[str]) -> bool:
    """Whether the weights of timm at the address `text` would have to be downloaded, which is then told."""
    where = address.parse(text)
    if where.kind != "timm" or is_cached(where):
        return False
    told.append(f"{text}: would be downloaded, so it is not opened here")
    return True


def _named(device: torch.device) -> str:
    return "the CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)


def _network(network: estimate.Network) -> str:
    return f"{network.name}: {network.parameters / 1e6:,.2f} M parameters, {network.flops / 1e9:,.2f} GFLOP an image"


def _estimates(recipe: "Recipe", subject: Subject, processes: int, device: torch.device) -> Iterator[str]:
    """Memory and time, as `fastdeit plan` models them."""
    gpu = GPUS.get(known_gpu(_named(device)) or "")
    if gpu is not None:
        nodes = -(-processes // GPUS_PER_NODE)
        found = report.report(recipe, [Machine(gpu, processes, nodes)], images=subject.images)
        plans = {plan["design"]: plan for plan in found["plans"]}
        plan = plans.get("fused") or next(iter(plans.values()))
        needed, available = plan["memory"]["total"], plan["memory"]["available"]
        yield f"{needed / memory.GIB:,.1f} of {available / memory.GIB:,.0f} GiB of a GPU (modelled, not measured)"
        yield f"{plan['seconds']['total'] / 3600:,.2g} hours (speed is {plan['basis']['speed']}; input keeps up)"
        return
    micro = recipe.method.passes * recipe.train.batch_size // (processes * recipe.train.accumulate)
    averaged = recipe.optim.ema_decay is not None
    work = estimate.Work(micro, recipe.engine.precision, recipe.model.drop_path > 0, averaged, subject.trained)
    shared = {"world": processes, "parallel": recipe.engine.parallel, "accumulate": recipe.train.accumulate}
    largest = subject.largest
    parts = memory.peak(largest.student, work, estimate.EAGER, **shared, teachers=largest.teachers)
    parts.pop("context")  # of CUDA
    yield f"{memory.total(parts) / memory.GIB:,.2g} GiB a process besides the libraries (modelled, not measured)"
    yield f"no time: there is no model of the speed of {_named(device)}; `fastdeit plan {recipe.name}` knows some GPUs"
