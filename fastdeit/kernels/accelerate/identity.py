"""What was tried out is what runs: the code and the settings that an op stands for, remembered and compared.

An op computes what a module and its leaves compute, and calls none of them. Whoever later changes one of them (its
class, the code of that class, a number that the code reads) would therefore change nothing. So `remember` notes, at the
time a module is tried out, what its forward and those of its leaves refer to:

    classes    of the leaves
    code       the functions of these classes, and what they name in Python modules: `F.scaled_dot_product_attention`
               is one that people replace by their own
    settings   attributes of the instances that the code reads, such as `scale` and `eps`

Every call compares (`difference`): code by identity, settings by value. Any difference is a reason to run the original
code. Attributes that no code reads may change.
"""

import inspect
import sys
from collections.abc import Collection, Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdeit.kernels._hooks import hooks

PLAIN = (nn.Parameter, Tensor)
"""Types of tensors that an op may read. A subclass may compute something else."""

_SWITCHED = frozenset({"distilled_training", *vars(nn.Module())})
"""Attributes that change in ordinary use: modules are tried out with either value of `training` and of
`distilled_training`; the other ones of every module are looked at elsewhere."""

_CHECKPOINTS = "transformers.modeling_layers"
"""Where the forward of a layer of transformers is wrapped by one that may checkpoint it. That is done to every subclass
as well, and so to the class of an accelerated module."""

_CONFIGURED = "_attn_implementation"
"""An object with this attribute is a configuration of transformers. All modules of a model hold the same one, and code
reads numbers of it. It is no constant, so the numbers are remembered in its place."""

_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device, type, FunctionType, BuiltinFunctionType)
_ABSENT = object()


class Unknown(Exception):
    """Something that an op would stand for cannot be remembered; the message is the reason."""


class Reference(NamedTuple):
    """`getattr(owner, name)` is `value`, where owner is a class or a Python module."""

    owner: Any
    name: str
    value: Any


class Leaf(NamedTuple):
    """What is remembered of one instance: of the module that runs on an op, or of a child that the op stands for.

    name        of the child; "" for the module itself
    settings    (attribute, value): what the code reads of the instance
    configured  (attribute, name, value): what the code reads of a configuration, which the instance has as `attribute`
    methods     functions of the class that the code calls. An attribute of the instance would hide one:
                `module.forward = ...`
    inherited   what else of the class the code reads, such as properties, and an attribute would hide
    tensors     (name, whether it is there, not None) of parameters and buffers
    """

    name: str
    cls: type[nn.Module]
    settings: tuple[tuple[str, Any], ...]
    configured: tuple[tuple[str, str, Any], ...]
    methods: tuple[str, ...]
    inherited: tuple[str, ...]
    tensors: tuple[tuple[str, bool], ...]


class Remembered(NamedTuple):
    """A module and its leaves as they were tried out. Equal for modules that are alike.

    forward   that of the module's own class
    code      of the classes of the leaves and of the module
    methods   (name, function) of the module's own class, but for its forward, which the op takes the place of
    children  names of all its children; None where it does not matter which there are
    """

    forward: Any
    code: tuple[Reference, ...]
    methods: tuple[tuple[str, Any], ...]
    own: Leaf
    leaves: tuple[Leaf, ...]
    children: tuple[str, ...] | None


# ---- remembering -----------------------------------------------------------------------------------------------------


def remember(
    module: nn.Module,
    original: type[nn.Module],
    leaves: Collection[str],
    called: Collection[str],
    *,
    calls_module: bool = False,
    functions: Collection[FunctionType] = (),
) -> Remembered:
    """What an op stands for in `module`, whose own code is that of `original`; `Unknown` if that cannot be said.

    leaves        names of children that the op stands for
    called        those of them whose own code runs nevertheless, so that their settings and tensors may change
    calls_module  whether the module's own code runs nevertheless, so that its other children and its tensors may change
    functions     that the module's own code calls, and the op stands for as well
    """
    own = _Code(original, functions)
    code, seen = dict.fromkeys(own.references), []
    if not calls_module and (reason := _patched(original)):
        raise Unknown(reason)
    for name in leaves:
        child = module._modules[name]
        of_child = _Code(type(child))
        if not calls_module and (reason := _patched(type(child))):
            raise Unknown(f"{name} is a {type(child).__name__}, and {reason}")
        code.update(dict.fromkeys(of_child.references))
        seen.append(_leaf(name, child, type(child), None if name in called else of_child))
    return Remembered(
        forward=original.forward,
        code=tuple(code),
        methods=tuple((name, value) for name, value in own.methods.items() if name != "forward"),
        own=_leaf("", module, original, own)._replace(**{"tensors": ()} if calls_module else {}),
        leaves=tuple(seen),
        children=None if calls_module else tuple(module._modules),
    )


