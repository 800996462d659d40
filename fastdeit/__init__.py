"""fastdeit: train DeiT-family vision transformers fast, and get the same result every time.

    import fastdeit

    run = fastdeit.train("digits", {"train.epochs": 3})
    model = fastdeit.load("runs/x@best")

`fastdeit.api` says what these do. They are imported when they are first asked for: `import fastdeit` imports no torch.
"""

from typing import TYPE_CHECKING, Any

from fastdeit.version import __version__

if TYPE_CHECKING:
    from fastdeit.api import Run, load, loader, stepper, train

__all__ = ["Run", "__version__", "load", "loader", "stepper", "train"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from fastdeit import api

        return getattr(api, name)
    raise AttributeError(f"module 'fastdeit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
