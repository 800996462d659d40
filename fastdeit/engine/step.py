"""One training step: micro-batches, autocast, gradient reduction, guard, update, EMA, and sums for the log."""

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from fastdeit.batch import Step
from fastdeit.engine import batchnorm, buffers, replicas, shards
from fastdeit.engine.buffers import Buffers
from fastdeit.engine.capture import GraphedStep
from fastdeit.engine.clip import UnitClipping
from fastdeit.engine.dist import DeviceError, World
from fastdeit.engine.ema import Ema, EmaTeacher
from fastdeit.engine.fit import check_fit
from fastdeit.engine.groups import GradientError, ParamGroup
from fastdeit.engine.guard import Guard, OnSpike
from fastdeit.engine.optim import Optimizer
from fastdeit.engine.parallel import Replicated
from fastdeit.kernels import Tuning
from fastdeit.kernels.dtypes import DTYPES


def autocast(device: torch.device, precision: str, keeps_casts: bool = True) -> AbstractContextManager:
    """fp32, fp16 or bf16 as a context for forward passes. keeps_casts: keep the 16-bit copies of weights inside."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision], cache_enabled=keeps_casts)


def check_capture(capture: str, device: torch.device) -> None:
    """Raise DeviceError for an `Engine.capture` that the device does not have."""
    if capture == "graph" and device.type != "cuda":
        raise DeviceError(f"engine.capture graph needs a CUDA device, not {device}; use none or compile")


class Engine:
    """Runs the steps of a method, which is to it an `nn.Module` with `step` and `after_step`.

    capture: "none" runs a step kernel by kernel, "compile" compiles the method's forward and its gradient with
    torch.compile, "graph" records the whole step as a CUDA graph. parallel: how the processes share the networks, of
    which it has spread the method already; None: each has all of them. tuning: tries the backends of the ops in the
    first steps, before which it may have a forward and backward made for it. on_spike: as of `Guard`.

    A method uses `run`, `backward`, `micro` and `input_gradient` in its `step`, and `now` there and in `after_step`,
    where `skipped` says what became of the update.
    """

    now: Step | None = None
    """Where the current batch stands in the run, on the device."""
    skipped: Tensor | None = None
    """Bool scalar on the device: whether the last update was skipped (`Verdict.skip`)."""

    def __init__(
        self,
        method: nn.Module,
        optimizer: Optimizer,
        world: World,
        *,
        precision: str,
        accumulate: int,
        clip_grad: float | None = None,
        clip_units: UnitClipping | None = None,
        ema: Ema | None = None,
        parallel: Replicated | None = None,
        capture: str = "none",
        tuning: Tuning | None = None,
        on_spike: OnSpike = "warn",
    ) -> None:
        check_capture(capture, world.device)
        self.method, self.optimizer, self.world, self.ema = method, optimizer, world, ema
        self.precision, self.accumulate, self.capture = precision, accumulate, capture
        self.parallel = parallel or Replicated(world)
        self.tuning = tuning
        self.guard = Guard(precision, clip_grad, world.device, on_spike, self.parallel.norm)
        self.clip_units = clip_units
        self.sums: dict[str, Tensor] = {}
        self._buffers = Buffers(method, world)
        self._averages = [module for module in method.modules() if isinstance(module, EmaTeacher)]
        self._micro_sums: dict[str, Tensor] = {}
        self._micro_runs: dict[str, int] = {}
        self._logged: list[dict[str, Tensor]] = []
        self._one = torch.ones((), device=world.device)
        self._last_micro = True
        self._wrap()

    def enter(self, groups: Sequence[ParamGroup]) -> None:
        """Train the parameters of `groups` from now on, as a phase of the run begins.

        What depends on which parameters have gradients is made anew: the reduction over processes and the capture. The
        sums for the log begin anew, because another phase may have other parts of the loss.
        """
        self.sums = {}
        self.optimizer.regroup(groups)
        self.module = self._graphed = None
        gc.collect()  # DDP is full of cycles, and its hooks on the parameters go when it does
        self._forget_compiled()
        self._wrap()

    def resized(self) -> None:
        """Batches have another shape from now on: forget what was recorded or compiled for the last one."""
        self._forget_compiled()
        self.record_anew()

    def _forget_compiled(self) -> None:
        if self.capture == "compile":
            # Of one function torch.compile keeps at most eight compilations; a ninth phase would run without.
            torch.compiler.reset()
        if self.tuning is not None:
            self.tuning.reopen()

    def _wrap(self) -> None:
        trained = {id(p) for p in self.optimizer.params.values()}
        self._untrained = [(name, p) for name, p in self.method.named_parameters() if id(p) not in trained]
        module = torch.compile(self.method, dynamic=False) if self.capture == "compile" else self.method
        self.module = self.parallel.wrap(module)
        self.record_anew()

    def record_anew(self) -> None:
        """Forget a step that was recorded, because tensors that it reads are not there any more."""
        self._graphed = GraphedStep(self._run_step, self.world.device, self.method) if self.capture == "graph" else None

    # ---- for methods -------------------------------------------------------------------------------------------------

    @contextmanager
    def micro(self, last: bool = True) -> Iterator[None]:
        """Around one forward and backward; gradients are reduced over processes only in the last of a step.

        A method that goes backward several times a micro-batch says `last=False` in all but the last.
        """
        with self.parallel.reducing(self.module, last and self._last_micro):
            yield

    def run(self, batch: Any, log: bool = True) -> Any:
        """The method's forward, in the precision of the run and through DDP or FSDP2. Methods call this, never
        `self(batch)`.

        Loss and parts go into the log, unless `log` is false; of several runs on a micro-batch their mean does.
        """
        with autocast(self.world.device, self.precision, self.parallel.keeps_casts):
            out = self.module(batch)
        if log:
            for name, value in {"loss": out.loss, **out.parts}.items():
                value = value.detach().float()
                earlier = self._micro_sums.get(name)
                self._micro_sums[name] = value if earlier is None else earlier + value
                self._micro_runs[name] = self._micro_runs.get(name, 0) + 1
        return out

    def backward(self, loss: Tensor, wrt: Tensor | None = None) -> Tensor | None:
        """Add the gradients of `loss` to those of the parameters; also return that of the leaf `wrt`, if it is given.

        What is returned is the plain gradient: the loss scale and the share of a micro-batch are taken out again.
        """
        share = self.guard.scale / self.accumulate
        self.world.at("the backward of a step")  # where processes wait for each other, which they do not in forward
        (loss * share).backward()
        if wrt is None:
            return None
        if wrt.grad is None:
            raise GradientError(
                "backward(loss, wrt=x): the loss does not depend on x, or x is no leaf that requires a gradient; give "
                "engine.run a batch.rendered_as(x)"
            )
        gradient, wrt.grad = wrt.grad / share, None
        return gradient

    def input_gradient(self, batch: Any, x: Tensor) -> Tensor:
        """The gradient, like `x`, of the method's loss with respect to `x` as the pixels of the first view.

        x is float `[B, 3, H, W]` in the student's normalisation, such as `batch.pixels()`. The parameters' gradients
        are left alone, processes are not waited for, and nothing is logged.
        """
        x = x.detach().requires_grad_()
        with self.micro(last=False):
            loss = self.run(batch.rendered_as(x), log=False).loss
            (gradient,) = torch.autograd.grad(loss * self.guard.scale, x)
        return gradient / self.guard.scale

    # ---- for the loop ------------------------------------------------------------------------------------------------

    def step(self, batches: Iterable[Any], lr: float, decay: float | None = None) -> None:
        """One update from `accumulate` micro-batches; skipped as a whole where the guard says so. decay: as of
        `Optimizer.step`, in all steps or in none."""
        step = self._graphed or self._run_step
        numbers = (lr,) if decay is None else (lr, decay)
        if self.tuning is None:
            step(list(batches), *numbers)
        else:
            with self.tuning.trying():
                step(list(batches), *numbers)
            if self.capture == "compile" and self.tuning.changed and self.tuning.left_to_compiler():
                torch.compiler.reset()  # what runs on PyTorch's own operations is compiled with what surrounds it
        if self.ema is not None:
            self.ema.stale = bool(self.ema.norms)

    def _run_step(self, batches: Sequence[Any], lr: float | Tensor, decay: float | Tensor | None = None) -> None:
        self.now = getattr(batches[0], "step", None)
        if self.tuning is not None and self.tuning.rehearses:
            self._rehearse(batches[0])
        before = self._buffers.copies()
        for number, batch in enumerate(batches):
            self._last_micro = number == len(batches) - 1
            self.method.step(batch, self)
            self._end_micro()
        self._refuse_stray_gradients()
        total = self.parallel.total
        # Trials are made on all processes alike, but parts have other shapes on each.
        with nullcontext() if self.tuning is None or total is None else self.tuning.paused():
            verdict = self.guard.judge(self.optimizer.gradients())
            self.skipped = verdict.skip
            if self.clip_units is not None:
                self.clip_units.apply(self.optimizer.params, verdict.factor, total)
            self._buffers.settle(before, verdict.skip)
            average, ema_decay = (self.ema.average, self.ema.decay) if self.ema else (None, 0.0)
            self.optimizer.step(lr, verdict, average, ema_decay, total, decay)
        self.optimizer.zero_grad()
        for teacher in self._averages:
            teacher.follow(self.now, verdict.skip)
        self.method.after_step(self)
        self._buffers.share()
        self._logged[-1] |= {"grad_norm": verdict.norm, "steps": self._one}
        self._add_logged(verdict.skip)

    def _rehearse(self, batch: Any) -> None:
        """Let the tuning make the forward and backward of a micro-batch as often as it likes. Afterwards everything is
        as it was."""
        self._last_micro = False  # processes do not reduce gradients, which nobody takes

        def run() -> None:
            try:
                self.method.step(batch, self)
            finally:
                self._micro_sums, self._micro_runs = {}, {}
                for parameter in self.method.parameters():
                    parameter.grad = None

        devices = [self.world.device] if self.world.device.type == "cuda" else []
        with buffers.kept(self.method), torch.random.fork_rng(devices):
            self.tuning.rehearse(run)

    def _refuse_stray_gradients(self) -> None:
        """Raise GradientError where a parameter has a gradient but no update: processes would not reduce it either."""
        stray = next((name for name, p in self._untrained if p.grad is not None), None)
        if stray is not None:
            raise GradientError(
                f"parameter {stray!r} has a gradient, but the optimizer does not train it: it was frozen when the "
                "groups of parameters were made. requires_grad_(True) later does not train it; say in the method's "
                "phases() when it is trained"
            )

    @torch.no_grad()
    def measure_average(self, steps: Iterable[Sequence[Any]]) -> None:
        """Measure the BatchNorm statistics of the averaged weights, by forwards on the micro-batches of some `steps`.

        For an average that is `stale`, with the method in training mode. Nothing but the statistics changes. Call it
        on every process: the result is the mean over all.
        """
        self.ema.copy_statistics()
        batches = (batch.to(self.world.device) for batch in chain.from_iterable(steps))
        with buffers.kept(self.method), self.ema.applied(), autocast(self.world.device, self.precision):
            measured = batchnorm.measure(self.ema.norms.values(), (partial(self.method, batch) for batch in batches))
            for statistic in (tensor for layer in measured for tensor in (layer.running_mean, layer.running_var)):
                self.world.sum(statistic).div_(self.world.size)
        self.ema.stale = False

    def _end_micro(self) -> None:
        """Put aside what the micro-batch has logged until the guard has judged the step."""
        shares = {name: runs * self.accumulate for name, runs in self._micro_runs.items()}
        self._logged.append(
            {name: total if shares[name] == 1 else total / shares[name] for name, total in self._micro_sums.items()}
        )
        self._micro_sums, self._micro_runs = {}, {}

    def _add_logged(self, skipped: Tensor) -> None:
        """Add what the step has logged to the sums; of a skipped one nothing, as its loss may be NaN."""
        values = torch.stack([value for values in self._logged for value in values.values()])
        counted = iter(torch.where(skipped, 0.0, values).unbind())
        for names in self._logged:
            for name in names:
                if name not in self.sums:
                    self.sums[name] = torch.zeros_like(values[0])
            torch._foreach_add_([self.sums[name] for name in names], list(islice(counted, len(names))))
        self._logged = []

    def _own_sums(self) -> Tensor:
        """This process's sums in the order of their names, float32 `[names]`."""
        own = [self.sums[name] for name in sorted(self.sums)]
        return torch.stack(own) if own else torch.zeros(0, device=self.world.device)

    def _over_processes(self, values: Tensor) -> Tensor:
        """The sum of `values`, float32 `[n]`, over all processes, which must have the same weights where each has them
        all; a collective. Raises DriftError."""
        if self.world.size == 1:
            return values
        alike = [p for p in self.method.parameters() if not shards.is_part(p)]
        weights = [replicas.slots(alike, self.world.rank, self.world.size)] if alike else []
        total = self.world.sum(torch.cat([values, *weights]))
        if weights:
            replicas.check(total[len(values) :])
        return total[: len(values)]

    def check_replicas(self) -> None:
        """Raise DriftError, on every process, unless all processes have the same weights. A collective."""
        self._over_processes(self._own_sums())

    def means(self) -> dict[str, float]:
        """Means over processes and over the steps since the last call, without those that were skipped; nothing where
        all were. Reads the device: call it when logging. Raises DriftError.
        """
        found = dict(zip(sorted(self.sums), self._over_processes(self._own_sums()).tolist(), strict=True))
        for total in self.sums.values():
            total.zero_()  # in place: a recorded step adds to these very tensors
        steps = found.pop("steps", 0.0)
        return {name: total / steps for name, total in found.items()} if steps else {}

    def state_dict(self) -> dict[str, Tensor]:
        """The guard's state and the sums since the last log line, so that a resumed run logs what the whole run would.

        A collective: call it on every process. Raises DriftError.
        """
        own = self._own_sums()
        sums = own.new_zeros(self.world.size, len(own))
        sums[self.world.rank] = own
        sums = self._over_processes(sums.flatten()).view_as(sums)
        named = zip(sorted(self.sums), sums.unbind(1), strict=True)
        return self.guard.state_dict() | {f"sum.{name}": of_processes.contiguous() for name, of_processes in named}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict`. Each process goes on from its own sum, because sums in another order round otherwise;
        where the number of processes is another one, the main process goes on from the sum of all.

        Raises FitError where names, shapes or dtypes are others.
        """
        sums = {name: tensor for name, tensor in state.items() if name.startswith("sum.")}
        processes = next((tensor.shape[:1] for tensor in sums.values()), ()) or 1
        names = sums.keys() | ({"sum.steps"} if sums else set())  # without their number sums are no means
        check_fit("engine", sums, {name: torch.zeros(processes) for name in sorted(names)})
        self.guard.load_state_dict({name: tensor for name, tensor in state.items() if name not in sums})
        for name, tensor in sums.items():
            same = len(tensor) == self.world.size
            own = tensor[self.world.rank] if same else tensor.sum() * float(self.world.main)
            self.sums[name.removeprefix("sum.")] = own.to(self.world.device, copy=True)
