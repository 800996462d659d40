"""Run the transformer blocks of an existing model, such as timm's, on the fused ops: in place and reversibly.

Modules are recognised by structure: the names of their children, and the types and settings of the leaves. Neither the
class of a block nor its code is looked at: from timm 0.6 to 1.0.31 the names of a ViT's parameters did not change,
while the forward of its attention had six versions. Three kinds are swapped, each on its own:

    block      norm1, attn, norm2, mlp      x = x + keep1 * gamma1 * attn(norm1(x)), then the same with norm2 and mlp:
                                            `add_layer_norm`; attn and mlp are called, whatever they are
    attention  qkv, proj                    `attention`; qkv and proj are called, whatever they are (where the bias of
                                            qkv is parameters of its own, as EVA's, the weight of qkv is read)
    mlp        fc1, act, fc2                `mlp`, on the weights of fc1 and fc2

A swap changes a module's class to a subclass of its class, and nothing else: children, parameters, state dict, the
module's own hooks and isinstance stay, and copies and pickles are accelerated too. Every call looks at the structure
again. Where it fits no more (a LoRA layer, a parametrisation, a hook on a child that an op would pass by), or an
argument is given that the op has no place for, the original forward runs.

Names do not tell in which order a forward uses the children. Therefore a swap is tried out first, once for all modules
that are alike: on random weights and tokens, outputs and all gradients must be as close to those of the original in
float64 as the original in float32 is. Torch's generator is left alone.
"""

import inspect
import re
from collections import Counter
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeit.kernels import _op
from fastdeit.kernels import nn as drop_in
from fastdeit.kernels.attention import attention
from fastdeit.kernels.layer_norm import add_layer_norm
from fastdeit.kernels.mlp import mlp

# ---- structure: every check returns the reason why something does not fit, or None -----------------------------------

_OF_ATTENTION = {"attn_mask", "is_causal", "rope", "shared_rel_pos_bias"}
"""Arguments of a block that only its attention looks at."""


def _passed_by(module: nn.Module, *tensors: str) -> str | None:
    """Why an op may not read these tensors of `module` instead of calling it."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has hooks, which would not run"
    for name in tensors:
        tensor = getattr(module, name)
        if type(tensor) not in (nn.Parameter, Tensor):
            return f"has no {name}" if tensor is None else f"has a {type(tensor).__name__} as {name}"
    return None


def _called(module: nn.Module) -> str | None:
    return None


def _linear(module: nn.Module, *tensors: str) -> str | None:
    if type(module) is not nn.Linear:
        return f"is a {type(module).__name__}, not a torch.nn.Linear"
    return _passed_by(module, *(tensors or ("weight", "bias")))


def _layer_norm(module: nn.Module) -> str | None:
    # Both torch's and timm's are called so; subclasses that compute something else are not.
    if not (isinstance(module, nn.LayerNorm) and type(module).__name__ == "LayerNorm"):
        return f"is a {type(module).__name__}, not a LayerNorm"
    return _passed_by(module, "weight", "bias")


def _gelu(module: nn.Module) -> str | None:
    if type(module).__name__ != "GELU" or getattr(module, "approximate", "none") != "none":
        return f"is {module}, not the exact GELU"
    return _passed_by(module)


def _nothing(module: nn.Module) -> str | None:
    if type(module) is not nn.Identity and not (type(module) is nn.Dropout and module.p == 0):
        return f"is {module}, which the op does not compute"
    return _passed_by(module)


def _layer_scale(module: nn.Module) -> str | None:
    return _passed_by(module, "gamma") if type(module).__name__ == "LayerScale" else _nothing(module)


def _drop_path(module: nn.Module) -> str | None:
    return _passed_by(module) if type(module).__name__ == "DropPath" else _nothing(module)


class _Structure(NamedTuple):
    """Children and what each has to be, those that have to be there, and tensors of the module's own."""

    children: Mapping[str, Callable[[nn.Module], str | None]]
    required: tuple[str, ...]
    tensors: tuple[str, ...] = ()

    def misfit(self, module: nn.Module) -> str | None:
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


_BLOCK = _Structure(
    children={
        "norm1": _layer_norm,
        "attn": _called,
        "ls1": _layer_scale,
        "drop_path1": _drop_path,
        "norm2": _layer_norm,
        "mlp": _called,
        "ls2": _layer_scale,
        "drop_path2": _drop_path,
        "drop_path": _drop_path,
    },
    required=("norm1", "attn", "norm2", "mlp"),
    tensors=("gamma_1", "gamma_2"),
)
_ATTENTION = _Structure(
    children={
        "qkv": _called,
        "q_norm": _nothing,
        "k_norm": _nothing,
        "attn_drop": _nothing,
        "norm": _nothing,
        "proj": _called,
        "proj_drop": _nothing,
    },
    required=("qkv", "proj"),
    tensors=("q_bias", "k_bias", "v_bias"),
)
_MLP = _Structure(
    children={"fc1": _linear, "act": _gelu, "drop1": _nothing, "norm": _nothing, "fc2": _linear, "drop2": _nothing},
    required=("fc1", "act", "fc2"),
)


