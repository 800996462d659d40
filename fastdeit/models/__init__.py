"""Models by name or by import path. All follow one contract (`contract.Model`).

State dicts of the DeiT family are interchangeable with timm's. Importing this package imports no torch; building a
model does.
"""

import inspect
from typing import TYPE_CHECKING, Any

from fastdeit.models.names import CONFIGS, MODELS, OTHERS, check
from fastdeit.plugins import load, load_shipped

if TYPE_CHECKING:
    from torch import nn

__all__ = ["MODELS", "build", "build_timm", "of"]


def build(name: str, **options: Any) -> "nn.Module":
    """The model `name`, freshly initialised from torch's generator: a `contract.Model`.

    name     one of `MODELS`, or the import path `package.module:callable` of a class or function that makes a model
    options  image_size, num_classes, drop_path, ...: fields of the model's configuration (`ViTConfig`,
             `ConvNetConfig`), or what the imported callable takes

    Raises ValueError for a name or an option that does not exist, for a value that makes no model, and for an object
    that lacks a part of the contract.
    """
    if name in CONFIGS:
        from fastdeit.models.families import transformer

        return transformer(name, **options)
    if name in OTHERS:
        return load_shipped(OTHERS[name], "model")(**options)
    return _imported(check(name), options)


def _imported(path: str, options: dict[str, Any]) -> "nn.Module":
    """The model that the callable at an import path makes."""
    from torch import nn

    from fastdeit.models.contract import missing, wrong

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
    if contradictions := wrong(model):
        raise ValueError(f"model {path!r} does not follow the contract of models: {'; '.join(contradictions)}")
    return model


def of(name: str | None, timm: str | None, **options: Any) -> "nn.Module":
    """fastdeit's model `name`, or timm's model `timm` where that is not None; raises ValueError as `build` does."""
    return build(name, **options) if timm is None else build_timm(timm, **options)


def build_timm(name: str, **options: Any) -> "nn.Module":
    """timm's model `name` under the same contract; `options` as `timm_model.build` has them."""
    # timm takes a second to import, and only runs that name one of its models need it.
    from fastdeit.models import timm_model

    return timm_model.build(name, **options)
