"""`fastdeit cache`: ask a teacher about every image that a run is going to have, and keep the answers.

The images are those of the run's own loader, in the run's own micro-batches. The work is shared out by steps: a process
makes whole shards, each by itself, so that the files are the same for any number of processes and machines.
"""

import argparse
import os
import shutil
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from fastdeit import cores
from fastdeit.batch import Batch
from fastdeit.data.bad import FILE, BadList
from fastdeit.data.examine import fault
from fastdeit.data.loader import TrainLoader
from fastdeit.data.logits import MANIFEST, Cache, Layout, Shard
from fastdeit.data.sources.source import Source, listed
from fastdeit.engine import rendezvous
from fastdeit.engine.dist import World
from fastdeit.engine.dist import world as join_world
from fastdeit.engine.progress import Progress
from fastdeit.engine.step import autocast
from fastdeit.errors import FastdeitError, Interrupted, UsageError
from fastdeit.methods.config import TeacherConfig
from fastdeit.methods.teacher import Ensemble, Teacher, together
from fastdeit.recipe import resolve as recipes
from fastdeit.run import build, cached, precision, threads
from fastdeit.run.weights import open_weights
from fastdeit.text import one_line
from fastdeit.version import __version__

if TYPE_CHECKING:
    from fastdeit.recipe.resolve import Recipe

_WARM_STEPS, _TRIAL_STEPS, _TRIAL_S = 4, 8, 10.0
"""How long the prediction measures at most. Of the first steps, which are not counted, the loader has some ready."""


def main(args: argparse.Namespace) -> None:
    """Worker of `fastdeit cache`: one process of those that fill the cache `args.out`."""
    with rendezvous.before(os.environ):
        recipe = recipes.load(args.recipe, args.overrides)
    torch.backends.cuda.matmul.allow_tf32 = True  # as in training
    torch.backends.cudnn.allow_tf32 = True
    with join_world(recipe.engine.device, recipe.engine.timeout_s) as world, world.stop_on_signals():
        recipe = precision.fixed(threads.fixed(recipe, world), world)
        with threads.computing(recipe.engine.threads):
            fill(recipe, teachers_of(recipe, args.teacher), args.out, world, top_k=args.top_k, epochs=args.epochs)


def teachers_of(recipe: "Recipe", address: str | None) -> tuple[TeacherConfig, ...]:
    """The teachers that are to be asked: those of the recipe, or the one with the weights at `address`.

    Raises UsageError where neither names one that is trained.
    """
    if address is not None:
        return (TeacherConfig(weights=address),)
    configs = recipe.method.teachers()
    if not configs:
        raise UsageError(f"recipe {recipe.name} has no teacher; name one with --teacher ADDRESS")
    for config in configs:
        if config.recipe is not None and config.weights is None:
            raise UsageError(
                f"the teacher of recipe {recipe.name} is not trained yet: `fastdeit train {config.recipe}` makes a run "
                "of it, which --teacher RUN then takes"
            )
    return configs


def fill(
    recipe: "Recipe",
    configs: Sequence[TeacherConfig],
    folder: Path,
    world: World,
    *,
    top_k: int,
    epochs: range | None = None,
) -> None:
    """Make what is missing or damaged of the cache in `folder`: of the given epochs, or of all that the recipe has.

    Call it on every process. Raises UsageError, which names the fields, where `folder` holds another cache, and where
    the disk has no room; Interrupted after a signal: every shard that is finished is kept.
    """

    def say(text: str) -> None:
        if world.main:
            print(one_line(text), flush=True)

    source = build.sources(recipe)[0]
    length, classes = build.run_length(recipe, len(source)), source.classes
    with world.main_first():  # timm may have to download
        options = {"classes": build.compared_classes(recipe, source), "say": say}
        sizes = build.image_size(recipe), len(classes)
        made = [build.teacher(config, *sizes, None, recipe.engine.precision, **options) for config in configs]
        addresses = [config.weights or f"timm:{config.timm}" for config in configs]
        weights = [open_weights(address).tensors for address in addresses]
    judges = list(zip(made, weights, strict=True))
    teacher = together([each.to(world.device) for each in made])
    top_k = min(top_k, len(classes))
    tau = 1.0 if top_k == len(classes) else getattr(recipe.method, "tau", 1.0)
    layout = Layout(len(classes), top_k, tau, recipe.train.batch_size, length.steps_per_epoch)
    facts = cached.fingerprint(recipe, source, judges, layout.exact)
    origin = {
        "teacher": " and ".join(addresses),
        "recipe": recipe.name,
        "device": world.device.type,
        "fastdeit": __version__,
    }
    cache = _begun(Cache(folder, layout, facts, origin), world)
    bad = _shared_list(cache, source, world, say)
    shards = cache.layout.shards(range(length.epochs_begun) if epochs is None else epochs)
    missing = _missing(cache, shards, world)
    say(f"{cached.described(cache)}: {len(shards) - len(missing):,} of {len(shards):,} shards are there")
    if missing:
        questions = _Questions(recipe, cache, _loader(recipe, source, world, bad), teacher, world)
        _predict(cache, missing, questions, world, say)
        _make(cache, missing, questions, world)
    world.barrier()
    bad.refresh()
    if len(bad):
        say(f"{len(bad):,} images could not be used, others stand in for them: {folder / FILE}")
    say(f"train from it with method.cached={folder}")


