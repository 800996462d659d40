"""Trying a swap out: does a module compute on the ops what its own code computes?

Names do not tell in which order a forward uses the children. Therefore outputs and all gradients, on random weights and
tokens, must be as close to those of the original in float64 as those of the original in float32 are. Torch's generator
is left alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastdeit.kernels._hooks import hooks
from fastdeit.kernels.accelerate.identity import Remembered, difference
from fastdeit.kernels.accelerate.modules import (
    AnyBlock,
    Kind,
    accelerated,
    called_as_it_is,
    given,
    linear,
    put_back,
)


class _StandIn(nn.Linear):
    """In place of a block's attn or mlp while the block is tried out: small, and it works on any number of tokens."""

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        if arguments := given((), kwargs):
            raise TypeError(f"{', '.join(arguments)} given")
        return super().forward(x)


class _StandInOfPair(nn.Linear):
    """In place of an attention that returns its result and something else, and is told more than tokens."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return super().forward(hidden_states), None


def _width_of(kind: Kind, module: nn.Module) -> int | None:
    """Channels of the tokens that the module takes."""
    if issubclass(kind.mixin, AnyBlock):
        return module._modules[kind.mixin.names.norm1].normalized_shape[0]
    first = module._modules[kind.structure.required[0]]
    return next((layer.in_features for layer in first.modules() if hasattr(layer, "in_features")), None)


def _stand_ins(kind: Kind, module: nn.Module, width: int) -> dict[int, nn.Module]:
    """What a copy has in the place of children that are called, whatever they are."""
    if issubclass(kind.mixin, AnyBlock):
        norm1, attn, _, mlp = (module._modules[name] for name in kind.mixin.names)
        device = norm1.weight.device
        of_attn = _StandInOfPair if kind.mixin.makes_pair else _StandIn
        return {id(attn): _plain(width, width, device, of_attn), id(mlp): _plain(width, width, device)}
    # Quantised weights have no values that could be made random.
    called = [
        module._modules[name] for name in kind.structure.required if kind.structure.children[name] is called_as_it_is
    ]
    return {
        id(layer): _plain(layer.in_features, layer.out_features, _device(module))
        for layer in called
        if hasattr(layer, "out_features")
        and linear(layer, "weight") is not None
        and type(getattr(layer, "weight", None)) is not nn.Parameter
    }


def _plain(made_of: int, makes: int, device: torch.device, cls: type[nn.Linear] = _StandIn) -> nn.Module:
    return nn.utils.skip_init(cls, made_of, makes, device=device)


def _device(module: nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def random_copy(module: nn.Module, stand_ins: dict[int, nn.Module]) -> nn.Module:
    """A float32 copy with random values wherever it has any, in eval mode and without hooks. One on the meta device
    comes to the CPU.

    stand_ins  what the copy has in place of the modules of these ids
    """
    copy = deepcopy(module, stand_ins).float().eval().requires_grad_()
    if any(parameter.is_meta for parameter in copy.parameters()):
        copy.to_empty(device="cpu")
    for part in copy.modules():
        for registry in hooks(part):
            registry.clear()
    for seed, tensor in enumerate((*copy.parameters(), *copy.buffers())):
        if tensor.is_floating_point():
            size = tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 1
            values = size * normal(*tensor.shape, like=tensor, seed=seed)
            # A buffer may be a variance.
            tensor.data = values if isinstance(tensor, nn.Parameter) else values.abs()
        else:
            tensor.zero_()
    return copy


def normal(*shape: int, like: Tensor, seed: int) -> Tensor:
    """Standard normal values that do not touch torch's generator."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=like.device, dtype=torch.float32).to(like.dtype)


