"""`fastdeit train --dry-run`: what would run, without running it.

A dry run refuses what a start would refuse: it checks the recipe, the data set, the networks, the weights that they
begin with, opened and compared as a start would, the method and the optimizer around them, teachers that are trained
first, how processes share a batch, and the disk. Nothing is downloaded, and nothing is written.
"""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastdeit import kernels
from fastdeit.data.sources.source import Source
from fastdeit.engine import batchnorm, optimizers
from fastdeit.engine.checkpoint import Checkpoint
from fastdeit.engine.dist import World, pick_device
from fastdeit.engine.ema import Ema
from fastdeit.engine.metrics import check_sinks
from fastdeit.engine.step import check_capture
from fastdeit.estimate import memory, report
from fastdeit.estimate.designs import EAGER
from fastdeit.estimate.gpus import GPUS, GPUS_PER_NODE
from fastdeit.estimate.machines import Machine
from fastdeit.estimate.networks import Network, Work
from fastdeit.estimate.rows import known_gpu
from fastdeit.estimate.subject import Subject
from fastdeit.estimate.subject import subject as subject_of
from fastdeit.methods.config import METHODS, TeacherConfig
from fastdeit.methods.teacher import Teacher
from fastdeit.recipe import resolve as recipes
from fastdeit.recipe.length import settled
from fastdeit.run import address, agreement, build, cached, carry, directory, precision, saver, sharing, teachers
from fastdeit.run.identity import refuse_other_run
from fastdeit.run.phasing import PhaseSchedule
from fastdeit.run.request import Request
from fastdeit.run.weights import is_cached, published_classes

if TYPE_CHECKING:
    from fastdeit.recipe.length import Length
    from fastdeit.recipe.resolve import Recipe


def show(asked: Request, processes: int) -> None:
    """Print what the run that is asked for would be on so many processes. Raises the errors of one that could not
    begin."""
    print("\n".join(lines(asked, processes)))


def lines(asked: Request, processes: int) -> Iterator[str]:
    """What `show` prints: facts first, then estimates, which are marked as such, then the resolved recipe."""
    device, recipe = pick_device(asked.recipe.engine.device), precision.fixed(asked.recipe)
    check_sinks(recipe.engine.sinks)
    kernels.info()  # refuses kernels that are asked for by name and cannot run here
    training, held_out = build.sources(recipe)
    length = build.run_length(recipe, len(training))
    cache = cached.checked(recipe, training, length)
    told: list[str] = []
    newest = _newest(asked, told)
    begins = _begins(asked, length, newest)
    trained, first = _teachers(asked, recipe)
    student, files = _checked(recipe, training, processes, device, told, trained | first, anew=begins is None)
    for own in first.values():
        _checked(own, training, processes, device, told, teachers.to_train(own), anew=True)
    recipe = settled(recipe, length)
    _check_going_on(asked, newest, recipe, saver.identity_of(training, held_out, cache), files)
    directory.check_space(asked.run_dir, saver.size(files), World(device), keep=recipe.engine.keep_checkpoints)
    classes = len(training.classes)
    known = recipe.model_copy(update={"model": recipe.model.model_copy(update={"num_classes": classes})})
    subject = replace(subject_of(known, len(training)), held_out=len(held_out))
    train = recipe.train

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
    evaluations = f"{subject.evaluations:,} evaluation{'s' * (subject.evaluations != 1)}"
    yield (
        f"run       {length.epochs:,.6g} epochs of {length.steps_per_epoch:,} steps, {length.total:,} in all, of "
        f"{train.batch_size:,} images{accumulated}; {evaluations}"
    )
    notes = build.notes(recipe, len(training), student, processes, device, anew=newest is None)
    yield from (f"note      {note}" for note in notes)
    if begins is not None:
        yield f"begins    {begins}"
    yield from (f"weights   {note}" for note in told)
    yield from (f"estimate  {line}" for line in _estimates(known, subject, processes, device))
    yield f"\n# the recipe in full\n{recipes.dump(recipe)}".rstrip("\n")


def _newest(asked: Request, told: list[str]) -> Checkpoint | None:
    """The checkpoint that a run which is there goes on from; damaged ones are told. Raises CheckpointError where all
    are."""
    if asked.origin is not None or not asked.goes_on:
        return None
    found = agreement.newest(World(torch.device("cpu")), asked.run_dir / directory.CHECKPOINTS, told.append)
    return saver.present(found)


def _begins(asked: Request, length: "Length", newest: Checkpoint | None) -> str | None:
    """Where a run that does not begin anew begins. Raises UsageError where a fork would have nothing left to train."""
    if asked.origin is not None:
        return f"at step {asked.origin.start(length):,}, as a fork of {asked.origin.run} at step {asked.origin.step:,}"
    return None if newest is None else f"at step {newest.step:,}: {asked.run_dir} goes on"