def _leaf(name: str, module: nn.Module, cls: type[nn.Module], code: "_Code | None") -> Leaf:
    if code is None:
        return Leaf(name, cls, settings=(), configured=(), methods=("forward",), inherited=(), tensors=())
    state, prefix = vars(module), f"{name} " if name else ""
    if replaced := sorted(state.keys() & code.methods.keys()):
        raise Unknown(f"{prefix}{replaced[0]} has been replaced")
    settings, configured = {}, []
    for key in sorted(code.names & state.keys() - _SWITCHED):
        if hasattr(type(state[key]), _CONFIGURED):
            configured += _configured(key, state[key], code.names)
            continue
        if not _constant(state[key]):
            raise Unknown(f"{prefix}reads {key}, a {type(state[key]).__name__}, which may change unnoticed")
        settings[key] = state[key]
    # The op is called by the module's own forward, whatever stands in front of it.
    inherited = [key for key in code.methods if name or key != "forward"]
    methods = [key for key in inherited if isinstance(inspect.getattr_static(cls, key), FunctionType)]
    tensors = [(key, value is not None) for own in (module._parameters, module._buffers) for key, value in own.items()]
    others = [key for key in inherited if key not in methods]
    of_leaf = tuple(settings.items()), tuple(configured), tuple(methods), tuple(others), tuple(tensors)
    return Leaf(name, cls, *of_leaf)


def _configured(key: str, config: Any, names: set[str]) -> Iterator[tuple[str, str, Any]]:
    """What code with these names may read of a configuration of transformers."""
    for name in sorted(names):
        value = getattr(config, name, _ABSENT)
        if value is not _ABSENT and not _constant(value):
            raise Unknown(f"reads {key}.{name}, a {type(value).__name__}, which may change unnoticed")
        if value is not _ABSENT:
            yield key, name, value


def _constant(value: Any) -> bool:
    return all(map(_constant, value)) if isinstance(value, tuple) else isinstance(value, _CONSTANTS)


class _Code:
    """What the forward of a class refers to, and the methods that it names.

    methods     {name: what the class has under it}: forward, those it names, those that these name
    names       all names in their code
    references  to the methods, and to what the names are in the Python modules that the methods were written in
    """

    def __init__(self, cls: type[nn.Module], functions: Collection[FunctionType] = ()) -> None:
        self.methods: dict[str, Any] = {}
        self.names: set[str] = set()
        self.references: list[Reference] = [Reference(cls, "__call__", cls.__call__)]
        waiting = ["forward"]
        while waiting:
            name = waiting.pop()
            if name not in self.methods:
                self.methods[name] = getattr(cls, name)
                waiting += [other for other in self._read(cls, name) if _is_stable(cls, other)]
        for function in functions:
            self._read_function(function)

    def _read(self, cls: type[nn.Module], name: str) -> set[str]:
        """Note what a method, and the one that it may reach by `super()`, refers to; the names in their code."""
        found = set()
        for base in cls.__mro__:
            # torch's own methods of every module, such as `float`, are no part of what is computed.
            if base is nn.Module or name not in vars(base):
                continue
            self.references.append(Reference(base, name, getattr(base, name)))
            value = vars(base)[name]
            function = inspect.unwrap(value.fget if isinstance(value, property) else getattr(base, name))
            if isinstance(function, FunctionType):
                found |= self._read_function(function)
        return found

    def _read_function(self, function: FunctionType) -> set[str]:
        names = set(_names(function.__code__))
        self.references += _in_module(sys.modules.get(function.__module__), names, set())
        self.names |= names
        return names


