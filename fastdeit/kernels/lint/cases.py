"""What the lint compiles: every example of every op, by each of its backends whose kernels Triton compiles."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from inspect import signature

import torch
from torch import Tensor

from fastdeit.kernels import _op, _triton
from fastdeit.kernels._example import Example, Maker
from fastdeit.kernels.dtypes import DTYPES

_META = torch.device("meta")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Case:
    """A call of a backend of an op at real sizes.

    run       calls forward, and backward where there is one, on meta tensors
    needs     oldest architecture the backend runs on
    newest    newest one; None where there is no such
    half      whether operands have 16 bits
    odd       whether rows or tensors start at any element, so that wide loads and stores are impossible
    """

    op: str
    backend: str
    name: str
    run: Callable[[], None]
    needs: int
    half: bool = True
    odd: bool = False
    newest: int | None = None

    def runs_on(self, arch: int) -> bool:
        """Whether the backend runs on an architecture."""
        return self.needs <= arch <= (arch if self.newest is None else self.newest)


def cases() -> dict[str, list[Case]]:
    """Those that Triton's interpreter can run, by op. A backend other than an op's first is named in the case."""
    return _cases(backends())


def compiled_cases() -> dict[str, list[Case]]:
    """What the lint compiles: `cases`, and those of backends in Gluon, which has no interpreter."""
    return _cases([*backends(), *backends(_triton.gluon_capability)])


def _cases(backends: Iterable[tuple[str, _op.Backend]]) -> dict[str, list[Case]]:
    found: dict[str, list[Case]] = {}
    first = {}
    for name, backend in backends:
        op, found[name] = _op.OPS[name], found.get(name, [])
        suffix = "" if first.setdefault(name, backend) is backend else f", {backend.name}"
        needs = signature(backend.capability).parameters["needs"].default
        newest = needs if _asks(backend, _triton.gluon_capability) else None
        for example in op.examples:
            for sizes, dtype in example.compiled:
                title = " ".join(filter(None, (sizes.name, _NAMES[dtype], example.name))) + suffix
                run = partial(_run, op, backend, example, Maker(sizes, dtype, _META))
                half = dtype != torch.float32
                found[name].append(Case(name, backend.name, title, run, needs, half, sizes.odd, newest))
    return found


def _run(op: _op.Op, backend: _op.Backend, example: Example, make: Maker) -> None:
    """Forward and backward; nothing of what the backend refuses, since that would run on another one."""
    args = example.build(make)
    with suppress(_op.Unsupported):
        results = op.run_on(backend, *args)
        results = results if isinstance(results, tuple) else (results,)
        ends = [result for result in results if isinstance(result, Tensor) and result.requires_grad]
        if ends:
            torch.autograd.backward(ends, [torch.empty_like(end) for end in ends])


def backends(capability: Callable = _triton.capability) -> Iterable[tuple[str, _op.Backend]]:
    """(op, backend) of all backends with this capability: that of Triton's own language, or that of Gluon, in which
    each is for one architecture."""
    for op in _op.OPS.values():
        for backend in op.backends:
            if _asks(backend, capability):
                yield op.name, backend


def _asks(backend: _op.Backend, capability: Callable) -> bool:
    """Whether the capability of a backend is this one, as it is or with arguments of its own."""
    return getattr(backend.capability, "func", backend.capability) is capability
