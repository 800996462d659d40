"""BatchNorm beyond one forward pass: statistics measured anew, and statistics shared by the processes of a run."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastdeit.engine.dist import DeviceError


def measure(layers: Iterable[_BatchNorm], passes: Iterable[Callable[[], Any]]) -> list[_BatchNorm]:
    """Set the running statistics of BatchNorm `layers` to their means over `passes`, calls of a network in training.

    Returns the layers that were measured: those in training mode. A layer in eval mode is frozen, and left alone.
    This is "precise BatchNorm" (Wu & Johnson, arXiv:2105.07576), as in `torch.optim.swa_utils.update_bn`,
    which would take the layers of averaged teachers and frozen layers as well.
    """
    momenta = {layer: layer.momentum for layer in layers if layer.training}
    for layer in momenta:
        layer.reset_running_stats()
        layer.momentum = None  # PyTorch's word for the plain mean
    try:
        for forward in passes:
            forward()
    finally:
        for layer, momentum in momenta.items():
            layer.momentum = momentum
    return list(momenta)


def synchronise(method: nn.Module, device: torch.device) -> bool:
    """Give BatchNorm below `method` the statistics of the batches of all processes; whether there is any BatchNorm.

    Layers in eval mode are those of teachers, and frozen ones: they are left alone. Parameters and buffers stay the
    same tensors under the same names, but the layers are other objects: call it before anything keeps a layer. On a GPU
    the layers are PyTorch's `SyncBatchNorm` (timm's subclass for its layers with an activation). PyTorch's refuses a
    CPU, so there they are `CpuSyncBatchNorm`.

    Raises DeviceError on a CPU for a subclass of BatchNorm that computes more than BatchNorm.
    """
    places = [
        (path, parent, name, layer)
        for path, parent in list(method.named_modules())
        for name, layer in list(parent.named_children())
        if isinstance(layer, _BatchNorm) and layer.training
    ]
    for path, parent, name, layer in places:
        setattr(parent, name, _on_cpu(f"{path}.{name}", layer) if device.type == "cpu" else _on_gpu(layer))
    return bool(places)


def _on_cpu(path: str, layer: _BatchNorm) -> _BatchNorm:
    if type(layer).forward is not _BatchNorm.forward:
        raise DeviceError(
            f"engine.sync_batchnorm: {path} is a {type(layer).__name__}, which can be synchronised on GPUs only; on a "
            "CPU use one process, or leave engine.sync_batchnorm false"
        )
    return CpuSyncBatchNorm.like(layer)


def _on_gpu(layer: _BatchNorm) -> nn.Module:
    from timm.layers import convert_sync_batchnorm  # a second of imports, which few runs need

    return convert_sync_batchnorm(layer)


class CpuSyncBatchNorm(_BatchNorm):
    """BatchNorm over the batches of all processes, in plain operations: the CPU's `torch.nn.SyncBatchNorm`.

    Computes in float32. Processes may have batches of different sizes. The running variance is the unbiased one, of all
    batches together, as it is for one process with the whole batch.
    """

    @classmethod
    def like(cls, layer: _BatchNorm) -> "CpuSyncBatchNorm":
        """A layer with the very parameters and buffers of `layer`."""
        made = cls(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        made._parameters, made._buffers, made.training = layer._parameters, layer._buffers, layer.training
        return made

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"BatchNorm takes [B, C, ...], not {list(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """`[B, C, ...]` normalised by channel; in eval mode by the running statistics, as any BatchNorm."""
        if not self.training or not dist.is_initialized():
            return super().forward(input)
        self._check_input_dim(input)
        dims, shape = [0, *range(2, input.ndim)], [1, -1, *[1] * (input.ndim - 2)]
        wide = input.float()
        local = torch.tensor([wide.numel() / self.num_features])
        *sums, count = _SumOverProcesses.apply(torch.cat((wide.sum(dims), local))).split((self.num_features, 1))
        mean = sums[0] / count
        centred = wide - mean.view(shape)
        variance = _SumOverProcesses.apply(centred.square().sum(dims)) / count
        self._follow(mean.detach(), variance.detach() * (count / (count - 1).clamp(min=1)))
        out = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        if not self.track_running_stats:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


class _SumOverProcesses(torch.autograd.Function):
    """The sum over all processes. Each process's loss depends on the sum, so its gradient is a sum as well."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total
