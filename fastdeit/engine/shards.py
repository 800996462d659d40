"""Tensors of which each process holds a part, and plain tensors alike.

FSDP2 keeps a parameter as a DTensor: its shape is that of the whole, and each process holds some of its rows. Averages
and the optimizer's state are made like the parameters, and so are split alike. Everything here takes a plain tensor as
well and leaves it as it is, so that no caller asks which of the two a run has.
"""

import torch
from torch import Tensor


def is_part(tensor: Tensor) -> bool:
    """Whether each process holds a part of `tensor`."""
    return hasattr(tensor, "full_tensor")  # importing DTensor takes a second, which most runs need not wait


def local(tensor: Tensor) -> Tensor:
    """What this process holds of `tensor`, `[rows, ...]`, in the same memory. A process may hold no rows."""
    if not is_part(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """All of `tensor`, on every process. A collective where it is in parts."""
    return tensor.full_tensor() if is_part(tensor) else tensor


def placed(values: Tensor, like: Tensor) -> Tensor:
    """`values`, a plain tensor that every process has, split as `like` is; no process is asked for anything."""
    if not is_part(like) or is_part(values):
        return values
    from torch.distributed.tensor import DTensor

    mine, mesh = local(like), like.device_mesh
    start = min(mesh.get_local_rank() * -(-len(like) // mesh.size()), len(like))
    own = values[start : start + len(mine)].to(mine.device)
    return DTensor.from_local(own, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


@torch.no_grad()
def exchange(tensor: Tensor, other: Tensor) -> None:
    """Each takes the values of the other, which is like it, in place."""
    mine, theirs = local(tensor), local(other)
    kept = mine.clone()
    mine.copy_(theirs)
    theirs.copy_(kept)
