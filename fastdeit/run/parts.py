"""What a run is made of, built from its recipe."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastdeit import kernels
from fastdeit.data.bad import BadList
from fastdeit.data.examine import fault
from fastdeit.data.loader import EvalLoader, TrainLoader
from fastdeit.data.sources.source import Source, listed
from fastdeit.engine import batchnorm, optimizers
from fastdeit.engine.dist import World
from fastdeit.engine.ema import Ema
from fastdeit.engine.step import Engine
from fastdeit.methods.base import Method
from fastdeit.methods.config import TeacherConfig
from fastdeit.methods.evaluators import Evaluator
from fastdeit.methods.teacher import Teacher
from fastdeit.recipe import resolve as recipes
from fastdeit.recipe.length import Length, settled
from fastdeit.recipe.resolve import Recipe
from fastdeit.run import agreement, build, cached, sharing, teachers
from fastdeit.run.evaluate import Result, evaluate, judged_at
from fastdeit.run.phasing import PhaseSchedule
from fastdeit.run.record import RunLog
from fastdeit.run.saver import Saver, identity_of


@dataclass(frozen=True)
class Parts:
    """What a run is made of.

    recipe   with the numbers written out that follow the size of the data set
    sources  training and held-out samples
    bad      those of them that cannot be used
    """

    recipe: Recipe
    world: World
    sources: tuple[Source, Source]
    bad: tuple[BadList, BadList]
    length: Length
    log: RunLog
    method: Method
    schedule: PhaseSchedule
    tuning: kernels.Tuning
    engine: Engine
    loader: TrainLoader
    val_loader: EvalLoader
    saver: Saver

    @classmethod
    def of(cls, recipe: Recipe, world: World, begins: bool, known: teachers.Known) -> "Parts":
        """Everything that the recipe asks for, in its initial state.

        begins  whether the student begins with `model.weights`; else a checkpoint gives it its weights, and the file
                need not exist any more
        known   of teachers with recipes of their own: their runs, or these recipes while they are not trained yet
        """
        sources = train_source, val_source = agreement.together(world, lambda: build.sources(recipe))
        agreement.same_data(world, identity_of(*sources, None))  # before what follows from them
        count, size = len(train_source.classes), build.image_size(recipe)
        names = build.compared_classes(recipe, train_source)
        length = build.run_length(recipe, len(train_source))
        agreement.together(world, lambda: build.check_batch(recipe, world.size))  # by the memory of each machine
        recipe = settled(recipe, length)
        log = RunLog(recipe, world, length.total, length.steps_per_epoch)
        cache = agreement.together(world, lambda: cached.checked(recipe, train_source, length))
        identity = identity_of(*sources, cache)
        agreement.same_data(world, {"cache": identity.get("cache")})
        begun = recipe if begins else recipes.without_weights(recipe)
        student = agreement.together(world, lambda: build.model(begun, count, log.say, names))

        def make_teacher(config: TeacherConfig) -> Teacher:
            own = known.get(config)
            if own is not None and not isinstance(own, Path):
                return build.untrained_teacher(own, config, count).to(world.device)
            with world.main_first():  # timm may have to download; the others then find the files
                options = {"classes": names, "say": log.say}
                made = build.teacher(config, size, count, own, recipe.engine.precision, **options)
            return made.to(world.device)

        method = build.method(recipe, student, count, length.total, make_teacher, train_source).to(world.device)
        if recipe.engine.sync_batchnorm and world.size > 1 and not batchnorm.synchronise(method, world.device):
            log.say("engine.sync_batchnorm changes nothing: this model has no BatchNorm")
        share = sharing.shared(recipe, method, world, log.say)
        tuning = build.tuning(recipe, world, log.say)
        schedule, decay = PhaseSchedule(method, recipe, length.epochs_begun), recipe.optim.ema_decay
        engine = Engine(
            method,
            optimizers.find(recipe.optim.name)(schedule.groups(), recipe.optim),
            world,
            precision=recipe.engine.precision,
            accumulate=recipe.train.accumulate,
            **build.clipping(recipe, student),
            ema=None if decay is None else Ema(schedule.trainable, decay, method),
            parallel=share,
            capture=recipe.engine.capture,
            tuning=tuning,
            on_spike=recipe.engine.on_spike,
        )
        bad = train_bad, val_bad = BadList("train"), BadList("val")
        loader = build.train_loader(recipe, train_source, world, method.noise(), log.bad_image, train_bad)
        val_loader = build.eval_loader(recipe, val_source, world, method.noise(), log.bad_image, val_bad)
        if cache is not None:
            log.say(f"teacher: {cached.described(cache)}")
        saver = Saver(recipe, identity, engine, world, schedule, length)
        loaders = loader, val_loader
        return cls(recipe, world, sources, bad, length, log, method, schedule, tuning, engine, *loaders, saver)

    def held_out(self, evaluators: Mapping[str, Evaluator], step: int, batches: int | None = None) -> Result:
        """What the evaluators say of the held-out images, or of the first `batches` of them, after `step` steps.

        The method is in eval mode meanwhile, and in training mode afterwards.
        """

        def training() -> EvalLoader:
            return build.eval_loader(self.recipe, self.sources[0], self.world, {}, self.log.bad_image, self.bad[0])

        precision = self.recipe.engine.precision
        at = judged_at(step, self.length.steps_per_epoch, self.length.total)
        with self.engine.parallel.gathered(self.method):
            # What modules compute once for eval mode, such as tables of attention's biases, is of these weights, whole.
            self.method.eval()
            try:
                return evaluate(self.method, evaluators, self.val_loader, training, self.world, precision, at, batches)
            finally:
                self.method.train()

    def share_bad(self, run_dir: Path) -> None:
        """Keep the lists of bad images in the run directory, one for all processes. What an earlier start has entered,
        and is mended since, is struck out."""
        with self.world.main_first():
            for bad, source in zip(self.bad, self.sources, strict=True):
                bad.keep_in(run_dir)
                mended = bad.mended(source, partial(fault, source)) if self.world.main else []
                if mended:
                    self.log.say(f"images that were not used, and are sound now: {listed(mended)}")

    def bad_images(self) -> int:
        """How many training images all processes together could not use."""
        self.bad[0].refresh()
        return len(self.bad[0])
