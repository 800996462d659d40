"""The same weights under other names: what training scripts put around a model's names, parallel blocks, LayerScale.

Every change is exact, and each is told in a sentence. Nothing is dropped here but what stands beside a part that was
chosen, and that is told as well.
"""

import re
from collections.abc import Collection, Mapping
from typing import TypeVar

from torch import Tensor

from fastdeit.text import some

T = TypeVar("T")

# DDP and DataParallel write the first before every name; torch.compile the second where the compiled module stands.
_WRAPPER = re.compile(r"^(?:(?:module|_orig_mod)\.)+|(?<=\.)(?:_orig_mod\.)+")
_PARTS = ("teacher.backbone.", "backbone.", "model.")
"""Names of the network inside a larger module, the one to be taken first: DINOv2's teacher, then any backbone, then
Lightning's `model`."""

_GAMMA = re.compile(r"(.*\bblocks\.\d+\.)gamma_([12])")  # of DeiT III, CaiT and BEiT
_LS = re.compile(r"(.*\bblocks\.\d+\.)ls([12])\.gamma")  # of timm
_LS_OF_PARALLEL = re.compile(r"(.*\bblocks\.\d+\.(attns|ffns)\.\d+\.)ls\.gamma")
_SCALED = {"1": "attn.proj", "2": "mlp.fc2", "attns": "attn.proj", "ffns": "mlp.fc2"}
"""The last layer of the branch that a LayerScale multiplies: 1 or 2, or that of a part of a parallel block."""


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
            wrappers = {word for name in named for match in _WRAPPER.findall(name) for word in match.split(".") if word}
            notes.append(f"stripped {' and '.join(f'{word}.' for word in sorted(wrappers))} from the names")
            named = stripped
        part = next((part for part in _PARTS if any(name.startswith(part) for name in named)), None)
        if part is None:
            return named, tuple(notes)
        inside = {name: name.removeprefix(part) for name in named if name.startswith(part)}
        outside = [name for name in named if name not in inside]
        if twice := set(inside.values()) & set(outside):
            raise ValueError(f"{min(twice)} and {part}{min(twice)} are two tensors of one name; keep one of them")
        beside = f", and left out {some(outside)}" if outside else ""
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
        match = _GAMMA.fullmatch(name) or _LS.fullmatch(name) or _LS_OF_PARALLEL.fullmatch(name)
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


_PARALLEL = {
    "norm1": "attns.0.norm",
    "attn": "attns.0.attn",
    "gamma_1": "attns.0.ls.gamma",
    "norm11": "attns.1.norm",
    "attn1": "attns.1.attn",
    "gamma_1_1": "attns.1.ls.gamma",
    "norm2": "ffns.0.norm",
    "mlp": "ffns.0.mlp",
    "gamma_2": "ffns.0.ls.gamma",
    "norm21": "ffns.1.norm",
    "mlp1": "ffns.1.mlp",
    "gamma_2_1": "ffns.1.ls.gamma",
}
"""Parts of a block with two attentions and two MLPs: the name in DeiT's public code, and timm's."""
_PARALLEL_OF_DEIT = re.compile(rf"(.*\bblocks\.\d+\.)({'|'.join(_PARALLEL)})(?=\.|$)")
_PARALLEL_OF_TIMM = re.compile(rf"(.*\bblocks\.\d+\.)({'|'.join(map(re.escape, _PARALLEL.values()))})(?=\.|$)")
_SECOND = re.compile(r".*\bblocks\.\d+\.attn1\.")


def parallel(own: Collection[str], tensors: Mapping[str, T]) -> tuple[dict[str, T], tuple[str, ...]]:
    """(the tensors of DeiT's public code for parallel blocks under timm's names, what was done in sentences). Others
    come back as they are, and so do these for a network whose names `own` are those of DeiT's code."""
    if not any(_SECOND.match(name) for name in tensors) or any(_SECOND.match(name) for name in own):
        return dict(tensors), ()
    named = {_PARALLEL_OF_DEIT.sub(lambda m: m[1] + _PARALLEL[m[2]], name): one for name, one in tensors.items()}
    return named, ("renamed the parts of parallel blocks from DeiT's names to timm's",)


