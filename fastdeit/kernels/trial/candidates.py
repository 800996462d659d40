"""One call of an op by every backend that could run it: is the result right, and how long does it take?

A call is tried with the tensors that it is made with, or copies of those that it changes. What is compared and timed is
the forward and, where the call is differentiated, the backward for random gradients of its results.

Right is what has no larger error than PyTorch's own operations in the same dtypes, both against these operations in
float64: in the largest element and in the mean square, at most twice theirs and a few units of rounding of the largest
element. Where memory does not suffice for float64, the result is compared with PyTorch's in the same dtypes, within
some more units of rounding: that finds what is grossly wrong, such as a row left out of few, and no more.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Thread
from time import monotonic, perf_counter, sleep
from typing import Any

import torch
from torch import Tensor

from fastdeit.kernels._op import REFERENCE, Backend, Op, Unsupported, tensors_in
from fastdeit.kernels._tried import INDUCTOR

ROUNDS = 5
"""Measurements of each candidate, in turn with those of the others."""
_LEAST_SECONDS = 2e-3
_MOST_CALLS = 50
_SLEEP_CYCLES = 20_000_000
"""About ten milliseconds of a GPU, in which the host queues the calls to be timed."""
_STEP_SLEEP_CYCLES = 10 * _SLEEP_CYCLES
"""The same for a whole step, whose launches take the host some tens of milliseconds."""

_PATIENCE_S = 60.0
"""Seconds after which what a candidate has launched is taken for endless: the longest of it takes less than one."""

Clock = Callable[[str, Callable[[], Any]], float]
"""Seconds of one call of what the candidate of this name does."""


class BrokenDevice(RuntimeError):
    """A candidate, `backend`, has left the device in a state in which nothing runs on it any more."""

    def __init__(self, op: str, backend: str, why: str) -> None:
        super().__init__(f"{op} on {backend} has broken the device ({why}); it will not be tried again: start anew")
        self.backend = backend


class Endless(RuntimeError):
    """What a candidate has launched does not end, such as a kernel that waits for what never comes."""


class NothingToSee(Exception):
    """The call changes nothing, such as an update that is skipped: no candidate can prove itself by it."""


@dataclass
class Findings:
    """What became of each candidate of a call.

    backend   the fastest that is right
    seconds   median of a call, of those that are right
    failed    why others cannot run it
    wrong     why others must not
    complete  whether all were tried; else time was up
    errors    of each wrong candidate the errors by result, as its report has them
    """

    backend: str = REFERENCE
    seconds: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    complete: bool = True
    errors: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """A call of an op: detached arguments, the places of those that are differentiated, and of the results that are."""

    op: Op
    args: list[Any]
    wanted: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()

    @classmethod
    def of(cls, op: Op, args: Sequence[Any], trained: bool) -> "Call":
        """The call with these arguments. Where it is differentiated and no argument says that it wants a gradient, as
        inside a compiled graph, all do for which the op has one."""
        args = [_detached(arg) for arg in args]
        if not trained:
            return cls(op, args)
        floats = [place for place, arg in enumerate(args) if isinstance(arg, Tensor) and arg.is_floating_point()]
        asking = [place for place in floats if args[place].requires_grad] or floats
        for place in asking:
            args[place].requires_grad_()
        # The backward that all backends have in common; native autograd would differentiate more.
        with torch.enable_grad():
            results = tensors_in([op.run_on(op.backends[-1], *args)])
            ends = tuple(place for place, result in enumerate(results) if result.requires_grad)
            chosen, seeds = [results[end] for end in ends], [torch.ones_like(results[end]) for end in ends]
        found = torch.autograd.grad(chosen, [args[place] for place in asking], seeds, allow_unused=True)
        wanted = tuple(place for place, grad in zip(asking, found, strict=True) if grad is not None)
        return cls(op, [_detached(arg, place in wanted) for place, arg in enumerate(args)], wanted, ends)

    def copied(self, double: bool = False) -> "Call":
        """The call with copies of what it changes, or with float64 in place of all floating dtypes."""
        changed = range(len(self.args)) if double else self.op.mutated
        convert = _doubled if double else torch.clone
        args = [_mapped(convert, arg) if place in changed else arg for place, arg in enumerate(self.args)]
        return replace(self, args=args)

    def seeds(self) -> list[Tensor]:
        """A random gradient for each result of the reference."""
        with torch.no_grad():
            results = tensors_in([self.op.native(*self.args)])
        made = []
        for number, result in enumerate(results):
            generator = torch.Generator(result.device).manual_seed(number)
            values = torch.randn(result.shape, generator=generator, device=result.device)
            made.append(values.to(result.dtype))
        return made

    def outcome(self, run: Callable, seeds: Sequence[Tensor]) -> list[Tensor]:
        """What it changes, if it is an op that works in place; else its results, as many as there are `seeds`, and the
        gradients of what is wanted, for the gradients `seeds` of the results."""
        if self.op.mutated:
            with torch.no_grad():
                run(*self.args)
            return tensors_in(self.args[place] for place in self.op.mutated)
        with torch.set_grad_enabled(bool(self.wanted)):
            results = tensors_in([run(*self.args)])[: len(seeds)]
        if not self.wanted:
            return results
        inputs = [self.args[place] for place in self.wanted]
        ends, own = [results[end] for end in self.ends], [seeds[end] for end in self.ends]
        grads = torch.autograd.grad(ends, inputs, own, allow_unused=True)
        grads = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, grads, strict=True)]
        return [*(result.detach() for result in results), *grads]


def _detached(value: Any, wanted: bool | None = None) -> Any:
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.requires_grad if wanted is None else wanted)
    return [_detached(part) for part in value] if isinstance(value, list | tuple) else value


def _mapped(convert: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_mapped(convert, part) for part in value]
    return convert(value) if isinstance(value, Tensor | torch.dtype) else value


def _doubled(value: Tensor | torch.dtype) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    if not value.is_floating_point():
        return value
    return value.detach().to(torch.float64, copy=True).requires_grad_(value.requires_grad)


def apart(function: Callable[[], Any], device: torch.device) -> Any:
    """`function()` in a thread of its own, on the device's current stream.

    There nothing holds that surrounds the call that is tried: no autocast, no hooks on saved tensors, and autograd
    works, which it does not inside a custom op.
    """
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    results, errors = [], []

    def body() -> None:
        try:
            if stream is None:
                results.append(function())
            else:
                with torch.cuda.device(device), torch.cuda.stream(stream):
                    results.append(function())
        except BaseException as error:  # passed on below
            errors.append(error)

    thread = Thread(target=body)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


# ---- the trial of a call ---------------------------------------------------------------------------------------------


def try_out(call: Call, able: Sequence[Backend], seconds: float, compiler_seconds: float, clock: Clock) -> Findings:
    """Try the reference, the backends that are able, and the reference compiled by Inductor, where nothing is changed
    in place. A candidate is begun while `seconds`, of which Inductor's begin within the first `compiler_seconds`, are
    not over. NothingToSee where the call proves nothing; BrokenDevice; the errors of the reference are passed on."""
    began, op, found = monotonic(), call.op, Findings()
    runs: dict[str, Callable] = {REFERENCE: op.native}
    same, exact, seeds = _truth(call)
    others: dict[str, Callable[[], Callable]] = {b.name: partial(partial, op.run_on, b) for b in able}
    others.pop(REFERENCE, None)
    if not op.mutated:
        others[INDUCTOR] = lambda: op.inductor
    for name, make in others.items():
        if monotonic() - began >= (compiler_seconds if name == INDUCTOR else seconds):
            found.complete = False
            continue
        try:
            run = make()
            mine = call.copied().outcome(run, seeds)
            _wait(call)
        except Unsupported as error:
            found.failed[name] = str(error)
        except torch.OutOfMemoryError as error:
            found.failed[name] = line(error)
        except Endless as error:
            raise BrokenDevice(op.name, name, str(error)) from error
        except Exception as error:  # whatever it raises, it is not used
            _check_device(call, name, error)
            (found.failed if name == INDUCTOR else found.wrong)[name] = f"it raised {line(error)}"
        else:
            errors = _errors(mine, same, exact)
            if errors:
                found.wrong[name], found.errors[name] = errors[0]["what"], errors
            else:
                runs[name] = run
    _time(call, runs, seeds, found, began + seconds, clock)
    return found


def _truth(call: Call) -> tuple[list[Tensor], list[Tensor] | None, list[Tensor]]:
    """(the reference's outcome, that in float64 if memory suffices, gradients of the results)"""
    seeds = [] if call.op.mutated else call.seeds()
    same = call.copied().outcome(call.op.native, seeds)
    if call.op.mutated and all(map(torch.equal, same, tensors_in(call.args[p] for p in call.op.mutated))):
        raise NothingToSee
    try:
        exact = call.copied(double=True).outcome(call.op.native, [seed.double() for seed in seeds])
    except torch.OutOfMemoryError:
        exact = None
    return same, exact, seeds


def _wait(call: Call) -> None:
    """Wait until the device has done all that was launched for the call. Raises what it fails with, and Endless."""
    device = tensors_in(call.args)[0].device
    if device.type == "cuda":
        end = torch.cuda.Event()
        end.record(torch.cuda.current_stream(device))
        _poll(end.query)


def _poll(done: Callable[[], bool]) -> None:
    began = monotonic()
    while not done():
        if monotonic() - began > _PATIENCE_S:
            raise Endless(f"it has not ended after {_PATIENCE_S:g} s")
        sleep(1e-4)


def _check_device(call: Call, name: str, error: Exception) -> None:
    """BrokenDevice where nothing runs any more, as after an access to memory that is not there."""
    try:
        _wait(call)
    except Exception:
        raise BrokenDevice(call.op.name, name, line(error)) from error


def line(error: BaseException) -> str:
    """What an error is, in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"


# ---- right or wrong --------------------------------------------------------------------------------------------------


def _errors(mine: Sequence[Tensor], same: Sequence[Tensor], exact: Sequence[Tensor] | None) -> list[dict[str, Any]]:
    """What is wrong with `mine`, a line a tensor; nothing if it is right."""
    found = []
    if len(mine) != len(same):
        return [{"what": f"it has {len(mine)} results and gradients in place of {len(same)}"}]
    for number, (my, their) in enumerate(zip(mine, same, strict=True)):
        if (my.shape, my.dtype) != (their.shape, their.dtype):
            what = f"a result is {list(my.shape)} {my.dtype} in place of {list(their.shape)} {their.dtype}"
            found.append({"tensor": number, **_kind(their), "what": what})
    if found:
        return found
    for number, their in enumerate(same):
        if number and _of_8_bits(same[number - 1]):
            continue  # the scales of what has been judged
        sides = [side and side[number] for side in (mine, same, exact)]
        if _of_8_bits(their):
            unit = same[number + 1].nan_to_num(nan=1.0)
            scales = (side and side[number + 1] for side in (mine, same, exact))
            sides = [
                None if side is None else side.to(scale.dtype) * (scale / unit)
                for side, scale in zip(sides, scales, strict=True)
            ]
        why = _wrong(*sides, their.dtype)
        if why is not None:
            found.append({"tensor": number, **_kind(their), **why})
    return found


def _kind(tensor: Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype)}


def _of_8_bits(tensor: Tensor) -> bool:
    """Whether these are floats of 8 bits, and so the next result has the scales of their rows. They are judged by what
    they stand for: where a row's largest number is a rounding away from the next scale, either scale is right."""
    return tensor.is_floating_point() and tensor.itemsize == 1


def _wrong(mine: Tensor, same: Tensor, exact: Tensor | None, dtype: torch.dtype) -> dict[str, Any] | None:
    """What is wrong with a result of that dtype."""
    if not mine.is_floating_point():
        equal = torch.equal(mine, same)
        return None if equal else {"what": f"{int((mine != same).sum())} of {mine.numel()} elements differ"}
    eps, half = torch.finfo(dtype).eps, dtype.itemsize <= 2
    finite = torch.isfinite(same)
    if not torch.equal(finite, torch.isfinite(mine)):
        return {"what": "other elements are not finite than in PyTorch's result"}
    units = (1 if half else 32) if exact is not None else (8 if half else 256)
    truth = (same if exact is None else exact)[finite]
    error, theirs = (_sizes(tensor[finite], truth) for tensor in (mine, same))
    whole = _sizes(truth, torch.zeros((), dtype=truth.dtype, device=truth.device))
    for kind, my, their, size in zip(("largest", "mean square"), error, theirs, whole, strict=True):
        bound = 2 * their + units * eps * size
        if my > bound:
            what = f"its {kind} error is {my:.3g}, where PyTorch's is {their:.3g} and at most {bound:.3g} is right"
            return {"what": what, "error": my, "theirs": their, "bound": bound}
    return None


def _sizes(tensor: Tensor, truth: Tensor) -> tuple[float, float]:
    """Largest and root mean square difference."""
    if not tensor.numel():
        return 0.0, 0.0
    difference = tensor.to(torch.promote_types(truth.dtype, torch.float32)) - truth
    return difference.abs().max().item(), difference.norm().item() / math.sqrt(tensor.numel())


# ---- how long it takes -----------------------------------------------------------------------------------------------


def _time(
    call: Call, runs: dict[str, Callable], seeds: Sequence[Tensor], found: Findings, deadline: float, clock: Clock
) -> None:
    """Medians of interleaved rounds, at least one of them, and with them the fastest."""
    calls = {name: partial(call.copied().outcome, run, seeds) for name, run in runs.items()}
    measured: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(ROUNDS):
        if number and monotonic() >= deadline:
            break
        for name in list(calls) if number % 2 == 0 else list(reversed(calls)):
            measured[name].append(clock(name, calls[name]))
    found.seconds = {name: statistics.median(times) for name, times in measured.items()}
    found.backend = min(found.seconds, key=found.seconds.__getitem__)


def with_launches(device: torch.device) -> Clock:
    """Wall time, in which launches by the host count, as they do in a run that is not recorded."""

    def clock(name: str, call: Callable[[], Any]) -> float:
        return _repeated(lambda count: _wall(call, count, device))

    return clock


def of_the_device(device: torch.device) -> Clock:
    """Time of the GPU alone, as in a CUDA graph: it sleeps until the host has queued the calls."""
    return lambda name, call: _repeated(lambda count: _busy(call, count, _SLEEP_CYCLES))


def of_a_step(device: torch.device, timed: str) -> Clock:
    """Time of one call that launches as much as a step. timed: "device" for that of the GPU alone, "wall" with the
    launches by the host."""
    if timed == "device":
        return lambda name, call: _busy(call, 1, _STEP_SLEEP_CYCLES)
    return lambda name, call: _wall(call, 1, device)


def _busy(call: Callable[[], Any], count: int, sleep: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(sleep)
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / count


def _repeated(measure: Callable[[int], float]) -> float:
    first = measure(1)
    count = min(_MOST_CALLS, round(_LEAST_SECONDS / max(first, 1e-6)))
    return measure(count) if count > 1 else first


def _wall(call: Callable[[], Any], count: int, device: torch.device) -> float:
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    began = perf_counter()
    for _ in range(count):
        call()
    wait()
    return (perf_counter() - began) / count
