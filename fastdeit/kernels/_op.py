"""What all ops share: registration, the choice of a backend with its reason, and autocast.

An op has one or more backends in order of preference; the last is `reference`, pure PyTorch, which runs everywhere
and defines the result. Taken is the one that was fastest where it was measured on such a card (`choices.json`, written
by `fastdeit kernels bench`), for tensors of such a width if these were, else the first that can run, and `info()` says
why. Where a row of that table was judged by the compiled code and not measured, it says so. What a trial on this very
card has found (`trial/`, `_tried.py`) outranks the table. `use()`, and the environment variable `FASTDEIT_KERNELS`
around it, force another choice: a backend for all ops, `op=backend` for one, or several of these separated by commas.
A forced backend that cannot run raises; otherwise the next takes its place, and if that is the reference, with one
warning for each set of reasons.

In eager mode the reference runs under native autograd and any other backend under an `autograd.Function`, since a
registered op costs ten to twenty microseconds a call. `torch.compile` sees the registered op, which is opaque to it;
where nothing would run but the reference, it sees that function under native autograd instead, and can fuse it with
what surrounds it. When the reference is forced, the registered op runs, in eager mode and compiled. It also runs on
fake tensors of the CPU, for which it knows the shapes, dtypes and layouts of its results.

Only PyTorch's own operations follow `torch.func` (vmap, grad, jvp and their compositions) and forward-mode AD. There an
op that is not forced runs under native autograd, whatever its backends, and one that is forced raises. No backend has a
second derivative: differentiating a gradient of one raises.
"""

import json
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdeit.kernels import _asked, _checks, _derivatives, _tried
from fastdeit.kernels._asked import AUTO, OPS, choice, source
from fastdeit.kernels._example import Example
from fastdeit.kernels._table import aligned as aligned_table
from fastdeit.kernels._tried import INDUCTOR

NAMESPACE = "fastdeit"
REFERENCE = "reference"
MEASURED = "measured: "
"""How the reason of a row of `choices.json` begins that was measured, and not judged by the compiled code."""
_ALIGNMENT = 16  # bytes
_ALONE = "there is no other kernel for it yet"

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


class ChoiceError(RuntimeError):
    """`FASTDEIT_KERNELS` or `use()` asks for a backend that does not exist or cannot run."""


class Unsupported(Exception):
    """Raised by a backend, before it does anything, for arguments it cannot run on; the message is the reason."""


class Backend(NamedTuple):
    """One implementation of an op.

    `capability(device, forced)` answers whether it can run there, and the reason in one sentence: why it is a good
    choice, or why it cannot run. Some can run only where they are asked for by name: `forced`. For arguments that they
    do not support, forward and backward raise `Unsupported`.
    """

    name: str
    capability: Callable[[torch.device, bool], tuple[bool, str]]
    forward: Callable
    backward: Callable | None = None


class OpInfo(NamedTuple):
    """The backend an op uses on a device, and why."""

    name: str
    backend: str
    reason: str