def _attention_misfit(module: nn.Module) -> str | None:
    if reason := _ATTENTION.misfit(module):
        return reason
    if not isinstance(getattr(module, "num_heads", None), int):
        return "has no num_heads"
    # EVA's qkv has its bias apart, and is then not called.
    if getattr(module, "q_bias", None) is not None and (reason := _linear(module.qkv, "weight")):
        return f"qkv {reason}"
    return None


def _mlp_misfit(module: nn.Module) -> str | None:
    if reason := _MLP.misfit(module):
        return reason
    made, taken = module.fc1.out_features, module.fc2.in_features
    return None if made == taken else f"is gated: fc1 makes {made} features, fc2 takes {taken}"


# ---- accelerated modules ---------------------------------------------------------------------------------------------


class _Accelerated:
    """Mixin in front of a module's original class."""

    original: type[nn.Module]

    def __reduce_ex__(self, protocol: int) -> tuple:
        _, _, *rest = super().__reduce_ex__(protocol)
        return _new, (_mixin(self), self.original), *rest


def _mixin(module: _Accelerated) -> type[_Accelerated]:
    return next(kind.mixin for kind in _KINDS if isinstance(module, kind.mixin))


@cache
def _accelerated(mixin: type[_Accelerated], original: type[nn.Module]) -> type[nn.Module]:
    body = {"original": original, "__doc__": original.__doc__, "__module__": __name__}
    return type(f"Accelerated{original.__name__}", (mixin, original), body)


def _new(mixin: type[_Accelerated], original: type[nn.Module]) -> nn.Module:
    cls = _accelerated(mixin, original)
    return cls.__new__(cls)


def _given(args: tuple, kwargs: Mapping[str, Any]) -> dict[str | int, Any]:
    """Arguments that ask for something: neither None nor False. Those without a name go by their place."""
    arguments = {**dict(enumerate(args)), **kwargs}
    return {name: value for name, value in arguments.items() if value is not None and value is not False}


class _Block(_Accelerated):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = _given(args, kwargs)
        if given.keys() - _OF_ATTENTION or _BLOCK.misfit(self):
            return super().forward(x, *args, **kwargs)
        norm1, norm2 = self.norm1, self.norm2
        _, normed = add_layer_norm(x, None, norm1.weight, norm1.bias, norm1.eps)
        tokens = _tokens(self, x, self.attn(normed, **given), "1")
        x, normed = add_layer_norm(
            tokens.residual, tokens.branch, norm2.weight, norm2.bias, norm2.eps, gamma=tokens.gamma, keep=tokens.keep
        )
        return _tokens(self, x, self.mlp(normed), "2").sum()


def _tokens(block: nn.Module, x: Tensor, branch: Tensor, number: str) -> drop_in.Tokens:
    """The sum of x and a branch, in the dtype to which PyTorch would promote it."""
    scale = getattr(block, f"ls{number}", None)
    gamma = getattr(block, f"gamma_{number}", None)
    if gamma is None and type(scale).__name__ == "LayerScale":
        gamma = scale.gamma
    dtype = torch.promote_types(x.dtype, branch.dtype)
    if gamma is not None:
        dtype = torch.promote_types(dtype, gamma.dtype)
    drop = getattr(block, f"drop_path{number}", None) or getattr(block, "drop_path", None)
    keep = None
    if type(drop).__name__ == "DropPath" and drop.training:
        # Its own code draws, so that the draws are those of the original model. In float32, because 1 / (1 - p) rounded
        # to bfloat16 would shrink or grow all branches alike.
        keep = drop(x.new_ones((len(x),) + (1,) * (x.dim() - 1), dtype=_op.statistics_dtype(x.dtype))).flatten()
    return drop_in.Tokens(x.to(dtype), branch, gamma, keep)


class _Attention(_Accelerated):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if _given(args, kwargs) or x.dim() != 3 or _attention_misfit(self):
            return super().forward(x, *args, **kwargs)
        if getattr(self, "q_bias", None) is None:
            qkv = self.qkv(x)
        else:
            qkv = F.linear(x, self.qkv.weight, torch.cat((self.q_bias, self.k_bias, self.v_bias)))
        return self.proj(attention(qkv, self.num_heads))


