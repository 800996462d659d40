"""From uint8 images and the plan's arrays to a model's input: normalise, erase, mix, lay out.

    x = (image / 255 - mean) / std                                                        [B, 3, H, W]
    x = N(0, 1) noise inside the sample's erase box
    out = x[partner] inside the sample's mix box, else lam * x + (1 - lam) * x[partner]

in DeiT's order: the partner is mixed with its own erasure. A box is (y0, x0, y1, x1), upper limits excluded, empty when
y1 <= y0 or x1 <= x0. `patchify` writes [B, P, 3*p*p] with patches row by row and (c, i, j) inside a patch, so that
`patches @ conv.weight.reshape(C, -1).T` is the patch convolution; `pixels` writes [B, 3, H, W].

Noise is a pure function of (sample's key, element): words w0, w1 of Philox4x32-10 (Salmon et al., SC 2011) for the
counter (element, 0, 0, 0), element = (c * H + y) * W + x, and the key's low and high 32 bits; then, by Box and Muller,
sqrt(-2 ln u) cos(2 pi v) with u = (w0 // 256 + 1) / 2**24 and v = (w1 // 256) / 2**24, both exact in float32.

Bytes moved at best per element: reads 1 (2 when mixed), writes the size of `dtype`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdeit.kernels import _op

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
_ROUNDS = 10


def philox(counter: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words, as int64, of Philox4x32-10 for the counter (counter, 0, 0, 0) and a 64-bit key.

    Both are int64 tensors that broadcast; a counter is in [0, 2**32), a key any 64 bits. A product wraps modulo 2**64
    and so has the bits of the unsigned product.
    """
    c0, k0, k1 = counter, key & _LOW, key >> 32 & _LOW
    c1 = c2 = c3 = torch.zeros_like(counter)
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _LOW) ^ c1 ^ k0, p1 & _LOW, (p0 >> 32 & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = k0 + _WEYL[0] & _LOW, k1 + _WEYL[1] & _LOW
    return c0, c1, c2, c3


def normal(element: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor:
    """Standard normal noise of elements (int64) under keys (int64, broadcast), in float32 or float64."""
    word0, word1, _, _ = philox(element, key)
    u, v = ((word0 >> 8) + 1).to(dtype) * 2.0**-24, (word1 >> 8).to(dtype) * 2.0**-24
    return torch.sqrt(-2 * torch.log(u)) * torch.cos(2 * math.pi * v)


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


def _few_erased(x: Tensor) -> bool:
    """Whether to count the erased pixels. Noise costs a hundred operations an element, but counting stalls a device."""
    return x.device.type == "cpu"


def _erase(x: Tensor, boxes: Tensor, keys: Tensor) -> Tensor:
    _, channels, height, width = x.shape
    inside = _inside(boxes, height, width)
    if _few_erased(x):
        sample, channel, row, column = inside.expand_as(x).nonzero(as_tuple=True)
        element = (channel * height + row) * width + column
        x[sample, channel, row, column] = normal(element, keys[sample], x.dtype)
        return x
    element = torch.arange(channels * height * width, device=x.device).reshape(1, channels, height, width)
    return torch.where(inside, normal(element, keys[:, None, None, None], x.dtype), x)


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
        _op.check_index("partner", partner, images.shape[0])
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
    x = reference_pixels(images, mean, std, partner, lam, box, boxes, keys, dtype)
    batch, channels, height, width = x.shape
    p = patch_size
    cells = x.reshape(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(batch, -1, channels * p * p)


PIXELS = _op.Op("pixels", reference_pixels)
PATCHIFY = _op.Op("patchify", reference_patchify)


@PIXELS.registered.register_fake
def _(images, mean, std, partner, lam, box, boxes, keys, dtype):
    batch, height, width, channels = images.shape
    return images.new_empty(batch, channels, height, width, dtype=dtype)


@PATCHIFY.registered.register_fake
def _(images, patch_size, mean, std, partner, lam, box, boxes, keys, dtype):
    batch, height, width, channels = images.shape
    patches = (height // patch_size) * (width // patch_size)
    return images.new_empty(batch, patches, channels * patch_size * patch_size, dtype=dtype)


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

    A partner outside [0, B) raises IndexError on the CPU; on a GPU the indexing asserts on the device.
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
    _op.check_dtype("images", images, torch.uint8)
    if images.dim() != 4 or images.shape[3] != 3:
        raise ValueError(f"images has shape {list(images.shape)}, but must be [B, H, W, 3]")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            raise ValueError(f"{name} has {len(values)} values, but must have one for each of 3 channels")
    if min(std) <= 0:
        raise ValueError(f"std is {list(std)}, but must be positive")
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
            _op.check_shape(name, tensor, (batch, *sides), "[B, 4]" if sides else "[B]")
            _op.check_dtype(name, tensor, wanted)