class Op:
    """A public op: its backends, and `torch.ops.fastdeit.<name>`, which runs the selected one.

    The annotations of the reference are the schema of the op, and those of its backward that of `<name>_backward`.
    Arguments are positional; results are new, contiguous tensors.

    reference, backward  the reference and its explicit backward, None when the op is not differentiable
    examples             calls of it, the usual one first: what is compiled by the lint, measured, and checked by tests
    others               backends to prefer to the reference, best first
    native               what runs under native autograd, where the registered reference does more than that
    cast                 arguments that take the autocast dtype under autocast; the op itself runs with autocast off,
                         `native` with autocast on
    mutates              arguments that are changed in place; `mutated` are their places
    """

    def __init__(
        self,
        name: str,
        reference: Callable,
        backward: Callable | None = None,
        *,
        examples: Sequence[Example],
        others: Sequence[Backend] = (),
        native: Callable | None = None,
        cast: Collection[str] = (),
        mutates: Collection[str] = (),
    ) -> None:
        self.name = name
        self.examples = tuple(examples)
        self.backends = (*others, Backend(REFERENCE, _reference_capability, reference, backward))
        self.native = native or reference
        self._pure = not mutates
        self._function: type[torch.autograd.Function] | None = None
        self.registered = self._register(name, reference, "forward", mutates)
        arguments = getattr(getattr(torch.ops, NAMESPACE), name).default._schema.arguments
        self.mutated = [place for place, argument in enumerate(arguments) if argument.name in mutates]
        self._cast = [argument.name in cast for argument in arguments]
        _autocast(name, self._cast)
        if backward is not None:
            self.registered_backward = self._register(f"{name}_backward", backward, "backward")
            _autocast(f"{name}_backward")
        OPS[name] = self

    def differentiable(self, save: Callable, differentiate: Callable) -> None:
        """The derivative, for the registered op and for eager mode: `save(ctx, inputs, output)` and
        `differentiate(ctx, *grads)`, which calls `run_backward`, as of `torch.library.register_autograd`. It reads
        `ctx.saved_tensors` once: hooks on saved tensors, such as those of activation checkpointing, may unpack each
        tensor a single time.

        The gradient of a result that nobody differentiates is None, and no zeros are made for it. `differentiate` gets
        at least one gradient: where none came, those of all arguments are None, as native autograd has it."""
        nothing = (None,) * len(self._cast)

        def save_for_gradients(ctx: Any, inputs: tuple, output: Any) -> None:
            ctx.set_materialize_grads(False)
            save(ctx, inputs, output)

        def save_choices(ctx: Any, inputs: tuple, output: Any) -> None:
            choices = _asked.in_use.get()
            ctx.choices = _asked.caller()[1] if choices is None else choices
            save_for_gradients(ctx, inputs, output)

        def differentiate_once(ctx: Any, *grads: Tensor | None) -> Any:
            _derivatives.check_first_order(self.name)
            for grad in grads:
                if grad is not None:
                    return differentiate(ctx, *grads)
            return nothing

        self.registered.register_autograd(differentiate_once, setup_context=save_choices)
        self._function = _derivatives.function(self.name, save_for_gradients, differentiate_once)

    def __call__(self, *args: Any) -> Any:
        """Run on the arguments of the reference: directly in eager mode, else as the module's docstring says."""
        if _derivatives.transformed():
            return self._run_transformed(args)
        if torch.compiler.is_compiling():
            return (self.native if self._left_to_compiler(_device(args)) else self.registered)(*args)
        if choice(self.name) == REFERENCE or (_device(args).type == "cpu" and _checks.is_fake(_first(args))):
            return self.registered(*args)
        refusals = []
        for backend, _ in self._able(_device(args), args, self._differentiated):
            if backend.name == REFERENCE:
                break
            if backend.name == INDUCTOR:
                return backend.forward(*args)
            try:
                return self._eager(backend, args)
            except Unsupported as error:
                refusals.append(self._refusal(backend, error))
        self._warn_of(refusals)
        return self.native(*args)

    @cached_property
    def inductor(self) -> Callable:
        """The reference under native autograd, compiled by Inductor: a choice that a trial may make."""
        return torch.compile(self.native)

    def _differentiated(self, args: Sequence[Any]) -> bool:
        """Whether autograd will differentiate an eager call."""
        wanted = self._function is not None and torch.is_grad_enabled()
        return wanted and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)

    def cast(self, args: Sequence[Any]) -> Sequence[Any]:
        """The arguments as a backend gets them: those that take the autocast dtype have it where autocast is on."""
        dtype = _tried.autocast_dtype(_device(args).type)
        return args if dtype is None else _to_autocast(args, self._cast, dtype)

    def _left_to_compiler(self, device: torch.device) -> bool:
        # The choice last: Dynamo guards what it reads, so that another one compiles anew, but only where it matters.
        return self._pure and _left_to_reference(self.name, device) and choice(self.name) == AUTO

    def _run_transformed(self, args: Sequence[Any]) -> Any:
        """Run inside `torch.func` or forward-mode AD."""
        if choice(self.name) != AUTO:
            raise ChoiceError(
                f"{source()} asks for {self.name}={choice(self.name)}, which cannot run inside torch.func or "
                f"forward-mode AD: only PyTorch's own operations can. Leave {self.name} unforced there"
            )
        if not torch.compiler.is_compiling():
            able = [backend.name for backend, _ in self.able_unforced(_device(args)) if backend.name != REFERENCE]
            self._warn_of([f"{name}: it cannot run inside torch.func or forward-mode AD" for name in able])
        return self.native(*args)

    def run_backward(self, ctx: Any, *args: Any) -> Any:
        """The backward of the backend whose forward made `ctx`, on the arguments of the reference's backward. The
        registered op chooses as its forward did, even in a thread of autograd's own."""
        backend = getattr(ctx, "backend", None)
        if backend is None:
            with _asked.choosing(ctx.choices):
                return self.registered_backward(*args)
        if _derivatives.transformed():
            raise RuntimeError(
                f"the backward of {self.name} on {backend.name} cannot run inside torch.func: call the whole function "
                "inside it, forward included, which then runs on PyTorch's own operations"
            )
        with _no_autocast():
            return backend.backward(*args)

    def select(self, device: torch.device) -> tuple[Backend, str]:
        """The backend for tensors on `device` and the reason; RuntimeError when the forced one cannot run."""
        backend, reason = self._able(device)[0]
        return backend, self._why_no_other(device) or reason if reason == _ALONE else reason

    def _why_no_other(self, device: torch.device) -> str:
        """Why none of the other backends runs on a card."""
        why: dict[str, list[str]] = {}
        for backend in self.backends[:-1]:
            able, reason = backend.capability(device, False)
            if not able:
                why.setdefault(reason, []).append(backend.name)
        return "; ".join(f"{' and '.join(names)}: {reason}" for reason, names in why.items())

    def _able(
        self, device: torch.device, args: Sequence[Any] = (), trained: Callable[[Sequence[Any]], bool] | None = None
    ) -> list[tuple[Backend, str]]:
        """The backends that may run on `device`, best first, each with the reason: one, if it is forced. Best is what
        was measured for the width of `args`, if they are given, or tried out for calls like theirs. trained: whether
        such a call is differentiated; None where it is no call of the op itself."""
        wanted = choice(self.name)
        if wanted == AUTO:
            return self.able_unforced(device, args, trained)
        for backend in self.backends:
            if backend.name == wanted:
                able, reason = backend.capability(device, True)
                if able:
                    return [(backend, f"chosen by {source()}")]
                raise ChoiceError(f"{source()} asks for {self.name}={wanted}, which cannot run on {device}: {reason}")
        names = ", ".join(backend.name for backend in self.backends)
        raise ChoiceError(f"{source()} asks for {self.name}={wanted[:40]!r}, but {self.name} has: {names}")

    def able_unforced(
        self, device: torch.device, args: Sequence[Any] = (), trained: Callable[[Sequence[Any]], bool] | None = None
    ) -> list[tuple[Backend, str]]:
        """`_able` as if none were forced."""
        verdicts = [(backend, *backend.capability(device, False)) for backend in self.backends]
        able = [(backend, reason) for backend, able, reason in verdicts if able]
        tried = _tried.current()
        if tried is None:
            return _fastest_first(self.name, device, able, args)
        found = tried.choice(self, args, trained and trained(args))
        able = [pair for pair in able if (self.name, pair[0].name) not in tried.wrong]
        if found is not None and found.backend == INDUCTOR:
            return [(Backend(INDUCTOR, _reference_capability, self.inductor), found.reason), *able]
        best = [(backend, found.reason) for backend, _ in able if found is not None and backend.name == found.backend]
        if not best:
            return _fastest_first(self.name, device, able, args)
        return best + [pair for pair in able if pair[0].name != best[0][0].name]

    def _refusal(self, backend: Backend, error: Unsupported) -> str:
        """What to say of it; RuntimeError if the backend is forced."""
        if choice(self.name) == backend.name:
            raise ChoiceError(
                f"{source()} asks for {self.name}={backend.name}, which cannot run on these arguments: {error}"
            ) from error
        return f"{backend.name}: {error}"

    def _warn_of(self, refusals: Sequence[str]) -> None:
        if refusals:
            _warn_once(f"{self.name} does not run on {', nor on '.join(refusals)}")

    def _eager(self, backend: Backend, args: Sequence[Any]) -> Any:
        args = self.cast(args)
        with _no_autocast():
            return self.run_on(backend, *args)

    def run_on(self, backend: Backend, *args: Any) -> Any:
        """Run on one of the op's backends, whether it was to be chosen or not, without a look at autocast. Where
        gradients are enabled, the result can be differentiated. `Unsupported` is passed on."""
        if self._function is not None and torch.is_grad_enabled():
            return self._function.apply(backend, *args)
        result = backend.forward(*args)
        if self.mutated:
            torch.autograd.graph.increment_version(tensors_in(args[place] for place in self.mutated))
        return result

    def _register(self, name: str, like: Callable, role: str, mutates: Collection[str] = ()) -> Callable:
        after_gradient = int(role == "backward")  # the width is that of forward's first argument or result

        def trained(args: Sequence[Any]) -> bool:
            return self._function is not None

        def run(*args: Any) -> Any:
            refusals = []
            like = args[after_gradient:]
            while like[0] is None:  # no gradient came for that result
                like = like[1:]
            for backend, _ in self._able(_device(args), like, trained if role == "forward" else None):
                if backend.name == INDUCTOR:  # here it is opaque to the compiler; the reference defines the same
                    backend = self.backends[-1]
                if backend.name == REFERENCE:
                    self._warn_of(refusals)
                try:
                    return _contiguous(getattr(backend, role)(*args))
                except Unsupported as error:
                    refusals.append(self._refusal(backend, error))
            raise AssertionError("the reference supports everything")

        schema = torch.library.infer_schema(like, mutates_args=mutates)
        return torch.library.custom_op(f"{NAMESPACE}::{name}", run, mutates_args=mutates, schema=schema)


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among the values and in their lists."""
    lists = (value if isinstance(value, list | tuple) else [value] for value in values)
    return [tensor for tensors in lists for tensor in tensors if isinstance(tensor, Tensor)]


def _first(args: Sequence[Any]) -> Tensor:
    """The first argument that is there, or the first of its tensors where it is a list."""
    first = args[0]
    if first is None:  # a gradient that did not come
        first = next(arg for arg in args if arg is not None)
    return first if isinstance(first, Tensor) else first[0]


def _device(args: Sequence[Any]) -> torch.device:
    return _first(args).device


def width(args: Sequence[Any]) -> int:
    """The last dimension of the first argument: the channels of tokens, or of q, k and v together, the classes of
    logits. Measurements of an op are kept apart by it."""
    first = _first(args)
    return first.shape[-1] if first.dim() else 1


def _contiguous(result: Tensor | tuple[Tensor, ...] | None) -> Tensor | tuple[Tensor, ...] | None:
    """The layout that fakes promise, whatever the layout of the arguments."""
    if isinstance(result, tuple):
        return tuple(tensor.contiguous() for tensor in result)
    return None if result is None else result.contiguous()


def aligned(x: Tensor) -> Tensor:
    """`x`, contiguous and at an address that is a multiple of 16 bytes, as wide loads and TMA want it."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % _ALIGNMENT else x


