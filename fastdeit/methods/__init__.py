"""Training methods: what the loss of a batch is. One method, one file; third parties plug in by import path."""

from importlib import import_module

METHODS = {
    "supervised": "fastdeit.methods.supervised:Supervised",
    "distill": "fastdeit.methods.distill:Distill",
}


def find(use: str) -> type:
    """Method class for a recipe's `method.use`: a name in `METHODS` or an import path `package.module:Class`.

    Raises ValueError naming what was not found.
    """
    path = METHODS.get(use, use)
    module_name, _, class_name = path.partition(":")
    if not class_name:
        raise ValueError(
            f"no method named {use!r}; there are {', '.join(METHODS)}, or an import path 'package.module:Class'"
        )
    try:
        return getattr(import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"method {use!r} cannot be imported: {error}") from error


def config(use: str) -> type:
    """The pydantic model of the recipe's `method:` section for `use`."""
    return find(use).Config
