"""What `accelerate` swaps: the structure a module must have, and what it computes afterwards.

Every check returns the reason why something does not fit, or None. Whether the structure fits is looked at when a
module is swapped, and whether anything has changed since then with every call (`identity`), because a leaf may be
replaced, hooked or patched in between.
"""

import functools
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeit.kernels import _asked, _op
from fastdeit.kernels import nn as drop_in
from fastdeit.kernels._hooks import hooks
from fastdeit.kernels.accelerate.identity import PLAIN, Remembered, difference, remember
from fastdeit.kernels.attention.op import attention, query_attention
from fastdeit.kernels.layer_norm.op import add_layer_norm
from fastdeit.kernels.mlp.op import mlp

# ---- structure -------------------------------------------------------------------------------------------------------

_OF_ATTENTION = {"attn_mask", "is_causal", "rope", "shared_rel_pos_bias"}
"""Arguments of a block that only its attention looks at."""


def passed_by(module: nn.Module, *tensors: str) -> str | None:
    """Why an op may not read these tensors of `module` instead of calling it."""
    if any(hooks(module)):
        return "has hooks, which would not run"
    if "forward" in vars(module):
        return "has a forward of its own, which would not run"
    for name in tensors:
        tensor = getattr(module, name)
        if type(tensor) not in PLAIN:
            return f"has no {name}" if tensor is None else f"has a {type(tensor).__name__} as {name}"
    return None


def called_as_it_is(module: nn.Module) -> str | None:
    """None: whatever `module` is, its own code runs."""
    return None


def linear(module: nn.Module, *tensors: str) -> str | None:
    """Why `module` is not a plain linear layer with these tensors, weight and bias by default."""
    if type(module) is not nn.Linear:
        return f"is a {type(module).__name__}, not a torch.nn.Linear"
    return passed_by(module, *(tensors or ("weight", "bias")))


def layer_norm(module: nn.Module) -> str | None:
    """Why `module` is not a LayerNorm with weight and bias."""
    # Both torch's and timm's are called so; subclasses that compute something else are not.
    if not (isinstance(module, nn.LayerNorm) and type(module).__name__ == "LayerNorm"):
        return f"is a {type(module).__name__}, not a LayerNorm"
    return passed_by(module, "weight", "bias")


def exact_gelu(module: nn.Module) -> str | None:
    """Why `module` is not GELU by the error function."""
    name, kind = type(module).__name__, getattr(module, "approximate", "none")
    of_transformers = name == "GELUActivation" and getattr(module, "act", None) is F.gelu
    if not (of_transformers or (name == "GELU" and kind == "none")):
        return f"is {module}, not the exact GELU"
    return passed_by(module)


def nothing(module: nn.Module) -> str | None:
    """Why `module` computes something."""
    if type(module) is not nn.Identity and not (type(module) is nn.Dropout and module.p == 0):
        return f"is {module}, which the op does not compute"
    return passed_by(module)


def _layer_scale(module: nn.Module) -> str | None:
    return passed_by(module, "gamma") if type(module).__name__ == "LayerScale" else nothing(module)


def drops(module: nn.Module | None) -> bool:
    """Whether `module` is called a drop-path: timm's, or that of a model of transformers."""
    return type(module).__name__.endswith("DropPath")


def drop_path(module: nn.Module) -> str | None:
    """Why `module` is neither a drop-path nor computes nothing."""
    return passed_by(module) if drops(module) else nothing(module)


def _no_functions(cls: type[nn.Module]) -> tuple[FunctionType, ...]:
    return ()


class Structure(NamedTuple):
    """Children and what each has to be, those that have to be there, and tensors of the module's own.

    functions  of a class, that its methods call and the op stands for as well
    """

    children: Mapping[str, Callable[[nn.Module], str | None]]
    required: tuple[str, ...]
    tensors: tuple[str, ...] = ()
    functions: Callable[[type[nn.Module]], tuple[FunctionType, ...]] = _no_functions

    def remember(self, module: nn.Module, original: type[nn.Module]) -> Remembered:
        """What an op stands for in `module`, which fits, and whose own code is that of `original`; `Unknown`."""
        present = [name for name, child in module._modules.items() if child is not None]
        leaves = [name for name in present if self.children[name] is not called_as_it_is]
        if getattr(module, "q_bias", None) is not None:
            leaves.append("qkv")  # whose weight is read, because its bias is apart
        called = [name for name in leaves if self.children[name] is drop_path]
        return remember(module, original, leaves, called, functions=self.functions(original))

    def misfit(self, module: nn.Module) -> str | None:
        """Why `module` is not built like this, in words; None if it is."""
        if "forward" in vars(module):
            return "has a forward of its own, which would not run"
        for name, child in module._modules.items():
            if child is None:
                continue
            if name not in self.children:
                return f"has {name}, a {type(child).__name__}, which the op does not compute"
            if reason := self.children[name](child):
                return f"{name} {reason}"
        for name in self.required:
            if name not in module._modules:
                return f"has no {name}"
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is not None and name not in self.tensors:
                    return f"has {name}, which the op does not take"
        return None


