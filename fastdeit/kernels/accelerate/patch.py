"""Run the transformer blocks of an existing model, such as timm's, on the fused ops: in place and reversibly.

Modules are recognised by structure: the names of their children, and the types and settings of the leaves. Neither the
class of a block nor its code is looked at: from timm 0.6 to 1.0.31 the names of a ViT's parameters did not change,
while the forward of its attention had six versions. Three kinds are swapped, each on its own:

    block      norm1, attn, norm2, mlp      x = x + keep1 * gamma1 * attn(norm1(x)), then the same with norm2 and mlp:
                                            `add_layer_norm`; attn and mlp are called, whatever they are
    attention  qkv, proj                    `attention`; qkv and proj are called, whatever they are (where the bias of
                                            qkv is parameters of its own, as EVA's, the weight of qkv is read)
    mlp        fc1, act, fc2                `mlp`, on the weights of fc1 and fc2

A fourth is the model around them: where its heads read the class token alone, its last block computes no more than
that (`last_block`).

A swap changes a module's class to a subclass of its class, and nothing else: children, parameters, state dict, the
module's own hooks and isinstance stay, and copies and pickles are accelerated too. Every swap is tried out first, once
for all modules that are alike (`trial`). What was tried out is remembered by the class, and every call compares
(`identity`): after any change of code, settings or leaves, or where an argument is given that the op has no place for,
the original forward runs.
"""

import copyreg
import inspect
import re
import warnings
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from fastdeit.kernels import nn as drop_in
from fastdeit.kernels._table import aligned
from fastdeit.kernels.accelerate import last_block as patch_last_block
from fastdeit.kernels.accelerate import other_attention, others
from fastdeit.kernels.accelerate.identity import Unknown, difference
from fastdeit.kernels.accelerate.last_block import LastBlockMixin
from fastdeit.kernels.accelerate.modules import (
    KINDS,
    Accelerated,
    AcceleratedClass,
    AttentionMixin,
    Kind,
    accelerated,
    make_last,
    put_back,
)
from fastdeit.kernels.accelerate.trial import disagreement, signature

_KINDS = (*KINDS, *others.KINDS, *other_attention.KINDS)
_BY_CLASS = (others.SEQUENCE, other_attention.PACKED)


class Row(NamedTuple):
    """What became of one module: `path` in the model, `part` ("block", "attn", "mlp", or "last block" of the model
    around them), the `op` it runs on, or None and the `reason` why its own code stays."""

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
        alike: dict[tuple, list[str]] = {}
        for row in self.rows:
            alike.setdefault((re.sub(r"\b\d+\b", "*", row.path), *row[1:]), []).append(row.path)
        lines = [("modules", "", "part", "runs on", "why")]
        for (pattern, part, op, reason), paths in alike.items():
            path = pattern if len(paths) > 1 else paths[0]
            lines.append((path or "(the model)", str(len(paths)), part, op or "its own code", reason))
        return aligned(lines)


