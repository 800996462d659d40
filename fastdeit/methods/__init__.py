"""Training methods: what the loss of a batch is. One method, one file; third parties plug in by import path."""

from fastdeit.plugins import load

METHODS = {
    "supervised": "fastdeit.methods.supervised:Supervised",
    "distill": "fastdeit.methods.distill:Distill",
}


def find(use: str) -> type:
    """Method class for a recipe's `method.use`: a name in `METHODS` or an import path `package.module:Class`.

    Raises ValueError naming what was not found.
    """
    if use not in METHODS and ":" not in use:
        raise ValueError(
            f"no method named {use!r}; there are {', '.join(METHODS)}, or an import path 'package.module:Class'"
        )
    return load(METHODS.get(use, use), "method")


def config(use: str) -> type:
    """The pydantic model of the recipe's `method:` section for `use`."""
    return find(use).Config
