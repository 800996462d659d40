"""`fastdeit show attention`: where a transformer looks, and which patches it finds alike, as a picture."""

import argparse
from collections.abc import Sequence
from math import ceil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdeit.engine.step import autocast
from fastdeit.errors import FastdeitError, UsageError
from fastdeit.methods.evaluators import images
from fastdeit.models.contract import Tokens
from fastdeit.models.tokens import taps
from fastdeit.run.settings import settings
from fastdeit.run.weights import open_weights
from fastdeit.verbs.predict import network_of, picture_files, pictures, readable

_COLUMNS = 6


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    """`fastdeit show attention ADDRESS PICTURE --out FILE.png`: of one block, the attention of the class token in every
    head, and how alike each patch is to the class token and to the patch that gets most attention."""
    weights = open_weights(args.address)
    recipe = settings(weights, args.model, args.overrides)
    model, device = network_of(weights, recipe, args.model)
    if not isinstance(model, Tokens):
        name = recipe.model.name or f"timm:{recipe.model.timm}"
        raise UsageError(f"{weights.origin}: {name} is no plain vision transformer, the only kind that can be shown")
    depth = len(model.blocks)
    block = depth - 1 if args.block is None else args.block
    if not 0 <= block < depth:
        raise UsageError(f"--block {block}: the model has blocks 0 to {depth - 1}")
    if Path(args.picture).is_dir():
        raise UsageError(f"{args.picture} is a folder; name one picture")
    batch = next(readable(pictures(picture_files([args.picture]), recipe, device)), None)
    if batch is None:
        raise UsageError(f"{args.picture}: the picture cannot be read")
    batch = batch.to(device)
    with autocast(device, recipe.engine.precision):
        try:
            read = taps(model, images(batch), blocks=[block], qkv=[block])
        except ValueError as error:
            raise UsageError(f"{weights.origin}: {error}") from error
    queries, keys, _ = (part[0].float() for part in read.qkv[block])
    height, width = batch.images[0].shape[1:3]
    looks, alike = maps(queries, keys, read.tokens[block][0].float(), (height, width))
    _draw(batch.images[0][0].cpu(), looks.cpu(), alike, f"{weights.origin}, block {block}", Path(args.out))
    print(f"picture in {args.out}")


def maps(queries: Tensor, keys: Tensor, tokens: Tensor, size: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
    """(attention `[heads, rows, columns]` of the first token to the patches, similarity `[rows, columns]` by title).

    queries, keys  `[heads, N, head_dim]`, prefix tokens first
    tokens         `[N, dim]` after the block
    size           (height, width) of the image in pixels, by which the patches are laid out

    Attention is softmax(q k' / sqrt(head_dim)) of the class token, where there is one, and else the mean over all
    tokens. A similarity is the cosine between tokens, from -1 to 1.
    """
    rows, columns, prefix = _layout(len(tokens), size)
    weights = (queries @ keys.mT / queries.shape[-1] ** 0.5).softmax(-1)
    looks = (weights[:, 0] if prefix else weights.mean(1))[:, prefix:]
    patches = F.normalize(tokens[prefix:], dim=-1)
    most = int(looks.mean(0).argmax())
    alike = {f"like patch {most // columns}, {most % columns}": patches @ patches[most]}
    if prefix:
        alike = {"like the class token": patches @ F.normalize(tokens[0], dim=-1)} | alike
    shape = rows, columns
    return looks.reshape(-1, *shape), {title: values.reshape(shape).cpu() for title, values in alike.items()}


def _layout(count: int, size: tuple[int, int]) -> tuple[int, int, int]:
    """(rows, columns, prefix tokens) of `count` tokens of an image: the square patches that leave fewest over."""
    height, width = size
    sides = [side for side in range(1, min(size) + 1) if height % side == 0 and width % side == 0]
    rows, columns = next((height // side, width // side) for side in sides if (height * width) // side**2 <= count)
    return rows, columns, count - rows * columns


def _draw(image: Tensor, looks: Tensor, alike: dict[str, Tensor], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    panels: Sequence[tuple[str, Tensor | None]] = [
        ("input", None),
        ("attention, mean of heads", looks.mean(0)),
        *alike.items(),
        *((f"head {number}", look) for number, look in enumerate(looks)),
    ]
    rows = ceil(len(panels) / _COLUMNS)
    figure = Figure(figsize=(2.2 * _COLUMNS, 2.4 * rows + 0.4), layout="constrained")
    figure.suptitle(title)
    for number, (name, values) in enumerate(panels):
        axes = figure.add_subplot(rows, _COLUMNS, number + 1)
        axes.set_title(name, fontsize=9)
        axes.axis("off")
        axes.imshow(image.numpy())
        if values is not None:
            height, width = image.shape[:2]
            axes.imshow(values.numpy(), alpha=0.65, cmap="viridis", extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    try:
        figure.savefig(path, dpi=120, metadata={"Software": None})
    except (OSError, ValueError) as error:
        raise FastdeitError(f"{path}: the picture cannot be written: {error}") from error