def _teachers(asked: Request, recipe: "Recipe") -> tuple[dict[TeacherConfig, Path], dict[TeacherConfig, "Recipe"]]:
    """Of the teachers with recipes of their own: the runs of those that are trained, and the recipes of those that a
    start would train first."""
    begun = asked.run_dir if asked.resume else None
    trained = teachers.trained(recipe, begun) if asked.origin is None else asked.origin.teachers(recipe)
    return trained, teachers.to_train(recipe, begun, trained)


def _checked(
    recipe: "Recipe",
    source: Source,
    processes: int,
    device: torch.device,
    told: list[str],
    known: teachers.Known,
    *,
    anew: bool,
) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
    """Make the parts of a run as a start would, and open what its student begins with and its teachers. Returns the
    student and the tensors of a checkpoint (`saver.held`), none where they are not known. What is found goes to `told`.

    known  of teachers with recipes of their own: their runs, or these recipes while they are not trained yet
    anew   whether the run begins with `model.weights`, and not with those of a checkpoint

    Networks have no storage, unless the method is somebody else's, who may need it. Raises the errors of parts and
    weights that do not fit.
    """
    precision.check_products(recipe)
    length = build.run_length(recipe, len(source))
    build.check_batch(recipe, processes)
    recipe = settled(recipe, length)
    count, classes = len(source.classes), build.compared_classes(recipe, source)
    ours = recipe.method.use in METHODS
    with torch.device("meta") if ours else nullcontext():
        student = build.model(recipes.without_weights(recipe), count, told.append)
    if anew and recipe.model.weights is not None and not _is_far("model.weights", recipe.model.weights, told):
        build.model(recipe, count, told.append, classes)
    made: dict[TeacherConfig, Teacher | None] = {}
    for config in recipe.method.teachers():
        name, own = f"timm:{config.timm}" if config.weights is None else config.weights, known.get(config)
        if own is not None and not isinstance(own, Path):
            made[config] = None if ours else build.untrained_teacher(own, config, count)
        elif own is not None or not _is_far(build.teacher_field(config), name, told):
            options = {"classes": classes, "say": told.append}
            opened = build.teacher(config, build.image_size(recipe), count, own, recipe.engine.precision, **options)
            made[config] = None if ours else opened
        else:
            with build.naming(build.teacher_field(config)):
                build.check_classes(name, config, published_classes(address.parse(name)), count)
    if not ours and len(made) < len(recipe.method.teachers()):
        return student, {}  # such a method cannot be made without its teachers
    method = build.method(recipe, student, count, length.total, made.get, source)
    sharing.check(recipe, method)
    if recipe.engine.sync_batchnorm and processes > 1:
        batchnorm.synchronise(method, device)
    schedule, decay = PhaseSchedule(method, recipe, length.epochs_begun), recipe.optim.ema_decay
    optimizer = optimizers.find(recipe.optim.name)(schedule.groups(), recipe.optim)
    ema = None if decay is None else Ema(schedule.trainable, decay, method)
    check_capture(recipe.engine.capture, device)
    return student, saver.held(method, optimizer, ema)


def _check_going_on(
    asked: Request,
    newest: Checkpoint | None,
    recipe: "Recipe",
    identity: Mapping[str, Any],
    files: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Raise UsageError where the run cannot go on from the checkpoint that it would: from the `newest` one, if that is
    of another run or of other data; as a fork, from what cannot be carried over. The `files` of a checkpoint here are
    compared, unless there are none."""
    if asked.origin is not None:
        carry.check(asked.origin, recipe, identity["classes"])
        if files:
            carry.check_network(asked.origin, recipe, files)
    elif newest is not None:
        changed = recipes.difference(directory.checked_recipe(newest.state["recipe"], newest.path), recipe)
        refuse_other_run(asked.run_dir, changed, saver.other_data(newest.state["identity"], identity))


def _is_far(field: str, text: str, told: list[str]) -> bool:
    """Whether the weights of timm at the address `text` of a field would have to be downloaded, which is then told."""
    with build.naming(field):
        where = address.parse(text)
        if where.kind != "timm" or is_cached(where):
            return False
    told.append(f"{text}: would be downloaded, so it is not opened here")
    return True


def _named(device: torch.device) -> str:
    return "the CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)


def _network(network: Network) -> str:
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
    work = Work(micro, recipe.engine.precision, recipe.model.drop_path > 0, averaged, subject.trained)
    shared = {"world": processes, "parallel": recipe.engine.parallel, "accumulate": recipe.train.accumulate}
    largest = subject.largest
    parts = memory.peak(largest.student, work, EAGER, **shared, teachers=largest.teachers)
    parts.pop("context")  # of CUDA
    yield f"{memory.total(parts) / memory.GIB:,.2g} GiB a process besides the libraries (modelled, not measured)"
    yield f"no time: there is no model of the speed of {_named(device)}; `fastdeit plan {recipe.name}` knows some GPUs"
