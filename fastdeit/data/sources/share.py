"""The held-out split as a share of the training split: `data.val=10%`. Imports nothing heavy, so that a recipe can be
checked by it."""

import re

_SHARE = re.compile(r"(\d+(?:\.\d+)?)%")


def is_share(val: str) -> bool:
    """Whether the name of a held-out split is a share of the training split, as in "10%"."""
    return val.endswith("%")


def share(val: str) -> float:
    """The share that "10%" says, between 0 and 1; ValueError where it is none."""
    match = _SHARE.fullmatch(val)
    if match is None or not 0 < float(match[1]) < 100:
        raise ValueError(f"must be a share between 0% and 100%, as in 10%, got {val!r}")
    return float(match[1]) / 100
