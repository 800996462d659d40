"""The same weights under other names: what training scripts put around a model's names, and LayerScale.

Every change is exact, and each is told in a sentence. Nothing is dropped here but what stands beside a part that was
chosen, and that is told as well.
"""

import re
from collections.abc import Collection, Mapping

from torch import Tensor

# DDP and DataParallel write the first before every name; torch.compile the second where the compiled module stands.
_WRAPPER = re.compile(r"^(?:module\.)+|(?:^|(?<=\.))_orig_mod\.")
_PARTS = ("teacher.backbone.", "backbone.", "model.")
"""Names of the network inside a larger module, the one to be taken first: DINOv2's teacher, then any backbone, then
Lightning's `model`."""

_GAMMA = re.compile(r"(.*\bblocks\.\d+\.)gamma_([12])")  # of DeiT III, CaiT and BEiT
_LS = re.compile(r"(.*\bblocks\.\d+\.)ls([12])\.gamma")  # of timm
_SCALED = {"1": "attn.proj", "2": "mlp.fc2"}
"""The last layer of the branch that LayerScale 1 or 2 multiplies."""


def bare(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """(`tensors` under the names that the network itself gives them, what was stripped or left out in sentences).

    `module.` and `_orig_mod.` go wherever they stand. Where some names begin with one of `_PARTS`, those are taken, and
    what is beside them (a projection head, a student) is left out. Both are repeated until there is nothing to strip.
    Raises ValueError where two names become one.
    """
    named, notes = dict(tensors), []
    while True:
        stripped = _renamed(named, {name: _WRAPPER.sub("", name) for name in named})
        if stripped.keys() != named.keys():
            wrappers = {f"{match.group().split('.')[0]}." for name in named for match in _WRAPPER.finditer(name)}
            notes.append(f"stripped {' and '.join(sorted(wrappers))} from the names")
            named = stripped
        part = next((part for part in _PARTS if any(name.startswith(part) for name in named)), None)
        if part is None:
            return named, tuple(notes)
        inside = {name: name.removeprefix(part) for name in named if name.startswith(part)}
        outside = [name for name in named if name not in inside]
        if twice := set(inside.values()) & set(outside):
            raise ValueError(f"{min(twice)} and {part}{min(twice)} are two tensors of one name; keep one of them")
        beside = f", and left out {_some(outside)}" if outside else ""
        notes.append(f"took what is under {part}{beside}")
        named = {short: named[name] for name, short in inside.items()}


def _renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for old, new in names.items():
        if new in renamed:
            first = next(name for name in names if names[name] == new)
            raise ValueError(f"{first} and {old} are two tensors of one name, {new}; keep one of them")
        renamed[new] = tensors[old]
    return renamed


def layer_scale(own: Collection[str], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """(`tensors` with LayerScale as a network with the names `own` has it, what was done in sentences).

    DeiT's `gamma_1` and `gamma_2` become timm's `ls1.gamma` and `ls2.gamma`, or the reverse. Where the network has no
    LayerScale, it is folded into the layer before: gamma * (W x + b) = (gamma W) x + gamma b, computed in float64 and
    rounded once to the dtype of W. Raises ValueError where that layer is not there or does not fit.
    """
    named, folded, mapped = dict(tensors), [], set()
    for name in tensors:
        match = _GAMMA.fullmatch(name) or _LS.fullmatch(name)
        if match is None or name in own:
            continue
        block, which = match.groups()
        others = f"{block}ls{which}.gamma", f"{block}gamma_{which}"
        other = next((other for other in others if other in own), None)
        gamma = named.pop(name)
        if other is not None:
            if other in named:
                raise ValueError(f"{name} and {other} are two tensors of one name; keep one of them")
            named[other] = gamma
            mapped.add((name.removeprefix(block), other.removeprefix(block)))
        else:
            _fold(named, f"{block}{_SCALED[which]}", gamma, name)
            folded.append(name)
    notes = [f"renamed {old} to {new}" for old, new in sorted(mapped)]
    if folded:
        notes.append(f"folded LayerScale ({len(folded)} tensors, {folded[0]}, ...) into attn.proj and mlp.fc2")
    return named, tuple(notes)


def _fold(tensors: dict[str, Tensor], layer: str, gamma: Tensor, name: str) -> None:
    weight = tensors.get(f"{layer}.weight")
    if weight is None or gamma.shape != weight.shape[:1] or weight.ndim != 2:
        raise ValueError(f"{name} cannot be folded into {layer}.weight, which is missing or of another width")
    tensors[f"{layer}.weight"] = (gamma.double()[:, None] * weight.double()).to(weight.dtype)
    bias = tensors.get(f"{layer}.bias")
    if bias is not None:
        tensors[f"{layer}.bias"] = (gamma.double() * bias.double()).to(bias.dtype)


def _some(names: Collection[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
