"""The last block of a model whose heads read the class token: only what they read is computed.

A head that pools by taking the class token (and the distillation token of DeiT) reads one or two tokens of the last
block. Keys and values are needed of all tokens; queries, projection and MLP only of these. For a ViT of 12 blocks and
197 tokens that is 7 % of the floating-point operations of a training step, with the same loss and the same gradients.

Who does what: the swapped model's `forward` asks its last block for the first tokens and then runs the model's own
forward, whatever that is. The block, if it can, returns these tokens alone; norm, pooling and heads see a sequence that
ends after them. The other way, a forward of our own that embeds, runs the blocks and pools, would have to know in which
order each version of timm does that, and would leave out what a version adds. So nothing is left out, and where a part
does not take part, such as a block that somebody has replaced, all tokens are computed and the result is still right.
The request holds in its thread until the forward returns: `forward_features`, `forward_intermediates` and blocks that
are called directly return all tokens.

That the heads read no more is looked at with every call (`global_pool`, hooks, replaced methods, gradient
checkpointing, arguments such as masks) and tried out before the swap: with stand-ins for the blocks, in eval and in
training mode, the model must give the same outputs and gradients whether the last one returns all tokens or the first
alone, and no module but `blocks` and `norm` may notice the difference.
"""

from copy import deepcopy
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from fastdeit.kernels.accelerate.identity import Remembered, difference, remember
from fastdeit.kernels.accelerate.modules import (
    BLOCK,
    Accelerated,
    BlockMixin,
    asked,
    asking,
    given,
    make_last,
    needs_all,
    put_back,
    traced,
    watched,
)
from fastdeit.kernels.accelerate.trial import all_close, first_line, gradients_in_float, normal, random_copy, results