def accelerate(model: nn.Module, *, strict: bool = False, last_block: bool = True) -> Report:
    """Run the transformer blocks, attentions and MLPs in `model` on the fused ops, where that computes the same.

    strict      change nothing and raise ValueError with the report unless all of these that were found can be swapped
    last_block  where the heads read the class token alone, `forward` computes no more than that in the last block

    Changes the model in place, and of it only the classes of modules; parameters, their names and the state dict stay.
    Calling it again is harmless. Drop-path draws from torch's generator what the model's own code would have drawn.
    Modules that have changed since an earlier call are tried out again. Gradients cannot be differentiated again. Call
    it before `torch.compile` and before `fully_shard`; RuntimeError after the latter.
    """
    _refuse_sharded(model, "accelerate")
    rows, swaps = _parts(model)
    report = Report(tuple(rows))
    if strict and (report.kept or not rows):
        raise ValueError(f"accelerate(strict=True) cannot swap everything, so nothing was changed:\n{report}")
    for module, cls in swaps:
        module.__class__ = cls
    return Report((*rows, *_last_blocks(model, last_block)))


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: all modules of `model` get their classes back. RuntimeError after `fully_shard`."""
    _refuse_sharded(model, "restore")
    put_back(model)


def _parts(model: nn.Module) -> tuple[list[Row], list[tuple[nn.Module, type[Accelerated]]]]:
    """What becomes of blocks, attentions and MLPs, and the classes that those to be swapped get."""
    with_rope = any(path.rpartition(".")[2] == "rope" for path, _ in model.named_modules())
    rows, swaps, tried = [], [], {}
    for path, module in model.named_modules():
        kind = _kind(path, module)
        if kind is None:
            continue
        reason = kind.misfit(module)
        if reason is None and with_rope and kind.mixin is AttentionMixin and _takes_rope(module):
            reason = "is given rotary position embeddings, which the op does not apply"
        if reason is None and (not isinstance(module, Accelerated) or difference(module)):
            cls = _swapped(kind, module, tried)
            reason = cls if isinstance(cls, str) else None
            if reason is None:
                swaps.append((module, cls))
        rows.append(Row(path, kind.name, kind.mixin.op if reason is None else None, reason or ""))
    return rows, swaps


def _swapped(kind: Kind, module: nn.Module, tried: dict[tuple, str | None]) -> type[Accelerated] | str:
    """The class that `module`, which fits, gets, or the reason why it keeps its own. Those alike are tried out once."""
    try:
        remembered = kind.structure.remember(module, _original(module))
    except Unknown as error:
        return str(error)
    alike = (remembered, *signature(kind, module))
    if alike not in tried:
        tried[alike] = disagreement(kind, module, remembered)
    return tried[alike] or accelerated(kind.mixin, _original(module), remembered)


def _original(module: nn.Module) -> type[nn.Module]:
    return module.original if isinstance(module, Accelerated) else type(module)


def _last_blocks(model: nn.Module, wanted: bool) -> list[Row]:
    """Swap the models whose parts have been swapped, or undo it if not wanted."""
    rows = []
    for path, module in model.named_modules():
        if not patch_last_block.found(module):
            continue
        if not wanted:
            if isinstance(module, LastBlockMixin):
                module.__class__ = module.original
            continue
        cls = _asking(module)
        reason = cls if isinstance(cls, str) else ""
        if not reason:
            module.__class__ = cls
            make_last(module.blocks[-1])
        rows.append(Row(path, "last block", None if reason else LastBlockMixin.op, reason))
    return rows


def _asking(model: nn.Module) -> type[Accelerated] | str:
    """The class of a model that asks its last block for less, or the reason why it cannot."""
    if reason := patch_last_block.misfit(model):
        return reason
    if isinstance(model, LastBlockMixin) and not difference(model):
        return type(model)
    try:
        remembered = patch_last_block.remembered(model, _original(model))
    except Unknown as error:
        return str(error)
    return patch_last_block.disagreement(model) or accelerated(LastBlockMixin, _original(model), remembered)


# ---- pickles ---------------------------------------------------------------------------------------------------------


def _not_tried_out(mixin: type[Accelerated], original: type[nn.Module]) -> type[nn.Module]:
    """The class of a module in a pickle. What was tried out where it was made may be other code here, so that it is
    tried out again: `__setstate__` is called when the module has all its parts."""

    def setstate(self: nn.Module, state: dict) -> None:
        original.__setstate__(self, state)
        self.__class__ = original
        kinds = [kind for kind in (*_KINDS, *_BY_CLASS) if kind.mixin is mixin]
        kind = next((kind for kind in kinds if not kind.misfit(self)), kinds[0] if kinds else None)
        cls = _asking(self) if kind is None else kind.misfit(self) or _swapped(kind, self, _TRIED)
        if isinstance(cls, str):
            warnings.warn(f"{original.__name__} was accelerated, but runs its own code here: {cls}", stacklevel=2)
        else:
            self.__class__ = cls
            if kind is None:
                make_last(self.blocks[-1])

    return type(original.__name__, (original,), {"__setstate__": setstate, "__module__": __name__})


_TRIED: dict[tuple, str | None] = {}
copyreg.pickle(AcceleratedClass, lambda cls: (_not_tried_out, (cls.mixin, cls.original)))


# ---- what is left alone ----------------------------------------------------------------------------------------------


def _refuse_sharded(model: nn.Module, name: str) -> None:
    from torch.distributed.fsdp import FSDPModule  # costs too much to import where nobody shards

    for path, module in model.named_modules():
        if isinstance(module, FSDPModule):
            raise RuntimeError(
                f"{name}(model) has to come before fully_shard, which has changed the class of "
                f"{path or 'the model'!r} to {type(module).__name__}"
            )


def _takes_rope(module: nn.Module) -> bool:
    return "rope" in inspect.signature(type(module).forward).parameters


def _kind(path: str, module: nn.Module) -> Kind | None:
    """What `module` looks like, by its children or by its own name."""
    if isinstance(module, (drop_in.Block, drop_in.Attention, drop_in.Mlp)):
        return None
    if isinstance(getattr(module, "fc1", None), nn.Conv2d):
        return None  # squeeze-and-excitation has an MLP's names, but works on images
    name = path.rpartition(".")[2]
    children = module._modules.keys()
    if isinstance(module, nn.Sequential) and name == others.SEQUENCE.name:
        return others.SEQUENCE
    if isinstance(module, nn.MultiheadAttention):
        return other_attention.PACKED if name in other_attention.NAMES else None
    by_children = (kind for kind in _KINDS if children >= set(kind.structure.required))
    return next(by_children, next((kind for kind in _KINDS if kind.name == name), None))
