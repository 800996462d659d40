"""`fastdeit data show` and `fastdeit data preview`: pictures of what a model sees.

The images come from the loaders and the kernel that training uses, with the recipe's seed; nothing is drawn anew here.
What a sample becomes does not depend on the number of processes, so only its own mixing group is decoded: as the share
of one process among as many as there are groups in a batch. Where a method wants several views, the first is drawn.
"""

import argparse
import sys
import textwrap
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastdeit import cores, kernels
from fastdeit.batch import Batch
from fastdeit.data import pixel_ops
from fastdeit.data.execute.decode import pixels
from fastdeit.data.plan import order, plan
from fastdeit.data.sources.source import Source
from fastdeit.engine.dist import World, pick_device
from fastdeit.engine.report import write_png
from fastdeit.errors import UsageError
from fastdeit.recipe import resolve as recipes
from fastdeit.run import build
from fastdeit.run.address import is_address
from fastdeit.run.settings import settings
from fastdeit.run.weights import open_weights
from fastdeit.text import for_picture, one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    from fastdeit.recipe.resolve import Recipe

_BOX = "#d55e00"
_GREY = "#666666"
_LABEL = 16

Picture = NDArray[np.float32]


@dataclass(frozen=True)
class Place:
    """Where a sample stands in a run: `step` counts from the start of the run, `group` and `slot` within its batch."""

    step: int
    group: int
    slot: int


def show(args: argparse.Namespace) -> None:
    """`fastdeit data show RECIPE --sample I --epoch E --copy C --out FILE`: one sample on its way to the model."""
    path, recipe, source = _begin(args)
    place = locate(recipe, len(source), args.sample, args.epoch, args.copy)
    batch = _group(recipe, source, place.step, place.group)
    own = int(batch.index[place.slot])
    original = pixels(source.read(own))
    height, width = original.shape[:2]
    augment = build.augmentations(recipe, args.epoch)[0]
    view = plan.samples(augment, recipe.train.seed, args.epoch, [own], [args.copy], [width], [height])
    rows = _words(augment.size, source, batch, view, place.slot, (width, height))
    where = (
        f"sample {args.sample} of {len(source):,}, epoch {args.epoch}, copy {args.copy}: "
        f"step {place.step:,}, group {place.group}, slot {place.slot}"
    )
    if own != args.sample:
        rows.insert(0, ("sample", f"{args.sample} cannot be used; training takes sample {own} in its place"))
    normalised = kernels.pixels(batch.images[0], mean=batch.mean, std=batch.std, erase=batch.erase[0])
    images = [
        original,
        batch.images[0][place.slot].cpu().numpy(),
        _visible(normalised, recipe)[place.slot],
        _visible(batch.pixels(), recipe)[place.slot],
    ]
    _save(_sheet(images, _window(view, original.shape, augment.size), where, rows), path)
    print("\n".join(map(one_line, [where, *(f"  {name:7} {text}" for name, text in rows), f"picture in {path}"])))


