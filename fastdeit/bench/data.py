"""The input pipelines that `fastdeit bench data` compares: a DeiT recipe from JPEG files to the model's input.

Every side starts from the same generated files and ends with float32 `[B, 3, H, W]` on the device: of training, in
random order, decoded, cropped, resized, flipped, changed by the recipe's pixel operations, normalised, and, where the
side has it, erased and mixed; of evaluation, in the files' order, decoded, resized, cut to the centre and normalised.
The sides called `_uint8` end earlier, with bytes: what the host does where a GPU does the rest. What a side does not
do, or does differently, is said in the field `work` of every row; a peer that has nothing like the recipe stands in
`failed`, with its reason.

Each measurement opens the stream anew and first takes `WARM_BATCHES`: what a side has decoded ahead while nobody looked
is used up, and the next `TIMED_BATCHES` come at the speed at which they are made. There are more images than that, so
that to the end every side works ahead as in the middle of an epoch: without them, batches made during the warm-up would
be counted and their cost would not. CPU time is that of this process, all its threads included, and of its worker
processes.

`DECODER` is the side that decodes what ours decode and does nothing else. Its time is the floor of ours: work on
everything else cannot bring them below it.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Container, Generator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastdeit import kernels
from fastdeit.bench.measure import CannotRun, Timer, median
from fastdeit.data import compiled
from fastdeit.data.plan import policy
from fastdeit.data.sources.synthetic import SyntheticSource
from fastdeit.engine.dist import World
from fastdeit.errors import UsageError
from fastdeit.feed import Loader
from fastdeit.recipe import resolve as recipes
from fastdeit.run import build
from fastdeit.views import parse_policy

if TYPE_CHECKING:
    from fastdeit.batch import Batch
    from fastdeit.recipe.config import DataConfig
    from fastdeit.recipe.resolve import Recipe

Stream = Generator[torch.Tensor, None, None]

IMAGES, SIDES = 512, (375, 500)
WARM_BATCHES, TIMED_BATCHES = 8, 16
BATCH = 64
OURS = "all of the recipe, replayable: TrainLoader (box decoded by DALI, rendered in threads)"
DECODER = "fastdeit_decoder"
CLASSES = 8
"""Classes of the generated files, a folder each."""
_FACTS = {
    "train": ("crop", "augment", "color_jitter", "erase", "mixup", "cutmix", "mix_probability"),
    "val": ("eval_crop_ratio",),
}
"""Fields of a recipe's data that a row of that split repeats."""


class Side(NamedTuple):
    """One side of a row: what it does, in words, and its batches, made from when the stream is first asked for one."""

    work: str
    stream: Callable[[], Stream]


