"""The training loop.

Read `train` from top to bottom: check, take the directory, train the teacher, resume; then `run_steps`, one step after
the other. What a batch's loss is belongs to the method, how a step is made to the engine, what a sample looks like to
the data package.
"""

import argparse
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastdeit import kernels, rng
from fastdeit.batch import Batch
from fastdeit.engine import rendezvous
from fastdeit.engine.checkpoint import CheckpointError
from fastdeit.engine.disk import DiskError, writing
from fastdeit.engine.dist import World
from fastdeit.engine.dist import world as join_world
from fastdeit.engine.metrics import check_sinks
from fastdeit.engine.schedule import decay_factor, learning_rate
from fastdeit.errors import Interrupted
from fastdeit.estimate import activations, capture
from fastdeit.methods.evaluators import Classify
from fastdeit.recipe.length import Length
from fastdeit.recipe.resolve import Recipe
from fastdeit.run import agreement, build, carry, directory, precision, request, teachers, threads
from fastdeit.run.clock import Clock
from fastdeit.run.fork import Origin
from fastdeit.run.health import Health, stopped
from fastdeit.run.parts import Parts
from fastdeit.run.record import Record, describe
from fastdeit.text import one_line

_RUN_DIR = "run directory"
"""What processes that a launcher starts anew go on with."""
_MEASURED_IMAGES = 1024
"""Images of the newest steps on which BatchNorm statistics of averaged weights are measured: a thousand are enough (Wu
& Johnson, arXiv:2105.07576)."""


def main(args: argparse.Namespace) -> None:
    """Worker of `fastdeit train`: one process of the run."""
    before = rendezvous.kept(os.environ, _RUN_DIR)
    if before is not None:
        request.restart(args, Path(before))
    with rendezvous.before(os.environ):
        asked = request.read(args, _say_once)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    engine = asked.recipe.engine
    with join_world(engine.device, engine.timeout_s) as world, world.stop_on_signals():
        world.agree("the run that they go on with", str(asked.origin.path if asked.origin else asked.run_dir))
        # Before what depends on the recipe: processes with other recipes would wait for each other at other places.
        agreement.same_view(world, asked.recipe, asked.run_dir if asked.resume else None, asked.origin)
        recipe = _fixed(asked.recipe, world)
        with threads.computing(recipe.engine.threads):
            train(recipe, asked.run_dir, world, resume=asked.resume, origin=asked.origin, began=args.began)


def alone(recipe: Recipe, run_dir: Path | None, *, resume: bool = False, began: float | None = None) -> dict[str, Any]:
    """`train` in this process by itself, which computes with as many threads as the recipe says.

    resume  go on from the newest checkpoint in `run_dir`, if there is one
    began   as of `train`

    A signal to stop saves the run and raises Interrupted.
    """
    if resume and run_dir is not None and directory.can_go_on(run_dir):
        recipe = request.given_again(recipe, directory.recipe_of(run_dir))
    with join_world(recipe.engine.device, recipe.engine.timeout_s) as world, world.stop_on_signals():
        recipe = _fixed(recipe, world)
        with threads.computing(recipe.engine.threads):
            return train(recipe, run_dir, world, resume=resume, began=began)


def _fixed(recipe: Recipe, world: World) -> Recipe:
    """The recipe with what it leaves to the machine."""
    recipe = precision.fixed(threads.fixed(recipe, world), world, _say_once)
    precision.check_products(recipe, world)
    return capture.fixed(activations.fixed(recipe, world, _say_once), world, _say_once)