class _Mlp(_Accelerated):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if _given(args, kwargs) or _mlp_misfit(self):
            return super().forward(x, *args, **kwargs)
        return mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)


class _Kind(NamedTuple):
    """A kind of module: what it is called where and what it runs on."""

    name: str
    op: str
    structure: _Structure
    misfit: Callable[[nn.Module], str | None]
    mixin: type[_Accelerated]


_KINDS = (
    _Kind("block", "add_layer_norm", _BLOCK, _BLOCK.misfit, _Block),
    _Kind("attn", "attention", _ATTENTION, _attention_misfit, _Attention),
    _Kind("mlp", "mlp", _MLP, _mlp_misfit, _Mlp),
)


def _kind(path: str, module: nn.Module) -> _Kind | None:
    """What `module` looks like, by its children or by its own name."""
    if isinstance(module, (drop_in.Block, drop_in.Attention, drop_in.Mlp)):
        return None
    if isinstance(getattr(module, "fc1", None), nn.Conv2d):
        return None  # squeeze-and-excitation has an MLP's names, but works on images
    name = path.rpartition(".")[2]
    children = module._modules.keys()
    return next((k for k in _KINDS if k.name == name or children >= set(k.structure.required)), None)


# ---- trying a swap out -----------------------------------------------------------------------------------------------


class _StandIn(nn.Linear):
    """In place of a block's attn or mlp while the block is tried out: small, and it works on any number of tokens."""

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        if given := _given((), kwargs):
            raise TypeError(f"{', '.join(given)} given")
        return super().forward(x)


def _width(kind: _Kind, module: nn.Module) -> int | None:
    """Channels of the tokens that the module takes."""
    if kind.mixin is _Block:
        return module.norm1.normalized_shape[0]
    first = module.fc1 if kind.mixin is _Mlp else module.qkv
    return next((layer.in_features for layer in first.modules() if hasattr(layer, "in_features")), None)


def _copy(kind: _Kind, module: nn.Module, width: int) -> nn.Module:
    """A float32 copy with random values wherever it has any, in eval mode. One on the meta device comes to the CPU."""
    stand_ins = {}
    if kind.mixin is _Block:
        device = module.norm1.weight.device
        stand_ins = {
            id(child): nn.utils.skip_init(_StandIn, width, width, device=device) for child in (module.attn, module.mlp)
        }
    copy = deepcopy(module, stand_ins).float().eval().requires_grad_()
    if any(parameter.is_meta for parameter in copy.parameters()):
        copy.to_empty(device="cpu")
    for seed, tensor in enumerate((*copy.parameters(), *copy.buffers())):
        if tensor.is_floating_point():
            size = tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 1
            tensor.data = size * _normal(*tensor.shape, like=tensor, seed=seed)
        else:
            tensor.zero_()
    return copy


def _normal(*shape: int, like: Tensor, seed: int) -> Tensor:
    """Standard normal values that do not touch torch's generator."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=like.device, dtype=torch.float32).to(like.dtype)


def _results(module: nn.Module, cls: type[nn.Module], x: Tensor) -> tuple[Tensor, ...]:
    """Output and the gradients of the tokens x and of all parameters, by the forward of `cls`."""
    module.__class__ = cls
    out = module.forward(x)
    free = [x, *module.parameters()]
    return out, *torch.autograd.grad(out, free, _normal(*out.shape, like=out, seed=1), materialize_grads=True)


def _disagreement(kind: _Kind, module: nn.Module) -> str | None:
    """Why the op cannot stand for the module's own forward, by what both compute."""
    width = _width(kind, module)
    if width is None:
        return "cannot be tried out: nothing says how wide its tokens are"
    original = type(module)
    try:
        copy = _copy(kind, module, width)
        x = _normal(2, 5, width, like=next(copy.parameters()), seed=0).requires_grad_()
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            theirs = _results(copy, original, x)
            exact = _results(deepcopy(copy).double(), original, x.detach().double().requires_grad_())
    except Exception as error:  # whatever an unknown forward may raise is the reason
        return f"cannot be tried out on tokens alone: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        mine = _results(copy, _accelerated(kind.mixin, original), x)
    for my, their, truth in zip(mine, theirs, exact, strict=True):
        if my.shape != truth.shape or not _as_close(my, their, truth):
            return "computes something else than its structure suggests"
    return None


def _as_close(mine: Tensor, theirs: Tensor, exact: Tensor) -> bool:
    """Whether mine is at most twice as far from exact as theirs, but for rounding."""
    rounding = 32 * torch.finfo(mine.dtype).eps * exact.abs().max()
    return bool((mine - exact).abs().max() <= 2 * (theirs - exact).abs().max() + rounding)


