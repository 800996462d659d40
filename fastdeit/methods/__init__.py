"""Training methods: what the loss of a batch is. One method, one file; third parties plug in by import path.

Importing this package imports no torch; finding a method does.
"""

from fastdeit.methods.config import METHODS, MethodConfig
from fastdeit.plugins import load, load_shipped

__all__ = ["METHODS", "config", "find"]


def find(use: str) -> type:
    """Method class for a recipe's `method.use`: a name in `METHODS` or an import path `package.module:Class`.

    Raises ValueError naming what was not found, and `plugins.Untrusted` as `plugins.load` does.
    """
    if use in METHODS:
        return load_shipped(METHODS[use].path, "method")
    if ":" not in use:
        raise ValueError(
            f"no method named {use!r}; there are {', '.join(METHODS)}, or an import path 'package.module:Class'"
        )
    return load(use, "method")


def config(use: str) -> type[MethodConfig]:
    """The model of the recipe's `method:` section for `use`. Of a name in `METHODS` it is known without torch.

    Raises ValueError as `find` does, and where what was found is no method.
    """
    if use in METHODS:
        return METHODS[use].config
    # Whoever brings the method has imported torch by now.
    found = find(use)
    from fastdeit.methods.base import Method

    kind = getattr(found, "Config", None)
    if not (_is_class(found, Method) and _is_class(kind, MethodConfig)):
        raise ValueError(
            f"{use!r} is not a method: that is a subclass of fastdeit.methods.base.Method whose Config is a subclass "
            "of fastdeit.methods.config.MethodConfig"
        )
    return kind


def _is_class(value: object, base: type) -> bool:
    return isinstance(value, type) and issubclass(value, base)