def preview(args: argparse.Namespace) -> None:
    """`fastdeit data preview RECIPE --rows R --columns C --out FILE`: the first images of the first training batch as
    the model sees them, and evaluation crops. A small batch is drawn whole, in fewer rows."""
    path, recipe, source = _begin(args)
    wanted, size, batch_size = args.rows * args.columns, recipe.data.group_size, recipe.train.batch_size
    count = min(wanted, batch_size)
    columns = min(args.columns, count)
    rows = -(-count // columns)
    training = []
    for group in range(-(-count // size)):
        batch = _group(recipe, source, 0, group)
        labels = zip(*(column.tolist() for column in batch.targets), strict=True)
        training += zip(_visible(batch.pixels(), recipe), (_target(source, *label) for label in labels), strict=True)
    _, held_out = build.sources(recipe)
    evaluation = _evaluation(recipe, held_out, min(len(held_out), columns * max(1, rows // 2)))
    _save(_grid(recipe, training[:count], evaluation, columns), path)
    if count < wanted:
        print(f"a batch of recipe {recipe.name} has {count} images: all are drawn, fewer than the {wanted} asked for")
    print(f"{_geometry(recipe)}\npicture in {one_line(path)}")


def locate(recipe: "Recipe", n: int, sample: int, epoch: int, copy: int) -> Place:
    """Where copy `copy` of sample `sample` of `n` stands in epoch `epoch` of a run of the recipe.

    Raises UsageError where it stands nowhere; the message says in which epoch it does.
    """
    train, repeats = recipe.train, recipe.data.repeats
    if not 0 <= sample < n:
        raise UsageError(f"there is no sample {sample}: the training split has samples 0 to {n - 1}")
    epochs = build.run_length(recipe, n).epochs_begun
    if not 0 <= epoch < epochs:
        raise UsageError(f"there is no epoch {epoch}: recipe {recipe.name} has epochs 0 to {epochs - 1}")

    def found(epoch: int) -> dict[int, int]:
        """Copy to position in the stream."""
        stream = order.epoch(train.seed, epoch, n, train.batch_size, repeats)
        return {int(stream.copy[at]): int(at) for at in np.flatnonzero(stream.sample == sample)}

    copies = found(epoch)
    if copy in copies:
        step, entry = divmod(copies[copy], train.batch_size)
        slot, group = divmod(entry, train.batch_size // recipe.data.group_size)
        return Place(epoch * order.steps_per_epoch(n, train.batch_size) + step, group, slot)
    if copies:
        raise UsageError(f"sample {sample} has no copy {copy} in epoch {epoch}, only {', '.join(map(str, copies))}")
    others = sorted(set(range(epochs)) - {epoch}, key=lambda other: abs(other - epoch))
    nearest = next((other for other in others if found(other)), None)
    where = "in no other either" if nearest is None else f"it does in epoch {nearest}"
    raise UsageError(
        f"sample {sample} does not occur in epoch {epoch}, {where}: with {repeats} repeats and whole batches only, "
        "an epoch does not show every sample"
    )


def _begin(args: argparse.Namespace) -> tuple[Path, "Recipe", Source]:
    recipe = _recipe(args.recipe, args)
    source, _ = build.sources(recipe)
    return Path(args.out), recipe, source


def _recipe(name: str, args: argparse.Namespace) -> "Recipe":
    """The recipe of this name, or the one that the weights at this address were trained by."""
    if not is_address(name):
        return recipes.load(name, args.overrides)
    weights = open_weights(name)
    recipe = settings(weights, None, args.overrides, args.data)
    if weights.checkpoint is None:
        told = "size, crop and normalisation are known, and nothing of the training: augmentation is that by default"
        print(one_line(f"{weights.origin}: {told}"), file=sys.stderr)
    return recipe


def _group(recipe: "Recipe", source: Source, step: int, group: int) -> Batch:
    """One mixing group of the batch at `step`, as the loader and the training loop make it."""
    alone = recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update={"accumulate": 1}),
            "data": recipe.data.model_copy(update={"threads": recipe.data.threads or cores.available()}),
        }
    )
    world = World(pick_device(recipe.engine.device), group, recipe.train.batch_size // recipe.data.group_size)
    ((batch,),) = build.train_loader(alone, source, world, {}, _on_bad).batches(step, step + 1)
    return batch.to(world.device)


def _evaluation(recipe: "Recipe", source: Source, count: int) -> list[tuple[Picture, str]]:
    """`count` held-out images as evaluation sees them, evenly spread over the split, each with its class."""
    world = World(pick_device(recipe.engine.device), 0, len(source) // count)
    images = []
    for batch in build.eval_loader(recipe, source, world, {}, _on_bad).batches():
        x = kernels.pixels(batch.images[0].to(world.device), mean=recipe.data.mean, std=recipe.data.std)
        images += zip(_visible(x, recipe), (_short(source, label) for label in batch.targets.y1.tolist()), strict=True)
        if len(images) >= count:
            break
    return images[:count]


def _on_bad(path: str, reason: str) -> None:
    print(f"image not used: {path}: {reason}", file=sys.stderr)


def _visible(x: torch.Tensor, recipe: "Recipe") -> Picture:
    """The model's input `[B, 3, H, W]` as pictures `[B, H, W, 3]` in [0, 1]."""
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (recipe.data.mean, recipe.data.std))
    return (x.float().cpu() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()


# ---- words -----------------------------------------------------------------------------------------------------------


def _words(
    out: tuple[int, int], source: Source, batch: Batch, view: plan.Plan, slot: int, size: tuple[int, int]
) -> list[tuple[str, str]]:
    """The plan of one sample as (what, words); `size` (width, height) is that of the file, `out` of the view."""
    height, width = out
    y, x, h, w = view.box[0].tolist()
    crop = f"{w} x {h} pixels from ({x}, {y}) of {size[0]} x {size[1]}, resized to {width} x {height}"
    if view.resize is not None:
        (rh, rw), (y, x) = view.resize[0].tolist(), view.start[0].tolist()
        crop = f"all of {size[0]} x {size[1]} resized to {rw} x {rh}, {width} x {height} pixels from ({x}, {y})"
    y0, x0, y1, x1 = view.erase_box[0].tolist()
    erased = f"{x1 - x0} x {y1 - y0} pixels from ({x0}, {y0}), filled with noise" if y1 > y0 else "nothing"
    return [
        ("file", source.path(int(batch.index[slot]))),
        ("crop", crop),
        ("flip", "yes" if view.flip[0] else "no"),
        ("ops", pixel_ops.described(view.ops.kind[0], view.ops.value[0])),
        ("erase", erased),
        ("mix", _mixed(batch, slot)),
        ("target", _target(source, *(column[slot].item() for column in batch.targets), limit=None)),
    ]


def _mixed(batch: Batch, slot: int) -> str:
    partner = f"sample {int(batch.index[batch.partner[slot]])}"
    y0, x0, y1, x1 = batch.box[0, slot].tolist()
    if y1 > y0 and x1 > x0:
        return f"cutmix: {x1 - x0} x {y1 - y0} pixels from ({x0}, {y0}) are those of {partner}"
    lam = float(batch.pixel_lam[slot])
    return f"mixup: {100 * lam:.1f} % of it and {100 - 100 * lam:.1f} % of {partner}" if lam < 1 else "not mixed"


def _target(source: Source, y1: int, y2: int, lam: float, limit: int | None = _LABEL) -> str:
    if lam == 1 or y1 == y2:
        return _short(source, y1, limit)
    return f"{100 * lam:.1f} % {_short(source, y1, limit)} + {100 - 100 * lam:.1f} % {_short(source, y2, limit)}"


def _short(source: Source, label: int, limit: int | None = _LABEL) -> str:
    name = source.classes[label]
    return f"'{name}'" if limit is None or len(name) <= limit else f"'{name[: limit - 3]}...'"


def _geometry(recipe: "Recipe") -> str:
    (height, width), ratio = build.image_size(recipe), recipe.data.eval_crop_ratio
    return (
        f"evaluation crop ratio {ratio:g}: resized to cover {int(width / ratio)} x {int(height / ratio)}, of which the "
        f"central {width} x {height} pixels are seen"
    )


# ---- drawing ---------------------------------------------------------------------------------------------------------


def _window(view: plan.Plan, shape: tuple[int, ...], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """(y, x, height, width) in source pixels of what the crop shows."""
    if view.resize is None:
        return tuple(view.box[0].tolist())
    scale = np.array(shape[:2]) / view.resize[0]
    return (*(view.start[0] * scale).tolist(), *(np.array(size) * scale).tolist())


def _sheet(
    images: list[Any], window: tuple[float, float, float, float], title: str, rows: list[tuple[str, str]]
) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    lines = [(name, textwrap.wrap(one_line(text), 120) or [""]) for name, text in rows]
    count = sum(len(text) for _, text in lines)
    figure = Figure(figsize=(13, 4.1 + 0.24 * count), dpi=120, layout="constrained")
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold")
    above, below = figure.subfigures(2, 1, height_ratios=(3.6, 0.24 * count))
    titles = "the file and the crop", "cropped, flipped, operations", "erased", "mixed: what the model sees"
    all_axes = above.subplots(1, len(images))
    for number, (axes, image, caption) in enumerate(zip(all_axes, images, titles, strict=True), 1):
        _draw(axes, image)
        axes.set_title(f"{number}  {caption}", fontsize=11, loc="left")
    y, x, h, w = window
    height, width = images[0].shape[:2]
    # Pixels lie around their coordinates: the first one covers -0.5 to 0.5.
    outline = {"fill": False, "clip_on": False}
    all_axes[0].add_patch(Rectangle((x - 0.5, y - 0.5), w, h, edgecolor=_BOX, linewidth=2.2, **outline))
    all_axes[0].set_xlim(min(x, 0) - 0.5, max(x + w, width) - 0.5)
    all_axes[0].set_ylim(max(y + h, height) - 0.5, min(y, 0) - 0.5)
    text = below.add_axes((0, 0, 1, 1))
    text.axis("off")
    row = 0.5
    for name, words in lines:
        text.text(0.012, 1 - row / count, name, va="center", fontsize=10.5, color=_GREY)
        for line in words:
            text.text(0.075, 1 - row / count, for_picture(line, 120), va="center", fontsize=10.5)
            row += 1
    return figure


def _grid(
    recipe: "Recipe", training: list[tuple[Picture, str]], evaluation: list[tuple[Picture, str]], columns: int
) -> "Figure":
    from matplotlib.figure import Figure

    heights = [0.45 + 1.62 * -(-len(images) // columns) for images in (training, evaluation)]
    figure = Figure(figsize=(max(1.5 * columns, 7.5), sum(heights)), dpi=120, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    _block(above, f"{for_picture(recipe.name)}: the first training batch, as the model sees it", training, columns)
    _block(below, _geometry(recipe), evaluation, columns)
    return figure


def _block(part: "SubFigure", title: str, images: list[tuple[Picture, str]], columns: int) -> None:
    part.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    all_axes = part.subplots(-(-len(images) // columns), columns, squeeze=False).reshape(-1)
    for axes in all_axes:
        axes.axis("off")
    for axes, (image, caption) in zip(all_axes, islice(images, len(all_axes)), strict=False):
        _draw(axes, image)
        axes.set_title("\n".join(map(for_picture, caption.split(" + "))), fontsize=7)


def _draw(axes: "Axes", image: Any) -> None:
    axes.imshow(image, interpolation="nearest" if min(image.shape[:2]) < 100 else "antialiased")
    axes.axis("off")


def _save(figure: "Figure", path: Path) -> None:
    try:
        write_png(figure, path)
    except OSError as error:
        raise UsageError(f"--out {path}: the picture cannot be written: {error.strerror}") from error
