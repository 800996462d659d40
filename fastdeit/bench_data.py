"""The input pipelines that `fastdeit bench data` compares: a DeiT recipe from JPEG files to the model's input.

Every side starts from the same generated files, in random order, and ends with float32 `[B, 3, H, W]` on the device:
decoded, cropped, resized, flipped, RandAugment, normalised, and, where the side has it, erased and mixed. The sides
called `_uint8` end earlier, with bytes: what the host does where a GPU does the rest. What a side does not do, or does
differently, is said in `WORK`, which is part of every row.

Each measurement opens the stream anew and first takes `WARM_BATCHES`: what a side has decoded ahead while nobody looked
is used up, and the next `TIMED_BATCHES` come at the speed at which they are made. There are more images than that, so
that to the end every side works ahead as in the middle of an epoch: without them, batches made during the warm-up would
be counted and their cost would not. CPU time is that of this process, all its threads included, and of its worker
processes.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastdeit import build
from fastdeit import recipe as recipes
from fastdeit.data import policy
from fastdeit.data.source import SyntheticSource
from fastdeit.engine.dist import World
from fastdeit.errors import UsageError

if TYPE_CHECKING:
    from fastdeit.recipe import Recipe

IMAGES, SIDES = 512, (375, 500)
WARM_BATCHES, TIMED_BATCHES = 8, 16
BATCH = 64
_CLASSES = 8
_BINS = 31

Stream = Generator[torch.Tensor, None, None]
Timer = Callable[[], tuple[float, float]]

WORK = {
    "fastdeit": "all of the recipe, replayable: TrainLoader (box decoded by DALI, rendered in threads) and the pixels "
    "kernel",
    "timm": "all of the recipe: create_loader with worker processes, FastCollateMixup on uint8, PrefetchLoader "
    "normalises and erases; PosterizeIncreasing keeps at least 1 bit, because timm 1.0.31 asks Pillow for 0, which "
    "Pillow 13 refuses",
    "torchvision": "all of the recipe, with torchvision's RandAugment (every operation applied, one magnitude, and "
    "bilinear, because on tensors it has no bicubic one): decode_image and transforms.v2 on uint8 tensors in worker "
    "processes of DataLoader, MixUp or CutMix of a batch",
    "fastdeit_uint8": "decoded, cropped, resized, flipped, RandAugment; the kernel normalises, erases and mixes",
    "timm_uint8": "decoded, cropped, resized, flipped, RandAugment, mixed; the DataLoader inside PrefetchLoader, which "
    "normalises and erases",
    "dali": "nothing erased or mixed, DALI's RandAugment (every operation applied, one magnitude), not replayable: one "
    "DALI pipeline",
}


@dataclass(frozen=True)
class Setting:
    """What all sides have in common. `recipe` reads the files and has the batch size and threads of the benchmark."""

    recipe: "Recipe"
    device: torch.device

    @property
    def steps(self) -> int:
        """Batches of an epoch: those that are taken, and as many as a side makes ahead (2 a worker)."""
        return 2 * WARM_BATCHES + TIMED_BATCHES + 2 * self.recipe.data.threads

    @property
    def folder(self) -> str:
        return os.path.join(self.recipe.data.root, "train")

    @property
    def rand(self) -> policy.Policy | None:
        """RandAugment's settings, if the recipe has it."""
        return None if self.recipe.data.augment == "none" else policy.parse(self.recipe.data.augment)


