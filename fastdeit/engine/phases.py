"""Phases of a run: which of them an epoch belongs to, and what is trained in it.

A phase is to the engine what `methods.base.Phase` describes: `name`, `until` and `holds(parameter name)`.
"""

from collections.abc import Collection, Sequence
from typing import Protocol

from torch import nn


class Phase(Protocol):
    """A part of the run in which the same parameters are trained."""

    name: str
    until: int | None

    def holds(self, parameter: str) -> bool: ...


class PhaseError(ValueError):
    """The phases of a method do not make up a run."""


def check(phases: Sequence[Phase], epochs: int) -> None:
    """Raise PhaseError unless the phases follow each other, have names of their own, and fill a run of `epochs`."""
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


def index_at(phases: Sequence[Phase], epoch: int) -> int:
    """Place in `phases` of the one that `epoch`, counted from 0, belongs to."""
    return next(i for i, phase in enumerate(phases) if phase.until is None or epoch < phase.until)


def train_only(method: nn.Module, phase: Phase, trainable: Collection[str]) -> None:
    """Ask for gradients of the parameters that the phase trains, and of no others.

    trainable  names of all parameters that the method itself has not frozen

    Raises PhaseError if there is none.
    """
    held = {name for name in trainable if phase.holds(name)}
    if not held:
        first = ", ".join(list(trainable)[:3])
        raise PhaseError(f"phase {phase.name!r} trains no parameter; the method's parameters are {first}, ...")
    for name, parameter in method.named_parameters():
        if name in trainable:
            parameter.requires_grad_(name in held)
