"""The training loop.

Read `train` from top to bottom: build, resume, then one step after the other. What a batch's loss is belongs to the
method, how a step is made to the engine, what a sample looks like to the data package.
"""

import argparse
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastdeit import kernels, rng
from fastdeit.data.loader import EvalLoader
from fastdeit.data.sources.source import DataError
from fastdeit.engine import batchnorm, optimizers, phases
from fastdeit.engine.checkpoint import CheckpointError
from fastdeit.engine.dist import World
from fastdeit.engine.dist import world as join_world
from fastdeit.engine.ema import Ema
from fastdeit.engine.groups import ParamGroup
from fastdeit.engine.schedule import learning_rate
from fastdeit.engine.step import Engine
from fastdeit.errors import FastdeitError, Interrupted, UsageError
from fastdeit.methods.base import Method, Phase
from fastdeit.methods.evaluators import Classify, Evaluator
from fastdeit.methods.teacher import Teacher, TeacherConfig
from fastdeit.recipe import resolve as recipes
from fastdeit.recipe.length import Length, settled
from fastdeit.run import build
from fastdeit.run.evaluate import Result, evaluate
from fastdeit.run.groups import param_groups
from fastdeit.run.record import Record, RunLog, Saver, choose_directory, describe, prepare_directory

if TYPE_CHECKING:
    from fastdeit.recipe.resolve import Recipe

_MEASURED_IMAGES = 1024
"""Images of the newest steps on which BatchNorm statistics of averaged weights are measured: a thousand are enough (Wu
& Johnson, arXiv:2105.07576)."""


def main(args: argparse.Namespace) -> None:
    """Worker of `fastdeit train`: one process of the run."""
    recipe = recipes.load(args.recipe, args.overrides)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("WORLD_SIZE", 1))))
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    with join_world(recipe.engine.device) as world, world.stop_on_signals():
        run_dir = Path(world.same(str(choose_directory(args.run_dir, recipe.name, args.resume))))
        train(recipe, run_dir, world, resume=args.resume)


