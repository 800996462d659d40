"""How the processes of a run share its networks: each has all of them, or each keeps a part of every tensor.

The engine asks one object, `Replicated` or `Sharded`, and nothing else in it knows which of them it is.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from fastdeit import kernels
from fastdeit.batch import map_tensors, tensors_of
from fastdeit.engine.dist import World
from fastdeit.engine.groups import GradientError
from fastdeit.kernels.dtypes import DTYPES

_REDUCTIONS = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}
"""What sends a bucket of gradients in 16 bit: each process's share is rounded, and so is the sum."""
_FORWARDS = "predict", "features"
"""What is called of a method besides its forward, with the weights."""
_OF_BLOCKS = ("qkv",)


class ShardError(ValueError):
    """The networks of a method cannot be split over processes."""


class Replicated:
    """Every process has whole networks, and DDP takes the mean of their gradients.

    reduce  the type in which gradients travel: fp32, bf16 or fp16
    """

    total: Callable[[Tensor], Tensor] | None = None
    """Sums, in place, what each process knows of the parts of tensors; None where every process has whole tensors."""
    keeps_casts = True
    """Whether autocast may keep the 16-bit copies of weights until a forward is over."""

    def __init__(self, world: World, reduce: str = "fp32") -> None:
        self.world, self.reduce = world, reduce

    def spread(self, method: nn.Module) -> None:
        """Split the networks of `method`. Before anything keeps one of their parameters, since these are replaced."""

    def wrap(self, module: nn.Module) -> nn.Module:
        """What is called in the place of `module`, a method or what was compiled of one, while the same parameters are
        trained."""
        if self.world.size == 1:
            return module
        # For one-token parameters the stride of a dimension of size 1 differs, which costs nothing.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        # Its new name, forward_sync_buffers, came with PyTorch 2.14.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
        device_ids = [self.world.device.index] if self.world.device.type == "cuda" else None
        # Its broadcast of the main process's buffers before a forward would throw the others' statistics away.
        # static_graph stays off: buckets are rebuilt in the order of the gradients without it, and it would forbid a
        # step with more forwards than the first had (docs/log.md).
        wrapped = DistributedDataParallel(
            module, device_ids=device_ids, gradient_as_bucket_view=True, broadcast_buffers=False
        )
        if self.reduce in _REDUCTIONS:
            wrapped.register_comm_hook(None, _REDUCTIONS[self.reduce])
        return wrapped

    def reducing(self, module: nn.Module, now: bool) -> AbstractContextManager:
        """Around a forward and backward of what `wrap` returned: whether the processes reduce gradients in it."""
        return nullcontext() if now or self.world.size == 1 else module.no_sync()

    def gathered(self, method: nn.Module) -> AbstractContextManager:
        """Around an evaluation of `method`: inside, this process has whole networks and waits for no other in a
        forward, since processes have different numbers of batches there. Enter it on every process."""
        return nullcontext()

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """2-norm of all gradients, of which `gradients` are what this process holds: float32 scalar."""
        return kernels.global_norm(gradients)


