"""What is looked at before a line of the log and before a checkpoint, and what a run that has to stop says."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastdeit.data.sources.source import DataError
from fastdeit.engine import checkpoint
from fastdeit.engine.checkpoint import CheckpointError
from fastdeit.engine.disk import DiskError
from fastdeit.engine.dist import World
from fastdeit.engine.guard import SPIKE
from fastdeit.engine.replicas import DriftError
from fastdeit.engine.step import Engine
from fastdeit.errors import FastdeitError, NonFiniteError
from fastdeit.recipe.resolve import Recipe
from fastdeit.run import directory, precision
from fastdeit.run.build import Report
from fastdeit.run.saver import PoisonedError, Saver


class Health:
    """Judges a run from step `start` on, and explains why it stops.

    again  how to go on, for messages
    """

    def __init__(
        self, engine: Engine, saver: Saver, run_dir: Path, start: int, say: Report, again: directory.Again
    ) -> None:
        self.engine, self.saver, self.run_dir, self.start = engine, saver, run_dir, start
        self.recipe, self.world, self.say, self.again = saver.recipe, saver.world, say, again
        self.step = start
        self.known = engine.guard.noticed().count

    def look(self, epoch: int) -> None:
        """Raise NonFiniteError where the guard has tripped; say spikes, and go back where the recipe wants that.

        Before every line of the log and every checkpoint, on every process; reads the device. `epoch` is that of the
        last step.
        """
        if tripped := self.engine.guard.trip():
            self.saver.settle()  # the error names the checkpoints that there are
            raise gave_up(
                self.recipe, self.run_dir, self.start + tripped, self.engine.guard.limit, self.world, self.again
            )
        spikes = self.engine.guard.noticed()
        if spikes.count > self.known:
            number, self.known = spikes.count - self.known, spikes.count
            self._tell(number, self.start + spikes.last, epoch)

    def _tell(self, number: int, last: int, epoch: int) -> None:
        policy = self.recipe.engine.on_spike
        which = f"the gradients of step {last}" if number == 1 else f"the gradients of {number} steps up to step {last}"
        text = f"spike: {which} had a norm of more than {SPIKE:g} times the usual one; "
        if policy == "warn":
            self.say(f"{text}the update was made (engine.on_spike=skip leaves it out)")
            return
        step = self.saver.rewind(self.run_dir, epoch, self.say) if policy == "rollback" else None
        text += "the update was left out"
        if policy == "rollback":
            text += ", there is no checkpoint yet to go back to" if step is None else ""
        if step is not None:
            text += f", and the run goes on from the weights of step {step}"
            self.saver.changes = [*self.saver.changes, {"step": last, "fields": {"weights": [last, step]}}]
        self.say(text)

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Turn the errors of a run that stops into errors that say how to go on."""
        try:
            yield
        except (DataError, CheckpointError, DiskError) as error:
            raise stopped(error, self.step, self.again.way(*self.saver.overrides)) from error
        except PoisonedError as error:
            raise NonFiniteError(f"stopped at step {self.step}: {error}, so it is not saved. {self._back()}") from error
        except DriftError as error:
            raise FastdeitError(f"stopped at step {self.step}: {error}, so it is not saved. {self._back()}") from error
        except KeyboardInterrupt:
            raise FastdeitError(f"stopped at once, without saving; {self.again.way(*self.saver.overrides)}") from None

    def _back(self) -> str:
        """How to go on where the newest checkpoint is the last good state: none is made that is not."""
        kept = checkpoint.steps(self.run_dir / directory.CHECKPOINTS)
        if not kept:
            return "There is no checkpoint from before; start anew"
        back = f"The run is back at its checkpoint of step {kept[-1]}; go on from there with "
        back += self.again(*self.saver.overrides)
        settings = _gentler(self.recipe)
        return f"{back}, or in a new run with a lower learning rate, and clipping: " + _fork(
            self.recipe, self.run_dir, kept[-1], settings, self.world
        )


def stopped(error: Exception, step: int, way: str) -> FastdeitError:
    """The error of a run that `error` ended at `step`; `way` as of `directory.Again`."""
    return FastdeitError(f"{error}\nstopped at step {step}; once that is mended, {way}")


def gave_up(
    recipe: Recipe, run_dir: Path, last: int, limit: int, world: World, again: Callable[..., str]
) -> NonFiniteError:
    """The error after `limit` steps in a row up to step `last` whose gradients were not finite, and what helps."""
    first = last - limit + 1
    text = f"stopped: the gradients of the steps {first} to {last} are not finite, and nothing of these steps is saved"
    settings = _gentler(recipe)
    wider = {"fp16": "bf16" if precision.has_bf16(world.device) else "fp32", "bf16": "fp32"}
    other = f"engine.precision={wider[recipe.engine.precision]}" if recipe.engine.precision in wider else None
    kept = [step for step in checkpoint.steps(run_dir / directory.CHECKPOINTS) if step < first]
    if not kept:
        return NonFiniteError(
            f"{text}. There is no checkpoint from before; start anew with a lower optim.lr, optim.clip_grad=1.0"
            + (f" or {other}" if other else "")
        )
    lines = [f"{text}. Go on from the checkpoint of step {kept[-1]}, before the trouble:"]
    if other:
        lines.append(f"  the same run in another precision: {again(other)}")
    lines.append(
        f"  a new run with a lower learning rate, and clipping: {_fork(recipe, run_dir, kept[-1], settings, world)}"
    )
    if kept[-1] == first - 1 and len(kept) > 1:
        before = _fork(recipe, run_dir, kept[-2], settings, world)
        lines.append(f"  if these weights are bad already, as the next step failed: {before}")
    return NonFiniteError("\n".join(lines))


def _gentler(recipe: Recipe) -> list[str]:
    """Overrides with which a run may get past what it stopped for."""
    lr, clip = max(recipe.optim.lr / 2, recipe.optim.min_lr), recipe.optim.clip_grad
    return [f"optim.lr={lr:g}", *(["optim.clip_grad=1.0"] if clip is None or clip > 1 else [])]


def _fork(recipe: Recipe, run_dir: Path, step: int, settings: list[str], world: World) -> str:
    run, trust = Path(f"{run_dir}@step={step}"), directory.names_code(recipe)
    return directory.command(run, *settings, verb="--from", world=world, trust=trust)
