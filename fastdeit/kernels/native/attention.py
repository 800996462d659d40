"""The backend `native` of attention: tensors checked and made, and the kernels run on PyTorch's current stream."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from fastdeit.kernels._op import Unsupported, aligned
from fastdeit.kernels.native import choice
from fastdeit.kernels.native.launches import HEAD_DIMS, MOST_BLOCKS, Sizes
from fastdeit.kernels.native.runnable import Backward, Runnable, Unusable


def forward(
    qkv: Tensor, num_heads: int, scale: float, bias: Tensor | None, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(out, lse) as of the op's reference. `Unsupported` where the kernels do not take this call, or do not run."""
    sizes = _checked(qkv, num_heads, scale, key_mask)
    qkv = aligned(qkv)
    out = qkv.new_empty(sizes.batch, sizes.tokens, num_heads * sizes.head_dim)
    lse = qkv.new_empty(sizes.batch, num_heads, sizes.tokens, dtype=torch.float32)
    _run(qkv.device, lambda kernels, stream: kernels.forward(qkv, out, lse, sizes, stream))
    return out, lse


def backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    scale: float,
    with_bias: bool,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(dqkv, dbias) as of the op's backward."""
    sizes = _checked(qkv, num_heads, scale, key_mask)
    grad, qkv, out, lse = map(aligned, (grad.to(qkv.dtype), qkv, out, lse))
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    dbias = partial = None
    if with_bias:
        dbias, partial = lse.new_empty(sizes.columns), lse.new_empty(sizes.batch * sizes.blocks, sizes.columns)
    tensors = Backward(grad, qkv, out, lse, dqkv, dbias, delta, partial)
    _run(qkv.device, lambda kernels, stream: kernels.backward(tensors, sizes, stream))
    return dqkv, lse.new_empty(0) if dbias is None else dbias


def _run(device: torch.device, call: Callable[[Runnable, int], None]) -> None:
    """Call the first kernels that this card takes, with PyTorch's current stream; those before it are dropped for
    good."""
    found = choice.found(choice.number(device))
    with nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device):
        choice.driver().enter(device.index)
        stream = torch.cuda.current_stream(device).cuda_stream
        while found.kernels is not None:
            try:
                return call(found.kernels, stream)
            except Unusable as error:
                found.drop(str(error))
    raise Unsupported(found.why_not)


def _checked(qkv: Tensor, num_heads: int, scale: float, key_mask: Tensor | None) -> Sizes:
    batch, tokens, width = qkv.shape
    sizes = Sizes(batch, tokens, num_heads, width // (3 * num_heads), scale)
    if qkv.dtype != torch.float16:
        raise Unsupported(f"it computes in torch.float16, not in {qkv.dtype}")
    if key_mask is not None:
        raise Unsupported("it does not take a mask of keys")
    if sizes.head_dim not in HEAD_DIMS:
        raise Unsupported(
            f"heads are {sizes.head_dim} wide, not {', '.join(map(str, HEAD_DIMS[:-1]))} or {HEAD_DIMS[-1]}"
        )
    if 0 in qkv.shape:
        raise Unsupported(f"qkv {list(qkv.shape)} is empty")
    if sizes.blocks * num_heads * batch > MOST_BLOCKS:
        raise Unsupported(f"{sizes.blocks * num_heads * batch} blocks, at most {MOST_BLOCKS} fit a launch")
    return sizes