BLOCK = Structure(
    children={
        "norm1": layer_norm,
        "attn": called_as_it_is,
        "ls1": _layer_scale,
        "drop_path1": drop_path,
        "norm2": layer_norm,
        "mlp": called_as_it_is,
        "ls2": _layer_scale,
        "drop_path2": drop_path,
        "drop_path": drop_path,
    },
    required=("norm1", "attn", "norm2", "mlp"),
    tensors=("gamma_1", "gamma_2"),
)
_ATTENTION = Structure(
    children={
        "qkv": called_as_it_is,
        "q_norm": nothing,
        "k_norm": nothing,
        "attn_drop": nothing,
        "norm": nothing,
        "proj": called_as_it_is,
        "proj_drop": nothing,
    },
    required=("qkv", "proj"),
    tensors=("q_bias", "k_bias", "v_bias"),
)
_MLP = Structure(
    children={"fc1": linear, "act": exact_gelu, "drop1": nothing, "norm": nothing, "fc2": linear, "drop2": nothing},
    required=("fc1", "act", "fc2"),
)


def _attention_misfit(module: nn.Module) -> str | None:
    if reason := _ATTENTION.misfit(module):
        return reason
    if not isinstance(getattr(module, "num_heads", None), int):
        return "has no num_heads"
    # EVA's qkv has its bias apart, and is then not called.
    if getattr(module, "q_bias", None) is not None and (reason := linear(module.qkv, "weight")):
        return f"qkv {reason}"
    return None


def _mlp_misfit(module: nn.Module) -> str | None:
    if reason := _MLP.misfit(module):
        return reason
    made, taken = module.fc1.out_features, module.fc2.in_features
    return None if made == taken else f"is gated: fc1 makes {made} features, fc2 takes {taken}"


# ---- accelerated modules ---------------------------------------------------------------------------------------------


class Accelerated:
    """Mixin in front of a module's original class.

    op          the op whose backend may be forced, and then has to run
    original    the class that the module had
    remembered  what was tried out
    last        whether it is the last block of a model, which can be asked for less
    """

    mixin: type["Accelerated"]
    op: str
    original: type[nn.Module]
    remembered: Remembered
    last: bool

    @classmethod
    def replaced(cls) -> str | None:
        """Which code that the op stands for, beside what is remembered, is not what it was; None for none."""
        return None

    @classmethod
    def on_tokens(cls, module: nn.Module, x: Tensor) -> Tensor:
        """The result of `module`, by its own code or the op, for the tokens x alone."""
        return module.forward(x)

    def steps_aside(self, refused: str | None) -> bool:
        """Whether the module's own code has to run: because of `refused`, which is about the arguments of this call, or
        because something has changed, of which one warning tells. ChoiceError if a kernel has been asked for by name.
        """
        reason = refused or difference(self)
        if reason is None:
            return False
        wanted = _asked.choice(self.op)
        if wanted not in (_asked.AUTO, _op.REFERENCE):
            raise _op.ChoiceError(
                f"{self.op}={wanted} is asked for, which cannot run in this {self.original.__name__}: {reason}"
            )
        if not refused and not torch.compiler.is_compiling():
            _warn_once(f"{self.original.__name__} runs its own code instead of {self.op}: {reason}")
        return True

    def __prepare_scriptable__(self) -> nn.Module:
        """What `torch.jit.script` takes: this module, with all classes put back. It would leave a copy in the model,
        and take one module for another by the ids of those that are gone."""
        warnings.warn(
            f"torch.jit.script has put {self.original.__name__} back on its own code: call accelerate(model) once more",
            RuntimeWarning,
            stacklevel=2,
        )
        put_back(self)
        return self


def traced(x: Any) -> bool:
    """Whether torch.fx or torch.jit.trace records what is done with x: that is to be the module's own code."""
    return isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing()


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


class AcceleratedClass(type):
    """The type of classes of accelerated modules, by which `pickle` knows them: they are in no Python module."""


@cache
def accelerated(
    mixin: type[Accelerated], original: type[nn.Module], remembered: Remembered, last: bool = False
) -> type[Accelerated]:
    """The class of a module of class `original` that has been swapped. Its forward has the original's signature."""
    forward = mixin.forward
    own = FunctionType(forward.__code__, forward.__globals__, "forward", forward.__defaults__, forward.__closure__)
    body = {
        "mixin": mixin,
        "original": original,
        "remembered": remembered,
        "last": last,
        "forward": functools.wraps(original.forward)(own),
        "__doc__": original.__doc__,
        "__module__": original.__module__,  # by which torch.fx knows what it leaves whole
    }
    return AcceleratedClass(f"Accelerated{original.__name__}", (mixin, original), body)