class Sharded(Replicated):
    """Every process keeps some rows of each tensor, by FSDP2 (`torch.distributed.fsdp.fully_shard`).

    A block's weights are gathered before its forward and before its backward, and freed after them. What belongs to no
    block is gathered for the whole of `forward`, `predict` and `features` of the method, and for the whole of backward.
    For an evaluation everything is gathered. Gradients are reduced to the mean of each part. Between micro-batches that
    are not reduced they are whole.
    """

    keeps_casts = False

    @property
    def total(self) -> Callable[[Tensor], Tensor]:
        """The sum over all processes."""
        return self.world.sum

    def spread(self, method: nn.Module) -> None:
        """As of `Replicated`, for a method that `check` takes."""
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        units = blocks(method)
        # The last block returns a view of the tokens, which nothing changes in place.
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor")
        reduced = None if self.reduce == "fp32" else DTYPES[self.reduce]
        options = {
            "mesh": DeviceMesh.from_group(dist.group.WORLD, self.world.device.type),
            # Of the root as well: a forward alone would leave it gathered, and the next one would not see an update.
            "reshard_after_forward": True,
            "mp_policy": MixedPrecisionPolicy(reduce_dtype=reduced, cast_forward_inputs=False),
        }
        for block in units:
            block.register_forward_hook(_outliving)
            fully_shard(block, **options)
        method.register_forward_hook(_refuse_hidden)
        fully_shard(method, **options)
        for module, names in ((method, _FORWARDS), *((block, _OF_BLOCKS) for block in units)):
            for name in names:
                if inspect.ismethod(getattr(module, name, None)):  # a block may have a layer of that name
                    register_fsdp_forward_method(module, name)

    def wrap(self, module: nn.Module) -> nn.Module:
        """`module` itself."""
        return module

    def reducing(self, module: nn.Module, now: bool) -> AbstractContextManager:
        """As of `Replicated`."""
        module.set_requires_gradient_sync(now)
        return nullcontext()

    @contextmanager
    def gathered(self, method: nn.Module) -> Iterator[None]:
        """As of `Replicated`. A collective at its begin."""
        from torch.distributed.fsdp import FSDPModule

        units = [module for module in method.modules() if isinstance(module, FSDPModule)]
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            for unit in units:
                unit.reshard()
                unit.set_reshard_after_forward(True, recurse=False)

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """As of `Replicated`, the same on all processes. A collective."""
        return self.total(super().norm(gradients).double().square()).sqrt().float()


def of(kind: str, world: World, reduce: str) -> Replicated:
    """The one that a recipe's `engine.parallel` names. One process has everything in any case."""
    return (Sharded if kind == "fsdp2" and world.size > 1 else Replicated)(world, reduce)


def blocks(method: nn.Module) -> list[nn.Module]:
    """What is gathered at a time: the members of every `blocks` of a network in `method`, the innermost first."""
    found: dict[int, nn.Module] = {}
    for module in method.modules():
        members = getattr(module, "blocks", None)
        if isinstance(members, nn.ModuleList | nn.Sequential):
            found |= {id(block): block for block in members if next(block.parameters(), None) is not None}
    return [*found.values()][::-1]


def check(method: nn.Module) -> None:
    """Raise ShardError, which names it, for a parameter of `method` that cannot be split."""
    unit_of = {id(module): number for number, unit in enumerate(blocks(method)) for module in unit.modules()}
    owners: dict[int, tuple[str, int | None]] = {}
    for name, parameter, unit in _named(method, unit_of):
        if parameter.ndim == 0:
            raise ShardError(f"{name!r} is a scalar, which has no rows to split; make it a tensor [1]")
        other, its_unit = owners.setdefault(id(parameter), (name, unit))
        if its_unit != unit:
            raise ShardError(f"{other!r} and {name!r} are one tensor, which blocks cannot share when they are split")


def _named(method: nn.Module, unit_of: dict[int, int]) -> Iterator[tuple[str, Tensor, int | None]]:
    """(name, parameter, block that it is in) wherever a parameter is."""
    for path, module in method.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            yield f"{path}.{name}".lstrip("."), parameter, unit_of.get(id(module))


def _refuse_hidden(method: nn.Module, inputs: Any, output: Any) -> None:
    """A hook after a method's forward: weights are gathered for backward because of the tensors in what it returns."""
    if torch.is_grad_enabled() and not any(tensor.requires_grad for tensor in tensors_of(output)):
        raise GradientError(
            f"engine.parallel fsdp2 finds no tensor with a gradient in the {type(output).__name__} that "
            f"{type(method).__name__}.forward returns; return an Out"
        )


def _outliving(block: nn.Module, inputs: Any, output: Any) -> Any:
    """A hook after a block's forward: what it hands on of its parameters, such as a LayerScale that the next LayerNorm
    applies, is a copy, because the parameter is freed when the block is done."""
    return map_tensors(lambda tensor: tensor.clone() if isinstance(tensor, nn.Parameter) else tensor, output)
