"""One training step: micro-batches, autocast, gradient reduction, guard, update, EMA, and sums for the log."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastdeit.engine.capture import GraphedStep
from fastdeit.engine.dist import DeviceError, World
from fastdeit.engine.ema import Ema
from fastdeit.engine.guard import Guard
from fastdeit.engine.optim import Optimizer

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """fp32, fp16 or bf16 as a context for forward passes."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])


class Engine:
    """Runs the steps of a method, which is to it an `nn.Module` with `step` and `after_step`.

    capture: "none" runs a step kernel by kernel, "compile" compiles the method's forward and its gradient with
    torch.compile, "graph" records the whole step as a CUDA graph.
    """

    def __init__(
        self,
        method: nn.Module,
        optimizer: Optimizer,
        world: World,
        *,
        precision: str,
        accumulate: int,
        clip_grad: float | None = None,
        ema: Ema | None = None,
        capture: str = "none",
    ) -> None:
        self.method, self.optimizer, self.world, self.ema = method, optimizer, world, ema
        self.precision, self.accumulate = precision, accumulate
        self.guard = Guard(precision, clip_grad, world.device)
        self.sums: dict[str, Tensor] = {}
        self.module = torch.compile(method, dynamic=False) if capture == "compile" else method
        if world.size > 1:
            # For one-token parameters the stride of a dimension of size 1 differs, which costs nothing.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            device_ids = [world.device.index] if world.device.type == "cuda" else None
            self.module = DistributedDataParallel(self.module, device_ids=device_ids, gradient_as_bucket_view=True)
        self._last_micro = True
        self._graphed: GraphedStep | None = None
        if capture == "graph":
            if world.device.type != "cuda":
                raise DeviceError(f"engine.capture graph needs a CUDA device, not {world.device}; use none or compile")
            self._graphed = GraphedStep(self._run_step, world.device)

    @contextmanager
    def micro(self, last: bool = True) -> Iterator[None]:
        """Around one forward and backward; gradients are reduced over processes only in the last of a step."""
        reduce = last and self._last_micro
        with nullcontext() if reduce or self.world.size == 1 else self.module.no_sync():
            yield

    def run(self, batch: Any) -> Any:
        """The method's forward, in the precision of the run and through DDP. Methods call this, never `self(batch)`."""
        with autocast(self.world.device, self.precision):
            out = self.module(batch)
        for name, value in {"loss": out.loss, **out.parts}.items():
            self._add(name, value.detach().float() / self.accumulate)
        return out

    def backward(self, loss: Tensor) -> None:
        (loss * (self.guard.scale / self.accumulate)).backward()

    def step(self, batches: Iterable[Any], lr: float) -> None:
        """One update from `accumulate` micro-batches; skipped as a whole when a gradient is not finite."""
        (self._graphed or self._run_step)(list(batches), lr)

    def _run_step(self, batches: Sequence[Any], lr: float | Tensor) -> None:
        for number, batch in enumerate(batches):
            self._last_micro = number == len(batches) - 1
            self.method.step(batch, self)
        verdict = self.guard.judge(self.optimizer.gradients())
        average, decay = (self.ema.average, self.ema.decay) if self.ema else (None, 0.0)
        self.optimizer.step(lr, verdict, average, decay)
        self.optimizer.zero_grad()
        self.method.after_step(self)
        self._add("grad_norm", verdict.norm.where(~verdict.skip, 0.0))
        self._add("steps", torch.ones_like(verdict.norm))

    def _add(self, name: str, value: Tensor) -> None:
        if name in self.sums:
            self.sums[name] += value
        else:
            self.sums[name] = value.clone()

    def _totals(self) -> dict[str, Tensor]:
        """The sums over all processes; a collective."""
        names = sorted(self.sums)
        if not names:
            return {}
        return dict(zip(names, self.world.sum(torch.stack([self.sums[name] for name in names])), strict=True))

    def means(self) -> dict[str, float]:
        """Means over processes and over the steps since the last call. Reads the device: call it when logging."""
        totals = {name: total.item() for name, total in self._totals().items()}
        for total in self.sums.values():
            total.zero_()  # in place: a recorded step adds to these very tensors
        steps = totals.pop("steps", 0.0)
        return {name: total / steps for name, total in totals.items()} if steps else {}

    def state_dict(self) -> dict[str, Tensor]:
        """Guard counters and the sums since the last log line, so that a resumed run logs what the whole run would.

        A collective: call it on every process.
        """
        return self.guard.state_dict() | {f"sum.{name}": total.reshape(1) for name, total in self._totals().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict`; the sums of all processes go to the main one, zeros to the others."""
        self.guard.load_state_dict(state)
        share = 1.0 if self.world.main else 0.0
        for name, tensor in state.items():
            if name.startswith("sum."):
                self.sums[name.removeprefix("sum.")] = tensor[0].to(self.world.device) * share
