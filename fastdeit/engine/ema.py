"""Running averages of weights: of the student, for evaluation; of a module, as a teacher inside the method."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastdeit.engine import shards
from fastdeit.engine.fit import check_fit


class Ema:
    """`ema = decay * ema + (1 - decay) * parameter` after every update that is not skipped.

    The average covers the trainable parameters `params`, and the optimizer makes it in the pass of its update. While a
    phase of the run does not train a parameter, its average stands still as well. DeiT's decay is a constant (0.99996,
    no warm-up).

    The BatchNorm layers of `method` have running statistics of their own for the averaged weights: neither those of the
    weights nor their average fit (docs/log.md has figures). They are measured (`Engine.measure_average`) before an
    evaluation and a checkpoint. Other buffers and frozen parameters are the method's own.

    average  all averages by the names of `params`, and the statistics by those of the layers' buffers
    stale    whether there are statistics, and they are of earlier averages
    """

    def __init__(self, params: dict[str, Tensor], decay: float, method: nn.Module) -> None:
        self.decay = decay
        self.params = params
        self.stale = False
        self.norms = {
            name: module
            for name, module in networks(method)
            if isinstance(module, _BatchNorm) and module.track_running_stats
        }
        self.average = {name: p.detach().float().clone() for name, p in params.items()}
        self.average |= {name: buffer.clone() for name, buffer in self._statistics()}
        averaged = {id(tensor): name for name, tensor in [*params.items(), *self._statistics()]}
        named = (*method.named_parameters(remove_duplicate=False), *method.named_buffers(remove_duplicate=False))
        self._tied = {
            name: averaged[id(tensor)] for name, tensor in named if id(tensor) in averaged and name not in self.average
        }

    def state(self) -> dict[str, Tensor]:
        """The averages by all names that the state dict of the method has for them: a tied tensor has several, and
        whoever loads the weights of a network by its names must find the same average under each."""
        return self.average | {name: self.average[first] for name, first in self._tied.items()}

    def _statistics(self) -> Iterator[tuple[str, Tensor]]:
        for path, norm in self.norms.items():
            for key, buffer in norm.named_buffers(recurse=False):
                yield f"{path}.{key}", buffer

    @torch.no_grad()
    def restart(self) -> None:
        """Average from now on: the averages become the parameters, and their statistics those of the layers."""
        for name, parameter in self.params.items():
            self.average[name].copy_(parameter)
        self.copy_statistics()
        self.stale = False

    @torch.no_grad()
    def copy_statistics(self) -> None:
        """Take over the statistics of the weights, for layers that are not measured because they are frozen."""
        for name, buffer in self._statistics():
            self.average[name].copy_(buffer)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the parameters hold the averages, and BatchNorm the statistics of these.

        No tensor is copied, but parts of tensors, of which FSDP2 knows the memory. The weights come back whatever
        happens.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, tensor in [*self.params.items(), *self._statistics()]:
            if shards.is_part(tensor):
                shards.exchange(tensor, self.average[name])
            else:
                tensor.data, self.average[name] = self.average[name], tensor.data

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Copy what `state` returned in. Raises FitError where names, shapes and dtypes are not exactly these."""
        check_fit("ema", {name: tensor for name, tensor in state.items() if name not in self._tied}, self.average)
        for name, tensor in self.average.items():
            tensor.copy_(shards.placed(state[name], tensor))
        self.stale = False


def networks(method: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the method and all modules in it, without averaged teachers and what is in them."""
    teachers = [module for module in method.modules() if isinstance(module, EmaTeacher)]
    theirs = {id(module) for teacher in teachers for module in teacher.modules()}
    return ((name, module) for name, module in method.named_modules() if id(module) not in theirs)


class EmaTeacher(nn.Module):
    """A module that answers as the running average of another does: float32, in eval mode, without gradients.

    The average is a child, `module`, and so part of the state of whoever owns this. The source is none, because it is
    somebody else's already.

    Buffers are copied from the source, BatchNorm's running statistics included. Averages of these were measured and
    are worse until the average of the weights has settled (docs/log.md), and measuring the statistics of the average
    itself would cost a forward pass in training mode after every step.
    """

    def __init__(self, source: nn.Module, momentum: float | Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.module = copy.deepcopy(source).float().requires_grad_(False).eval()
        self.momentum = momentum
        self.__dict__["source"] = source
        for each in self.module.modules():
            if type(each).train is not nn.Module.train:
                each.register_forward_pre_hook(_anew)

    def train(self, mode: bool = True) -> "EmaTeacher":
        """Stays in eval mode: whoever puts the method into training mode does not mean its teacher."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the averaged module returns."""
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def follow(self, step: Any, skipped: Tensor) -> None:
        """After an update: average = m * average + (1 - m) * source, with m = 1 where the update was `skipped` (bool).

        m is the momentum, or momentum(step) for a `Step`. Buffers are copied. No value is read from the device.
        """
        momentum = self.momentum(step) if callable(self.momentum) else self.momentum
        keep = torch.where(skipped, 1.0, momentum).float()
        averages, sources = (
            [shards.local(p).float() for p in module.parameters()] for module in (self.module, self.source)
        )
        torch._foreach_mul_(averages, keep)
        torch._foreach_add_(averages, torch._foreach_mul(sources, 1 - keep))
        for average, source in zip(self.module.buffers(), self.source.buffers(), strict=True):
            average.copy_(source)


def _anew(module: nn.Module, inputs: Any) -> None:
    """A hook before a forward: what the module made for eval mode, such as a table of biases, is of older weights. With
    fsdp2 they are whole here, and not yet before the forward of what it is a part of."""
    module.train()
    module.eval()