@dataclass(frozen=True)
class Setting:
    """What all sides have in common. `recipe` reads the files and has the batch size and threads of the benchmark;
    evaluation: the input of its evaluation, not of its training."""

    recipe: "Recipe"
    device: torch.device
    evaluation: bool = False

    @property
    def data(self) -> "DataConfig":
        """The recipe's section `data`."""
        return self.recipe.data

    @property
    def batch(self) -> int:
        """Images of a batch."""
        return self.recipe.train.batch_size

    @property
    def steps(self) -> int:
        """Batches of an epoch: those that are taken, and as many as a side makes ahead (2 a worker)."""
        return 2 * WARM_BATCHES + self.timed + 2 * self.data.threads

    @property
    def timed(self) -> int:
        """Batches of a measurement: `TIMED_BATCHES`, and as many more as make every worker of a peer do its share.
        Workers begin together and end batches at about the same time, in bursts of one a worker."""
        return TIMED_BATCHES + -TIMED_BATCHES % self.data.threads

    @property
    def split(self) -> str:
        """The split that is read: "train" or "val"."""
        return "val" if self.evaluation else "train"

    @property
    def folder(self) -> str:
        """The directory of that split."""
        return os.path.join(self.data.root, self.split)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels of the model's input."""
        return build.image_size(self.recipe)

    @property
    def covered(self) -> tuple[int, int]:
        """(height, width) in pixels that the resized image just covers, in evaluation and for the simple crop."""
        ratio = self.data.eval_crop_ratio if self.evaluation else 1.0
        return int(self.size[0] / ratio), int(self.size[1] / ratio)

    @property
    def operations(self) -> policy.Policy:
        """On the pixels, after crop and flip."""
        return parse_policy(self.data.augment, self.size, self.data.color_jitter)

    @property
    def rand(self) -> policy.Policy | None:
        """RandAugment's settings, if that is what the recipe has."""
        return self.operations if self.data.augment.startswith("rand-") else None

    @property
    def jitter(self) -> tuple[float, ...] | None:
        """Strengths of brightness, contrast, saturation and hue, if the recipe has colour jitter."""
        strengths = self.operations.jitter
        return strengths if any(strengths) else None

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs."""
        return self.data.mixes and not self.evaluation


@contextmanager
def opened(args: argparse.Namespace, device: torch.device, fixed: dict[str, Any] | None = None) -> Generator[Setting]:
    """The recipe with what the benchmark sets, and the fields `fixed`; `write_images` makes the files that it reads,
    which live as long as the context."""
    with tempfile.TemporaryDirectory() as root:
        yield Setting(_recipe(args, root, fixed or {}), device, getattr(args, "eval", False))


def facts(setting: Setting, overrides: list[str]) -> dict[str, Any]:
    """What a row repeats of its input."""
    return {
        "recipe": setting.recipe.name,
        "overrides": overrides,
        "evaluation": setting.evaluation,
        **{field: getattr(setting.data, field) for field in _FACTS[setting.split]},
        "batch": setting.batch,
        "images": setting.timed * setting.batch,
        "threads": setting.data.threads,
        "pixel_operations": compiled.status(),
        "side": SIDES,
    }


def _recipe(args: argparse.Namespace, root: str, fixed: dict[str, Any]) -> "Recipe":
    batch = args.batch or BATCH
    own = {"data.root": root, "data.source": "folder", "data.train": "train", "data.val": "val", "data.repeats": 1}
    own |= {"data.threads": args.threads or len(os.sched_getaffinity(0)), "data.group_size": batch}
    own |= {"train.batch_size": batch, "train.accumulate": 1, **fixed}
    own["data.size_schedule"] = []  # peers make images of `model.image_size`
    recipe = recipes.load(args.recipe, [*args.overrides, *(f"{field}={value}" for field, value in own.items())])
    if len(build.augmentations(recipe)) > 1:
        raise UsageError(f"recipe {recipe.name}: its method wants several views of a sample, which no peer makes")
    return recipe


def input_of(row: dict[str, Any]) -> str:
    """Whose input a row is, in words."""
    words = [row["recipe"], *row.get("overrides", [])]  # older rows have none
    return ", ".join([*words, "evaluation"] if row.get("evaluation") else words)


def compared_to(peer: str, sides: Container[str]) -> str | None:
    """The one among `sides` of ours that ends where `peer` does."""
    name = "fastdeit_uint8" if peer.endswith("_uint8") else "fastdeit"
    return name if name in sides else None


def decoder_shares(row: dict[str, Any], of: str) -> dict[str, float]:
    """What `DECODER` takes of the time of every other side of ours, by the clock (`of` "seconds") or in "cpu_seconds";
    empty for a row without it."""
    if DECODER not in row[of]:
        return {}
    names = [name for name in row[of] if name.startswith("fastdeit") and name != DECODER]
    return {name: median(row, DECODER, of) / median(row, name, of) for name in names}


def cpu_seconds() -> float:
    """CPU time used so far by this process and by its worker processes that live."""
    ticks = os.sysconf("SC_CLK_TCK")
    used = time.process_time()
    for worker in multiprocessing.active_children():
        # The name, in brackets, may contain anything; behind it are fields 3, 4, ..., 14 and 15 among them (proc(5)).
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        used += (int(fields[11]) + int(fields[12])) / ticks
    return used


def timer(open_stream: Callable[[], Generator[Any, None, None]], setting: Setting) -> Timer:
    """Timer of `Setting.timed` batches of a stream that is opened anew, after the first `WARM_BATCHES`."""
    world = World(setting.device)

    def measure() -> tuple[float, float]:
        with closing(open_stream()) as stream:
            for _ in range(WARM_BATCHES):
                next(stream)
            world.synchronize()
            began, used = time.perf_counter(), cpu_seconds()
            for _ in range(setting.timed):
                next(stream)
            world.synchronize()
            return time.perf_counter() - began, cpu_seconds() - used

    return measure


def write_images(setting: Setting) -> None:
    """The files of both splits: enough for `Setting.steps`, of the other a few."""
    for split in ("train", "val"):
        count = setting.steps * setting.batch if split == setting.split else CLASSES
        _write(Path(setting.data.root, split), count)


def _write(folder: Path, count: int) -> None:
    """`count` names of `IMAGES` different files."""
    source = SyntheticSource(IMAGES, classes=CLASSES, size=SIDES, seed=0)
    written: list[Path] = []
    for i in range(count):
        path = folder / f"class{source.label(i)}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i < IMAGES:
            path.write_bytes(bytes(source.read(i)))
            written.append(path)
        else:
            os.link(written[i % IMAGES], path)


def ours(setting: Setting, uint8: bool = False) -> Side:
    """What `fastdeit train` and `fastdeit eval` read; `uint8`: before the pixels kernel."""
    if setting.evaluation:
        made, kernel, stream = "EvalLoader (decoded by DALI, rendered in threads)", "normalises", _evaluated_on
    else:
        made, kernel, stream = OURS, "does the rest", _trained_on
    work = f"{made}; without the pixels kernel, which {kernel}" if uint8 else f"{made}; the pixels kernel {kernel}"
    return Side(work, partial(stream, setting, uint8))


def decoder(setting: Setting) -> Side:
    """The boxes that our sides decode, and nothing made of them. CannotRun on a GPU, where all is one graph."""
    if setting.device.type != "cpu":
        raise CannotRun("on a GPU the decoder is part of one graph and is not measured alone")
    work = "our decoder alone: the same boxes of the same files, which lie in memory; nothing is made of their pixels"
    return Side(work, partial(_decoded, setting))


def _decoded(setting: Setting) -> Generator[Any, None, None]:
    world = World(setting.device)
    source, held_out = build.sources(setting.recipe)
    if setting.evaluation:
        loader = build.eval_loader(setting.recipe, held_out, world, {}, print)
        works = loader.works()
    else:
        loader = build.train_loader(setting.recipe, source, world, {}, print)
        works = loader.works(0, TIMED_BATCHES)
    with closing(works):
        first = list(islice(works, TIMED_BATCHES))
    yield from loader.decoded(cycle(first))


def as_loader(setting: Setting) -> Side:
    """The same images for somebody else's loop."""
    given = "uint8 off: finished floats and shares of the classes"
    return Side(f"fastdeit.feed.Loader, for a loop that is not ours; {given}", partial(_given_by_loader, setting))


def _given_by_loader(setting: Setting) -> Stream:
    with closing(Loader(setting.recipe, train=not setting.evaluation, device=setting.device)) as loader:
        for images, _ in loader:
            yield images


def batches(setting: Setting, noise: Mapping[str, int]) -> Generator["Batch", None, None]:
    """Training batches as `fastdeit train` reads them."""
    world = World(setting.device)
    source, _ = build.sources(setting.recipe)
    loader = build.train_loader(setting.recipe, source, world, noise, print)
    with closing(loader.batches(0, setting.steps)) as stream:
        for (batch,) in stream:
            yield batch.to(world.device)


def _trained_on(setting: Setting, uint8: bool) -> Stream:
    with closing(batches(setting, {})) as stream:
        for batch in stream:
            yield batch.images[0] if uint8 else batch.pixels()


def _evaluated_on(setting: Setting, uint8: bool) -> Stream:
    _, source = build.sources(setting.recipe)
    loader = build.eval_loader(setting.recipe, source, World(setting.device), {}, print)
    with closing(loader.batches()) as batches:
        for samples in batches:
            images = samples.images[0].to(setting.device)
            yield images if uint8 else kernels.pixels(images, mean=setting.data.mean, std=setting.data.std)