def timm_names(tensors: Mapping[str, T]) -> dict[str, T]:
    """`tensors` of DeiT's public code under timm's names: those of parallel blocks and of LayerScale differ."""
    named, _ = parallel((), tensors)
    return {_GAMMA.sub(r"\1ls\2.gamma", name): one for name, one in named.items()}


def deit_names(tensors: Mapping[str, T]) -> dict[str, T]:
    """`tensors` of timm's names under those of DeiT's public code: `timm_names` undone."""
    theirs = {timms: deits for deits, timms in _PARALLEL.items()}
    named = {_PARALLEL_OF_TIMM.sub(lambda m: m[1] + theirs[m[2]], name): one for name, one in tensors.items()}
    return {_LS.sub(r"\1gamma_\2", name): one for name, one in named.items()}


def _fold(tensors: dict[str, Tensor], layer: str, gamma: Tensor, name: str) -> None:
    weight = tensors.get(f"{layer}.weight")
    if weight is None or gamma.shape != weight.shape[:1] or weight.ndim != 2:
        raise ValueError(f"{name} cannot be folded into {layer}.weight, which is missing or of another width")
    if not (gamma.is_floating_point() and weight.is_floating_point()):
        raise ValueError(f"{name} is {gamma.dtype} and {layer}.weight {weight.dtype}, which cannot be folded")
    tensors[f"{layer}.weight"] = (gamma.double()[:, None] * weight.double()).to(weight.dtype)
    bias = tensors.get(f"{layer}.bias")
    if bias is not None:
        tensors[f"{layer}.bias"] = (gamma.double() * bias.double()).to(bias.dtype)


def levit(own: Collection[str], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """(the tensors of a file of LeViT's authors under timm's names, what was done in sentences). Others come back as
    they are, and so do these for a network whose names `own` are the authors'.

    Their network is one list of blocks: attention and MLP in turn, and a subsampling attention between two stages. timm
    has stages, and each begins with what subsamples for it. `attention_bias_idxs` is not a weight but a table that the
    network computes from its size, and is left out.
    """
    if _LEVIT not in tensors or _LEVIT in own:
        return dict(tensors), ()
    places: dict[str, str] = {}
    stage, block, unit = 0, 0, ""
    for number in sorted({int(match[1]) for name in tensors if (match := _BLOCK.match(name))}):
        if f"blocks.{number}.m.qkv.c.weight" in tensors:
            unit = f"stages.{stage}.blocks.{block}."
            places[f"blocks.{number}.m"], block = f"{unit}attn", block + 1
        elif f"blocks.{number}.kv.c.weight" in tensors:
            stage, block = stage + 1, 0
            unit = f"stages.{stage}.downsample."
            places[f"blocks.{number}"] = f"{unit}attn_downsample"
        else:
            places[f"blocks.{number}.m"] = f"{unit}mlp"
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not name.endswith("attention_bias_idxs"):
            named[_of_timms_levit(name, places)] = tensor
    return named, ("renamed from LeViT's names to timm's, and left out attention_bias_idxs",)


_LEVIT = "patch_embed.0.c.weight"
"""A name that is in LeViT's own files alone."""
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_LEVIT_PARTS = (
    (re.compile(r"^patch_embed\.(\d+)\."), lambda match: f"stem.conv{int(match[1]) // 2 + 1}."),
    (re.compile(r"(\.mlp)\.([02])\."), lambda match: f"{match[1]}.ln{int(match[2]) // 2 + 1}."),
    (re.compile(r"\.(proj|q)\.1\."), r".\1.ln."),
    (re.compile(r"\.[cl]\.(?=weight$|bias$)"), ".linear."),
)


def _of_timms_levit(name: str, places: Mapping[str, str]) -> str:
    parts = name.split(".")
    block = ".".join(parts[:3]) if parts[2:3] == ["m"] else ".".join(parts[:2])
    if block in places:
        name = places[block] + name.removeprefix(block)
    for pattern, replacement in _LEVIT_PARTS:
        name = pattern.sub(replacement, name)
    return name
