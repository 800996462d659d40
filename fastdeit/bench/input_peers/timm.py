"""timm's `create_loader`."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from fastdeit.bench.data import CLASSES, Setting, Side, Stream
from fastdeit.bench.measure import CannotRun


def timm(setting: Setting, uint8: bool = False) -> Side:
    """`create_loader`; `uint8`: without its PrefetchLoader, the DataLoader alone."""
    notes = ["create_loader with worker processes"]
    options = _evaluation(setting) if setting.evaluation else _training(setting, notes)
    last = "normalises" if setting.evaluation or not setting.data.erase else "normalises and erases"
    if uint8:
        notes.append(f"the DataLoader inside PrefetchLoader, which {last}")
    else:
        notes.append(f"PrefetchLoader {last}")
    return Side("; ".join(notes), partial(_stream, setting, options, uint8))


def _stream(setting: Setting, options: dict[str, Any], uint8: bool) -> Stream:
    from timm.data import create_dataset, create_loader

    with posterize_keeps_a_bit():
        loader = create_loader(
            create_dataset("", root=setting.folder),
            input_size=(3, *setting.size),
            batch_size=setting.batch,
            interpolation="bicubic",
            mean=setting.data.mean,
            std=setting.data.std,
            num_workers=setting.data.threads,
            device=setting.device,
            **options,
        )
    for images, _ in loader.loader if uint8 else loader:
        yield images


def _evaluation(setting: Setting) -> dict[str, Any]:
    return {"is_training": False, "crop_pct": setting.data.eval_crop_ratio}


def _training(setting: Setting, notes: list[str]) -> dict[str, Any]:
    from timm.data import FastCollateMixup

    data = setting.data
    options = {"is_training": True, "hflip": data.flip, "re_prob": data.erase, "re_mode": "pixel"}
    options |= operations_options(setting, notes)
    if data.crop == "simple":
        options |= {"train_crop_mode": "rkrr", "scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
        notes.append("the simple crop by train_crop_mode rkrr without scaling, within the image: no reflected pixels")
    else:
        options |= {"scale": data.crop_scale, "ratio": data.crop_ratio}
    if setting.mixes:
        notes.append("FastCollateMixup on uint8")
        options["collate_fn"] = FastCollateMixup(**mixing_options(setting))
    return options


def operations_options(setting: Setting, notes: list[str]) -> dict[str, Any]:
    """auto_augment and color_jitter of timm's create_transform."""
    augment = setting.data.augment
    if augment == "trivial" or augment.startswith("augreg"):
        raise CannotRun(f"timm has no augment {augment}")
    if augment == "three_augment":
        notes.append("its augment 3a, which is 3-Augment, and colour jitter")
        augment = "3a"
    if "inc1" in augment or augment in ("originalr", "v0r"):
        notes.append(
            "PosterizeIncreasing keeps at least 1 bit, because timm 1.0.31 asks Pillow for 0, which Pillow 13 refuses"
        )
    return {"auto_augment": None if augment == "none" else augment, "color_jitter": setting.jitter}


def mixing_options(setting: Setting) -> dict[str, Any]:
    """Arguments of timm's FastCollateMixup and Mixup."""
    data = setting.data
    return {
        "mixup_alpha": data.mixup,
        "cutmix_alpha": data.cutmix,
        "prob": data.mix_probability,
        "switch_prob": data.mix_switch,
        "mode": "elem" if data.mix_mode == "element" else data.mix_mode,
        "num_classes": CLASSES,
    }


@contextmanager
def posterize_keeps_a_bit() -> Iterator[None]:
    """timm's PosterizeIncreasing at magnitude 10 keeps 0 of 8 bits, which Pillow 13 refuses; inside it keeps one."""
    from timm.data import auto_augment

    name = "PosterizeIncreasing"
    original = auto_augment.NAME_TO_OP[name]
    auto_augment.NAME_TO_OP[name] = lambda image, bits, **options: original(image, max(1, bits), **options)
    try:
        yield
    finally:
        auto_augment.NAME_TO_OP[name] = original