def train(recipe: "Recipe", run_dir: Path, world: World, *, resume: bool) -> dict[str, Any]:
    """Train by the recipe into `run_dir` and return the summary.

    Raises UsageError when `run_dir` holds another run, Interrupted after a signal (everything is saved),
    NonFiniteError when too many steps in a row had non-finite gradients.
    """
    # ---- build -----------------------------------------------------------------------------------------------------
    world.agree("the kernels that they choose", {row.name: row.backend for row in kernels.info()})
    train_source, val_source = build.sources(recipe)
    classes, size = len(train_source.classes), build.image_size(recipe)
    length = build.run_length(recipe, len(train_source))
    prepare_directory(run_dir, world, resume)
    trained_teacher = train_teacher(recipe, run_dir, world)

    steps_per_epoch, total = length.steps_per_epoch, length.total
    recipe = settled(recipe, length)
    log = RunLog(run_dir, recipe, world, total, steps_per_epoch)
    student = build.model(recipe, classes, log.say, train_source.classes)

    def make_teacher(config: TeacherConfig) -> Teacher:
        with world.main_first():  # timm may have to download; the others then find the files
            options = {"classes": train_source.classes, "say": log.say}
            made = build.teacher(config, size, classes, trained_teacher, recipe.engine.precision, **options)
        return made.to(world.device)

    method = build.method(recipe, student, classes, total, make_teacher, train_source).to(world.device)
    if recipe.engine.sync_batchnorm and world.size > 1 and not batchnorm.synchronise(method, world.device):
        log.say("engine.sync_batchnorm changes nothing: this model has no BatchNorm")
    schedule = PhaseSchedule(method, recipe, length.epochs_begun)
    ema = Ema(schedule.trainable, recipe.optim.ema_decay, method) if recipe.optim.ema_decay is not None else None
    engine = Engine(
        method,
        optimizers.find(recipe.optim.name)(schedule.groups(), recipe.optim),
        world,
        precision=recipe.engine.precision,
        accumulate=recipe.train.accumulate,
        **build.clipping(recipe, student),
        ema=ema,
        capture=recipe.engine.capture,
    )
    loader = build.train_loader(recipe, train_source, world, method.noise(), log.bad_image)
    val_loader = build.eval_loader(recipe, val_source, world, method.noise(), log.bad_image)

    # ---- resume ----------------------------------------------------------------------------------------------------
    identity = {"train": train_source.fingerprint, "val": val_source.fingerprint, "classes": train_source.classes}
    saved = Saver(run_dir, recipe, identity, engine, world, schedule, total)
    start, record = saved.restore(log.say) if resume else (0, Record())
    log.begin(start, record, describe(recipe, method, train_source, val_source, world, length, run_dir))

    # ---- go --------------------------------------------------------------------------------------------------------
    log_every = recipe.engine.log_every
    eval_every = length.eval_every
    save_every = max(1, round(steps_per_epoch * recipe.engine.checkpoint_every))
    rates = schedule_of(recipe, length)
    measured_steps = math.ceil(_MEASURED_IMAGES / recipe.train.batch_size)
    step = start

    def held_out(evaluators: Mapping[str, Evaluator], batches: int | None = None) -> Result:
        def training() -> EvalLoader:
            return build.eval_loader(recipe, train_source, world, {}, log.bad_image)

        return evaluate(method, evaluators, val_loader, training, world, recipe.engine.precision, batches)

    def measure_average() -> None:
        if ema is not None and ema.stale:
            seed_torch(recipe.train.seed, step, world.rank)
            with closing(loader.batches(max(0, step - measured_steps), step)) as again:
                engine.measure_average(again)

    def evaluate_now() -> None:
        measure_average()
        method.eval()
        results = {"": held_out(method.evaluators())}
        if ema is not None:
            with ema.applied():
                results["_ema"] = held_out(method.evaluators())
        method.train()
        log.evaluation(step, results, record)

    batches = loader.batches(start, total)
    try:
        if method.teacher is not None and recipe.method.teacher.classifies and record.teacher_top1 is None:
            # Before the first step: a teacher with the wrong classes or normalisation shows here, not after two days.
            log.teacher(held_out({"teacher": Classify(lambda batch: {"class": method.teacher(batch)})}), record)
        if recipe.train.stop_after is not None and not method.evaluators():
            raise UsageError(f"train.stop_after needs a metric, but method {recipe.method.use} has none")
        if recipe.train.best_by is not None:
            # Only an evaluation tells the names of the metrics. One batch is enough, and a wrong name shows now.
            method.eval()
            names = held_out(method.evaluators(), batches=1).metrics
            log.check_best_by([*names, *(f"{name}_ema" for name in names if ema is not None)])
        method.train()
        if 0 < start != record.evaluated_step and (start % eval_every == 0 or start == total):
            evaluate_now()  # the run was stopped after the last step of an epoch, before its evaluation
        while step < total and not log.ends_early(record):
            if step % steps_per_epoch == 0 or step == start:
                epoch = step // steps_per_epoch
                if schedule.enter(epoch, engine):
                    log.say(f"epoch {epoch}: phase {schedule.phase.name}")
                method.on_epoch(epoch, engine)
            seed_torch(recipe.train.seed, step, world.rank)
            began = time.perf_counter()
            micro_batches = [batch.to(world.device) for batch in next(batches)]
            waited = time.perf_counter() - began
            lr = learning_rate(step, **rates)
            engine.step(micro_batches, lr)
            step += 1

            finished = step == total
            stop = world.stop_requested() and not finished
            logs = finished or step % log_every == 0
            evaluates = finished or (step % eval_every == 0 and not stop)
            saves = finished or stop or step % save_every == 0
            if logs or evaluates or saves:
                world.synchronize()  # what is still queued on the device belongs to the time of these steps
            record.add(recipe.train.batch_size, time.perf_counter() - began, waited)
            log.step(step)
            if logs:
                log.training(step, engine, record, lr)
            if evaluates:
                evaluate_now()
            ends = evaluates and log.ends_early(record)
            if ends and not logs:
                log.training(step, engine, record, lr)
            if saves or ends or (evaluates and record.best_step == step):  # the best is kept, so it must be on disk
                measure_average()
                saved.save(step, record)
            if stop:
                raise Interrupted(f"interrupted at step {step} of {total}; saved in {run_dir}, go on with --resume")

        if step < total:
            log.say(f"stopped at step {step}: {recipe.train.stop_after} evaluations in a row brought no new best")
        # ---- done --------------------------------------------------------------------------------------------------
        bad_images = world.sum(torch.tensor(len(loader.bad.reasons), device=world.device)).item()
        return log.finish(record, bad_images)
    except (DataError, CheckpointError) as error:
        raise FastdeitError(f"{error}\nstopped at step {step}; once that is mended, go on with --resume") from error
    finally:
        batches.close()
        log.close()


