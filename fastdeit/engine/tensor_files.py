"""Tensors as the safetensors files of a checkpoint: what can be stored, writing and reading.

It stands apart from `checkpoint`, so that a manifest can be read without the seconds that torch takes to import.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

_DTYPES = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}
    | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}
)


def storable(group: Mapping[str, Tensor], file: str) -> dict[str, Tensor]:
    """The same values as dense CPU tensors, no two of which share memory, which is what safetensors can store.

    `file` names the group in messages. Raises ValueError for what cannot be stored.
    """
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in group.items():
        where = f"tensors[{file!r}][{key!r}]"
        if not isinstance(key, str):
            raise ValueError(f"{where} is keyed by a {type(key).__qualname__}; keys must be strings")
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{where} is a {type(tensor).__qualname__}, not a tensor; plain values belong into state")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise ValueError(f"{where} is a {tensor.layout} tensor on {tensor.device}; only dense data can be saved")
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{where} has dtype {tensor.dtype}, which safetensors cannot store")
        tensor = tensor.detach().cpu().resolve_neg().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        if storage in seen:
            tensor = tensor.clone()
        seen.add(storage)
        stored[key] = tensor
    return stored


def write(group: dict[str, Tensor], path: Path) -> None:
    """Write what `storable` returned. Raises OSError where that is not possible."""
    try:
        safetensors.torch.save_file(group, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # It tells what the disk has refused in words alone: "I/O error: No space left on device (os error 28)".
        number = re.search(r"\(os error (\d+)\)", str(error))
        raise (OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))) from error


def mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU, mapped into memory: values are read from the file when they are used.

    What is written into them stays in memory. Raises ValueError if it is no safetensors file.
    """
    try:
        found = safetensors.torch.load_file(path)
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, AssertionError, OSError) as error:
        raise ValueError(str(error).partition("\n")[0]) from error
    for name, tensor in found.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name!r} has dtype {tensor.dtype}, which no checkpoint has")
    return found
