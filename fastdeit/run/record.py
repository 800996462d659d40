"""A run on disk and on the terminal: its directory, its log, its checkpoints, its summary."""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from math import isnan
from operator import gt, lt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fastdeit.data.sources.source import Source
from fastdeit.engine import checkpoint, report
from fastdeit.engine.dist import World
from fastdeit.engine.metrics import MetricsLog, Sink, open_sinks
from fastdeit.engine.progress import Progress, table
from fastdeit.engine.step import Engine
from fastdeit.errors import NonFiniteError, UsageError
from fastdeit.methods.base import Method
from fastdeit.recipe import resolve as recipes
from fastdeit.recipe.length import Length
from fastdeit.run import build, environment
from fastdeit.run.evaluate import Result, metric_rows, named_metrics

if TYPE_CHECKING:
    from fastdeit.recipe.resolve import Recipe

RUNS = Path("runs")


def choose_directory(given: str | None, name: str, resume: bool) -> Path:
    """`--run-dir`, or with `--resume` the newest run of this recipe under runs/, or a new dated directory there."""
    if given is not None:
        return Path(given)
    if resume:
        earlier = sorted(path for path in RUNS.glob(f"????-??-??_??????_{name}") if path.is_dir())
        if not earlier:
            raise UsageError(f"--resume: there is no run of recipe {name} under {RUNS}/; name it with --run-dir DIR")
        return earlier[-1]
    return RUNS / f"{datetime.now():%Y-%m-%d_%H%M%S}_{name}"


def prepare_directory(path: Path, world: World, resume: bool) -> None:
    """Make the run directory; refuse one that holds a run already, unless that run is to be resumed."""
    used = (path / "metrics.jsonl").exists() or bool(checkpoint.steps(path / "checkpoints"))
    if world.same(used and not resume):
        raise UsageError(f"{path} already holds a run; add --resume to continue it, or choose another --run-dir")
    problem = None
    if world.main:
        try:
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = error.strerror
    if problem := world.same(problem):
        raise UsageError(f"{path}: the run directory cannot be made or written to: {problem}; choose another --run-dir")
    if world.main:
        checkpoint.sweep(path / "checkpoints")
    world.barrier()


@dataclass
class Record:
    """What a run remembers besides tensors; part of every checkpoint."""

    evaluated_step: int = 0
    best_step: int = 0
    best: float | None = None
    best_by: str | None = None
    evaluations_since_best: int = 0
    phase: str = ""
    train_loss: float | None = None
    teacher_top1: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def add(self, images: int, seconds: float, waited: float) -> None:
        """Account for one step: images of the global batch, its wall time, and how much of it was waiting for data."""
        self.images += images
        self.seconds += seconds
        self.waited += waited

    def speed_since(self, images: int, seconds: float, waited: float) -> tuple[float, float]:
        """(images per second, per cent of the time spent waiting for data) since these earlier totals."""
        elapsed = max(self.seconds - seconds, 1e-9)
        return (self.images - images) / elapsed, 100 * (self.waited - waited) / elapsed


class Phases(Protocol):
    """The phase that training is in."""

    @property
    def phase(self) -> Any: ...

    def resume(self, name: str, engine: Engine) -> None: ...