def results(forward: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Output of `forward`, and the gradients of the tokens x and of all parameters of `module`."""
    out = forward(x)
    free = [x, *module.parameters()]
    return out, *torch.autograd.grad(out, free, normal(*out.shape, like=out, seed=1), materialize_grads=True)


def disagreement(kind: Kind, module: nn.Module, remembered: Remembered) -> str | None:
    """Why the op cannot stand for the module's own forward, by what both compute."""
    width = _width_of(kind, module)
    if width is None:
        return "cannot be tried out: nothing says how wide its tokens are"
    with gradients_in_float(module):
        try:
            copy = random_copy(module, _stand_ins(kind, module, width))
            put_back(copy)
            double = deepcopy(copy).double()
            x = normal(2, 5, width, like=next(copy.parameters()), seed=0).requires_grad_()
            theirs = results(partial(kind.mixin.on_tokens, copy), copy, x)
            exact = results(partial(kind.mixin.on_tokens, double), double, x.detach().double().requires_grad_())
        except Exception as error:  # whatever an unknown forward may raise is the reason
            return f"cannot be tried out on tokens alone: {first_line(error)}"
        copy.__class__ = accelerated(kind.mixin, type(copy), remembered)
        if reason := difference(copy):
            return f"cannot be tried out on a copy, which {reason}"
        mine = results(partial(kind.mixin.on_tokens, copy), copy, x)
        if odd := [name for name in copy._modules if "drop_path" in name and not _drops_samples(copy._modules[name])]:
            return f"{odd[0]} does more than drop samples"
        return None if all_close(mine, theirs, exact) else "computes something else than its structure suggests"


def _drops_samples(drop: nn.Module) -> bool:
    """Whether a drop-path, in training, multiplies whole samples by what it makes of ones: so the op uses it."""
    x, ones = normal(64, 3, 2, like=torch.empty(0, device="cpu"), seed=0), torch.ones(64, 1, 1, device="cpu")
    if hasattr(drop, "drop_prob"):
        drop.drop_prob = 0.5
    drawn = []
    for tokens in (x, ones):
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            drawn.append(drop.train()(tokens))
    return torch.equal(drawn[0], x * drawn[1])


@contextmanager
def gradients_in_float(module: nn.Module) -> Iterator[None]:
    """Whatever surrounds a trial: gradients are on in it, autocast is off, and tensors are made where the module is."""
    device = _device(module)
    if device.type == "meta":  # copies come to the CPU
        device = torch.device("cpu")
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False), device:
        yield


def first_line(error: Exception) -> str:
    """Type and first line of an error, as a reason."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def all_close(mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> bool:
    """Whether of each tensor mine is at most twice as far from exact as theirs, but for rounding."""
    largest = max(truth.abs().max() for truth in exact)
    return all(
        my.shape == truth.shape and _as_close(my, their, truth, largest)
        for my, their, truth in zip(mine, theirs, exact, strict=True)
    )


def _as_close(mine: Tensor, theirs: Tensor, exact: Tensor, largest: Tensor) -> bool:
    scale = exact.abs().max()
    # What is 0, such as the gradient of a bias of the keys, is a sum whose terms cancel: its rounding is that of these.
    rounding = 32 * torch.finfo(mine.dtype).eps * (largest if scale < 1e-9 * largest else scale)
    return bool((mine - exact).abs().max() <= 2 * (theirs - exact).abs().max() + rounding)


def signature(kind: Kind, module: nn.Module) -> tuple:
    """Equal for modules that are alike: types, settings and shapes. Drop-path rates differ between all blocks."""
    called = (kind.mixin.names.attn, kind.mixin.names.mlp) if issubclass(kind.mixin, AnyBlock) else ()
    parts = []
    for name, part in module.named_modules():
        if name.partition(".")[0] in called:
            continue
        settings = [
            (key, value)
            for key, value in vars(part).items()
            if isinstance(value, (bool, int, float, str)) and key not in ("training", "drop_prob")
        ]
        shapes = [(key, value.shape, value.device) for key, value in part.named_parameters(recurse=False)]
        parts.append((name, type(part), tuple(settings), tuple(shapes)))
    return kind.name, *parts