class LastBlockMixin(Accelerated):
    """A model whose forward asks the last block for the tokens that the heads read."""

    op = "query_attention"

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward, in which the last block makes no tokens but those that the heads read."""
        if traced(x) or given(args, kwargs) or difference(self) or _reads_more(self):
            return super().forward(x, *args, **kwargs)
        with asking(self.blocks[-1], _rows(self)):
            return super().forward(x, *args, **kwargs)


def found(module: nn.Module) -> bool:
    """Whether `module` has the children and the setting of a vision transformer with heads."""
    blocks = module._modules.get("blocks")
    if not ({"norm", "head"} <= module._modules.keys() and hasattr(module, "global_pool")):
        return False
    is_list = isinstance(blocks, (nn.Sequential, nn.ModuleList)) and len(blocks) > 0
    return is_list and set(BLOCK.required) <= blocks[-1]._modules.keys()


def remembered(model: nn.Module, original: type[nn.Module]) -> Remembered:
    """What is tried out in the model: its own methods, and what stands between the last block and the heads."""
    between = ("blocks", "norm")
    return remember(model, original, between, between, calls_module=True)


def _rows(model: nn.Module) -> int:
    """Tokens that the heads read: those of the class and, where there is one, of distillation."""
    return 1 if getattr(model, "dist_token", None) is None else 2


# ---- what does not fit -----------------------------------------------------------------------------------------------


def misfit(model: nn.Module) -> str | None:
    """Why all tokens of the last block have to be computed, or None."""
    if reason := _reads_more(model):
        return reason
    reason = needs_all(model.blocks[-1])
    return reason and f"blocks.{len(model.blocks) - 1}{reason}"


def _reads_more(model: nn.Module) -> str | None:
    """Why not to ask the last block for the first tokens alone. What it can do is its own to decide, because
    `fully_shard` brings its weights only when it is called."""
    pool = getattr(model, "global_pool", None)
    if pool != "token":
        return f"global_pool is {pool!r}, not 'token'"
    if getattr(model, "attn_pool", None) is not None:
        return "attn_pool reads all tokens"
    if getattr(model, "grad_checkpointing", False):
        # The block is called again during backward, by nobody who would ask for less.
        return "gradient checkpointing computes the blocks again"
    blocks, norm = model._modules.get("blocks"), model._modules.get("norm")
    if type(blocks) not in (nn.Sequential, nn.ModuleList) or len(blocks) == 0:
        return f"blocks is a {type(blocks).__name__}"
    *earlier, last = blocks  # a slice would be a new module
    for number, block in enumerate(earlier):
        # A block that is not accelerated may be anything, such as a wrapper.
        if block is last or (not isinstance(block, BlockMixin) and last in block.modules()):
            return f"blocks.{number} is the last block as well"
    if type(norm).__name__ not in ("LayerNorm", "Identity"):
        return f"norm is a {type(norm).__name__}, not a LayerNorm"
    for name, module in (("blocks", blocks), ("norm", norm)):
        if reason := watched(module):
            return f"{name} {reason}"
    return None


# ---- trying it out ---------------------------------------------------------------------------------------------------


def disagreement(model: nn.Module) -> str | None:
    """Why the first tokens of the last block cannot stand for all of them, by what is computed from both."""
    rows, last = _rows(model), f"blocks.{len(model.blocks) - 1}"
    with gradients_in_float(model):
        try:
            if not _block_agrees(model.blocks[-1], rows):
                return f"{last} computes something else for its first tokens"
            return _difference_between(model, rows, last)
        except Exception as error:  # whatever an unknown forward may raise is the reason
            return f"cannot be tried out: {first_line(error)}"


def _difference_between(model: nn.Module, rows: int, last: str) -> str | None:
    """What else but the first rows the model around its last block reads, in every way that it may be switched."""
    copy = random_copy(model, {id(block): _Mix() for block in model.blocks}).double()
    if isinstance(copy, LastBlockMixin):
        copy.__class__ = copy.original
    images = _images(copy)
    distillation = (False, True) if hasattr(copy, "distilled_training") else (None,)
    for training, distilled in product((False, True), distillation):
        copy.train(training)
        if distilled is not None:
            copy.distilled_training = distilled
        whole, seen_whole = _run(copy, images, None)
        first, seen_first = _run(copy, images, rows)
        if not all(map(_same, first, whole)):
            return "reads more than the first tokens of the last block"
        touched = {path for path, shapes in seen_whole.items() if shapes != seen_first.get(path)}
        if others := touched - {"blocks", last, "norm"}:
            return f"{min(others)} takes all tokens"
    return None


def _block_agrees(block: nn.Module, rows: int) -> bool:
    """Whether the block, asked for its first tokens, computes what its own code computes for them."""
    copy = random_copy(block, {})
    make_last(copy)
    theirs = deepcopy(copy)
    put_back(theirs)
    exact = deepcopy(theirs).double()
    x = normal(2, 5, block.norm1.normalized_shape[0], like=copy.norm1.weight, seed=0).requires_grad_()
    their = results(lambda x: theirs(x)[:, :rows], theirs, x)
    truth = results(lambda x: exact(x)[:, :rows], exact, x.detach().double().requires_grad_())
    with asking(copy, rows):
        mine = results(copy, copy, x)
    return all_close(mine, their, truth)


def _same(first: Tensor, whole: Tensor) -> bool:
    """Whether two results in float64 differ by no more than the order of additions explains."""
    return first.shape == whole.shape and bool((first - whole).abs().max() <= 1e-9 * whole.abs().max())


class _Mix(nn.Module):
    """In place of a block while the model around it is tried out: tokens, or the first of them, that depend on all.

    So it shows if the first are mixed once more, and, by what autograd saves, if they are computed again by nobody who
    asks.
    """

    last = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        first = x[:, : asked(self)]
        return first + torch.sin(first + x.mean(1, keepdim=True))


def _images(model: nn.Module) -> Tensor:
    """Two random images of the size and channels that the model embeds."""
    stem = next(module for module in model.patch_embed.modules() if isinstance(module, nn.Conv2d))
    height, width = model.patch_embed.img_size
    return normal(2, stem.in_channels, height, width, like=stem.weight, seed=0).requires_grad_()


Seen = dict[str, list[torch.Size]]
"""Shapes of all tensors that the modules took and returned."""


def _run(model: nn.Module, images: Tensor, rows: int | None) -> tuple[tuple[Tensor, ...], Seen]:
    """Outputs, gradients of images and parameters, and what the modules saw, where the last block makes `rows` tokens.

    All runs draw the same random numbers, and leave torch's generators as they were.
    """
    seen: Seen = {}
    hooks = [module.register_forward_hook(partial(_see, seen, path)) for path, module in model.named_modules()]
    devices = [images.device] if images.is_cuda else []
    with torch.random.fork_rng(devices):
        with asking(model.blocks[-1], rows):
            outs = model.forward(images)
        outs = outs if isinstance(outs, tuple) else (outs,)
        directions = [normal(*out.shape, like=out, seed=seed) for seed, out in enumerate(outs)]
        free = [images, *model.parameters()]
        grads = torch.autograd.grad(outs, free, directions, materialize_grads=True)
    for hook in hooks:
        hook.remove()
    return (*outs, *grads), seen


def _see(seen: Seen, path: str, module: nn.Module, args: tuple, out: Any) -> None:
    tensors = (*args, *(out if isinstance(out, tuple) else (out,)))
    seen.setdefault(path, []).extend(tensor.shape for tensor in tensors if isinstance(tensor, Tensor))
