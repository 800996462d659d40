"""Groups of parameters: what shares a weight decay and a factor on the learning rate, and whether groups make sense."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite

from torch import Tensor


@dataclass(frozen=True)
class ParamGroup:
    """Parameters by name that share a weight decay and a factor on the learning rate.

    matrix  whether they are 2-D weights between embedding and head, which Muon treats in a way of its own
    """

    params: Mapping[str, Tensor]
    weight_decay: float
    lr_scale: float = 1.0
    matrix: bool = False


class GroupError(ValueError):
    """Groups of parameters that cannot be trained by."""


class GradientError(RuntimeError):
    """A method's step gives other gradients than those of the parameters that are trained, and of these all."""


def default_groups(
    named_parameters: Iterable[tuple[str, Tensor]], weight_decay: float, no_decay: Collection[str] = ()
) -> list[ParamGroup]:
    """Trainable parameters in two groups: decayed, and not (1-D tensors, biases and the names in `no_decay`)."""
    decayed: dict[str, Tensor] = {}
    undecayed: dict[str, Tensor] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            plain = parameter.ndim <= 1 or name.endswith(".bias") or name in no_decay
            (undecayed if plain else decayed)[name] = parameter
    groups = ParamGroup(decayed, weight_decay), ParamGroup(undecayed, 0.0)
    return [group for group in groups if group.params]


def refined(
    groups: Sequence[ParamGroup], scales: Mapping[str, float], matrices: Collection[str] = ()
) -> list[ParamGroup]:
    """The groups, each split so that all of its parameters have one factor in `scales` and are matrices or not.

    scales    by name a factor on the learning rate, which multiplies the group's own; 1 for a name that is missing
    matrices  names of the parameters that are `ParamGroup.matrix`
    """
    found = []
    for group in groups:
        parts: dict[tuple[float, bool], dict[str, Tensor]] = {}
        for name, parameter in group.params.items():
            parts.setdefault((scales.get(name, 1.0), name in matrices), {})[name] = parameter
        found += [
            replace(group, params=params, lr_scale=group.lr_scale * scale, matrix=matrix)
            for (scale, matrix), params in parts.items()
        ]
    return found


def check(groups: Sequence[ParamGroup]) -> None:
    """Raise GroupError unless the groups hold something to train, each tensor once and under one name, and all of it
    asks for gradients. Groups without parameters are allowed."""
    names: set[str] = set()
    owners: dict[int, str] = {}
    for group in groups:
        for what, value in (("weight_decay", group.weight_decay), ("lr_scale", group.lr_scale)):
            if not (isfinite(value) and value >= 0):
                first = next(iter(group.params), "no parameter")
                raise GroupError(f"the group that begins with {first!r} has {what} {value}, but it must be at least 0")
        for name, parameter in group.params.items():
            if name in names:
                raise GroupError(f"{name!r} is in more than one group of parameters")
            if id(parameter) in owners:
                raise GroupError(
                    f"{owners[id(parameter)]!r} and {name!r} are one tensor, which would be updated twice a step; put "
                    "tied parameters into a group under one of their names, the first of named_parameters()"
                )
            if not parameter.requires_grad:
                raise GroupError(
                    f"{name!r} is in a group of parameters but is frozen (requires_grad is False), so it would get no "
                    "gradient; leave it out of param_groups()"
                )
            names.add(name)
            owners[id(parameter)] = name
    if not names:
        raise GroupError("there is nothing to train: no group has a parameter")


def check_owned(groups: Sequence[ParamGroup], parameters: Mapping[str, Tensor]) -> None:
    """Raise GroupError unless the groups hold nothing but `parameters`, by name what is trained now: the same tensors
    under the same names."""
    for name, parameter in ((name, p) for group in groups for name, p in group.params.items()):
        if parameters.get(name) is not parameter:
            own = next((own for own, p in parameters.items() if p is parameter), None)
            hint = f": there that tensor is {own!r}" if own else ""
            raise GroupError(
                f"a group of parameters has {name!r}, which is not the name of a parameter that is trained now{hint}"
            )