def runs(module: nn.Module | None, mixin: type[Accelerated]) -> bool:
    """Whether `module` is called by the forward of `mixin`, and not by that of a subclass."""
    return isinstance(module, mixin) and type(module).forward.__code__ is mixin.forward.__code__


def make_last(block: nn.Module) -> None:
    """Let an accelerated block be asked for its first tokens alone."""
    block.__class__ = accelerated(block.mixin, block.original, block.remembered, last=True)


def put_back(module: nn.Module) -> None:
    """Give `module` and all modules in it their original classes."""
    for part in module.modules():
        if isinstance(part, Accelerated):
            part.__class__ = part.original


def given(args: tuple, kwargs: Mapping[str, Any]) -> dict[str | int, Any]:
    """Arguments that ask for something: neither None nor False. Those without a name go by their place."""
    arguments = {**dict(enumerate(args)), **kwargs}
    return {name: value for name, value in arguments.items() if value is not None and value is not False}


def not_taken(arguments: Collection[str | int]) -> str | None:
    """Why an op cannot do what these arguments ask for."""
    return f"is given {', '.join(map(str, arguments))}, which the op does not take" if arguments else None


def not_tokens(x: Tensor) -> str | None:
    """Why `x` is not what an op for attention takes."""
    return None if x.dim() == 3 else f"is given a tensor of {x.dim()} dimensions, not tokens [B, N, C]"


class _Asked(threading.local):
    def __init__(self) -> None:
        self.block = 0
        self.rows: int | None = None


_ASKED = _Asked()


@contextmanager
def asking(block: nn.Module, rows: int | None) -> Iterator[None]:
    """In this thread, `block` returns its first `rows` tokens alone, if it can; None is all."""
    before = _ASKED.block, _ASKED.rows
    # By its number: Dynamo, compiling a block, refuses to meet that same block in another place as well.
    _ASKED.block, _ASKED.rows = id(block), rows
    try:
        yield
    finally:
        _ASKED.block, _ASKED.rows = before


def asked(block: nn.Module) -> int | None:
    """How many of its first tokens `block` is asked for; None is all."""
    # Of last blocks alone, for Dynamo guards the number: each other block would be compiled on its own.
    return _ASKED.rows if type(block).last and _ASKED.block == id(block) else None


def needs_all(block: nn.Module) -> str | None:
    """Why a block cannot make its first tokens alone: the path to what is in the way, and the reason."""
    for path, mixin in (("", BlockMixin), (".attn", AttentionMixin), (".mlp", MlpMixin)):
        part = block._modules.get(path[1:]) if path else block
        if not runs(part, mixin):
            return f"{path} keeps its own code"
        if reason := difference(part) or (None if path == "" and _sharded(part) else watched(part)):
            return f"{path} {reason}"
    for name in ("qkv", "proj"):
        # The weight of qkv is read, and what is not a plain layer may draw or do something else for fewer tokens. The
        # code of plain layers is what it was, for the MLP has two of them.
        layer = getattr(block.attn, name)
        bias = getattr(layer, "bias", None)
        if reason := linear(layer, "weight") if bias is None else linear(layer):
            return f".attn.{name} {reason}"
    return None


def watched(module: nn.Module) -> str | None:
    """Why it would be noticed that `module` takes or returns fewer tokens."""
    if "forward" in vars(module):
        return "has a forward of its own"
    return "has hooks, which would not see all tokens" if any(hooks(module)) else None


def _sharded(module: nn.Module) -> bool:
    """Whether `module` has hooks, all of them those of `fully_shard`, which do not mind how many tokens there are."""
    owners = [getattr(hook, "__self__", None) for registry in hooks(module) for hook in registry.values()]
    return bool(owners) and all(type(owner).__module__.startswith("torch.distributed.fsdp.") for owner in owners)


class Names(NamedTuple):
    """What a block calls its norms, its attention and its MLP."""

    norm1: str
    attn: str
    norm2: str
    mlp: str


class AnyBlock(Accelerated):
    """A block on `add_layer_norm`, whoever's it is.

    names       of its children
    arguments   what its own forward has to be given beside tokens
    makes_pair  whether its attention returns the result and something else
    """

    op = "add_layer_norm"
    names: Names
    arguments: Mapping[str, Any] = {}
    makes_pair = False

    @classmethod
    def on_tokens(cls, module: nn.Module, x: Tensor) -> Tensor:
        return module.forward(x, **cls.arguments)


