"""From uint8 images and the plan's arrays to a model's input: normalise, erase, mix, lay out.

    x = (image / 255 - mean) / std                                                        [B, 3, H, W]
    x = N(0, 1) noise inside the sample's erase box
    out = x[partner] inside the sample's mix box, else lam * x + (1 - lam) * x[partner]

in DeiT's order: the partner is mixed with its own erasure. A box is (y0, x0, y1, x1), upper limits excluded, empty when
y1 <= y0 or x1 <= x0. `patchify` writes [B, P, 3*p*p] with patches row by row and (c, i, j) inside a patch, so that
`patches @ conv.weight.reshape(C, -1).T` is the patch convolution; `pixels` writes [B, 3, H, W].

Noise is a pure function of (sample's key, pixel): `noise.py`.

Bytes moved at best per element: reads 1 (2 where two images have a weight), writes the size of `dtype`. The Triton
kernel reads a run of pixels as three words of up to 8 bytes, takes the channels apart in registers, and writes 128 bits
at a time where the patches' width is a multiple of that. Of a cutmix it reads only the image that shows, but for runs
across a side of the box. Noise is computed by the programs whose patches touch an erase box. A partner outside [0, B)
is never read: its sample becomes NaN. On the CPU, "host" does a sample at a time, in the cache and by one thread.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels import _checks, _op, _triton
from fastdeit.kernels._example import BASE, HALVES, MEAN, STD, Example, Maker
from fastdeit.kernels._host_pixels import host_pixels, status
from fastdeit.kernels.noise import normals, triton_normals

# ---- reference -------------------------------------------------------------------------------------------------------


def _normalise(images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    batch, height, width, channels = images.shape
    x = torch.empty(batch, channels, height, width, dtype=dtype, device=images.device)
    # One channel at a time: tensors of mean and std would be a blocking copy to the device.
    for c in range(channels):
        torch.mul(images[..., c].to(dtype), 1 / (255 * std[c]), out=x[:, c])
        x[:, c] -= mean[c] / std[c]
    return x


def _inside(box: Tensor, height: int, width: int) -> Tensor:
    """bool `[B, 1, H, W]`: which pixels lie in each sample's box."""
    y0, x0, y1, x1 = (side[:, None] for side in box.unbind(1))
    y, x = (torch.arange(size, device=box.device) for size in (height, width))
    rows, columns = (y >= y0) & (y < y1), (x >= x0) & (x < x1)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _erase(x: Tensor, boxes: Tensor, keys: Tensor) -> Tensor:
    height, width = x.shape[2:]
    # All noise is computed, and most of it not taken: to count the erased pixels would stall a device.
    pixel = torch.arange(height * width, device=x.device).reshape(height, width)
    return torch.where(_inside(boxes, height, width), normals(pixel, keys[:, None, None], x.dtype), x)