def _begun(wanted: Cache, world: World) -> Cache:
    """The cache in the folder of `wanted`, which is begun if there is none. Raises UsageError for another one."""
    folder = wanted.folder
    if world.main and not (folder / MANIFEST).exists():
        try:
            wanted.create()
        except OSError as error:
            raise UsageError(f"--out {folder}: it cannot be written: {error.strerror or error}") from error
    world.barrier()
    cache = Cache.open(folder)
    found = cached.differences(cache.fingerprint, wanted.fingerprint)
    if cache.layout.top_k != wanted.layout.top_k:
        found = [("--top-k", cache.layout.top_k, wanted.layout.top_k)]
    if found:
        raise UsageError(
            f"--out {folder} holds another cache:\n{cached.lines(found, 'this command')}\n"
            "Go on with the same recipe and teacher, or choose another --out"
        )
    return cache


def _missing(cache: Cache, shards: Sequence[Shard], world: World) -> list[Shard]:
    """The shards that are not there whole. All processes together read those that are, and compare their checksums."""
    lacking = torch.zeros(len(shards), dtype=torch.int32, device=world.device)
    for number in range(world.rank, len(shards), world.size):
        lacking[number] = not cache.is_sound(shards[number])
    return [shards[number] for number in world.sum(lacking).nonzero().flatten().tolist()]


def _shared_list(cache: Cache, source: Source, world: World, say: build.Report) -> BadList:
    """The list of images that cannot be used: in the folder of the cache, one for all processes. What an earlier start
    has entered, and is mended since, is struck out."""
    bad = BadList("train")
    with world.main_first():
        bad.keep_in(cache.folder)
        mended = bad.mended(source, partial(fault, source)) if world.main else []
    if mended:
        say(f"images that were not used, and are sound now: {listed(mended)}; make what is there of the cache anew")
    return bad


