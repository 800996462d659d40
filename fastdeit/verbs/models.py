"""`fastdeit models`: which networks a recipe may name."""

import argparse
from collections.abc import Iterable
from fnmatch import fnmatchcase

from fastdeit import models
from fastdeit.engine.progress import table
from fastdeit.errors import UsageError
from fastdeit.text import did_you_mean

_TIMM = "timm:"
HOW = """
model.name=NAME trains one of these. model.timm=NAME trains a model of timm unchanged; `fastdeit models timm:PATTERN`
lists those. GFLOP are of one image, forward, at the model's own size, with 2 for a multiply-add."""
OF_TIMM = """
model.timm=NAME trains one of these. `fastdeit models 'timm:NAME.*'` lists the weights that there are of it."""


def main(args: argparse.Namespace) -> None:
    """Print the models whose name fits `args.pattern`; raises UsageError where there is none."""
    pattern = args.pattern
    if pattern.startswith(_TIMM):
        import timm

        # With the tags of weights only where the pattern asks for one: there are ten times as many.
        wanted = pattern.removeprefix(_TIMM)
        print("\n".join(fitting(wanted, timm.list_models(pretrained="." in wanted), _TIMM)))
        print(OF_TIMM)
        return
    rows = [described(name) for name in fitting(pattern, models.MODELS, "")]
    table(rows, ("model", "parameters", "GFLOP", "image", "patch"))
    print(HOW)


def described(name: str) -> tuple[str, ...]:
    """A row of the table of our models, which are built on the meta device: name, parameters in millions, GFLOP, size
    of the image, side of a patch."""
    import torch

    with torch.device("meta"):
        built = models.build(name)
    height, width = built.config.image_size
    parameters = sum(parameter.numel() for parameter in built.parameters())
    return (
        name,
        f"{parameters / 1e6:.2f} M",
        f"{built.flops() / 1e9:.2f}",
        f"{height}x{width}",
        str(built.patch_size or "-"),
    )


def fitting(pattern: str, names: Iterable[str], prefix: str) -> list[str]:
    """The `names` that have `pattern` in them, or match it if it has `*` or `?`; `prefix` stands before it in messages.

    Raises UsageError where there is none.
    """
    names = list(names)
    glob = pattern if any(letter in pattern for letter in "*?[") else f"*{pattern}*"
    found = [name for name in names if fnmatchcase(name, glob)]
    if not found:
        hint = (
            did_you_mean(pattern, names) or "; `fastdeit models` lists ours, `fastdeit models timm:deit` those of timm"
        )
        raise UsageError(f"no model is called {prefix}{pattern}{hint}")
    return found
