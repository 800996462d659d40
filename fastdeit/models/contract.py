"""What every model of fastdeit has in common: options, weight-decay groups, and a count of operations.

The contract itself is the section "Model" of `docs/architecture.md`.
"""

import copy
import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ConfigT = TypeVar("ConfigT")
ImageSize = int | tuple[int, int]


def size_pair(size: ImageSize, name: str) -> tuple[int, int]:
    """`(height, width)` of an int or a pair of ints; raises ValueError for anything else."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError(f"{name} is {size!r}, but must be a positive int or a pair (height, width) of them")
    return pair


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the known names closest to `name`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def with_options(config: ConfigT, owner: str, options: Mapping[str, Any]) -> ConfigT:
    """The frozen dataclass `config` with some fields replaced; raises ValueError for a field it does not have."""
    known = [field.name for field in fields(config)]
    for option in options:
        if option not in known:
            hint = did_you_mean(option, known)
            raise ValueError(f"{owner} has no option {option!r}{hint or '; it takes ' + ', '.join(known)}")
    return replace(config, **options)


def split_decay(model: nn.Module, exempt: Collection[str]) -> tuple[list[str], list[str]]:
    """Names of the parameters `(with, without)` weight decay, in the order of `named_parameters()`.

    Without decay are 1-D parameters, biases, and the names in `exempt`.
    """
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        free = parameter.ndim <= 1 or name.rpartition(".")[2] == "bias" or name in exempt
        (no_decay if free else decay).append(name)
    return decay, no_decay


def counted_flops(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Floating-point operations (2 per multiply-add) of `model` in eval mode on a tensor of `shape`.

    Counted are convolutions, matrix products and attention, on a copy without storage (meta device): nothing is
    computed.
    """
    twin = copy.deepcopy(model).to("meta").eval()
    # As plain products: torch before 2.9 leaves some fused attention kernels out of its count.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        twin(torch.empty(shape, device="meta"))
    return counter.get_total_flops()


def refuse_patches(x: Tensor, owner: str) -> None:
    """ValueError unless `x` is a batch of images `[B, C, H, W]`."""
    if x.ndim != 4:
        raise ValueError(
            f"{owner} takes images [B, C, H, W], but got a tensor of shape {tuple(x.shape)}; "
            "patchified input is only for fastdeit's own vision transformers"
        )
