"""Peers of `fastdeit bench step` and `bench forward`: timm's model as a good script around it would run it.

timm                 eager, autocast, torch's choice of attention kernel, `AdamW(fused=True)`, timm's `ModelEmaV3`
timm_compile         the same tuned: forward and loss in one `torch.compile`, FlashAttention, averages by one foreach
                     call, the teacher compiled and in 16-bit weights, channels last
timm_compile_cudnn   that with cuDNN's attention
timm_compile_fa3     that with FlashAttention-3, timm_compile_fa4 with FlashAttention-4, where they are installed
timm_compile_graph   timm_compile in torch's mode `reduce-overhead`: forward, backward and teacher are CUDA graphs
..._pruned           each compiled peer with a last block that computes what the heads read alone, as ours does
accelerate           timm's eager script with `fastdeit.kernels.accelerate(model)`
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdeit import kernels, models
from fastdeit.bench.measure import CLASSES, CannotRun
from fastdeit.bench.step import EMA_DECAY, LR, WEIGHT_DECAY, Cell, Side, floats, step_flops, teacher
from fastdeit.bench.stronger_peers import check_flash, flash, prune
from fastdeit.engine.step import autocast
from fastdeit.kernels.dtypes import DTYPES

_ALPHA = 0.5
_GRAPHS = "reduce-overhead"


class Variant(NamedTuple):
    """mode: of `torch.compile`; None is eager. backend: of attention; None is torch's choice. flash: which release of
    FlashAttention; None is torch's. pruned: whether the last block computes what the heads read alone."""

    mode: str | None = None
    backend: SDPBackend | None = None
    accelerated: bool = False
    flash: str | None = None
    pruned: bool = False


_COMPILED = {
    "timm_compile": Variant("default", SDPBackend.FLASH_ATTENTION),
    "timm_compile_cudnn": Variant("default", SDPBackend.CUDNN_ATTENTION),
    "timm_compile_fa3": Variant("default", SDPBackend.FLASH_ATTENTION, flash="FA3"),
    "timm_compile_fa4": Variant("default", SDPBackend.FLASH_ATTENTION, flash="FA4"),
    "timm_compile_graph": Variant(_GRAPHS, SDPBackend.FLASH_ATTENTION),
}
VARIANTS = {
    "timm": Variant(),
    "accelerate": Variant(accelerated=True),
    **_COMPILED,
    **{f"{name}_pruned": variant._replace(pruned=True) for name, variant in _COMPILED.items()},
}


def side(wanted: Cell, device: torch.device, *, name: str) -> Side:
    """The peer on one batch of random floats."""
    run, flops = step_of(name, wanted, device)
    images = floats(wanted, device)
    return Side(lambda: run(images), flops, around=partial(flash, VARIANTS[name].flash))


def step_of(name: str, wanted: Cell, device: torch.device) -> tuple[Callable[[Tensor], None], float]:
    """(a step, or a forward, of the images `[B, 3, H, W]` it is given, its FLOPs). Targets are random and stay."""
    variant = VARIANTS[name]
    if device.type == "cpu":
        if variant.backend is SDPBackend.CUDNN_ATTENTION:
            raise CannotRun("cuDNN's attention needs a CUDA device")
        if variant.mode == _GRAPHS:
            raise CannotRun("a CUDA graph needs a CUDA device")
    if variant.flash is not None:
        check_flash(variant.flash, device)
    try:
        known = models.build_timm(wanted.model, **wanted.options)
    except ValueError as error:
        raise CannotRun(str(error)) from error
    if variant.pruned:
        prune(known.inner)
    judge = teacher(wanted)
    flops = step_flops(known, judge, wanted)
    model = known.inner.to(device)
    if variant.accelerated:
        report = kernels.accelerate(model)
        if len(report.kept) == len(report.rows):
            raise CannotRun(f"accelerate swaps nothing in timm's {wanted.model}: {report}")
    if wanted.what == "forward":
        return _forward(model, wanted, device, variant), flops
    return training_step(model, judge, wanted, device, variant), flops


def _compiled(function: Callable, mode: str | None) -> Callable:
    return function if mode is None else torch.compile(function, dynamic=False, mode=mode)


def _out(model: nn.Module, images: Tensor, backend: SDPBackend | None) -> Tensor | tuple[Tensor, Tensor]:
    # Inside what is compiled: around it, a choice of attention is no part of the keys by which Dynamo and the caches of
    # Inductor find what they have compiled before, and the second side to run would run the first one's.
    with sdpa_kernel(backend) if backend is not None else nullcontext():
        return model(images)


def _forward(model: nn.Module, wanted: Cell, device: torch.device, variant: Variant) -> Callable[[Tensor], None]:
    model.eval()
    called = _compiled(_out, variant.mode)

    @torch.inference_mode()
    def run(images: Tensor) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        with autocast(device, wanted.precision):
            called(model, images, variant.backend)

    return run


def training_step(
    model: nn.Module, judge: nn.Module | None, wanted: Cell, device: torch.device, variant: Variant
) -> Callable[[Tensor], None]:
    """A step of timm's `model`, taught by `judge` if there is one, on the images `[B, 3, H, W]` it is given."""
    model.train()
    targets = torch.rand(wanted.batch, CLASSES, device=device).softmax(-1)
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups = param_groups_weight_decay(model, WEIGHT_DECAY, no_weight_decay_list=exempt)
    optimizer = torch.optim.AdamW(groups, lr=LR, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=wanted.precision == "fp16")
    average = _average(model, variant.mode is not None) if wanted.ema else lambda: None
    judged = _judge(judge, wanted, device, variant.mode)
    loss_of = _compiled(loss, variant.mode)

    def run(images: Tensor) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        with autocast(device, wanted.precision):
            loss = loss_of(model, images, targets, judged(images), variant.backend)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        average()

    return run


def loss(
    model: nn.Module, images: Tensor, targets: Tensor, judged: Tensor | None, backend: SDPBackend | None = None
) -> Tensor:
    """What our methods compute: with two heads and no teacher, of the mean of their logits."""
    out = _out(model, images, backend)
    first, second = out if isinstance(out, tuple) else (out, out)
    soft = SoftTargetCrossEntropy()
    if judged is None:
        return soft((first + second) / 2 if first is not second else first, targets)
    hard = nn.functional.cross_entropy(second, judged.argmax(1))
    return (1 - _ALPHA) * soft(first, targets) + _ALPHA * hard


def _judge(
    judge: nn.Module | None, wanted: Cell, device: torch.device, mode: str | None
) -> Callable[[Tensor], Tensor | None]:
    """The teacher's forward, which every step repeats."""
    if judge is None:
        return lambda images: None
    network = judge.inner.to(device)
    if mode is None:
        return torch.no_grad()(lambda images: network(images))
    layout = {"dtype": DTYPES[wanted.precision], "memory_format": torch.channels_last}
    called = _compiled(network.to(**layout), mode)
    return torch.no_grad()(lambda images: called(images.to(**layout)))


def _average(model: nn.Module, compiled: bool) -> Callable[[], None]:
    if not compiled:
        kept = ModelEmaV3(model, decay=EMA_DECAY)
        return lambda: kept.update(model)
    weights = [parameter.detach() for parameter in model.parameters()]
    averages = [weight.clone() for weight in weights]
    return lambda: torch._foreach_lerp_(averages, weights, 1 - EMA_DECAY)


PEERS: dict[str, Callable[[Cell, torch.device], Side]] = {name: partial(side, name=name) for name in VARIANTS}