def _loader(recipe: "Recipe", source: Source, world: World, bad: BadList) -> TrainLoader:
    """The run's loader as one process has it, with this process's share of the processors."""
    threads = recipe.data.threads or max(1, cores.available() // world.size)
    data = recipe.data.model_copy(update={"threads": threads})
    parts = {"data": data, "method": recipe.method.model_copy(update={"cached": None})}

    def unused(path: str, reason: str) -> None:
        print(one_line(f"image not used: {path}: {reason}"), flush=True)

    return build.train_loader(recipe.model_copy(update=parts), source, World(world.device), {}, unused, bad)


class _Questions:
    """What the teacher answers to the run's batches."""

    def __init__(
        self, recipe: "Recipe", cache: Cache, loader: TrainLoader, teacher: Teacher | Ensemble, world: World
    ) -> None:
        self._layout, self._loader, self._teacher, self._world = cache.layout, loader, teacher, world
        self._precision = recipe.engine.precision

    def blocks(self, first: Shard, steps: int) -> Generator[NDArray, None, None]:
        """Records `[batch_size]` of so many steps from the first of the shard on."""
        start = first.epoch * self._layout.steps_per_epoch + first.steps.start
        with closing(self._loader.batches(start, start + steps)) as batches:
            for step, micro_batches in enumerate(batches, start):
                try:
                    yield np.concatenate([self._records(batch) for batch in micro_batches])
                except ValueError as error:
                    epoch, within = divmod(step, self._layout.steps_per_epoch)
                    raise FastdeitError(f"step {within} of epoch {epoch}: {error}") from error

    def shards(self, wanted: Sequence[Shard]) -> Generator[tuple[Shard, list[NDArray]], None, None]:
        """Each of the shards, which are in order, with its records by step."""
        for run in _in_a_row(wanted):
            with closing(self.blocks(run[0], sum(len(shard.steps) for shard in run))) as blocks:
                for shard in run:
                    yield shard, [next(blocks) for _ in shard.steps]

    def seconds(self, first: Shard) -> tuple[float, int]:
        """(seconds of a step, steps that this was measured on)."""
        with closing(self.blocks(first, _WARM_STEPS + _TRIAL_STEPS)) as blocks:
            _timed(blocks, _WARM_STEPS)
            self._world.barrier()
            return _timed(blocks, _TRIAL_STEPS)

    def _records(self, batch: Batch) -> NDArray:
        self._world.at("the teacher's answers", patient=True)
        with autocast(self._world.device, self._precision):
            logits = self._teacher(batch.to(self._world.device))
        return self._layout.encode(batch.index.numpy(), logits)


def _timed(blocks: Iterator[NDArray], most: int) -> tuple[float, int]:
    """(seconds of a step, steps): of so many steps, or of those that the time allows."""
    began, ends = time.perf_counter(), []
    for _ in islice(blocks, most):
        ends.append(time.perf_counter() - began)
        if ends[-1] > _TRIAL_S:
            break
    return ends[-1] / len(ends), len(ends)


def _in_a_row(shards: Sequence[Shard]) -> Iterator[list[Shard]]:
    """The shards in runs without a gap: starting a loader costs a pipeline."""
    run: list[Shard] = []
    for shard in shards:
        if run and shard != run[-1].following:
            yield run
            run = []
        run.append(shard)
    if run:
        yield run


def _predict(cache: Cache, missing: Sequence[Shard], questions: _Questions, world: World, say: build.Report) -> None:
    """Say how large the missing shards are and how long they take. Raises UsageError where the disk has no room."""
    size, free = sum(shard.bytes for shard in missing), shutil.disk_usage(cache.folder).free
    layout, steps = cache.layout, sum(len(shard.steps) for shard in missing)
    say(
        f"size: {steps * layout.batch_size:,} records of {layout.record.itemsize:,} bytes, {_bytes(size)}; "
        f"{_bytes(free)} are free"
    )
    if world.same(free < size):
        raise UsageError(
            f"{cache.folder} has {_bytes(free)} free, and the cache needs {_bytes(size)} more; make room, choose "
            "another disk with --out, or keep fewer logits with --top-k"
        )
    seconds, measured = questions.seconds(missing[0])
    speed = layout.batch_size / seconds * world.size
    say(
        f"time: about {steps * seconds / world.size / 3600:.2g} hours at {speed:,.0f} images/s, measured on {measured} "
        f"steps of {world.size} process{'es' * (world.size > 1)}"
    )


def _bytes(count: int) -> str:
    return f"{count / 1e9:,.3g} GB" if count >= 1e8 else f"{count / 1e6:,.3g} MB"


def _make(cache: Cache, missing: Sequence[Shard], questions: _Questions, world: World) -> None:
    """Write the missing shards, of which each process makes a part that lies together."""
    first, last = (len(missing) * rank // world.size for rank in (world.rank, world.rank + 1))
    mine, done = missing[first:last], 0
    total = sum(len(shard.steps) for shard in missing)
    bar = Progress(total, cache.layout.steps_per_epoch) if world.main else None
    try:
        if bar is not None:
            bar.update(0)
        with closing(questions.shards(mine)) as answers:
            # In rounds of a shard for each process, so that all of them stop together.
            for _ in range(-(-len(missing) // world.size)):
                if world.stop_requested():
                    raise Interrupted(
                        f"interrupted; {cache.folder} keeps what is finished, and the same command goes on"
                    )
                made = next(answers, None)
                if made is not None:
                    _write(cache, *made)
                steps = torch.tensor(0 if made is None else len(made[0].steps), device=world.device)
                done += int(world.sum(steps).item())
                if bar is not None:
                    bar.line(done)
    finally:
        if bar is not None:
            bar.close()


def _write(cache: Cache, shard: Shard, blocks: Sequence[NDArray]) -> None:
    try:
        cache.write(shard, blocks)
    except OSError as error:
        raise FastdeitError(f"{cache.folder / shard.path} cannot be written: {error.strerror or error}") from error
