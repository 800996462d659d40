"""What runs the kernels, however they were built."""

from typing import NamedTuple, Protocol

from torch import Tensor

from fastdeit.kernels.native.launches import Sizes


class Unusable(Exception):
    """These kernels do not run on this card at all; raised before anything was written. The message is the reason."""


class Backward(NamedTuple):
    """The tensors of a backward. grad, qkv, out, lse: as of the forward, and what came back. dqkv: as qkv. dbias:
    float32 `[3*H*d]`, or None where it is not wanted. Scratch: delta float32 `[B, H, N]` and, with dbias, partial
    float32 `[B * sizes.blocks, 3*H*d]`."""

    grad: Tensor
    qkv: Tensor
    out: Tensor
    lse: Tensor
    dqkv: Tensor
    dbias: Tensor | None
    delta: Tensor
    partial: Tensor | None


class Runnable(Protocol):
    """Kernels that were built for a kind of card. Tensors are contiguous and aligned to 16 bytes, their device is the
    current one, and its context that of this thread. Nothing waits for the device."""

    origin: str
    """Who built them for what, as a reason to choose them."""

    def forward(self, qkv: Tensor, out: Tensor, lse: Tensor, sizes: Sizes, stream: int) -> None:
        """Write out float16 `[B, N, H*d]` and lse float32 `[B, H, N]` of qkv float16 `[B, N, 3*H*d]`.

        Raises Unusable.
        """

    def backward(self, tensors: Backward, sizes: Sizes, stream: int) -> None:
        """Write dqkv and, where it is wanted, dbias."""