def _patched(cls: type[nn.Module]) -> str | None:
    """Why the forward of a class is not the code that it was written with. It may do more than compute tokens, such as
    keep them for later."""
    cls = next(base for base in cls.__mro__ if "forward" in vars(base))
    forward = vars(cls)["forward"]
    if getattr(forward, "__globals__", {}).get("__name__") == _CHECKPOINTS:
        forward = forward.__wrapped__
    if not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__"):
        return f"{cls.__name__}.forward is wrapped, and the wrapper would not run"
    if (forward.__module__, forward.__qualname__) != (cls.__module__, f"{cls.__qualname__}.forward"):
        return f"{cls.__name__}.forward has been replaced by {forward.__qualname__}, which would not run"
    return None


def _is_stable(cls: type, name: str) -> bool:
    """Whether `cls` has something under this name that can be recognised, unlike a class method, made at each look."""
    value = getattr(cls, name, _ABSENT)
    return value is not _ABSENT and value is getattr(cls, name) and (_constant(value) or isinstance(value, property))


def _names(code: CodeType) -> Iterator[str]:
    """Names in a function's code and in functions inside it; strings too, for `getattr(self, "name")`."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _names(constant)


def _in_module(module: ModuleType | None, names: set[str], visited: set[int]) -> Iterator[Reference]:
    """What `names` are in a Python module, and in those that are named there, as in `torch.nn.functional.gelu`."""
    visited.add(id(module))
    for name in sorted(names & vars(module).keys()) if module else ():
        value = getattr(module, name)
        if isinstance(value, ModuleType):
            yield Reference(module, name, value)
            if id(value) not in visited:
                yield from _in_module(value, names, visited)
        elif _constant(value):
            yield Reference(module, name, value)


# ---- comparing -------------------------------------------------------------------------------------------------------


def rewritten(cls: type) -> str | None:
    """Which code that the op of an accelerated class stands for is not what it was, or None."""
    remembered = cls.remembered
    for owner, name, value in remembered.code:
        if getattr(owner, name, None) is not value:
            return f"{owner.__name__}.{name} has been replaced"
    for name, value in remembered.methods:
        if getattr(cls, name, None) is not value:
            return f"{name} has been replaced"
    return cls.replaced()


# A constant of the trace for Dynamo, which would guard each of its comparisons. It guards most code that it traces
# through against being replaced no better.
rewritten._dynamo_marked_constant = True


def difference(module: nn.Module) -> str | None:
    """In what an accelerated module is not what it was when it was tried out, or None."""
    forward, _, _, own, leaves, names = module.remembered
    if module.original.forward is not forward:
        return "its forward has been replaced"
    if reason := rewritten(type(module)):
        return reason
    children = module._modules
    if names is not None and tuple(children) != names:
        return f"has the children {', '.join(children)}, not {', '.join(names)}"
    if reason := _differs(module, own):
        return reason
    for leaf in leaves:
        child = children.get(leaf.name)
        if type(child) is not leaf.cls:
            return f"{leaf.name} is a {type(child).__name__} that was not there when it was tried out"
        if any(hooks(child)):
            return f"{leaf.name} has hooks, which would not run"
        if reason := _differs(child, leaf):
            return f"{leaf.name} {reason}"
    return None


def _code_of(owner: Any, name: str) -> CodeType | None:
    return getattr(getattr(owner, name), "__code__", None)


def _differs(module: nn.Module, leaf: Leaf) -> str | None:
    state = vars(module)
    for name, value in leaf.settings:
        if state.get(name, _ABSENT) != value:
            return f"has another {name} than when it was tried out"
    for key, name, value in leaf.configured:
        if getattr(state.get(key), name, _ABSENT) != value:
            return f"has another {key}.{name} than when it was tried out"
    for name in leaf.methods:
        # Dynamo does not guard what is in `vars`; it guards the second comparison.
        if name in state or _code_of(module, name) is not _code_of(type(module), name):
            return f"has a {name} of its own, which would not run"
    for name in leaf.inherited:
        if name in state:
            return f"has a {name} of its own"
    # Not by `getattr`, which finds parameters last and costs more than all the rest.
    parameters, buffers = state["_parameters"], state["_buffers"]
    for name, there in leaf.tensors:
        tensor = parameters[name] if name in parameters else buffers.get(name)
        if (tensor is not None) != there:
            return f"has {'no' if there else 'a'} {name}"
        if there and type(tensor) not in PLAIN:
            return f"has a {type(tensor).__name__} as {name}"
    return None