_WHICH_DATA = "source", "root", "train", "val", "synthetic_samples", "synthetic_classes"


def train_teacher(recipe: "Recipe", run_dir: Path, world: World) -> Path:
    """Train the teacher that has a recipe of its own, unless it is trained already; returns its run, RUN/teacher."""
    path = run_dir / "teacher"
    config = getattr(recipe.method, "teacher", None)
    if config is not None and config.recipe is not None:
        own = recipes.load(config.recipe)
        data = own.data.model_copy(update={name: getattr(recipe.data, name) for name in _WHICH_DATA})
        train(own.model_copy(update={"data": data, "engine": recipe.engine}), path, world, resume=path.exists())
    return path


class PhaseSchedule:
    """The phases of a method through a run, and which of them is under way.

    trainable  by name all parameters that the method has not frozen, whichever phase trains them
    epochs     of the run

    Raises UsageError for phases that do not fit the run.
    """

    def __init__(self, method: Method, recipe: "Recipe", epochs: int) -> None:
        self._method, self._recipe = method, recipe
        self._phases: Sequence[Phase] = tuple(method.phases())
        self.trainable = {name: p for name, p in method.named_parameters() if p.requires_grad}
        names = [name for name, _ in method.named_parameters()]
        try:
            phases.check(self._phases, epochs, names, self.trainable)
        except phases.PhaseError as error:
            raise UsageError(f"method {recipe.method.use}: {error}") from error
        self.phase = self._phases[0]

    def groups(self) -> list[ParamGroup]:
        """What is trained in the phase that is under way, in the method's groups; nothing else asks for gradients."""
        phases.train_only(self._method, self.phase, self.trainable)
        self._method.on_phase(self.phase)
        return param_groups(self._method, self._recipe)

    def enter(self, epoch: int, engine: Engine) -> bool:
        """Make the phase of `epoch` that of the engine; whether it is another than before."""
        return self._go_to(self._phases[phases.index_at(self._phases, epoch)], engine)

    def resume(self, name: str, engine: Engine) -> None:
        """Make the phase called `name`, of a checkpoint, that of the engine, before its state is loaded."""
        found = next((phase for phase in self._phases if phase.name == name), None)
        if found is None:
            raise UsageError(f"the checkpoint is of phase {name!r}, but the method has no phase of that name")
        self._go_to(found, engine)

    def _go_to(self, phase: Phase, engine: Engine) -> bool:
        if phase is self.phase:
            return False
        self.phase = phase
        engine.enter(self.groups())
        return True


def schedule_of(recipe: "Recipe", length: Length) -> dict[str, Any]:
    """The arguments of `learning_rate` for a run of the recipe."""
    names = "schedule", "lr", "warmup_lr", "min_lr"
    run = {"steps_per_epoch": length.steps_per_epoch, "epochs": length.epochs, "warmup_epochs": length.warmup_epochs}
    return run | {name: getattr(recipe.optim, name) for name in names}


def seed_torch(seed: int, step: int, rank: int) -> None:
    """torch's own generator as a function of the step, for dropout inside models that are not ours."""
    torch.manual_seed(rng.key(seed, "torch", step, rank) >> 1)