def _say_once(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(one_line(text), flush=True)


def _of_teacher(recipe: Recipe, text: str) -> None:
    _say_once(f"of the teacher {recipe.name}, {text}")


def train(
    recipe: Recipe,
    run_dir: Path | None,
    world: World,
    *,
    resume: bool = False,
    origin: Origin | None = None,
    student: Path | None = None,
    began: float | None = None,
) -> dict[str, Any]:
    """Train by the recipe and return the summary, which also says the `run_dir`.

    run_dir  the run's directory; None: a new one under runs/
    resume   go on from the newest checkpoint in `run_dir`, if there is one
    origin   begin with this checkpoint of another run
    student  of a run that trains a teacher: the run that it is for, which messages name
    began    when the command was started, by `time.monotonic()`: the clock of the run begins then; None: now

    All that can be checked is checked before a directory is made and before a teacher is trained, and a start that
    fails leaves no directory behind. Raises UsageError for what does not fit, and when `run_dir` holds another run or
    belongs to another process; Interrupted after a signal (everything is saved); NonFiniteError when too many steps in
    a row had non-finite gradients.
    """
    # ---- check -----------------------------------------------------------------------------------------------------
    began = time.monotonic() if began is None else began
    world.agree("the kernels that they choose", {row.name: row.backend for row in kernels.info()})
    agreement.same_view(world, recipe, run_dir if resume else None, origin)
    ahead = agreement.Ahead(world, run_dir / directory.CHECKPOINTS if resume and run_dir is not None else None)
    check_sinks(recipe.engine.sinks)
    begins = origin is None and not (resume and run_dir is not None and directory.has_checkpoint(run_dir))
    begun, folders = run_dir if resume else None, teachers.folders(recipe.method)
    trained = teachers.trained(recipe, begun) if origin is None else origin.teachers(recipe)
    to_train = teachers.to_train(recipe, begun, trained).items()
    own = {config: activations.fixed(each, world, partial(_of_teacher, each)) for config, each in to_train}
    parts = Parts.of(recipe, world, begins, trained | own)
    recipe = parts.recipe
    start = 0 if origin is None else origin.start(parts.length)
    record = Record() if origin is None else carry.over(origin, parts.saver, parts.log.say)
    for each in own.values():
        precision.check_products(each, world)
        Parts.of(each, world, True, teachers.to_train(each))
    directory.check_space(run_dir, parts.saver.size(), world, keep=recipe.engine.keep_checkpoints)

    with directory.claim(run_dir, recipe.name, world, parts.log.say, resume=resume) as run_dir:
        if world.main and student is None:
            rendezvous.keep(os.environ, _RUN_DIR, str(run_dir))
        again = directory.Again(student or run_dir, world, directory.names_code(recipe))
        clock = Clock.going_on(run_dir, began) if resume and world.main else Clock(began)
        parts.log.say(f"recipe {recipe.name}, run directory {run_dir}")
        if origin is not None:
            parts.log.say(f"a fork of {origin.run} at step {origin.step}, with its weights and its optimizer")
        if student is None:
            parts.log.say(f"if it is interrupted, go on with {again()}")
        # ---- teachers ----------------------------------------------------------------------------------------------
        if origin is not None and world.main:
            for config, teacher in trained.items():
                with writing(run_dir / folders[config]):
                    origin.copy_teacher(teacher, run_dir / folders[config], print)
        if own:
            del parts  # its memory is the teachers' now
            if world.main and origin is None:  # the recipe of a fork does not say where it begins
                directory.write_recipe(run_dir, recipe)  # what to go on by, until the student has a checkpoint
            for config, each in own.items():
                trained[config] = run_dir / folders[config]
                train(each, trained[config], world, resume=trained[config].exists(), student=run_dir)
            parts = Parts.of(recipe, world, begins, trained)
            record = Record() if origin is None else carry.over(origin, parts.saver, parts.log.say)

        # ---- go ----------------------------------------------------------------------------------------------------
        if resume:
            start, record = parts.saver.restore(run_dir, parts.log.say, ahead)
        parts.share_bad(run_dir)
        anew = begins or origin is not None
        facts = describe(recipe, parts.method, *parts.sources, world, parts.length, anew=anew)
        try:
            if record.clock is not None:
                clock.restore(record.clock)
            parts.tuning.begin(0 if origin is not None else start, record.kernels)
            if origin is not None:  # before its recipe is written, by which alone a run would begin at the start
                record.clock = clock.state()
                parts.saver.save(run_dir, start, record)
            parts.log.begin(run_dir, start, record, parts.saver.lineage, facts, clock)
            return {"run_dir": str(run_dir), **run_steps(parts, run_dir, start, record, again)}
        except (CheckpointError, DiskError) as error:
            raise stopped(error, start, again.way(*parts.saver.overrides)) from error
        finally:
            parts.tuning.close()
            parts.log.close()


def run_steps(parts: Parts, run_dir: Path, start: int, record: Record, again: directory.Again) -> dict[str, Any]:
    """Train from step `start` to the end and return the summary; `again` says how to go on after a stop."""
    log, length = parts.log, parts.length
    loop = Loop(parts, run_dir, start, record, again)
    stream = parts.loader.batches(start, length.total)
    with loop.health.explaining(), parts.saver.ending(log.say), closing(stream) as batches:
        check_metrics(parts, start, record)
        parts.method.train()
        if 0 < start != record.evaluated_step and (start % length.eval_every == 0 or loop.finished):
            loop.evaluate()  # the run was stopped after the last step of an epoch, before its evaluation
        while not loop.finished and not log.ends_early(record):
            if loop.step % length.steps_per_epoch == 0 or loop.step == start:
                loop.begin_epoch()
            due = loop.make_step(batches)
            if due.line:
                loop.write_line()
            if due.any:
                loop.look(due)
            if due.evaluation:
                loop.evaluate()
                if log.ends_early(record):
                    due.checkpoint = due.last = True
                    if not due.line:
                        loop.write_line()
            if due.checkpoint or (due.evaluation and record.best_step == loop.step):  # the best has to be on disk
                loop.save(due.last)
            if due.stop:
                raise Interrupted(
                    f"interrupted at step {loop.step} of {length.total}; everything is saved, go on with {again()}"
                )
        if not loop.finished:
            log.say(
                f"stopped at step {loop.step}: {parts.recipe.train.stop_after} evaluations in a row brought no new best"
            )
        return log.finish(record, parts.bad_images())


@dataclass
class Due:
    """What is due after a step: a line of the log, an evaluation, a checkpoint, and the end that a signal asked for.

    last  nothing comes after this step in this process
    """

    line: bool
    evaluation: bool
    checkpoint: bool
    stop: bool
    last: bool

    @property
    def any(self) -> bool:
        """Whether anything has to be done that costs time."""
        return self.line or self.evaluation or self.checkpoint


class Loop:
    """What `run_steps` does before, in and after a step.

    step    how many steps are made
    health  what names the fault when a step fails
    """

    def __init__(self, parts: Parts, run_dir: Path, start: int, record: Record, again: directory.Again) -> None:
        self._parts, self._run_dir, self._record = parts, run_dir, record
        self._recipe, self._length, self._engine = parts.recipe, parts.length, parts.engine
        self.step, self.health = start, Health(parts.engine, parts.saver, run_dir, start, parts.log.say, again)
        self._rates = schedule_of(parts.recipe, parts.length)
        self._save_every = max(1, round(parts.length.steps_per_epoch * parts.recipe.engine.checkpoint_every))
        self._save_is_due = False
        self._epoch, self._size = 0, None
        self._steady = False  # whether the next step is like the last one: else code may be compiled in it

    @property
    def finished(self) -> bool:
        """Whether all steps of the run are made."""
        return self.step == self._length.total

    def begin_epoch(self) -> None:
        """Enter the phase and the image size of the epoch that the next step belongs to."""
        schedule, log, engine = self._parts.schedule, self._parts.log, self._engine
        self._epoch = epoch = self.step // self._length.steps_per_epoch
        if schedule.ends_before(epoch) and self.step % self._recipe.engine.log_every:
            self.write_line()  # a line of the log is of one phase
        if schedule.enter(epoch, engine):
            self._steady = False
            log.say(f"epoch {epoch}: phase {schedule.phase.name}")
        if self._size != (size := build.scheduled_size(self._recipe, epoch)):
            self._size, self._steady = size, False
            log.say(f"epoch {epoch}: images of {size[0]} x {size[1]} pixels")
            engine.resized()
        self._parts.method.on_epoch(epoch, engine)

    def make_step(self, batches: Iterator[Sequence[Batch]]) -> Due:
        """Take the next batch, make a step with it, and return what is due now."""
        parts, world, recipe = self._parts, self._parts.world, self._recipe
        seed_torch(recipe.train.seed, self.step, world.rank)
        began = time.perf_counter()
        world.at("the batch of a step", patient=not self._steady)
        micro_batches = [batch.to(world.device) for batch in next(batches)]
        waited = time.perf_counter() - began
        world.at("the computation of a step", patient=not self._steady)
        decay = decay_of(recipe, self._length, self.step)
        self._engine.step(micro_batches, learning_rate(self.step, **self._rates), decay)
        self.health.step = self.step = self.step + 1
        self._steady = not parts.tuning.changed
        world.at("the end of a step", patient=not self._steady)
        if parts.tuning.changed:
            parts.log.environment()
        due = self._due()
        if due.any:
            world.synchronize()  # what is still queued on the device belongs to the time of these steps
        self._record.add(recipe.train.batch_size, time.perf_counter() - began, waited)
        parts.log.step(self.step)
        return due

    def _due(self) -> Due:
        stop = self._parts.world.stop_requested() and not self.finished
        last = self.finished or stop
        self._save_is_due = self._save_is_due or self.step % self._save_every == 0
        return Due(
            line=self.finished or self.step % self._recipe.engine.log_every == 0,
            evaluation=self.finished or (self.step % self._length.eval_every == 0 and not stop),
            checkpoint=last or (self._save_is_due and self._may_save),
            stop=stop,
            last=last,
        )

    @property
    def _may_save(self) -> bool:
        """Not in a row of skipped steps: what made the first of them bad may be in the data or in the weights."""
        return not self._engine.guard.in_row()

    def write_line(self) -> None:
        """Log the training since the line before."""
        last, decay = self.step - 1, decay_of(self._recipe, self._length, self.step - 1)
        weight_decay = None if decay is None else decay * self._recipe.optim.weight_decay
        rate = learning_rate(last, **self._rates)
        self._parts.log.training(self.step, self._engine, self._record, rate, weight_decay)

    def look(self, due: Due) -> None:
        """Find out whether a step or a checkpoint has failed meanwhile. A checkpoint that failed is due again."""
        wait = due.evaluation or due.checkpoint or self._recipe.engine.on_spike == "rollback"
        if save_failed(self._parts, self._run_dir, self._record, wait):
            self._save_is_due, due.checkpoint = True, due.checkpoint or self._may_save
        self.health.look(self._epoch)

    def evaluate(self) -> None:
        """Evaluate the weights and, where there is one, their average."""
        method, ema = self._parts.method, self._engine.ema
        self._parts.world.at("an evaluation", patient=True)
        self._measure_average()
        results = {"": self._parts.held_out(method.evaluators(), self.step)}
        if ema is not None:
            with ema.applied():
                results["_ema"] = self._parts.held_out(method.evaluators(), self.step)
        self._parts.log.evaluation(self.step, results, self._record, self._parts.bad_images())

    def save(self, last: bool) -> None:
        """Save a checkpoint. One that cannot be written is made again at the next step; the `last` one raises
        CheckpointError, because there is no next time."""
        parts, record = self._parts, self._record
        parts.world.at("a checkpoint", patient=True)
        self._measure_average()
        record.kernels, record.clock = parts.tuning.state(), parts.log.clock.state()
        try:
            parts.saver.save(self._run_dir, self.step, record, wait=last)
            self._save_is_due = False
        except CheckpointError as error:
            if last:
                raise
            parts.log.not_saved(error)

    def _measure_average(self) -> None:
        """BatchNorm's statistics of the averaged weights, on the newest batches."""
        if self._engine.ema is not None and self._engine.ema.stale:
            seed_torch(self._recipe.train.seed, self.step, self._parts.world.rank)
            steps = math.ceil(_MEASURED_IMAGES / self._recipe.train.batch_size)
            with closing(self._parts.loader.batches(max(0, self.step - steps), self.step)) as newest:
                self._engine.measure_average(newest)


def save_failed(parts: Parts, run_dir: Path, record: Record, wait: bool) -> bool:
    """Whether the checkpoint that is written in the background is to be made again, which the log says. With `wait`
    that is known afterwards; else nothing is said of one that is not written yet."""
    if wait and parts.saver.unheard:
        parts.world.at("a checkpoint", patient=True)
    try:
        parts.saver.heard(run_dir, record, wait=wait)
    except CheckpointError as error:
        parts.log.not_saved(error)
        return True
    return False


def check_metrics(parts: Parts, start: int, record: Record) -> None:
    """What would only show after the first evaluation otherwise: a teacher with the wrong classes or normalisation, and
    a metric of the recipe that the method does not have, where its heads do not tell the metrics."""
    recipe, method = parts.recipe, parts.method
    judged = method.teacher is not None and all(config.classifies for config in recipe.method.teachers())
    if judged and record.teacher_top1 is None:
        parts.log.teacher(start, parts.held_out({"teacher": Classify(method.teacher.scores)}, start), record)
    if recipe.train.best_by is not None and build.known_metrics(method) is None:
        # Only an evaluation tells the names of the metrics. One batch is enough.
        build.check_best_by(recipe, list(parts.held_out(method.evaluators(), start, batches=1).metrics))


def schedule_of(recipe: Recipe, length: Length) -> dict[str, Any]:
    """The arguments of `learning_rate` for a run of the recipe."""
    names = "schedule", "lr", "warmup_lr", "min_lr"
    run = {"steps_per_epoch": length.steps_per_epoch, "epochs": length.epochs, "warmup_epochs": length.warmup_epochs}
    return run | {name: getattr(recipe.optim, name) for name in names}


def decay_of(recipe: Recipe, length: Length, step: int) -> float | None:
    """The factor on weight decays in a step of a run of the recipe; None where they follow no schedule."""
    end = recipe.optim.weight_decay_end
    return None if end is None else decay_factor(step, total=length.total, end=end / recipe.optim.weight_decay)


def seed_torch(seed: int, step: int, rank: int) -> None:
    """torch's own generator as a function of the step, for dropout inside models that are not ours."""
    torch.manual_seed(rng.key(seed, "torch", step, rank) >> 1)
