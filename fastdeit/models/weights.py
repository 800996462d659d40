"""Weights of one model into another of the same kind: another image size, class count, or number of heads.

Nothing is dropped, resized or left as initialised without being named in the report.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdeit.models import convert
from fastdeit.models.init import init_linear
from fastdeit.models.positions import interpolated
from fastdeit.text import some

HEADS = ("head", "head_dist")
"""Heads of the DeiT family, which weights may have where a network has none."""
_PREFIX = ("cls_token", "dist_token", "reg_token")
"""Tokens in front of those of the patches, in their order."""

_SAY_GRID = (
    "a run tells how they lie; of a file, say it with model.weights_grid=[height, width], or of a teacher with "
    "method.teacher.weights_grid"
)


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` could not take over as it was.

    missing             names of the model's tensors that keep their initial values because the weights have none for
                        them
    unexpected          names of the weights' tensors that were left out: the model has no place for them
    resized             what became of the positional embedding, in words; empty if it fitted
    reinitialised_heads names of the heads whose number of classes differs: initialised anew
    converted           what was renamed or folded, in words (`convert`)
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    reinitialised_heads: tuple[str, ...] = ()
    converted: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Every tensor of the model is now that of the weights, and all of those were used."""
        return self == LoadReport()

    def __str__(self) -> str:
        parts = (
            ("kept as initialised", self.missing),
            ("left out", self.unexpected),
            ("resized", self.resized),
            ("heads initialised anew", self.reinitialised_heads),
            ("converted", self.converted),
        )
        return "; ".join(f"{what}: {', '.join(names)}" for what, names in parts if names) or "all tensors fit"


def load_weights(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    grid: tuple[int, int] | None = None,
    may_differ: Collection[str] | None = None,
) -> LoadReport:
    """Load `state_dict` into `model`, with names as timm has them, and say what did not fit.

    grid        (height, width) in patches of the weights' positional embedding, needed where it is not square
    may_differ  names of modules and parameters that only one side may have, and of heads that may be of another number
                of classes: what only the model has, and such a head, is initialised anew; what only the weights have is
                left out. None: the heads, and the distillation token. Everything else must be there on both sides

    A positional embedding for another image size is resized (`resize_pos_embed`). What else depends on the size is
    resized by the model's own `resized_weights`, where it has that (`contract.Model`). Where the model adds its prefix
    tokens without positions, those of the weights are added to the tokens. The names of LeViT's files and of DeiT's
    parallel blocks are mapped, and LayerScale is renamed or folded (`convert`). Raises ValueError, before anything is
    changed, where something is missing, left over, or of another shape or kind of number, and where a tied tensor of
    the model has two values.
    """
    own = model.state_dict()
    if odd := [name for name, tensor in state_dict.items() if tensor.layout != torch.strided or tensor.is_meta]:
        raise ValueError(f"{some(odd)} of the weights are sparse or without data")
    tensors, renamed = convert.levit(own, state_dict)
    tensors, parallel = convert.parallel(own, tensors)
    tensors, scaled = convert.layer_scale(own, tensors)
    tensors, resized = _resized_by_model(model, tensors)
    if not own.keys() & tensors.keys():
        raise ValueError(
            f"no tensor name of the weights ({some(state_dict)}) is one of the model's ({some(own)}); they are of "
            "another kind of model, or under names that are not known here"
        )
    free = (*model.head_names, *HEADS, "dist_token") if may_differ is None else tuple(may_differ)
    tied = second_names(model)
    tensors = tensors | {
        name: tensors[first] for name, first in tied.items() if name not in tensors and first in tensors
    }
    missing = tuple(name for name in own if name not in tensors)
    unexpected = tuple(sorted(name for name in tensors if name not in own))  # safetensors has no order
    heads = _foreign_heads(model, own, tensors)
    _refuse("it needs {}, which they do not have", missing, free)
    _refuse("they have {}, for which it has no place", unexpected, free)
    for head in heads:
        if head not in free:
            theirs, ours = (len(side[f"{head}.weight"]) for side in (tensors, own))
            raise ValueError(f"{head} of the weights knows {theirs} classes, and that of the model {ours}")
    taken = {
        name: tensor
        for name, tensor in tensors.items()
        if name in own and not any(name.startswith(f"{head}.") for head in heads)
    }
    _refuse_other_numbers(taken, own)
    positions = _positions(model)
    if positions is not None and "pos_embed" not in resized and getattr(taken.get("pos_embed"), "ndim", 0) == 3:
        taken["pos_embed"], note = resize_pos_embed(tensors, model, grid)
        resized |= {"pos_embed": note} if note else {}
        if positions[1] == 0:
            tokens = _prefix_with_positions(tensors, tuple(model.grid), grid)
            taken |= {name: tensor for name, tensor in tokens.items() if name in taken}
    _refuse_other_shapes(taken, own)
    _refuse_untied(taken, tied)
    model.load_state_dict(taken, strict=False)
    for head in heads:
        init_linear(model.get_submodule(head))
    return LoadReport(missing, unexpected, tuple(resized.values()), heads, (*renamed, *parallel, *scaled))