def reference_pixels(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    partner: Tensor | None,
    lam: Tensor | None,
    box: Tensor | None,
    boxes: Tensor | None,
    keys: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`[B, 3, H, W]` as in the module's formula, computed in float32 (float64 for float64) and rounded once."""
    x = _normalise(images, mean, std, _op.statistics_dtype(dtype))
    if boxes is not None:
        x = _erase(x, boxes, keys)
    if partner is not None:
        _checks.check_index("partner", partner, images.shape[0])
        other = x[partner]
        if lam is not None:
            weight = lam.to(x.dtype)[:, None, None, None]
            x = weight * x + (1 - weight) * other
        if box is not None:
            x = torch.where(_inside(box, *x.shape[2:]), other, x)
    return x.to(dtype)


def reference_patchify(
    images: Tensor,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    partner: Tensor | None,
    lam: Tensor | None,
    box: Tensor | None,
    boxes: Tensor | None,
    keys: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`reference_pixels` as patches `[B, P, 3*p*p]`."""
    return to_patches(reference_pixels(images, mean, std, partner, lam, box, boxes, keys, dtype), patch_size)


def to_patches(x: Tensor, patch_size: int) -> Tensor:
    """Images `[B, C, H, W]` as patches `[B, H/p * W/p, C*p*p]`, row by row, each laid out as a convolution's weight."""
    batch, channels, height, width = x.shape
    p = patch_size
    cells = x.reshape(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
    # Contiguous by name: a reshape copies unless p is 1. And -1 would be any number for an empty batch.
    return cells.reshape(batch, (height // p) * (width // p), channels * p * p).contiguous()


# ---- host ------------------------------------------------------------------------------------------------------------


def host_patchify(images: Tensor, patch_size: int, *others: Any) -> Tensor:
    """`host_pixels` as patches."""
    return to_patches(host_pixels(images, *others), patch_size)


def _host_capability(device: torch.device, forced: bool) -> tuple[bool, str]:
    if device.type != "cpu":
        return False, "it runs on CPUs only"
    return True, f"sample by sample in the cache, by {status()}"


# ---- Triton ----------------------------------------------------------------------------------------------------------

_PIXELS = 512
"""Pixels that a program of two warps works on: eight in every thread, so 24 bytes in flight there from each source."""
_WORDS = {1: tl.uint8, 2: tl.int16, 4: tl.int32, 8: tl.int64}


@triton.jit
def _columns(box, y):
    """First column of a box in row y and the one after the last; an empty range in rows beside it."""
    within = (y >= tl.load(box)) & (y < tl.load(box + 2))
    return tl.where(within, tl.load(box + 1), 0), tl.where(within, tl.load(box + 3), 0)


@triton.jit
def _touches(box, tile):
    """Whether a box and a tile (top, left, bottom, right) have a pixel in common."""
    top, left, bottom, right = tile
    y, x = (tl.load(box) < bottom) & (tl.load(box + 2) > top), (tl.load(box + 1) < right) & (tl.load(box + 3) > left)
    return y & x


@triton.jit
def _covers(box, tile):
    top, left, bottom, right = tile
    y, x = (
        (tl.load(box) <= top) & (tl.load(box + 2) >= bottom),
        (tl.load(box + 1) <= left) & (tl.load(box + 3) >= right),
    )
    return y & x


@triton.jit
def _read(images, used, y, x, W: tl.constexpr, RUN: tl.constexpr, WORD: tl.constexpr):
    """The three words of RUN bytes that are a run of RUN pixels; 0 for those that are not used."""
    words = images.to(tl.pointer_type(WORD), bitcast=True) + (y * W + x) // RUN * 3
    word0 = tl.load(words, mask=used, other=0)
    return word0, tl.load(words + 1, mask=used, other=0), tl.load(words + 2, mask=used, other=0)


@triton.jit
def _channel(words, scale, shift, C: tl.constexpr, RUN: tl.constexpr):
    """Channel C of runs `[runs, RUN]`, normalised: bytes 3 * j + C of the three words."""
    at = 3 * tl.arange(0, RUN)[None, :] + C
    word = tl.where(at < RUN, words[0], tl.where(at < 2 * RUN, words[1], words[2]))
    return ((word >> (8 * (at % RUN))).to(tl.int32) & 255).to(tl.float32) * scale + shift


@triton.jit
def _weighted(
    words,
    weight,
    seen,
    boxes,
    keys,
    sample,
    y,
    x,
    tile,
    scales,
    shifts,
    H: tl.constexpr,
    W: tl.constexpr,
    RUN: tl.constexpr,
):
    """`weight` times the channels of a sample, normalised and, if it is seen in this tile, erased."""
    r = _channel(words, scales[0], shifts[0], 0, RUN)
    g = _channel(words, scales[1], shifts[1], 1, RUN)
    b = _channel(words, scales[2], shifts[2], 2, RUN)
    if boxes is not None:
        box = boxes + 4 * sample
        if seen & _touches(box, tile):
            key = tl.load(keys + sample)
            first, end = _columns(box, y)
            # Pixel by pixel of the runs: noise for whole runs at once would take twice the registers.
            for j in range(RUN):
                here = (tl.arange(0, RUN)[None, :] == j) & (x + j >= first) & (x + j < end)
                noise_r, noise_g, noise_b = triton_normals(y * W + x + j, key)
                r, g, b = tl.where(here, noise_r, r), tl.where(here, noise_g, g), tl.where(here, noise_b, b)
    return weight * r, weight * g, weight * b


@triton.jit
def _render_kernel(
    images,
    partner,
    lam,
    box,
    boxes,
    keys,
    out,
    batch,
    scale0,
    scale1,
    scale2,
    shift0,
    shift1,
    shift2,
    H: tl.constexpr,
    W: tl.constexpr,
    CELL_H: tl.constexpr,
    CELL_W: tl.constexpr,
    PLANE: tl.constexpr,
    RUN: tl.constexpr,
    WORD: tl.constexpr,
    RUNS: tl.constexpr,
):
    """Pixels in the order of the result: cells of CELL_H x CELL_W, row by row. PLANE consecutive ones of them are a
    channel in the result, followed by those of the other channels."""
    programs: tl.constexpr = (H * W + RUNS * RUN - 1) // (RUNS * RUN)
    sample = (tl.program_id(0) // programs).to(tl.int64)
    start = tl.program_id(0) % programs * (RUNS * RUN)
    pixel = start + RUN * tl.arange(0, RUNS)[:, None]
    lane = tl.arange(0, RUN)[None, :]
    cell, inside = pixel // (CELL_H * CELL_W), pixel % (CELL_H * CELL_W)
    across: tl.constexpr = W // CELL_W
    y = cell // across * CELL_H + inside // CELL_W
    x = cell % across * CELL_W + inside % CELL_W
    real = pixel < H * W
    # What this program works on lies in these rows and columns.
    one, last = start // (CELL_H * CELL_W), (start + RUNS * RUN - 1) // (CELL_H * CELL_W)
    strip = one // across == last // across
    left, right = tl.where(strip, one % across * CELL_W, 0), tl.where(strip, (last % across + 1) * CELL_W, W)
    tile = one // across * CELL_H, left, (last // across + 1) * CELL_H, right
    scales, shifts = (scale0, scale1, scale2), (shift0, shift1, shift2)
    factor = 1.0
    if lam is not None:
        factor = tl.load(lam + sample)
    share = tl.full((RUNS, 1), 1.0, tl.float32) * factor
    # What has a weight of 0 is not read: of cutmix, each pixel's run from one image but at the sides of the box. Nor is
    # its noise made, in tiles that are all inside the box or all outside.
    own, own_used, other_used = share, real, real & (share != 1.0)
    own_seen, other_seen = True, factor != 1.0
    if box is not None:
        own_seen = ~_covers(box + 4 * sample, tile)
        other_seen = other_seen | _touches(box + 4 * sample, tile)
        first, end = _columns(box + 4 * sample, y)
        own = tl.where((x + lane >= first) & (x + lane < end), 0.0, share)
        own_used = real & ((x < first) | (x + RUN > end))
        other_used = other_used | (real & (x < end) & (x + RUN > first))
    words = _read(images + sample * (3 * H * W), own_used, y, x, W, RUN, WORD)
    if partner is not None:
        other = tl.load(partner + sample)
        known = (other >= 0) & (other < batch)
        other = tl.where(known, other, sample)
        rest = tl.where(known, 1.0, float("nan")) - own
        other_words = _read(images + other * (3 * H * W), other_used, y, x, W, RUN, WORD)
        r2, g2, b2 = _weighted(other_words, rest, other_seen, boxes, keys, other, y, x, tile, scales, shifts, H, W, RUN)
    r, g, b = _weighted(words, own, own_seen, boxes, keys, sample, y, x, tile, scales, shifts, H, W, RUN)
    if partner is not None:
        r, g, b = r + r2, g + g2, b + b2
    place = pixel + lane + pixel // PLANE * (2 * PLANE)
    result = out + sample * (3 * H * W) + place
    tl.store(result, r.to(out.dtype.element_ty), mask=real)
    tl.store(result + PLANE, g.to(out.dtype.element_ty), mask=real)
    tl.store(result + 2 * PLANE, b.to(out.dtype.element_ty), mask=real)


def _render(
    out: Tensor,
    cell: tuple[int, int],
    plane: int,
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    *tensors: Tensor | None,
) -> Tensor:
    """Fill `out` in one launch: cells of (height, width) pixels one after the other, `plane` pixels to a channel.
    `tensors` are partner, lam, box, boxes and keys."""
    _triton.require_dtypes(out)
    batch, height, width, _ = images.shape
    if tensors[0] is not None:
        _checks.check_index("partner", tensors[0], batch)
    images, *plan = (None if t is None else t.contiguous() for t in (images, *tensors))
    # Runs fill a store of 128 bits where the cells' width and the address of the images let them.
    run = math.gcd(cell[1], 16 // out.element_size(), images.data_ptr())
    grid = (batch * _triton.cdiv(height * width, _PIXELS),)
    numbers = *(1 / (255 * s) for s in std), *(-m / s for m, s in zip(mean, std, strict=True))
    sizes = {"H": height, "W": width, "CELL_H": cell[0], "CELL_W": cell[1], "PLANE": plane}
    tile = {"RUN": run, "WORD": _WORDS[run], "RUNS": _PIXELS // run}
    _triton.launch(_render_kernel, grid, images, *plan, out, batch, *numbers, **sizes, **tile, warps=2)
    return out


def triton_pixels(images: Tensor, *plan: Any) -> Tensor:
    """`reference_pixels` in one launch: an image's rows are its cells, the whole image is a plane."""
    batch, height, width, channels = images.shape
    *plan, dtype = plan
    out = torch.empty(batch, channels, height, width, dtype=dtype, device=images.device)
    return _render(out, (1, width), height * width, images, *plan)


def triton_patchify(images: Tensor, patch_size: int, *plan: Any) -> Tensor:
    """`reference_patchify` in one launch: patches are the cells, and each is a plane."""
    batch, height, width, channels = images.shape
    *plan, dtype = plan
    p = patch_size
    out = torch.empty(batch, height * width // (p * p), channels * p * p, dtype=dtype, device=images.device)
    return _render(out, (p, p), p * p, images, *plan)


# ---- registration ----------------------------------------------------------------------------------------------------

_BACKENDS = ("triton", _triton.capability), ("host", _host_capability)


def _backends(*functions: Callable) -> list[_op.Backend]:
    return [_op.Backend(*backend, function) for backend, function in zip(_BACKENDS, functions, strict=True)]


_triton.expect(_render_kernel, loads=64)  # 8 pixels of 3 bytes are 3 words of 64 bits


def _example(make: Maker, patches: bool, mixed: bool = True, erased: bool = False) -> list[Any]:
    (height, width), batch = make.sizes.image, make.sizes.batch
    images = torch.randint(256, (batch, height, width, 3), dtype=torch.uint8, device=make.device)
    samples, lam = torch.arange(batch, device=make.device), torch.linspace(0, 1, batch, device=make.device)
    boxes = torch.zeros(batch, 4, dtype=torch.int32, device=make.device)
    boxes[::2, 2], boxes[::2, 3] = height // 2, width // 2  # none in every other image
    mix = (samples.flip(0), lam, boxes) if mixed else (None, None, None)
    noise = (boxes.flip(0), samples) if erased else (None, None)
    patch_size = [make.sizes.patch] if patches else []
    return [images, *patch_size, list(MEAN), list(STD), *mix, *noise, make.dtype]


def _bytes(args: Sequence[Any]) -> float:
    return args[0].numel() * (2 + args[-1].itemsize)


_ODD_PATCHES = replace(BASE, name="deit_base, patches of 14", patch=14, odd=True)
_EXAMPLES = {
    patches: [
        Example(
            "mixed",
            partial(_example, patches=patches),
            compiled=[*((BASE, dtype) for dtype in HALVES), *[(_ODD_PATCHES, torch.float16)] * patches],
            bytes=_bytes,
        ),
        Example("", partial(_example, patches=patches, mixed=False)),
        Example("mixed, erased", partial(_example, patches=patches, erased=True)),
    ]
    for patches in (False, True)
}
PIXELS = _op.Op("pixels", reference_pixels, examples=_EXAMPLES[False], others=_backends(triton_pixels, host_pixels))
PATCHIFY = _op.Op(
    "patchify", reference_patchify, examples=_EXAMPLES[True], others=_backends(triton_patchify, host_patchify)
)


@PIXELS.registered.register_fake
def _(images, mean, std, partner, lam, box, boxes, keys, dtype):
    batch, height, width, channels = images.shape
    return images.new_empty(batch, channels, height, width, dtype=dtype)


@PATCHIFY.registered.register_fake
def _(images, patch_size, mean, std, partner, lam, box, boxes, keys, dtype):
    batch, height, width, channels = images.shape
    patches = (height // patch_size) * (width // patch_size)
    return images.new_empty(batch, patches, channels * patch_size * patch_size, dtype=dtype)


# ---- public ----------------------------------------------------------------------------------------------------------


def pixels(
    images: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    partner: Tensor | None = None,
    lam: Tensor | None = None,
    box: Tensor | None = None,
    erase: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Normalised, erased and mixed images `[B, 3, H, W]` of raw ones.

    images     uint8 `[B, H, W, 3]`
    mean, std  three floats each, in units of [0, 1]
    partner    int64 `[B]`: the sample each is mixed with; None mixes nothing
    lam        float32 `[B]`: weight of the own pixel outside `box`; None is 1
    box        int32 `[B, 4]` (y0, x0, y1, x1): inside it the partner's pixel is taken; None is empty
    erase      (boxes int32 `[B, 4]`, keys int64 `[B]`): pixels to replace by N(0, 1) noise, and its key; None is none
    dtype      of the result

    A partner outside [0, B) raises IndexError on the CPU. On a GPU, where looking would stall the device, the mixed
    sample is NaN, and the reference's indexing asserts on the device.
    """
    boxes, keys = (None, None) if erase is None else erase
    _check(images, mean, std, partner, lam, box, boxes, keys, dtype)
    return PIXELS(images, list(mean), list(std), partner, lam, box, boxes, keys, dtype)


def patchify(
    images: Tensor,
    *,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    partner: Tensor | None = None,
    lam: Tensor | None = None,
    box: Tensor | None = None,
    erase: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`pixels` as patches `[B, H/p * W/p, 3*p*p]`: row by row, (c, i, j) inside, like a patch convolution's weight.

    patch_size  p, a divisor of H and W
    others      as of `pixels`
    """
    boxes, keys = (None, None) if erase is None else erase
    _check(images, mean, std, partner, lam, box, boxes, keys, dtype)
    _, height, width, _ = images.shape
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"patch_size is {patch_size}, but must divide the images' height {height} and width {width}")
    return PATCHIFY(images, patch_size, list(mean), list(std), partner, lam, box, boxes, keys, dtype)


def _check(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    partner: Tensor | None,
    lam: Tensor | None,
    box: Tensor | None,
    boxes: Tensor | None,
    keys: Tensor | None,
    dtype: torch.dtype,
) -> None:
    _checks.check_dtype("images", images, torch.uint8)
    if images.dim() != 4 or images.shape[3] != 3:
        raise ValueError(f"images has shape {list(images.shape)}, but must be [B, H, W, 3]")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            raise ValueError(f"{name} has {len(values)} values, but must have one for each of 3 channels")
    for c in range(3):
        _checks.check_number(f"mean[{c}]", mean[c], -math.inf)
        _checks.check_positive(f"std[{c}]", std[c])
    if not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype}, but must be a floating-point type")
    if partner is None and not (lam is None and box is None):
        raise ValueError(
            f"partner is None, but {'box' if lam is None else 'lam'} is given: there is nothing to mix with"
        )
    batch = images.shape[0]
    for name, tensor, sides, wanted in (
        ("partner", partner, (), torch.int64),
        ("lam", lam, (), torch.float32),
        ("box", box, (4,), torch.int32),
        ("erase: boxes", boxes, (4,), torch.int32),
        ("erase: keys", keys, (), torch.int64),
    ):
        if tensor is not None:
            _checks.check_shape(name, tensor, (batch, *sides), "[B, 4]" if sides else "[B]")
            _checks.check_dtype(name, tensor, wanted)
            _checks.check_device(name, tensor, images, "images")
