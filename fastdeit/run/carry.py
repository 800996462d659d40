"""What a fork takes over from its parent.

That are the weights, the method's state, the optimizer's, the guard's, the average, and the place in the schedule. Of
the record nothing is taken: what the parent measured stays with the parent. Any field of the recipe may differ as long
as those still fit; what cannot be carried over is refused in a sentence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from fastdeit.engine import checkpoint
from fastdeit.engine.checkpoint import Checkpoint
from fastdeit.engine.fit import FitError, check_fit
from fastdeit.errors import UsageError
from fastdeit.recipe import resolve as recipes
from fastdeit.recipe.resolve import Recipe
from fastdeit.run import agreement
from fastdeit.run.build import Report
from fastdeit.run.fork import Origin
from fastdeit.run.record import Record
from fastdeit.run.saver import Saver, does_not_fit, present
from fastdeit.text import some


def over(origin: Origin, saver: Saver, say: Report) -> Record:
    """Put the checkpoint of `origin` into the parts of the fork; returns the fork's record, empty but for the phase.

    Raises UsageError, with what to do instead, for what cannot be carried over.
    """
    recipe, parent = saver.recipe, origin.recipe
    check(origin, recipe, saver.identity["classes"])
    verify = agreement.first_of_its_machine(saver.world)
    found = agreement.together(saver.world, lambda: checkpoint.load(origin.path, verify=verify))
    found, phase = present(found), origin.state["record"]["phase"]
    try:
        saver.phases.resume(phase, saver.engine)
        found = _averages(found, saver, origin, say)
        if recipe.model.freeze != parent.model.freeze:
            found = _refrozen(found, saver, say)
        saver.load(found)
    except UsageError as error:
        raise _misfit(origin, recipe, error) from error
    agreement.together(saver.world, lambda: saver.check_finite(found))
    saver.lineage = origin.lineage(recipe)
    return Record(phase=phase)


def check(origin: Origin, recipe: Recipe, classes: Sequence[str]) -> None:
    """Raise UsageError for a recipe, and data of such classes, that cannot go on from the checkpoint of `origin`, as
    far as can be said without its tensors."""
    parent, theirs = origin.recipe, origin.state["identity"]["classes"]
    if recipe.optim.name != parent.optim.name:
        raise _refusal(
            origin,
            f"optim.name is {parent.optim.name} there and {recipe.optim.name} here, and one optimizer cannot go on "
            "with the state of another",
        )
    if recipe.model.weights != parent.model.weights:
        raise UsageError(f"model.weights says what a run begins with; a fork begins with the weights of {origin.run}")
    if theirs != list(classes):
        raise _refusal(origin, f"the data there has {len(theirs)} classes, and other ones than the {len(classes)} here")


def check_network(origin: Origin, recipe: Recipe, files: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise UsageError as `over` does where a network whose checkpoints have such `files` (`saver.held`), perhaps
    without storage, is another than that in the checkpoint of `origin`."""
    found = checkpoint.load(origin.path, verify=False)
    try:
        for file in ("model", "method"):
            check_fit(file, found.tensors[file], files[file])
    except FitError as error:
        raise _misfit(origin, recipe, does_not_fit(found, origin.state["record"]["phase"], error)) from error


def _misfit(origin: Origin, recipe: Recipe, error: UsageError) -> UsageError:
    changed = ", ".join(field for field, _, _ in recipes.difference(origin.recipe, recipe))
    return _refusal(origin, f"{error} (changed: {changed or 'nothing'})")


def _averages(found: Checkpoint, saver: Saver, origin: Origin, say: Report) -> Checkpoint:
    """The checkpoint with an average where the fork keeps one: that of the parent, or its weights."""
    ema = saver.engine.ema
    if ema is None:
        if "ema" in found.tensors:
            say(f"the average of the weights stays with {origin.run}: optim.ema_decay is null now")
        return found
    if "ema" in found.tensors:
        return found
    say(f"the average of the weights begins with the weights: {origin.run} has none")
    return _with(found, "ema", {name: tensor for name, tensor in _held(found).items() if name in ema.average})


def _refrozen(found: Checkpoint, saver: Saver, say: Report) -> Checkpoint:
    """The checkpoint with the state of what is trained here, where `model.freeze` is another than in the parent.

    What is trained anew has no state there: it begins at zero, and its average with its weights. What is frozen now
    keeps its weights and leaves its state behind.
    """
    fresh, theirs = saver.engine.optimizer.state_dict(), found.tensors["optim"]
    trained = set(saver.engine.optimizer.params)
    states = {name.partition(".")[2] for name in theirs}
    if thawed := sorted(trained - states):
        say(f"model.freeze: trained now, and not there, are {some(thawed)}: the optimizer begins anew with them")
    if frozen := sorted(states - trained):
        say(f"model.freeze: frozen now are {some(frozen)}, at their weights; the optimizer's state of them is dropped")
    found = _with(found, "optim", {name: theirs.get(name, tensor) for name, tensor in fresh.items()})
    if saver.engine.ema is None:
        return found
    averages = _held(found) | found.tensors["ema"]
    return _with(found, "ema", {name: averages[name] for name in saver.engine.ema.average if name in averages})


def _held(found: Checkpoint) -> dict[str, Tensor]:
    """The method's tensors by its own names, the student's among them."""
    return {f"model.{name}": tensor for name, tensor in found.tensors["model"].items()} | found.tensors["method"]


def _with(found: Checkpoint, file: str, tensors: dict[str, Tensor]) -> Checkpoint:
    return replace(found, tensors=found.tensors | {file: tensors})


def _refusal(origin: Origin, why: str) -> UsageError:
    return UsageError(
        f"{origin.run} cannot be forked so: {why}\nA fork goes on with the network and the optimizer of its parent. "
        f"For its weights alone, start a new run: `fastdeit train RECIPE model.weights={origin.run}`"
    )
