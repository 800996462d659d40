"""`fastdeit show attention`: where a transformer looks, and which patches it finds alike, as a picture."""

import argparse
from collections.abc import Sequence
from math import ceil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeit.engine.step import autocast
from fastdeit.errors import FastdeitError, UsageError
from fastdeit.methods.evaluators import images
from fastdeit.models.contract import Tokens
from fastdeit.models.tokens import taps
from fastdeit.run.settings import settings
from fastdeit.run.weights import open_weights
from fastdeit.text import for_picture, one_line
from fastdeit.verbs.predict import network_of, picture_files, pictures, readable

_COLUMNS = 6


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    """`fastdeit show attention ADDRESS PICTURE --out FILE.png`: of one block, the attention of the class token in every
    head, and how alike each patch is to the class token and to the patch that gets most attention."""
    weights = open_weights(args.address)
    recipe = settings(weights, args.model, args.overrides)
    model, device = network_of(weights, recipe, args.model)
    depth = len(model.blocks) if isinstance(model, Tokens) else len(class_blocks(model))
    if depth == 0:
        name = recipe.model.name or f"timm:{recipe.model.timm}"
        raise UsageError(
            f"{weights.origin}: {name} cannot be shown; what can are fastdeit's transformers, timm's plain vision "
            "transformers (ViT, DeiT, DeiT III and their like) and CaiT"
        )
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
            queries, keys, tokens = (_plain if isinstance(model, Tokens) else _of_class)(model, images(batch), block)
        except ValueError as error:
            raise UsageError(f"{weights.origin}: {error}") from error
    height, width = batch.images[0].shape[1:3]
    looks, alike = maps(queries, keys, tokens, (height, width))
    _draw(batch.images[0][0].cpu(), looks.cpu(), alike, f"{weights.origin}, block {block}", Path(args.out))
    print(one_line(f"picture in {args.out}"))


def _plain(model: nn.Module, x: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """`queries`, `keys` and `tokens` of the first of the images `x`, as `maps` takes them."""
    read = taps(model, x, blocks=[block], qkv=[block])
    queries, keys, _ = (part[0].float() for part in read.qkv[block])
    return queries, keys, read.tokens[block][0].float()


def class_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of timm's CaiT in which the class token alone asks; empty for any other model.

    In the blocks before there is no class token, and the heads' attention is mixed before and after the softmax.
    """
    blocks = list(getattr(model, "blocks_token_only", []))
    if not blocks:
        return []
    from timm.models.cait import ClassAttn  # timm takes a second to import, and this is a model of timm's

    return blocks if all(isinstance(getattr(each, "attn", None), ClassAttn) for each in blocks) else []


def _of_class(model: nn.Module, x: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same of a class-attention block, with the class token as the one query."""
    seen: dict[str, Tensor] = {}
    chosen = class_blocks(model)[block]
    hooks = [
        chosen.attn.register_forward_pre_hook(lambda module, given: seen.update(normed=given[0])),
        chosen.register_forward_hook(lambda module, given, out: seen.update(tokens=torch.cat((out, given[0]), 1))),
    ]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    attention, normed = chosen.attn, seen["normed"][:1]
    split = (attention.num_heads, -1)
    queries, keys = (
        layer(part)[0].unflatten(-1, split).transpose(0, 1).float()
        for layer, part in ((attention.q, normed[:, :1]), (attention.k, normed))
    )
    return queries, keys, seen["tokens"][0].float()


def maps(queries: Tensor, keys: Tensor, tokens: Tensor, size: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
    """(attention `[heads, rows, columns]` of the first token to the patches, similarity `[rows, columns]` by title).

    queries, keys  `[heads, N, head_dim]`, prefix tokens first; where there are any, the first query is enough
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
    figure.suptitle(for_picture(title, 120))
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
