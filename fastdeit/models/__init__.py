"""Models by name or by import path. All follow one contract (`contract.Model`).

State dicts of the DeiT family are interchangeable with timm's.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from fastdeit.models.contract import missing
from fastdeit.models.convnet import convnet_digits
from fastdeit.models.families import CONFIGS, names_by_shapes, transformer
from fastdeit.plugins import load
from fastdeit.text import did_you_mean

__all__ = ["MODELS", "build", "build_timm", "names_by_shapes", "of"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    **{name: partial(transformer, name) for name in CONFIGS},
    "convnet_digits": convnet_digits,
}


def build(name: str, **options: Any) -> nn.Module:
    """The model `name`, freshly initialised from torch's generator: a `contract.Model`.

    name     one of `MODELS`, or the import path `package.module:callable` of a class or function that makes a model
    options  image_size, num_classes, drop_path, ...: fields of the model's configuration (`ViTConfig`,
             `ConvNetConfig`), or what the imported callable takes

    Raises ValueError for a name or an option that does not exist, for a value that makes no model, and for an object
    that lacks a part of the contract.
    """
    if name in MODELS:
        return MODELS[name](**options)
    if ":" in name:
        return _imported(name, options)
    paths = f"; known are {', '.join(MODELS)}, and import paths 'package.module:callable'"
    raise ValueError(f"there is no model {name!r}{did_you_mean(name, MODELS) or paths}")


def _imported(path: str, options: dict[str, Any]) -> nn.Module:
    """The model that the callable at an import path makes."""
    make = load(path, "model")
    if not callable(make):
        raise ValueError(f"model {path!r} is a {type(make).__name__}, not a class or function that makes a model")
    try:
        inspect.signature(make).bind(**options)
    except TypeError as error:
        raise ValueError(f"model {path!r} cannot be called with {', '.join(options)}: {error}") from error
    model = make(**options)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {path!r} makes a {type(model).__name__}, not a torch.nn.Module")
    if lacking := missing(model):
        raise ValueError(f"model {path!r} does not follow the contract of models; it lacks: {'; '.join(lacking)}")
    return model


def of(name: str | None, timm: str | None, **options: Any) -> nn.Module:
    """fastdeit's model `name`, or timm's model `timm` where that is not None; raises ValueError as `build` does."""
    return build(name, **options) if timm is None else build_timm(timm, **options)


def build_timm(name: str, **options: Any) -> nn.Module:
    """timm's model `name` under the same contract; `options` as `timm_model.build` has them."""
    # timm takes a second to import, and only runs that name one of its models need it.
    from fastdeit.models import timm_model

    return timm_model.build(name, **options)
