"""Running averages of weights: of the student, for evaluation; of a module, as a teacher inside the method."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Ema:
    """`ema = decay * ema + (1 - decay) * parameter` after every update that is not skipped.

    The average covers the trainable parameters; buffers and frozen parameters are the model's own. The optimizer makes
    it in the pass of its update. While a phase of the run does not train a parameter, its average stands still as well.
    DeiT's decay is a constant (0.99996, no warm-up).
    """

    def __init__(self, params: dict[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.params = params
        self.average = {name: p.detach().float().clone() for name, p in params.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the parameters hold the averages; no tensor is copied and the weights come back whatever happens."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, p in self.params.items():
            p.data, self.average[name] = self.average[name], p.data

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Copy the averages in; raises KeyError with the names when they are not exactly these."""
        if state.keys() != self.average.keys():
            raise KeyError(f"EMA state does not fit: {sorted(state.keys() ^ self.average.keys())[:5]}")
        for name, tensor in self.average.items():
            tensor.copy_(state[name])


class EmaTeacher(nn.Module):
    """A module that answers as the running average of another does: float32, in eval mode, without gradients.

    The average is a child, `module`, and so part of the state of whoever owns this. The source is none, because it is
    somebody else's already.
    """

    def __init__(self, source: nn.Module, momentum: float | Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.module = copy.deepcopy(source).float().requires_grad_(False).eval()
        self.momentum = momentum
        self.__dict__["source"] = source

    def train(self, mode: bool = True) -> "EmaTeacher":
        """Stays in eval mode: whoever puts the method into training mode does not mean its teacher."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the averaged module returns."""
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def follow(self, step: Any, skipped: Tensor) -> None:
        """After an update: average = m * average + (1 - m) * source, with m = 1 where the update was `skipped` (bool).

        m is the momentum, or momentum(step) for a `Step`. Buffers are copied. No value is read from the device.
        """
        momentum = self.momentum(step) if callable(self.momentum) else self.momentum
        keep = torch.where(skipped, 1.0, momentum).float()
        averages, sources = list(self.module.parameters()), [p.float() for p in self.source.parameters()]
        torch._foreach_mul_(averages, keep)
        torch._foreach_add_(averages, torch._foreach_mul(sources, 1 - keep))
        for average, source in zip(self.module.buffers(), self.source.buffers(), strict=True):
            average.copy_(source)
