"""The updates of optimizers behind one signature, so that what all of them promise is one test."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastdeit import kernels


@dataclass(frozen=True)
class Update:
    """A public update: the function, how many lists of state it takes, whether it counts steps, and its numbers."""

    function: Callable
    states: int
    counted: bool
    numbers: dict[str, Any] = field(default_factory=dict)

    def __call__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[Sequence[Tensor]],
        step: Tensor,
        lr: float | Tensor,
        **changes: Any,
    ) -> None:
        """Call the function; states and step that it does not have are left alone."""
        counted = (step,) if self.counted else ()
        self.function(params, grads, *states[: self.states], *counted, lr, **self.numbers | changes)


_ADAM = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
_SGD = {"momentum": 0.9, "weight_decay": 0.1}
FORMS = {
    "adamw": Update(kernels.fused_adamw, 2, True, _ADAM),
    "lamb": Update(kernels.fused_lamb, 2, True, _ADAM),
    "sgd": Update(kernels.fused_sgd, 1, False, _SGD),
    "sgd decoupled": Update(kernels.fused_sgd, 1, False, _SGD | {"decoupled": True}),
    "sgd nesterov": Update(kernels.fused_sgd, 1, False, _SGD | {"nesterov": True}),
}
"""Every update, in all its forms."""
UPDATES = {form.function.__name__: form for form in FORMS.values()}
"""One form of each, by the name of the op."""
