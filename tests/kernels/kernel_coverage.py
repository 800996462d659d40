"""What of the kernels ran in the checked interpreter: rounds of loops, sides of branches, lanes behind masks.

A loop is covered if it went round at least twice in one go, a branch if its condition was true in one run and false in
another, a mask if it hid lanes and showed lanes. An `if` of a constant is a branch, too: the compiler makes two kernels
of it. What there is to cover is read from the source, so that what never ran is known as well.
"""

import ast
import inspect
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import walk_packages
from types import ModuleType
from typing import Any
from unittest import mock

from triton import JITFunction
from triton.runtime import interpreter as triton_interpreter

from fastdeit import kernels
from fastdeit.kernels.lint import interpreter

_NAME = "__coverage__"


@dataclass(frozen=True, order=True)
class Place:
    """A loop, branch or mask: the function, the kind, and its text in the source."""

    function: str
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.function}: {self.kind} `{self.text}`"


@dataclass
class Coverage:
    """What was seen of each place in each kernel: rounds of a loop, 2 meaning more; sides of a branch or mask. A device
    function is a part of every kernel that calls it."""

    places: list[Place] = field(default_factory=list)
    seen: dict[Place, dict[str, set[Any]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(set)))

    def loop(self, number: int, values: Iterable[Any]) -> Iterator[Any]:
        """The values, counted."""
        rounds = 0
        for rounds, value in enumerate(values, 1):  # noqa: B007 (the count is wanted after the loop)
            yield value
        self._here(number).add(min(rounds, 2))

    def branch(self, number: int, value: Any) -> Any:
        """The condition, noted."""
        self._here(number).add(bool(value))
        return value

    def mask(self, number: int, value: Any) -> Any:
        """The mask, noted: True if it shows a lane, False if it hides one."""
        shown = value.handle.data
        self._here(number).update(side for side, found in ((True, shown.any()), (False, not shown.all())) if found)
        return value

    def _here(self, number: int) -> set[Any]:
        return self.seen[self.places[number]][interpreter.running()]

    def missing(self, places: Iterable[Place]) -> dict[str, str]:
        """{place and kernel: what is missing there} of those that are not covered."""
        found = {}
        for place in places:
            if place not in self.seen:
                found[str(place)] = "never ran"
            for kernel, seen in self.seen[place].items():
                name = str(place) if place.function == kernel else f"{kernel}: in {place}"
                if place.kind == "loop" and 2 not in seen:
                    found[name] = "never went round twice"
                elif place.kind != "loop" and len(seen) < 2:
                    found[name] = f"only ever {'true' if True in seen else 'false'}"
        return found


def jit_functions() -> dict[str, Any]:
    """Every function of the package in Triton's own language, by "module.function"."""
    found = {}
    for module in _modules():
        for value in vars(module).values():
            if (
                isinstance(value, (triton_interpreter.InterpretedFunction, JITFunction))
                and value.fn.__module__ == module.__name__
            ):
                found[interpreter.title(value.fn)] = value
    return found


def _modules() -> list[ModuleType]:
    names = [m.name for m in walk_packages(kernels.__path__, f"{kernels.__name__}.") if not m.ispkg]
    return [import_module(name) for name in names if ".lint." not in name and ".hopper." not in name]


def places_of(functions: Iterable[Any]) -> list[Place]:
    """All loops, branches and masks of functions that Triton compiles."""
    coverage = Coverage()
    for function in functions:
        _Instrument(coverage, interpreter.title(function.fn)).visit(ast.parse(inspect.getsource(function.fn)))
    return sorted(set(coverage.places))


@contextmanager
def measured(package: str = kernels.__name__) -> Iterator[Coverage]:
    """Inside, functions of kernels of a package say what of them runs."""
    coverage = Coverage()
    original = triton_interpreter.FunctionRewriter._transform_ast

    def transform(rewriter: Any, source: str) -> ast.AST:
        tree = original(rewriter, source)
        if rewriter.fn.__module__.startswith(package):
            _Instrument(coverage, interpreter.title(rewriter.fn)).visit(tree)
            rewriter.fn.__globals__[_NAME] = coverage
        return ast.fix_missing_locations(tree)

    with (
        mock.patch.object(triton_interpreter.FunctionRewriter, "_transform_ast", transform),
        mock.patch.object(triton_interpreter.InterpretedFunction, "rewritten_fn", {}),
    ):
        yield coverage
    for function in jit_functions().values():
        function.fn.__globals__.pop(_NAME, None)


class _Instrument(ast.NodeTransformer):
    """Has the loops, conditions and masks of a function tell the coverage of themselves."""

    def __init__(self, coverage: Coverage, function: str) -> None:
        self._coverage, self._function = coverage, function

    def _told(self, kind: str, text: str, value: ast.expr) -> ast.expr:
        self._coverage.places.append(Place(self._function, kind, text))
        method = ast.Attribute(ast.Name(_NAME, ast.Load()), kind, ast.Load())
        return ast.Call(method, [ast.Constant(len(self._coverage.places) - 1), value], [])

    def visit_For(self, node: ast.For) -> ast.AST:
        node.iter = self._told("loop", f"for {ast.unparse(node.target)} in {ast.unparse(node.iter)}", node.iter)
        return self.generic_visit(node)

    def visit_If(self, node: ast.If | ast.IfExp) -> ast.AST:
        node.test = self._told("branch", ast.unparse(node.test), node.test)
        return self.generic_visit(node)

    visit_IfExp = visit_If

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if ast.unparse(node.func) in ("tl.load", "tl.store"):
            for word in node.keywords:
                if word.arg == "mask":
                    text = f"{ast.unparse(node.args[0])}, mask={ast.unparse(word.value)}"
                    word.value = self._told("mask", text, word.value)
        return self.generic_visit(node)