def _reference_capability(device: torch.device, forced: bool) -> tuple[bool, str]:
    return True, "no CUDA device" if device.type == "cpu" else _ALONE


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


# ---- the choice ------------------------------------------------------------------------------------------------------


def _left_to_reference(name: str, device: torch.device) -> bool:
    """Whether no other backend of op `name` would be chosen on `device`, whatever the width of the arguments."""
    tried = _tried.current()
    if tried is not None and (found := tried.chosen.get(name)):
        return all(choice.backend in (REFERENCE, INDUCTOR) for choice in found.values())
    (best, _), *_ = OPS[name].able_unforced(device)
    at_widths = _measured().get(card(device), {}).get(name, {}).get("widths", {}).values()
    return best.name == REFERENCE and all(row["backend"] == REFERENCE for row in at_widths)


# It does not change in a process, nor can Dynamo trace it.
_asked.constant(_left_to_reference)


@cache
def _measured() -> dict[str, dict[str, dict[str, Any]]]:
    """{card: {op: {"backend": the fastest, "because": a sentence, "widths": {width: {"backend", "because"}}}}}, of the
    cards and the widths of tensors that were measured; the backend of the op itself is for all other widths."""
    return json.loads((Path(__file__).parent / "choices.json").read_text())


def measured(name: str, device: torch.device, args: Sequence[Any]) -> bool:
    """Whether `choices.json` has a measurement of op `name` on such a card at the width of `args`."""
    row = _measured().get(card(device), {}).get(name, {}).get("widths", {}).get(str(width(args)), {})
    return row.get("because", "").startswith(MEASURED)


