"""Phases of a run: which of them an epoch belongs to, and what is trained in it.

A phase is to the engine what `methods.base.Phase` describes: `name`, `until`, `trains` and `holds(parameter name)`.
"""

from collections.abc import Collection, Sequence
from typing import Protocol

from torch import nn


class Phase(Protocol):
    """A part of the run in which the same parameters are trained."""

    name: str
    until: int | None
    trains: Sequence[str] | None

    def holds(self, parameter: str) -> bool:
        """Whether it trains the parameter of that name."""


class PhaseError(ValueError):
    """The phases of a method do not make up a run."""


def check(phases: Sequence[Phase], epochs: int, parameters: Collection[str], trainable: Collection[str]) -> None:
    """Raise PhaseError unless the phases follow each other, have names of their own, and fill a run of `epochs`, and
    each trains something.

    parameters  names of all parameters of the method
    trainable   of them those that the method itself has not frozen
    """
    if not phases:
        raise PhaseError("a method has at least one phase, but its phases() returns none")
    names = [phase.name for phase in phases]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise PhaseError(f"two phases are called {twice!r}; the name says in a checkpoint which phase it is of")
    before = 0
    for phase in phases[:-1]:
        if phase.until is None or not before < phase.until < epochs:
            raise PhaseError(
                f"phase {phase.name!r} ends at epoch {phase.until}, but must end after epoch {before} and before the "
                f"end of the run, epoch {epochs}"
            )
        before = phase.until
    if phases[-1].until is not None:
        raise PhaseError(
            f"the last phase, {phases[-1].name!r}, ends at epoch {phases[-1].until}; leave its `until` None: it ends "
            "with the run"
        )
    for phase in phases:
        _check_trained(phase, parameters, trainable)


def _check_trained(phase: Phase, parameters: Collection[str], trainable: Collection[str]) -> None:
    for own in phase.trains or ():
        if not any(name == own or name.startswith(f"{own}.") for name in parameters):
            raise PhaseError(
                f"phase {phase.name!r} trains {own!r}, but no parameter of the method has that name or lies below it; "
                f"there are {', '.join(list(parameters)[:3])}, ..."
            )
    if not any(phase.holds(name) for name in trainable):
        raise PhaseError(
            f"phase {phase.name!r} trains no parameter: the method or model.freeze has frozen all that it names"
        )


def index_at(phases: Sequence[Phase], epoch: int) -> int:
    """Place in `phases` of the one that `epoch`, counted from 0, belongs to."""
    return next(i for i, phase in enumerate(phases) if phase.until is None or epoch < phase.until)


def train_only(method: nn.Module, phase: Phase, trainable: Collection[str]) -> None:
    """Ask for gradients of the parameters that the phase trains, and of no others.

    trainable  names of all parameters that the method itself has not frozen
    """
    held = {name for name in trainable if phase.holds(name)}
    for name, parameter in method.named_parameters():
        if name in trainable:
            parameter.requires_grad_(name in held)
