"""What is asked for by name: the backends of ops that `use()` and the environment variable `FASTDEIT_KERNELS` name."""

import ctypes
import os
import sys
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from threading import get_ident, local
from typing import Any

import torch

VARIABLE = "FASTDEIT_KERNELS"
AUTO = "auto"
OPS: dict[str, Any] = {}
"""All ops (`_op.Op`) by name, in the order in which they were registered."""

Choices = dict[str, str]
"""{op: backend}, with "" for the choice of all other ops."""


class UnknownOpError(ValueError):
    """`FASTDEIT_KERNELS` or `use()` names an op that does not exist."""


in_use: ContextVar[Choices | None] = ContextVar("in_use", default=None)
"""The choices of `use()` here; None outside of it."""

_TO_BACKWARD = "fastdeit.kernels.use"
"""Key under which PyTorch takes the choices of `use()` from the thread that calls `backward` to those of autograd's,
where a compiled backward runs on a GPU, and where no context variable of the caller's is seen."""


_traced = local()
"""What Dynamo reads of `in_use` and guards, since that of torch 2.8 cannot read a context variable: `choices` of the
context that last entered or left `use()` in this thread, missing where none has. It decides only whether an op is
traced through; the registered op itself reads `in_use`."""


@contextmanager
def use(backend: str | None = None, **ops: str) -> Iterator[None]:
    """Inside, run every op on `backend`, or single ones on theirs: `with use("reference", attention="auto")`.

    It outranks `FASTDEIT_KERNELS`, and holds for this thread and this asyncio task alone, like any context variable.
    The backward of an eager call runs where its forward ran. Activation checkpointing runs the forward once more in
    the backward, so there `use()` has to enclose both.

    The ops of a compiled function look for the choice at every run. Those of its backward find the choice of the thread
    that calls `backward`. A function that was traced through the reference of an op, as `auto` does on a CPU, is
    compiled once more where `use()` names that reference.

    ValueError for an op that does not exist; a backend that cannot run raises RuntimeError at the call.
    """
    _check_names("use()", ops)
    outer = _asked()
    outer = environment() if outer is None else outer
    with choosing({**({} if backend else outer), **({"": backend} if backend else {}), **ops}):
        yield


@contextmanager
def choosing(choices: Choices | None) -> Iterator[None]:
    """Inside, `use()` has made these choices; None for none."""
    token, behind = in_use.set(choices), caller()
    _let_others_see(choices)
    try:
        yield
    finally:
        in_use.reset(token)
        _let_others_see(in_use.get(), behind)


def of_forward(choices: Choices | None) -> AbstractContextManager[Any]:
    """A context for a backward that calls ops: inside, what `used()` told in its forward holds, in whatever thread and
    whatever `use()` it runs."""
    return nullcontext() if torch.compiler.is_compiling() else choosing(choices)


def used() -> Choices | None:
    """The choices of `use()` here, for `of_forward`; None for none, and in a graph that is being compiled, whose ops
    look at every run."""
    return None if torch.compiler.is_compiling() else _asked()


def _asked() -> Choices | None:
    """The choices of `use()` here; in a thread of autograd's own, those of the thread that called `backward`. Every
    call of an op asks the same in lines of its own, which spares the host a function."""
    choices = in_use.get()
    return caller()[1] if choices is None else choices


_NOBODY: tuple[int, Choices | None] = 0, None


def caller() -> tuple[int, Choices | None]:
    """In a thread of autograd's own, the thread that called `backward` and its choices, else `_NOBODY`. What lies there
    of this thread itself may be another asyncio task's."""
    if torch._C._current_graph_task_id() == -1 or not torch._C._is_key_in_tls(_TO_BACKWARD):
        return _NOBODY
    found = torch._C._get_obj_in_tls(_TO_BACKWARD)
    return _NOBODY if found[0] == get_ident() else found


def _stash_needs_a_reference() -> bool:
    """Whether `torch._C._stash_obj_in_tls` takes the reference that it is given, as that of torch 2.8 does, in place of
    one of its own; an object that nobody else holds would be freed under it."""
    value = object()
    before = sys.getrefcount(value)
    torch._C._stash_obj_in_tls(f"{_TO_BACKWARD}, tried", value)
    if sys.getrefcount(value) > before:
        return False
    _add_reference(value)
    return True


_add_reference = ctypes.pythonapi.Py_IncRef
_add_reference.argtypes, _add_reference.restype = [ctypes.py_object], None
_STASH_NEEDS_A_REFERENCE = _stash_needs_a_reference()


def _let_others_see(choices: Choices | None, behind: tuple[int, Choices | None] = _NOBODY) -> None:
    """`behind` is the caller of a backward that this thread is at again, behind an op."""
    seen = (get_ident(), choices) if behind is _NOBODY else behind
    if _STASH_NEEDS_A_REFERENCE:
        _add_reference(seen)
    torch._C._stash_obj_in_tls(_TO_BACKWARD, seen)
    if choices is None:
        vars(_traced).pop("choices", None)
    else:
        _traced.choices = choices


@cache
def environment() -> Choices:
    """`FASTDEIT_KERNELS`, read once."""
    choices = {}
    for part in filter(None, os.environ.get(VARIABLE, AUTO).split(",")):
        name, _, backend = part.strip().rpartition("=")
        choices[name] = backend
    _check_names(VARIABLE, [name for name in choices if name])
    return choices


def _check_names(origin: str, names: Collection[str]) -> None:
    for name in names:
        if name not in OPS:
            raise UnknownOpError(f"{origin} names the op {name!r}, but the ops are: {', '.join(OPS)}")


def source() -> str:
    """Who asks here: the name for messages."""
    return VARIABLE if _asked() is None else "use()"


def choice(name: str) -> str:
    """What `use()` or `FASTDEIT_KERNELS` asks for op `name`: a backend's name or "auto"."""
    if torch.compiler.is_compiling():
        choices = getattr(_traced, "choices", None)
    elif (choices := in_use.get()) is None:
        _, choices = caller()
    return _of_environment(name) if choices is None else _of(choices, name)


def _of(choices: Choices, name: str) -> str:
    return choices.get(name, choices.get("", AUTO))


def _of_environment(name: str) -> str:
    return _of(environment(), name)


def constant(function: Any) -> None:
    """Tell Dynamo that what the function returns does not change in a process, so that it is not traced.
    `torch.compiler.assume_constant_result` does the same, but imports Dynamo, which takes more than a second."""
    function._dynamo_marked_constant = True


constant(_of_environment)
