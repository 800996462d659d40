"""The table of our models by name. It imports no torch, so that a wrong name is said in tenths of a second."""

from fastdeit.models import deit, deit3, plain_vit
from fastdeit.text import did_you_mean

CONFIGS = {**deit.CONFIGS, **deit3.CONFIGS, **plain_vit.CONFIGS}
"""The vision transformers, which differ in the fields of `ViTConfig` alone (`families.transformer` makes them)."""
OTHERS = {"convnet_digits": "fastdeit.models.convnet:convnet_digits"}
"""Import paths of what makes the other networks."""
MODELS = (*CONFIGS, *OTHERS)


def check(name: str) -> str:
    """`name`; ValueError unless it is one of `MODELS` or has the form of an import path."""
    if name not in MODELS and ":" not in name:
        known = "; `fastdeit models` lists those there are, and an import path is written package.module:callable"
        raise ValueError(f"there is no model {name!r}{did_you_mean(name, MODELS) or known}")
    return name