class Saver:
    """Writes and restores the checkpoints of one run.

    phases  what the run's training is in (`PhaseSchedule`)
    steps   of the whole run
    """

    def __init__(
        self,
        run_dir: Path,
        recipe: "Recipe",
        identity: dict[str, Any],
        engine: Engine,
        world: World,
        phases: Phases,
        steps: int,
    ) -> None:
        self.root, self.steps = run_dir / "checkpoints", steps
        self.recipe, self.identity, self.engine, self.world, self.phases = recipe, identity, engine, world, phases

    def save(self, step: int, record: Record) -> None:
        """Save everything a run needs to go on as if it had never stopped. Call it on every process."""
        record.phase = self.phases.phase.name
        engine_state = self.engine.state_dict()
        if self.world.main:
            method, ema = self.engine.method, self.engine.ema
            student = method.model.state_dict()
            own = {k: v for k, v in method.state_dict().items() if not k.startswith("model.")}
            tensors = {"model": student, "method": own, "optim": self.engine.optimizer.state_dict()}
            tensors["engine"] = engine_state
            if ema is not None:
                tensors["ema"] = ema.average
            state = {"recipe": self.recipe.model_dump(mode="json"), "identity": self.identity, "record": asdict(record)}
            state["steps"] = self.steps
            checkpoint.save(self.root, step, tensors, state)
            keep = [record.best_step] if record.best_step else []
            checkpoint.prune(self.root, self.recipe.engine.keep_checkpoints, keep)
        self.world.barrier()

    def restore(self, say: build.Report) -> tuple[int, Record]:
        """(step, record) of the newest checkpoint that verifies, with everything loaded; (0, fresh) when there is none.

        Every process reads the files itself. Raises UsageError when the checkpoint is of another run: other model,
        method, data, optimizer, global batch or seed.
        """
        found = checkpoint.newest(self.root, lambda path, why: say(f"checkpoint {path} is damaged ({why}); skipped"))
        if found is None:
            say("nothing to resume yet: starting at step 0")
            return 0, Record()
        self._refuse_other_run(found)
        engine, tensors, record = self.engine, found.tensors, Record(**found.state["record"])
        self.phases.resume(record.phase, engine)
        student = {f"model.{name}": tensor for name, tensor in tensors["model"].items()}
        try:
            engine.method.load_state_dict(student | tensors["method"])
            engine.optimizer.load_state_dict(tensors["optim"])
            engine.load_state_dict(tensors["engine"])
            if engine.ema is not None:
                engine.ema.load(tensors["ema"])
        except (KeyError, RuntimeError) as error:
            reason = error.args[0] if error.args else error
            raise UsageError(
                f"{found.path} does not fit the method as its code is now, in phase {record.phase!r}: {reason}\n"
                "Resume with the code that the run was started with, or start anew with another --run-dir"
            ) from error
        return found.step, record

    def _refuse_other_run(self, found: checkpoint.Checkpoint) -> None:
        before = recipes.Recipe.model_validate(found.state["recipe"])
        differences = recipes.difference(before, self.recipe)
        named = {"train": "data (training images)", "val": "data (held-out images)", "classes": "data (classes)"}
        for key, name in named.items():
            if found.state["identity"][key] != self.identity[key]:
                differences.append((name, found.state["identity"][key], self.identity[key]))
        if differences:
            lines = "\n".join(
                f"  {field}: the run has {_short(old)}, asked for {_short(new)}" for field, old, new in differences
            )
            raise UsageError(
                f"{found.path} is a checkpoint of another run; resume with the same settings, or start anew with "
                f"another --run-dir:\n{lines}"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


class RunLog:
    """Everything a run says: terminal, metrics.jsonl, sinks, curves.png and summary.json.

    Beside the main process it is silent, except for files that cannot be read, which every process meets on its own.
    """

    def __init__(self, run_dir: Path, recipe: "Recipe", world: World, steps: int, steps_per_epoch: int) -> None:
        self.run_dir, self.recipe, self.world = run_dir, recipe, world
        self.steps, self.steps_per_epoch = steps, steps_per_epoch
        self.progress: Progress | None = None
        self.metrics: MetricsLog | None = None
        self.sinks: list[Sink] = []
        self.mark = (0, 0.0, 0.0)

    def say(self, text: str) -> None:
        """One line to the person watching."""
        if self.progress is not None:
            self.progress.message(text)
        elif self.world.main:
            print(text, flush=True)

    def bad_image(self, path: str, reason: str) -> None:
        """A sample was replaced or left out because it cannot be used."""
        text = f"image not used: {path}: {reason}"
        if self.progress is not None:
            self.progress.message(text)
        else:
            print(text, flush=True)

    def begin(self, start: int, record: Record, facts: list[str]) -> None:
        """Open the log at step `start` and write down what is going to be run, and on what."""
        self.mark = (record.images, record.seconds, record.waited)
        if not self.world.main:
            return
        (self.run_dir / "recipe.yaml").write_text(recipes.dump(self.recipe))
        (self.run_dir / "environment.json").write_text(json.dumps(environment.report(), indent=2) + "\n")
        config = self.recipe.model_dump(mode="json")
        self.sinks = open_sinks(self.recipe.engine.sinks, self.run_dir, config, start)
        self.metrics = MetricsLog(self.run_dir / "metrics.jsonl")
        self.metrics.truncate(start)
        for fact in facts:
            self.say(fact)
        if start:
            self.say(f"resumed at step {start} of {self.steps}")
        self.progress = Progress(self.steps, self.steps_per_epoch, start=start)

    def step(self, step: int) -> None:
        """Move the bar."""
        if self.progress is not None:
            self.progress.update(step)

    def training(self, step: int, engine: Engine, record: Record, lr: float) -> None:
        """One line of training. Call it on every process; raises NonFiniteError when the guard gives up."""
        means = engine.means()
        if "loss" not in means:
            raise UsageError(
                f"method {self.recipe.method.use}: its step has logged no loss; call engine.run(batch) at least once a "
                "micro-batch without log=False"
            )
        speed, waiting = record.speed_since(*self.mark)
        self.mark = (record.images, record.seconds, record.waited)
        record.train_loss = means["loss"]
        if self.progress is not None:
            shown = {"loss": means["loss"], "lr": lr, "images_per_second": speed, "data_wait": waiting}
            name, value = next(iter(record.metrics.items()), ("", 0.0))
            if name.startswith("top1_"):
                shown["top1"] = value
            self.progress.line(step, **shown)
        skipped = int(engine.guard.skipped.item())
        self._write(
            "train", step, **means, lr=lr, images_per_second=speed, data_wait_percent=waiting, skipped_steps=skipped
        )
        if engine.guard.exceeded():
            raise NonFiniteError(
                f"stopped at step {step}: {engine.guard.limit} steps in a row had non-finite gradients; the newest "
                f"checkpoint in {self.run_dir / 'checkpoints'} is from before. Try a lower optim.lr, "
                "optim.clip_grad=1.0 or, on GPUs that have it, engine.precision=bf16"
            )

    def teacher(self, result: Result, record: Record) -> None:
        """The teacher's accuracy on the held-out images."""
        record.teacher_top1 = result.metrics["top1_class"]
        self._write("teacher", 0, teacher_top1=record.teacher_top1)
        self.say(f"teacher: held-out top-1 {record.teacher_top1:.2f} %")

    def evaluation(self, step: int, results: Mapping[str, Result], record: Record) -> None:
        """Metrics of the weights ("") and of their averages ("_ema") after `step` steps."""
        record.evaluated_step = step
        record.metrics = named_metrics(results)
        name, value, better = self._judged_by(results)
        comparable = name is not None and not isnan(value)  # nothing would ever be better than NaN
        if comparable and (record.best is None or better(value, record.best)):
            record.best, record.best_by, record.best_step = value, name, step
            record.evaluations_since_best = 0
        else:
            record.evaluations_since_best += 1
        self._write("eval", step, images=results[""].images, bad_images=results[""].bad, **record.metrics)
        listed = [f"{name} {value:.4g}" for name, value in record.metrics.items() if not name.startswith("top5_")]
        self.say(f"epoch {step / self.steps_per_epoch:g}: held-out {', '.join(listed)}")

    def ends_early(self, record: Record) -> bool:
        """Whether the run is over because `train.stop_after` evaluations in a row brought no new best."""
        limit = self.recipe.train.stop_after
        return limit is not None and record.evaluations_since_best >= limit

    def check_best_by(self, names: Collection[str]) -> None:
        """Raise UsageError unless `train.best_by` is among `names`, the metrics of the run."""
        wanted = self.recipe.train.best_by
        if wanted not in names:
            raise UsageError(f"train.best_by {wanted} is no metric of this run, which has {', '.join(names) or 'none'}")

    def _judged_by(self, results: Mapping[str, Result]) -> tuple[str | None, float, Callable[[float, float], bool]]:
        """(metric, its value, whether a first value is better than a second): what the best step is chosen by.

        That is `train.best_by`, or else the first metric, of the weights or of their averages, whichever is better; no
        metric where the method has none.
        """
        wanted = self.recipe.train.best_by
        plain = wanted.removesuffix("_ema") if wanted else next(iter(results[""].metrics), None)
        better = gt if plain not in results[""].lower else lt
        found = named_metrics(results)
        name = wanted or plain
        if name is None:
            return None, 0.0, better
        averaged = f"{plain}_ema"
        if wanted is None and averaged in found and better(found[averaged], found[name]):
            name = averaged
        return name, found[name], better

    def _write(self, kind: str, step: int, **values: Any) -> None:
        if self.metrics is None:
            return
        values = {"kind": kind, "epoch": step / self.steps_per_epoch, **values}
        self.metrics.write(step, **values)
        for sink in self.sinks:
            sink.write(step, **values)

    def finish(self, record: Record, bad_images: int) -> dict[str, Any]:
        """Write summary.json and curves.png, print the final table, and return the summary."""
        speed, waiting = record.speed_since(0, 0.0, 0.0)
        summary = {
            "recipe": self.recipe.name,
            **record.metrics,
            "teacher_top1": record.teacher_top1,
            "best": record.best,
            "best_by": record.best_by,
            "best_step": record.best_step,
            "train_loss": record.train_loss,
            "images_per_second": speed,
            "data_wait_percent": waiting,
            "bad_images": bad_images,
            "epochs": record.evaluated_step / self.steps_per_epoch,
            "steps": record.evaluated_step,
        }
        if self.progress is not None:
            (self.run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
            report.curves(self.run_dir / "metrics.jsonl", self.run_dir / "curves.png")
            self.progress.close()
            table(self._rows(record, speed, waiting))
        return summary

    def _rows(self, record: Record, speed: float, waiting: float) -> list[tuple[str, str]]:
        rows = metric_rows(self.recipe, record.metrics)
        if record.teacher_top1 is not None:
            rows.append(("top-1 teacher", f"{record.teacher_top1:.2f} %"))
        rows.append(("training speed", f"{speed:,.0f} images/s"))
        rows.append(("waiting for data", f"{waiting:.1f} %"))
        return [*rows, ("run directory", str(self.run_dir))]

    def close(self) -> None:
        """End the line of progress and close the log and its sinks."""
        if self.progress is not None:
            self.progress.close()
        for sink in self.sinks:
            sink.close()
        if self.metrics is not None:
            self.metrics.close()


def describe(
    recipe: "Recipe", method: Method, train: Source, val: Source, world: World, length: Length, run_dir: Path
) -> list[str]:
    """What is going to happen, in the few numbers that decide the result."""
    parameters = sum(p.numel() for p in method.model.parameters())
    height, width = build.image_size(recipe)
    batch, data = recipe.train.batch_size, recipe.data
    groups = batch // data.group_size
    return [
        f"recipe {recipe.name}, run directory {run_dir}",
        f"model {recipe.model.timm or recipe.model.name}: {parameters / 1e6:.2f} M parameters, {height}x{width} "
        "pixels, "
        f"{len(train.classes)} classes, {recipe.engine.precision} on {world.size} x {world.device.type}",
        f"data {len(train):,} training and {len(val):,} held-out images; evaluation crop ratio "
        f"{data.eval_crop_ratio:g}",
        f"global batch {batch} = {groups} groups of {data.group_size}, over {world.size} processes x "
        f"{recipe.train.accumulate} micro-batches; learning rate {recipe.optim.lr:g}; "
        f"{length.total} steps, {length.epochs:g} epochs of {length.steps_per_epoch}",
    ]