@cache
def card(device: torch.device) -> str:
    """What measurements are valid for: the architecture of a GPU, such as "sm_90", or "cpu"."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _fastest_first(
    name: str, device: torch.device, able: list[tuple["Backend", str]], args: Sequence[Any]
) -> list[tuple["Backend", str]]:
    """The backends that are able, the fastest first where they were measured on such a card."""
    row = _measured().get(card(device), {}).get(name)
    if row is None:
        unknown = f"; not measured on {card(device)} yet" if len(able) > 1 else ""
        return [(backend, reason + unknown) for backend, reason in able]
    row = _at_width(row, args)
    others = [pair for pair in able if pair[0].name != row["backend"]]
    return [(backend, row["because"]) for backend, _ in able if backend.name == row["backend"]] + others


def _at_width(row: dict[str, Any], args: Sequence[Any]) -> dict[str, Any]:
    """What was measured at the width of `args`, else what is for all others; that also without `args`, and then the
    reason names the widths that have another backend."""
    widths = row.get("widths", {})
    if args:
        return widths.get(str(width(args)), row)
    exceptions = {at: found for at, found in widths.items() if found["backend"] != row["backend"]}
    reasons = (f"; at width {at} {found['backend']}, {found['because']}" for at, found in exceptions.items())
    return row | {"because": row["because"] + "".join(reasons)}


def info() -> list[OpInfo]:
    """Backend and reason of every op, on the CUDA device where there is one, else on the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [OpInfo(op.name, backend.name, reason) for op in OPS.values() for backend, reason in [op.select(device)]]