def _refuse(sentence: str, names: Collection[str], free: Collection[str]) -> None:
    bound = [name for name in names if not any(name == one or name.startswith(f"{one}.") for one in free)]
    if bound:
        raise ValueError(f"the weights do not fit the model: {sentence.format(some(bound))}")


def _refuse_other_shapes(taken: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    wrong = [name for name, tensor in taken.items() if tensor.shape != own[name].shape]
    if wrong:
        shapes = (f"{name} is {tuple(taken[name].shape)}, not {tuple(own[name].shape)}" for name in wrong[:4])
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(
            f"the weights are of another model, or of this one for another image size: {'; '.join(shapes)}{more}"
        )


def _refuse_other_numbers(taken: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    for name, tensor in taken.items():
        if tensor.is_floating_point() != own[name].is_floating_point() or tensor.is_complex():
            raise ValueError(f"{name} of the weights is {tensor.dtype}, and that of the model {own[name].dtype}")


def _refuse_untied(taken: Mapping[str, Tensor], tied: Mapping[str, str]) -> None:
    for name, first in tied.items():
        if name in taken and first in taken and not torch.equal(taken[name], taken[first]):
            raise ValueError(f"{first} and {name} are one tensor of the model, but two different ones of the weights")


def second_names(model: nn.Module) -> dict[str, str]:
    """The further names of the tensors that the state dict has under several, each with the first one."""
    firsts: dict[int, str] = {}
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: first for name, tensor in named if (first := firsts.setdefault(id(tensor), name)) != name}


def _resized_by_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights as the model's own `resized_weights` makes them, if it has that, and by name how, in words."""
    tensors = dict(tensors)
    if not hasattr(model, "resized_weights"):
        return tensors, {}
    try:
        made = dict(model.resized_weights(tensors))
    except KeyError as error:
        raise ValueError(
            f"{type(model).__name__}.resized_weights asks for {error}, which the weights do not have; they are of "
            "another kind of model"
        ) from error
    changed = {name: (tensors[name].shape, tensor.shape) for name, tensor in made.items() if name in tensors}
    return made, {name: f"{name} {tuple(a)} -> {tuple(b)}" for name, (a, b) in changed.items() if a != b}


def _positions(model: nn.Module) -> tuple[tuple[int, int], int] | None:
    """(grid, prefix positions) of the model's `pos_embed`; None where it has none, or does not tell its `grid`."""
    grid, own = getattr(model, "grid", None), model.state_dict().get("pos_embed")
    if grid is None or own is None or own.ndim != 3:
        return None
    rows, columns = grid
    prefix = getattr(model, "prefix_positions", own.shape[1] - rows * columns)
    return ((rows, columns), prefix) if prefix >= 0 else None


def _foreign_heads(model: nn.Module, own: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Heads whose weight differs from the model's in the number of classes alone."""
    foreign = []
    for head in model.head_names:
        mine, theirs = own.get(f"{head}.weight"), state_dict.get(f"{head}.weight")
        if mine is None or theirs is None or mine.shape == theirs.shape:
            continue
        if mine.shape[1:] == theirs.shape[1:]:
            foreign.append(head)
    return tuple(foreign)


def resize_pos_embed(
    state_dict: Mapping[str, Tensor], model: nn.Module, grid: tuple[int, int] | None = None
) -> tuple[Tensor, str]:
    """(positional embedding `[1, N, dim]` as `model` needs it, what was done in words: "" for nothing).

    Patch positions are interpolated as DeiT does for fine-tuning at another size (`positions.interpolated`). Positions
    of prefix tokens are copied; one that only the model has is 0 if the weights add the token without a position
    (DeiT III), and else stays as initialised, as its token does. For a model that adds its prefix tokens without
    positions there are none: the tokens themselves have them (`load_weights`).

    `grid` is the (height, width) of the weights' patches. Without it they are taken for a square. Raises ValueError
    where they are none, or are as many as those of a model that is no square.
    """
    source, own = state_dict["pos_embed"], model.state_dict()["pos_embed"]
    new_grid, new_prefix = _positions(model)
    old_prefix, old_grid = _source_layout(source, state_dict, new_grid, grid)
    if (old_grid, old_prefix) == (new_grid, new_prefix):
        return source, ""
    note = f"pos_embed {old_prefix}+{_by(old_grid)} -> {new_prefix}+{_by(new_grid)}"
    if old_prefix and not new_prefix:
        note += " (positions of the prefix tokens added to these)"
    patches = source[:, old_prefix:]
    if old_grid != new_grid:
        patches = interpolated(patches, old_grid, new_grid)
    prefix = source[:, : min(old_prefix, new_prefix)]
    if old_prefix == 0:
        prefix = source.new_zeros(1, min(_tokens(state_dict), new_prefix), source.shape[2])
    if prefix.shape[1] < new_prefix:
        prefix = torch.cat((prefix, own[:, prefix.shape[1] : new_prefix].to(source)), 1)
        note += " (position of the distillation token kept as initialised)"
    return torch.cat((prefix, patches), 1), note


def _prefix_with_positions(
    state_dict: Mapping[str, Tensor], new_grid: tuple[int, int], grid: tuple[int, int] | None
) -> dict[str, Tensor]:
    """The prefix tokens of the weights with their positions added, which is what their own model does with both."""
    positions, start, found = state_dict["pos_embed"], 0, {}
    if _source_layout(positions, state_dict, new_grid, grid)[0]:
        for name in (name for name in _PREFIX if name in state_dict):
            token = state_dict[name]
            found[name] = token + positions[:, start : start + token.shape[1]]
            start += token.shape[1]
    return found


def _source_layout(
    source: Tensor, state_dict: Mapping[str, Tensor], new_grid: tuple[int, int], grid: tuple[int, int] | None
) -> tuple[int, tuple[int, int]]:
    """(prefix positions, grid) of a stored positional embedding: they add up to its length."""
    length, tokens = source.shape[1], _tokens(state_dict)
    if grid is not None:
        prefix = length - grid[0] * grid[1]
        if prefix not in (0, tokens):
            raise ValueError(
                f"pos_embed has {length} positions, neither grid {_by(grid)} nor that plus {tokens} prefix tokens"
            )
        return prefix, tuple(grid)
    for prefix in (tokens, 0) if length > tokens else (0,):
        side = math.isqrt(length - prefix)
        if side * side == length - prefix:
            if new_grid != (side, side) and side * side == new_grid[0] * new_grid[1]:
                raise ValueError(
                    f"pos_embed has {length - prefix} patches, which can be {_by((side, side))} or {_by(new_grid)}; "
                    f"{_SAY_GRID}"
                )
            return prefix, (side, side)
    raise ValueError(f"pos_embed has {length} positions, which is no square plus {tokens} prefix tokens; {_SAY_GRID}")


def _tokens(state_dict: Mapping[str, Tensor]) -> int:
    """Number of prefix tokens of the model the weights come from."""
    return sum(state_dict[name].shape[1] for name in _PREFIX if name in state_dict)


def _by(grid: tuple[int, int]) -> str:
    return f"{grid[0]}x{grid[1]}"