@contextmanager
def sides(args: argparse.Namespace, device: torch.device) -> Generator[tuple[dict[str, Timer], dict[str, Any]]]:
    """(a timer for each side, facts for the row); a timer returns (seconds, CPU seconds) of `TIMED_BATCHES`."""
    threads, batch = args.threads or len(os.sched_getaffinity(0)), args.batch or BATCH
    names = ["fastdeit", *_PEERS[args.peer]]
    with tempfile.TemporaryDirectory() as root:
        own = [f"data.root={root}", "data.source=folder", "data.repeats=1", f"data.threads={threads}"]
        own += [f"train.batch_size={batch}", f"data.group_size={batch}", "train.accumulate=1"]
        recipe = recipes.load(args.recipe, own)
        data = recipe.data
        if data.crop != "random_resized" or data.color_jitter or data.augment.partition("-")[0] not in ("rand", "none"):
            raise UsageError(
                f"recipe {recipe.name}: the peers only have the random resized crop and augment rand-... or none, not "
                f"crop {data.crop}, augment {data.augment}, color_jitter {data.color_jitter}"
            )
        setting = Setting(recipe, device)
        _write_images(Path(root), setting.steps * batch)
        facts = {"recipe": recipe.name, "augment": data.augment, "batch": batch, "images": TIMED_BATCHES * batch}
        facts |= {"threads": threads, "side": SIDES, "work": {name: WORK[name] for name in names}}
        yield {name: _timer(partial(_STREAMS[name], setting), device) for name in names}, facts


def compared_to(peer: str) -> str:
    """Our side that ends where `peer` does."""
    return "fastdeit_uint8" if peer.endswith("_uint8") else "fastdeit"


def cpu_seconds() -> float:
    """CPU time used so far by this process and by its worker processes that live."""
    ticks = os.sysconf("SC_CLK_TCK")
    used = time.process_time()
    for worker in multiprocessing.active_children():
        # The name, in brackets, may contain anything; behind it are fields 3, 4, ..., 14 and 15 among them (proc(5)).
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        used += (int(fields[11]) + int(fields[12])) / ticks
    return used


def _timer(open_stream: Callable[[], Stream], device: torch.device) -> Timer:
    world = World(device)

    def measure() -> tuple[float, float]:
        with closing(open_stream()) as stream:
            for _ in range(WARM_BATCHES):
                next(stream)
            world.synchronize()
            began, used = time.perf_counter(), cpu_seconds()
            for _ in range(TIMED_BATCHES):
                next(stream)
            world.synchronize()
            return time.perf_counter() - began, cpu_seconds() - used

    return measure


def _write_images(root: Path, count: int) -> None:
    """`count` names of `IMAGES` different files."""
    source = SyntheticSource(IMAGES, classes=_CLASSES, size=SIDES, seed=0)
    for split, files in (("train", count), ("val", _CLASSES)):
        written: list[Path] = []
        for i in range(files):
            path = root / split / f"class{source.label(i)}" / f"{i:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            if i < IMAGES:
                path.write_bytes(bytes(source.read(i)))
                written.append(path)
            else:
                os.link(written[i % IMAGES], path)


def _ours(setting: Setting, uint8: bool = False) -> Stream:
    recipe, world = setting.recipe, World(setting.device)
    source, _ = build.sources(recipe)
    loader = build.train_loader(recipe, source, world, 0, print)
    with closing(loader.batches(0, setting.steps)) as batches:
        for (samples,) in batches:
            batch = build.to_batch(samples, recipe, world.device)
            yield batch.images[0] if uint8 else batch.pixels()


def _timm(setting: Setting, uint8: bool = False) -> Stream:
    from timm.data import FastCollateMixup, create_dataset, create_loader

    data, size = setting.recipe.data, build.image_size(setting.recipe)
    mixup = FastCollateMixup(
        mixup_alpha=data.mixup,
        cutmix_alpha=data.cutmix,
        prob=data.mix_probability,
        switch_prob=data.mix_switch,
        num_classes=_CLASSES,
    )
    with _posterize_keeps_a_bit():
        loader = create_loader(
            create_dataset("", root=setting.folder),
            input_size=(3, *size),
            batch_size=setting.recipe.train.batch_size,
            is_training=True,
            re_prob=data.erase,
            re_mode="pixel",
            scale=data.crop_scale,
            ratio=data.crop_ratio,
            hflip=data.flip,
            color_jitter=0.0,
            auto_augment=None if setting.rand is None else data.augment,
            interpolation="bicubic",
            mean=data.mean,
            std=data.std,
            num_workers=data.threads,
            collate_fn=mixup if data.mixup or data.cutmix else None,
            device=setting.device,
        )
    for images, _ in loader.loader if uint8 else loader:
        yield images


