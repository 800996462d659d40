"""Exponential moving average of the weights: updated inside the optimizer's pass, evaluated like the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """`ema = decay * ema + (1 - decay) * parameter` after every update that is not skipped.

    The average covers the trainable parameters; buffers and frozen parameters are the model's own. DeiT's decay is a
    constant (0.99996, no warm-up).
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
        if state.keys() != self.average.keys():
            raise KeyError(f"EMA state does not fit: {sorted(state.keys() ^ self.average.keys())[:5]}")
        for name, tensor in self.average.items():
            tensor.copy_(state[name])

    def weights_of(self, model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
        """`model.state_dict()` with the averages in place; `prefix` is the model's path inside the averaged module."""
        return {name: self.average.get(prefix + name, tensor) for name, tensor in model.state_dict().items()}
