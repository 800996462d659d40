"""Hooks of modules: code that computes without calling a module must not take the place of one that has some."""

from torch import nn


def hooks(module: nn.Module) -> tuple[dict, ...]:
    """The registries of functions that see what `module` takes and returns."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