@contextmanager
def _posterize_keeps_a_bit() -> Iterator[None]:
    from timm.data import auto_augment

    name = "PosterizeIncreasing"
    original = auto_augment.NAME_TO_OP[name]
    auto_augment.NAME_TO_OP[name] = lambda image, bits, **options: original(image, max(1, bits), **options)
    try:
        yield
    finally:
        auto_augment.NAME_TO_OP[name] = original


def _torchvision(setting: Setting) -> Stream:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    data, size = setting.recipe.data, build.image_size(setting.recipe)
    bicubic, bilinear, rand = v2.InterpolationMode.BICUBIC, v2.InterpolationMode.BILINEAR, setting.rand
    transform = [
        v2.RandomResizedCrop(size, data.crop_scale, data.crop_ratio, bicubic, antialias=True),
        v2.RandomHorizontalFlip(data.flip),
        *([v2.RandAugment(rand.draws, round(_magnitude(rand)), 10 + 1, bilinear, policy.FILL)] if rand else []),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(data.mean, data.std),
        v2.RandomErasing(data.erase, value="random"),
    ]
    loader = DataLoader(
        ImageFolder(setting.folder, v2.Compose(transform), loader=partial(decode_image, mode=ImageReadMode.RGB)),
        setting.recipe.train.batch_size,
        shuffle=True,
        num_workers=data.threads,
        drop_last=True,
    )
    kinds = (v2.MixUp, data.mixup), (v2.CutMix, data.cutmix)
    mixes = [kind(alpha=alpha, num_classes=_CLASSES) for kind, alpha in kinds if alpha]
    for images, labels in loader:
        moved = images.to(setting.device), labels.to(setting.device)
        yield v2.RandomChoice(mixes)(*moved)[0] if mixes else moved[0]


def _dali(setting: Setting) -> Stream:
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.auto_aug import rand_augment

    data, size, device = setting.recipe.data, build.image_size(setting.recipe), setting.device
    on_cpu, rand = device.type == "cpu", setting.rand

    @pipeline_def(
        batch_size=setting.recipe.train.batch_size,
        num_threads=data.threads,
        device_id=None if on_cpu else device.index or 0,
        seed=0,
        enable_conditionals=True,
    )
    def pipeline():
        encoded, _ = fn.readers.file(file_root=setting.folder, random_shuffle=True)
        images = fn.decoders.image_random_crop(
            encoded,
            device="cpu" if on_cpu else "mixed",
            random_area=list(data.crop_scale),
            random_aspect_ratio=list(data.crop_ratio),
        )
        images = fn.resize(images, size=size, interp_type=types.INTERP_CUBIC, antialias=True)
        images = fn.flip(images, horizontal=fn.random.coin_flip(probability=data.flip))
        if rand is not None:
            magnitude = round(_magnitude(rand) / 10 * (_BINS - 1))
            images = rand_augment.rand_augment(
                images, n=rand.draws, m=magnitude, num_magnitude_bins=_BINS, shape=size, fill_value=policy.FILL[1]
            )
        normalise = {"mean": [255 * mean for mean in data.mean], "std": [255 * std for std in data.std]}
        return fn.crop_mirror_normalize(images, dtype=types.FLOAT, output_layout="CHW", **normalise)

    pipe = pipeline()
    pipe.build()
    while True:
        (images,) = pipe.run()
        yield torch.from_dlpack(images.as_tensor())


def _magnitude(rand: policy.Policy) -> float:
    """In tenths of the largest, as timm's."""
    return rand.rows[0][0].magnitude


_STREAMS: dict[str, Callable[[Setting], Stream]] = {
    "fastdeit": _ours,
    "fastdeit_uint8": partial(_ours, uint8=True),
    "timm": _timm,
    "timm_uint8": partial(_timm, uint8=True),
    "torchvision": _torchvision,
    "dali": _dali,
}
_PEERS = {
    "none": ["fastdeit_uint8"],
    "timm": ["fastdeit_uint8", "timm", "timm_uint8"],
    "torchvision": ["torchvision"],
    "dali": ["dali"],
    "all": [name for name in _STREAMS if name != "fastdeit"],
}
