"""What a run remembers and says: its record, terminal, metrics.jsonl, sinks, curves and summary."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isnan
from operator import gt, lt
from pathlib import Path
from typing import Any

from fastdeit.data.sources.source import Source
from fastdeit.engine import disk, report
from fastdeit.engine.dist import World
from fastdeit.engine.metrics import MetricsLog, Sink, open_sinks
from fastdeit.engine.progress import Progress, table
from fastdeit.engine.step import Engine
from fastdeit.errors import UsageError
from fastdeit.methods.base import Method
from fastdeit.recipe.length import Length
from fastdeit.recipe.resolve import Recipe
from fastdeit.run import build, directory, environment
from fastdeit.run.clock import Clock
from fastdeit.run.evaluate import Result, metric_rows, named_metrics
from fastdeit.text import one_line

CURVES_EVERY_S = 10.0
"""Drawing takes 0.2 s: more often, it would be a part of the time of a short run."""


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
    kernels: list[list[Any]] | None = None
    """What trials have chosen (`Tuning.state`), so that a resumed run has the same kernels."""
    clock: dict[str, float] | None = None
    """`Clock.state` when the checkpoint was made; None before the first one."""

    def add(self, images: int, seconds: float, waited: float) -> None:
        """Account for one step: images of the global batch, its wall time, and how much of it was waiting for data."""
        self.images += images
        self.seconds += seconds
        self.waited += waited

    def take_back_best(self, saved: Mapping[str, Any]) -> None:
        """Have the best of the record `saved` of a checkpoint; of an empty one, no best."""
        self.best, self.best_by, self.best_step = saved.get("best"), saved.get("best_by"), saved.get("best_step", 0)

    def speed_since(self, images: int, seconds: float, waited: float) -> tuple[float, float]:
        """(images per second, per cent of the time spent waiting for data) since these earlier totals."""
        elapsed = max(self.seconds - seconds, 1e-9)
        return (self.images - images) / elapsed, 100 * (self.waited - waited) / elapsed


class RunLog:
    """Everything a run says: terminal, metrics.jsonl, sinks, curves.png and summary.json.

    Beside the main process it is silent, except for files that cannot be read, which every process meets on its own.
    """

    def __init__(self, recipe: Recipe, world: World, steps: int, steps_per_epoch: int) -> None:
        self.recipe, self.world = recipe, world
        self.steps, self.steps_per_epoch = steps, steps_per_epoch
        self.run_dir: Path | None = None
        self.start = 0
        self.clock = Clock()
        self.lineage: list[dict[str, Any]] = []
        self.progress: Progress | None = None
        self.metrics: MetricsLog | None = None
        self.sinks: list[Sink] = []
        self.mark = (0, 0.0, 0.0)
        self.drawn = time.monotonic()
        self._warned: set[str] = set()
        self._again: set[str] = set()

    def say(self, text: str) -> None:
        """One line to the person watching."""
        if self.progress is not None:
            self.progress.message(text)
        elif self.world.main:
            print(one_line(text), flush=True)

    def bad_image(self, path: str, reason: str) -> None:
        """A sample was replaced or left out because it cannot be used."""
        text = one_line(f"image not used: {path}: {reason}")
        if self.progress is not None:
            self.progress.message(text)
        else:
            print(one_line(text), flush=True)

    def begin(
        self,
        run_dir: Path,
        start: int,
        record: Record,
        lineage: list[dict[str, Any]],
        facts: list[str],
        clock: Clock,
    ) -> None:
        """Open the log in `run_dir` at step `start` and write down what is going to be run, and on what."""
        self.run_dir, self.lineage, self.clock = run_dir, lineage, clock
        self.mark = (record.images, record.seconds, record.waited)
        if not self.world.main:
            return
        directory.write_recipe(run_dir, self.recipe)
        self.start = start
        self._write_environment()
        for fact in facts:
            self.say(fact)
        with disk.writing(run_dir / directory.METRICS):
            self._open_metrics(run_dir / directory.METRICS, start)
        config = self.recipe.model_dump(mode="json")
        self.sinks = open_sinks(self.recipe.engine.sinks, run_dir, config, start)
        if start:
            self.say(f"resumed at step {start} of {self.steps}")
        self.progress = Progress(self.steps, self.steps_per_epoch, start=start)

    def environment(self) -> None:
        """Write down what the run runs on, its kernels included, after what it ran on before."""
        if self.world.main:
            self._kept(self._write_environment)

    def _write_environment(self) -> None:
        path = self.run_dir / "environment.json"
        report = environment.with_history(environment.report(), self.start, environment.read(path))
        disk.replace_text(path, json.dumps(report, indent=2) + "\n")

    def _kept(self, write: Callable[[], None]) -> None:
        """Write a file of the run. What the disk refuses is raised or said, as `engine.on_save_error` has it."""
        try:
            write()
        except disk.DiskError as error:
            self.not_saved(error)

    def not_saved(self, error: Exception) -> None:
        """Say, in the same words once, that a file of the run could not be written; raise `error` if that ends it."""
        if self.recipe.engine.on_save_error == "stop":
            raise error
        self._warn(f"{error}; the run goes on (engine.on_save_error is warn), and tries the next time again")

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            self.say(f"warning: {text}")

    def _open_metrics(self, path: Path, start: int) -> None:
        """Records after the checkpoint that the run goes on from will be written again; without one, none is lost."""
        aside = directory.set_aside(path) if start == 0 else None
        if aside is not None:
            self.say(f"the run has no checkpoint; what it had measured is kept as {aside}")
        self.metrics = MetricsLog(path)
        self.metrics.truncate(start)

    def step(self, step: int) -> None:
        """Move the bar."""
        if self.progress is not None:
            self.progress.update(step)

    def training(self, step: int, engine: Engine, record: Record, lr: float, weight_decay: float | None = None) -> None:
        """One line of training, with the weight decay where it follows a schedule. Call it on every process."""
        means = engine.means()
        if "loss" not in engine.sums:
            raise UsageError(
                f"method {self.recipe.method.use}: its step has logged no loss; call engine.run(batch) at least once a "
                "micro-batch without log=False"
            )
        speed, waiting = record.speed_since(*self.mark)
        self.mark = (record.images, record.seconds, record.waited)
        loss = {"loss": means["loss"]} if "loss" in means else {}  # there is none where all steps were skipped
        record.train_loss = means.get("loss", record.train_loss)
        if self.progress is not None:
            shown = loss | {"lr": lr, "images_per_second": speed, "data_wait": waiting}
            name, value = next(iter(record.metrics.items()), ("", 0.0))
            if name.startswith("top1_"):
                shown["top1"] = value
            self.progress.line(step, **shown)
        skipped = int(engine.guard.skipped.item())
        told = {"images_per_second": speed, "data_wait_percent": waiting, "skipped_steps": skipped}
        rates = {"lr": lr} if weight_decay is None else {"lr": lr, "weight_decay": weight_decay}
        self._write("train", step, **means, **rates, **told, spikes=engine.guard.noticed().count)

    def teacher(self, step: int, result: Result, record: Record) -> None:
        """The accuracy of the teacher, or of all together and of each, on the held-out images, as of the first step."""
        top1 = {name.removeprefix("top1_"): value for name, value in result.metrics.items() if name.startswith("top1_")}
        record.teacher_top1 = top1.pop("class")
        each = {f"teacher_{number}_top1": value for number, value in top1.items()}
        self._write("teacher", step, teacher_top1=record.teacher_top1, **each)
        alone = f"; alone {', '.join(f'{value:.2f} %' for value in top1.values())}" if top1 else ""
        self.say(f"teacher: held-out top-1 {record.teacher_top1:.2f} %{alone}")

    def evaluation(self, step: int, results: Mapping[str, Result], record: Record, bad_images: int) -> None:
        """Metrics of the weights ("") and of their averages ("_ema") after `step` steps; curves and summary so far."""
        record.evaluated_step = step
        record.metrics = named_metrics(results)
        name, value, better = self._judged_by(results)
        comparable = name is not None and not isnan(value)  # nothing would ever be better than NaN
        if comparable and (record.best is None or better(value, record.best)):
            record.best, record.best_by, record.best_step = value, name, step
            record.evaluations_since_best = 0
        else:
            record.evaluations_since_best += 1
        lower = sorted(results[""].lower)
        told = {"lower_is_better": lower} if lower else {}
        self._write("eval", step, images=results[""].images, bad_images=results[""].bad, **told, **record.metrics)
        listed = [f"{name} {value:.4g}" for name, value in record.metrics.items() if not name.startswith("top5_")]
        self.say(f"epoch {step / self.steps_per_epoch:g}: held-out {', '.join(listed)}")
        if step < self.steps:
            self.summarise(step, record, bad_images)

    def ends_early(self, record: Record) -> bool:
        """Whether the run is over because `train.stop_after` evaluations in a row brought no new best."""
        limit = self.recipe.train.stop_after
        return limit is not None and record.evaluations_since_best >= limit

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
        values = {"kind": kind, "epoch": step / self.steps_per_epoch, "seconds": self.clock.seconds, **values}
        self._kept(lambda: self._append(step, values))
        for sink in self.sinks:
            sink.write(step, **values)

    def _append(self, step: int, values: Mapping[str, Any]) -> None:
        with disk.writing(self.metrics.path):
            if step == self.start > 0 and values["kind"] not in self._again:
                # What a run that is resumed at a step finds missing there, such as the evaluation of a run that was
                # stopped before it, an earlier resume may have written already, before it was killed.
                self._again.add(values["kind"])
                self.metrics.truncate(step, values["kind"])
            self.metrics.write(step, **values)

    def summarise(self, step: int, record: Record, bad_images: int, *, last: bool = False) -> dict[str, Any]:
        """Write summary.json as of `step`, and return it. Write curves.png, too, if it is the last or they are old."""
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
            "seconds": self.clock.seconds,
            "paused_seconds": self.clock.paused,
            "bad_images": bad_images,
            "epochs": step / self.steps_per_epoch,
            "steps": self.steps,
            "step": step,
            "finished": last,
            "lineage": self.lineage,
        }
        if self.progress is not None:
            text = json.dumps(summary, indent=2) + "\n"
            self._kept(lambda: disk.replace_text(self.run_dir / "summary.json", text))
            if last or time.monotonic() > self.drawn + CURVES_EVERY_S:
                self._draw()
        return summary

    def _draw(self) -> None:
        """Draw curves.png. Whatever goes wrong is said and costs no run: the numbers are in metrics.jsonl."""
        picture = self.run_dir / "curves.png"
        try:
            report.curves(self.run_dir / directory.METRICS, picture)
        except Exception as error:
            self._warn(f"{picture} was not drawn ({type(error).__name__}: {error}); the run goes on")
        self.drawn = time.monotonic()

    def finish(self, record: Record, bad_images: int) -> dict[str, Any]:
        """Write the last summary, print the final table, and return the summary."""
        summary = self.summarise(record.evaluated_step, record, bad_images, last=True)
        if self.progress is not None:
            self.progress.close()
            table(self._rows(record))
        return summary

    def _rows(self, record: Record) -> list[tuple[str, str]]:
        speed, waiting = record.speed_since(0, 0.0, 0.0)
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
    recipe: Recipe, method: Method, train: Source, val: Source, world: World, length: Length, *, anew: bool
) -> list[str]:
    """What is going to happen, in the few numbers that decide the result. anew: as of `build.notes`."""
    parameters = sum(p.numel() for p in method.model.parameters())
    height, width = build.image_size(recipe)
    batch, data = recipe.train.batch_size, recipe.data
    groups = batch // data.group_size
    end = recipe.optim.weight_decay_end
    decay = "" if end is None else f"; weight decay from {recipe.optim.weight_decay:g} to {end:g}"
    return [
        f"model {recipe.model.timm or recipe.model.name}: {parameters / 1e6:.2f} M parameters, {height}x{width} "
        "pixels, "
        f"{len(train.classes)} classes, {recipe.engine.precision} on {world.size} x {world.device.type}",
        f"data {len(train):,} training and {len(val):,} held-out images; evaluation crop ratio "
        f"{data.eval_crop_ratio:g}",
        f"global batch {batch} = {groups} groups of {data.group_size}, over {world.size} processes x "
        f"{recipe.train.accumulate} micro-batches; learning rate {recipe.optim.lr:g}{decay}; "
        f"{length.total} steps, {length.epochs:g} epochs of {length.steps_per_epoch}",
        *build.notes(recipe, len(train), method.model, world.size, world.device, anew=anew),
    ]
