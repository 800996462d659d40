"""The `config.json` that timm writes beside weights: what a folder of the Hugging Face hub tells of them.

{"architecture": "deit_small_patch16_224", "num_classes": 3, "label_names": ["cat", "dog", "eel"],
 "pretrained_cfg": {"input_size": [3, 224, 224], "mean": [...], "std": [...], "crop_pct": 0.9, ...}}
"""

from pathlib import Path
from typing import Any

from fastdeit import jsons
from fastdeit.fields import size_pair

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names of the files that such a config belongs to."""


def described(weights: Path) -> dict[str, Any]:
    """What the config beside the file `weights` tells, as fields of `run.weights.Known`; empty where there is none.

    The network is under `architecture`. Raises ValueError, in a sentence, for a config of timm's that is damaged; a
    `config.json` that names no architecture is somebody else's, and is left alone.
    """
    path = weights.with_name("config.json")
    if weights.name not in _WEIGHTS or not path.is_file():
        return {}
    try:
        config = jsons.read(path)
        if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
            return {}
        return _fields(config, config.get("pretrained_cfg") or {})
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error


def _fields(config: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    names, size, count = config.get("label_names"), inputs.get("input_size"), config.get("num_classes")
    found = {
        "architecture": config["architecture"],
        "image_size": None if size is None else size_pair(tuple(size[1:]), "input_size"),
        "num_classes": None if count is None else int(count),
        "classes": None if names is None else tuple(map(str, names)),
        "mean": _floats(inputs.get("mean")),
        "std": _floats(inputs.get("std")),
        "crop_ratio": None if inputs.get("crop_pct") is None else float(inputs["crop_pct"]),
    }
    if names is not None and count is not None and len(names) != count:
        raise ValueError(f"num_classes is {count}, but there are {len(names)} label_names")
    return found


def _floats(values: Any) -> tuple[float, ...] | None:
    return None if values is None else tuple(map(float, values))
