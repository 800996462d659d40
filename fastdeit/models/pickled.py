"""Weights in a file that `torch.save` wrote, read without executing anything that stands in it.

A pickle is a program. `torch.load(weights_only=True)` runs a small part of it: tensors, numbers, text and their
containers are built, and any other name is refused before it is imported. Added to that is `argparse.Namespace`, which
holds the arguments of a training run in the files of DeiT, DeiT III, CaiT, LeViT and timm. It is a plain object: making
one calls no code of the file's.

Training scripts store several things in one file. **Which entry is taken**: the file itself if it is a mapping from
names to tensors, else the first of `ENTRIES` that is one, else the only entry that is one. An entry may be nested, and
its name then has dots. The trained weights come before their average, as in every address of fastdeit; the average has
to be asked for. Of DINO's files it is the teacher, which is the network that its authors publish.
"""

import argparse
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

ENTRIES = ("model", "state_dict", "model_state_dict", "module", "teacher", "student", "model_ema", "state_dict_ema")
"""Names of entries in the order in which they are preferred."""

_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
_REASON = re.compile(r"WeightsUnpickler error: ([^\n]{,200})")
_DEPTH = 3
_NO_WEIGHTS = ("optimizer", "optimizer_states", "optim", "lr_scheduler", "scaler")
"""Entries that are not searched: the state of an optimizer maps names to tensors, too."""


@dataclass(frozen=True)
class Pickled:
    """`tensors` by name on the CPU; `entry`, the dotted name they had in the file, "" for the file itself; `notes`,
    what was chosen and why, in sentences."""

    tensors: dict[str, Tensor]
    entry: str
    notes: tuple[str, ...]


def read(path: Path, entry: str | None = None) -> Pickled:
    """The weights in the file at `path`: those of `entry` (dotted), or of the entry that the rule above chooses.

    Raises ValueError, in a sentence, for a file that is damaged or holds anything but plain data and tensors, for one
    without weights, and for an entry that is not there. Raises OSError if the file cannot be read.
    """
    with path.open("rb") as file:
        content = _parsed(file)
    found = dict(_state_dicts(content))
    if entry is not None:
        if entry not in found:
            raise ValueError(f"it has no weights under {entry!r}; {_there(content, found)}")
        return Pickled(found[entry], entry, ())
    if not found:
        raise ValueError(f"it holds no weights; {_there(content, found)}")
    chosen = "" if "" in found else next((name for name in ENTRIES if name in found), None)
    if chosen is None:
        inside = [name for name in found if name.rpartition(".")[2] in ENTRIES]
        candidates = inside or list(found)
        if len(candidates) > 1:
            raise ValueError(f"it holds weights under {', '.join(candidates)}; say which with @{candidates[0]}")
        (chosen,) = candidates
    others = [name for name in found if name != chosen]
    notes = []
    if chosen:
        beside = f", not {', '.join(others)} (@{others[0]} would)" if others else ""
        notes.append(f"took the entry {chosen!r}{beside}")
    return Pickled(found[chosen], chosen, tuple(notes))


def _parsed(file: BinaryIO) -> Any:
    try:
        # Legacy files warn about their age, TorchScript archives that they are dispatched; neither helps anybody here.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        foreign = _GLOBAL.search(str(error))
        if foreign is None:
            reason = _REASON.search(str(error))
            why = reason[1] if reason else _first_sentence(error)
            raise ValueError(f"it is damaged, or no file of torch.save ({why})") from error
        raise ValueError(
            f"it uses {foreign[1]}, and nothing but tensors and plain data is read, because a pickle can execute "
            "anything. If you trust its author, save the weights alone where it can be read: "
            "torch.save(model.state_dict(), 'weights.pth')"
        ) from error
    except Exception as error:  # a damaged file can fail in any part of the parser
        if "TorchScript" in str(error):
            raise ValueError(
                "it is a TorchScript archive, a program; save its weights: torch.save(m.state_dict(), 'weights.pth')"
            ) from error
        raise ValueError(f"it is damaged, or no file of torch.save ({_first_sentence(error)})") from error


def _first_sentence(error: Exception) -> str:
    text = str(error).partition("\n")[0].partition(". ")[0].strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _state_dicts(content: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(dotted name, tensors) of every mapping from names to tensors, the outer before the inner."""
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        return
    values = list(content.values())
    if values and all(isinstance(value, Tensor) for value in values):
        yield name, dict(content)
    elif depth < _DEPTH:
        for key, value in content.items():
            if key in _NO_WEIGHTS:
                continue
            yield from _state_dicts(value, f"{name}.{key}" if name else key, depth + 1)


def _there(content: Any, found: Mapping[str, Any]) -> str:
    """What is in the file, for a message."""
    if "" in found:
        return "the file itself is the weights; leave the entry out"
    if found:
        return f"there are {', '.join(found)}"
    if isinstance(content, Mapping) and content:
        return f"its entries are {', '.join(map(str, list(content)[:8]))}, none of which maps names to tensors"
    return "it is empty" if isinstance(content, Mapping) else f"it is a {type(content).__name__}"
