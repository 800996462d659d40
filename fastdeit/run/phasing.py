"""The phases of a run's method, and which of them is under way."""

from collections.abc import Sequence

from fastdeit.engine import phases
from fastdeit.engine.groups import ParamGroup
from fastdeit.engine.step import Engine
from fastdeit.errors import UsageError, naming
from fastdeit.methods.base import Method, Phase
from fastdeit.recipe.resolve import Recipe
from fastdeit.run.groups import param_groups


class PhaseSchedule:
    """The phases of a method through a run, and which of them is under way.

    trainable  by name all parameters that the method has not frozen, whichever phase trains them
    epochs     of the run

    Raises UsageError for phases that do not fit the run.
    """

    def __init__(self, method: Method, recipe: Recipe, epochs: int) -> None:
        self._method, self._recipe = method, recipe
        self._phases: Sequence[Phase] = tuple(method.phases())
        self.trainable = {name: p for name, p in method.named_parameters() if p.requires_grad}
        names = [name for name, _ in method.named_parameters()]
        with naming(f"method {recipe.method.use}", phases.PhaseError):
            phases.check(self._phases, epochs, names, self.trainable)
        self.phase = self._phases[0]

    def groups(self) -> list[ParamGroup]:
        """What is trained in the phase that is under way, in the method's groups; nothing else asks for gradients."""
        phases.train_only(self._method, self.phase, self.trainable)
        self._method.on_phase(self.phase)
        return param_groups(self._method, self._recipe)

    def ends_before(self, epoch: int) -> bool:
        """Whether `epoch` is of another phase than the one that is under way."""
        return self._phases[phases.index_at(self._phases, epoch)] is not self.phase

    def enter(self, epoch: int, engine: Engine) -> bool:
        """Make the phase of `epoch` that of the engine; whether it is another than before."""
        return self._go_to(self._phases[phases.index_at(self._phases, epoch)], engine)

    def resume(self, name: str, engine: Engine) -> None:
        """Make the phase called `name`, of a checkpoint, that of the engine, before its state is loaded."""
        found = next((phase for phase in self._phases if phase.name == name), None)
        if found is None:
            raise UsageError(f"the checkpoint was saved in phase {name!r}, but the method has no phase of that name")
        self._go_to(found, engine)

    def _go_to(self, phase: Phase, engine: Engine) -> bool:
        if phase is self.phase:
            return False
        self.phase = phase
        engine.enter(self.groups())
        return True