class BlockMixin(AnyBlock):
    """A block on `add_layer_norm`. Asked for the first tokens, it makes their queries, projection and MLP alone."""

    names = Names("norm1", "attn", "norm2", "mlp")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the original computes; its own forward for what the ops do not do."""
        arguments = given(args, kwargs)
        if traced(x) or self.steps_aside(not_taken(arguments.keys() - _OF_ATTENTION)):
            return super().forward(x, *args, **kwargs)
        norm1, norm2 = self.norm1, self.norm2
        _, normed = add_layer_norm(x, None, norm1.weight, norm1.bias, norm1.eps)
        rows = asked(self)
        # A mask or an embedding of positions is for the queries of all tokens.
        if rows is None or arguments or x.dim() != 3 or needs_all(self):
            branch = self.attn(normed, **arguments)
        else:
            x, branch = x[:, :rows], self.attn.of_first(normed, rows)
        x, normed = normed_sum(sum_of(self, x, branch, "1"), norm2)
        return sum_of(self, x, self.mlp(normed), "2").sum()


def sum_of(block: nn.Module, x: Tensor, branch: Tensor, number: str) -> drop_in.Tokens:
    """`summed`, with the factor and the drop-path of one of timm's blocks."""
    scale = getattr(block, f"ls{number}", None)
    gamma = getattr(block, f"gamma_{number}", None)
    if gamma is None and type(scale).__name__ == "LayerScale":
        gamma = scale.gamma
    return summed(x, branch, gamma, getattr(block, f"drop_path{number}", None) or getattr(block, "drop_path", None))


def summed(x: Tensor, branch: Tensor, gamma: Tensor | None, drop: nn.Module | None) -> drop_in.Tokens:
    """The sum of x and a branch with this factor and this drop-path, in the dtype to which PyTorch would promote it."""
    dtype = torch.promote_types(x.dtype, branch.dtype)
    if gamma is not None:
        dtype = torch.promote_types(dtype, gamma.dtype)
    return drop_in.Tokens(x.to(dtype), branch, gamma, _kept(drop, x))


def normed_sum(tokens: drop_in.Tokens, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(the sum, its LayerNorm as `norm` has it)"""
    residual, branch, gamma, keep = tokens
    return add_layer_norm(residual, branch, norm.weight, norm.bias, norm.eps, gamma=gamma, keep=keep)


def _kept(drop: nn.Module | None, x: Tensor) -> Tensor | None:
    """Factors of the samples of a branch, by the drop-path of its block; None for none."""
    if drops(drop) and drop.training:
        # Its own code draws, so that the draws are those of the original model. In float32, because 1 / (1 - p) rounded
        # to bfloat16 would shrink or grow all branches alike.
        return drop(x.new_ones((len(x),) + (1,) * (x.dim() - 1), dtype=_op.statistics_dtype(x.dtype))).flatten()
    return None


class AttentionMixin(Accelerated):
    """A self-attention on `attention`."""

    op = "attention"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the original computes; its own forward for what the op does not do."""
        if traced(x) or self.steps_aside(not_taken(given(args, kwargs)) or not_tokens(x)):
            return super().forward(x, *args, **kwargs)
        apart = getattr(self, "q_bias", None) is not None
        qkv = F.linear(x, self.qkv.weight, self._qkv_bias()) if apart else self.qkv(x)
        return self.proj(attention(qkv, self.num_heads))

    def of_first(self, x: Tensor, rows: int) -> Tensor:
        """The result of the first `rows` of the tokens x `[B, N, C]`; reads the weight of qkv instead of calling it."""
        weight, bias = self.qkv.weight, self._qkv_bias()
        dim = len(weight) // 3
        of_q, of_kv = (None, None) if bias is None else (bias[:dim], bias[dim:])
        queries = F.linear(x[:, :rows], weight[:dim], of_q)
        return self.proj(query_attention(queries, F.linear(x, weight[dim:], of_kv), self.num_heads))

    def _qkv_bias(self) -> Tensor | None:
        if getattr(self, "q_bias", None) is None:
            return self.qkv.bias
        return torch.cat((self.q_bias, self.k_bias, self.v_bias))


class MlpMixin(Accelerated):
    """An MLP on `mlp`."""

    op = "mlp"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the original computes; its own forward for what the op does not do."""
        if traced(x) or self.steps_aside(not_taken(given(args, kwargs))):
            return super().forward(x, *args, **kwargs)
        return mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)


class Kind(NamedTuple):
    """A kind of module: what it is called, what it is built like, and the mixin that runs it on an op."""

    name: str
    structure: Structure
    misfit: Callable[[nn.Module], str | None]
    mixin: type[Accelerated]


KINDS = (
    Kind("block", BLOCK, BLOCK.misfit, BlockMixin),
    Kind("attn", _ATTENTION, _attention_misfit, AttentionMixin),
    Kind("mlp", _MLP, _mlp_misfit, MlpMixin),
)