def format_info() -> str:
    """`info()` as an aligned table, one op a line."""
    return aligned_table(info())


# ---- autocast --------------------------------------------------------------------------------------------------------


def _autocast(name: str, chosen: Sequence[bool] | None = None) -> None:
    """Under autocast, run `fastdeit::name` with autocast off and the `chosen` arguments in the autocast dtype.

    `torch.library.register_autocast` fixes one dtype at registration; this rule reads the dtype of the region (fp16 or
    bf16), and leaves float64, which autocast never touches, alone. Casts are differentiable: gradients come back in the
    dtype of the arguments.
    """
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    chosen = chosen or [False] * len(op._schema.arguments)

    def rule(device: str) -> Callable:
        def run(*args: Any) -> Any:
            args = _to_autocast(args, chosen, torch.get_autocast_dtype(device))
            with torch.autocast(device, enabled=False):
                return op(*args)

        return run

    for device in ("cpu", "cuda"):
        _LIBRARY.impl(name, rule(device), f"Autocast{device.upper()}")


def _to_autocast(args: Sequence[Any], chosen: Sequence[bool], dtype: torch.dtype) -> list[Any]:
    return [
        a.to(dtype) if c and a.is_floating_point() and a.dtype != torch.float64 else a
        for a, c in zip(args, chosen, strict=True)
    ]


_no_autocast = torch._C._DisableAutocast
"""A context: inside, autocast is off for every device. `torch.autocast(device, enabled=False)` takes ten times as long,
which is as much as many a launch."""


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives `tensor` in the current region; None outside one, for float64, and on the meta
    device, for which there is no autocast."""
    return None if tensor.dtype == torch.float64 else _tried.autocast_dtype(tensor.device.type)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of statistics and losses of data of `dtype`: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