def _signature(kind: _Kind, module: nn.Module) -> tuple:
    """Equal for modules that are alike: types, settings and shapes. Drop-path rates differ between all blocks."""
    parts = []
    for name, part in module.named_modules():
        if kind.mixin is _Block and name.partition(".")[0] in ("attn", "mlp"):
            continue
        settings = [
            (key, value)
            for key, value in vars(part).items()
            if isinstance(value, (bool, int, float, str)) and key not in ("training", "drop_prob")
        ]
        shapes = [(key, value.shape, value.device) for key, value in part.named_parameters(recurse=False)]
        parts.append((name, type(part), tuple(settings), tuple(shapes)))
    return kind.name, *parts


# ---- public ----------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """What became of one module: `path` in the model, `part` ("block", "attn" or "mlp"), the `op` it runs on, or None
    and the `reason` why its own code stays."""

    path: str
    part: str
    op: str | None
    reason: str


@dataclass(frozen=True)
class Report:
    """What `accelerate` found. `str(report)` is a table in which modules of the same fate are one line."""

    rows: tuple[Row, ...]

    @property
    def kept(self) -> tuple[Row, ...]:
        """The rows of modules that keep their own code."""
        return tuple(row for row in self.rows if row.op is None)

    def __str__(self) -> str:
        if not self.rows:
            return "no module has the structure of a transformer block, its attention or its MLP"
        alike = Counter((re.sub(r"\b\d+\b", "*", row.path), *row[1:]) for row in self.rows)
        single = {(re.sub(r"\b\d+\b", "*", row.path), *row[1:]): row.path for row in self.rows}
        lines = [("modules", "", "part", "runs on", "why")]
        for key, count in alike.items():
            _, part, op, reason = key
            path = key[0] if count > 1 else single[key]
            lines.append((path or "(the model)", str(count), part, op or "its own code", reason))
        widths = [max(len(line[column]) for line in lines) for column in range(4)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[4]]).rstrip()
            for line in lines
        )


def accelerate(model: nn.Module, *, strict: bool = False) -> Report:
    """Run the transformer blocks, attentions and MLPs in `model` on the fused ops, where that computes the same.

    strict  change nothing and raise ValueError with the report unless everything found can be swapped

    Changes the model in place, and of it only the classes of modules; parameters, their names and the state dict stay.
    Calling it again is harmless. Drop-path draws from torch's generator what the model's own code would have drawn.
    Gradients cannot be differentiated again, and `torch.jit.script` needs `restore` first. Call it before
    `torch.compile` and before `fully_shard`; RuntimeError after the latter.
    """
    _refuse_sharded(model, "accelerate")
    with_rope = any(path.rpartition(".")[2] == "rope" for path, _ in model.named_modules())
    rows, swaps, tried = [], [], {}
    for path, module in model.named_modules():
        kind = _kind(path, module)
        if kind is None:
            continue
        reason = kind.misfit(module)
        if reason is None and with_rope and kind.mixin is _Attention and _takes_rope(module):
            reason = "is given rotary position embeddings, which the op does not apply"
        if reason is None and not isinstance(module, _Accelerated):
            signature = _signature(kind, module)
            if signature not in tried:
                tried[signature] = _disagreement(kind, module)
            reason = tried[signature]
            if reason is None:
                swaps.append((module, _accelerated(kind.mixin, type(module))))
        rows.append(Row(path, kind.name, kind.op if reason is None else None, reason or ""))
    report = Report(tuple(rows))
    if strict and (report.kept or not rows):
        raise ValueError(f"accelerate(strict=True) cannot swap everything, so nothing was changed:\n{report}")
    for module, cls in swaps:
        module.__class__ = cls
    return report


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: all modules of `model` get their classes back. RuntimeError after `fully_shard`."""
    _refuse_sharded(model, "restore")
    for module in model.modules():
        if isinstance(module, _Accelerated):
            module.__class__ = module.original


def _refuse_sharded(model: nn.Module, name: str) -> None:
    from torch.distributed.fsdp import FSDPModule  # costs too much to import where nobody shards

    for path, module in model.named_modules():
        if isinstance(module, FSDPModule):
            raise RuntimeError(
                f"{name}(model) has to come before fully_shard, which has changed the class of "
                f"{path or 'the model'!r} to {type(module).__name__}"
            )


def _takes_rope(module: nn.Module) -> bool:
    return "rope" in inspect.signature(getattr(module, "original", type(module)).forward).parameters
