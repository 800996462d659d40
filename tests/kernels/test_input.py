"""Rendering against naive loops, and the noise against published numbers."""

import math

import numpy as np
import pytest
import torch

from fastdeit import kernels
from fastdeit.kernels import _host_pixels, patchify, pixels
from fastdeit.kernels.noise import host_philox, normals, philox

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
B, H, W, P = 3, 8, 12, 4


def plan():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (B, H, W, 3), dtype=torch.uint8)
    return images, {
        "mean": MEAN,
        "std": STD,
        "partner": torch.tensor([2, 1, 0]),
        "lam": torch.tensor([0.3, 0.6, 1.0]),
        "box": torch.tensor([[0, 0, 0, 5], [2, 3, 7, 12], [1, 1, 6, 9]], dtype=torch.int32),
        "erase": (
            torch.tensor([[1, 2, 4, 8], [0, 0, 0, 0], [5, 0, 8, 3]], dtype=torch.int32),
            torch.tensor([2**63 - 1, 5, -7]),
        ),
    }


def scalar_philox(counter, key):
    """Philox4x32-10 on Python integers, as in Random123's description."""
    c, k = [counter, 0, 0, 0], [key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def scalar_normal(channel, pixel, key):
    words = scalar_philox(pixel, key)[2 * (channel // 2) :]
    u, v = ((words[0] >> 8) + 1) / 2**24, (words[1] >> 8) / 2**24
    return math.sqrt(-2 * math.log(u)) * (math.sin if channel == 1 else math.cos)(2 * math.pi * v)


def naive(images, mean, std, partner, lam, box, erase):
    boxes, keys = erase

    def erased(b, c, y, x):
        y0, x0, y1, x1 = boxes[b].tolist()
        if y0 <= y < y1 and x0 <= x < x1:
            return scalar_normal(c, y * W + x, int(keys[b]))
        return (int(images[b, y, x, c]) / 255 - mean[c]) / std[c]

    out = np.empty((B, 3, H, W))
    for b, c, y, x in np.ndindex(out.shape):
        own, other = erased(b, c, y, x), erased(int(partner[b]), c, y, x)
        y0, x0, y1, x1 = box[b].tolist()
        weight = 0.0 if y0 <= y < y1 and x0 <= x < x1 else float(lam[b])
        out[b, c, y, x] = weight * own + (1 - weight) * other
    return torch.from_numpy(out)


def test_philox_known_answer():
    """Random123's kat_vectors: philox4x32 10 with counter and key 0."""
    words = philox(torch.tensor(0), torch.tensor(0))
    assert [f"{int(word):08x}" for word in words] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


@pytest.mark.parametrize("key", [1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF])
def test_philox_is_the_integer_algorithm(key):
    counters = torch.tensor([0, 1, 2, 2**31, 2**32 - 1])
    words = torch.stack(philox(counters, torch.tensor(key)), 1)
    assert words.tolist() == [scalar_philox(c, key & (2**64 - 1)) for c in counters.tolist()]
    host = np.stack(host_philox(counters.numpy().astype(np.uint64), key), 1)
    assert host.tolist() == words.tolist()


def test_noise_is_standard_normal():
    noise = normals(torch.arange(200_000).reshape(400, 500), torch.tensor(42), torch.float64).reshape(3, -1)
    assert noise.mean(1).abs().max() < 5 / math.sqrt(200_000)
    # The covariance of the channels is the identity.
    assert (noise.cov() - torch.eye(3)).abs().max() < 5 * math.sqrt(2 / 200_000)
    assert ((noise.abs() < 1).double().mean(1) - math.erf(math.sqrt(0.5))).abs().max() < 0.005
    # Two channels share a radius: they are uncorrelated, and independent.
    assert (noise**2).cov()[~torch.eye(3, dtype=bool)].abs().max() < 5 * 2 / math.sqrt(200_000)


@pytest.mark.parametrize("backend", ["reference", "host"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_pixels_is_the_naive_loop(dtype, backend):
    images, arguments = plan()
    with kernels.use(backend):
        result = pixels(images, **arguments, dtype=dtype)
    assert result.dtype == dtype
    # lam is float32; float32's own rounding is a few units of values below 6.
    tolerance = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2}[dtype]
    arguments["lam"] = arguments["lam"].double()
    torch.testing.assert_close(result.double(), naive(images, **arguments), rtol=0, atol=tolerance)


def random_plan(seed):
    """Boxes inside, across edges, beside the image, empty and the wrong way round; any of the arguments missing."""
    draw = np.random.default_rng(seed)
    batch, height, width = draw.integers(1, [4, 9, 9])

    def boxes():
        return torch.from_numpy(draw.integers(-3, 12, (batch, 4), dtype=np.int32))

    arguments = {"mean": MEAN, "std": STD}
    if draw.random() < 0.8:
        arguments["partner"] = torch.from_numpy(draw.permutation(batch))
        if draw.random() < 0.7:
            arguments["lam"] = torch.from_numpy(draw.choice(np.float32([0, 0.25, 1, 1 / 3]), batch))
        if draw.random() < 0.7:
            arguments["box"] = boxes()
    if draw.random() < 0.7:
        arguments["erase"] = boxes(), torch.from_numpy(draw.integers(-(2**63), 2**63 - 1, batch))
    return torch.from_numpy(draw.integers(0, 256, (batch, height, width, 3), dtype=np.uint8)), arguments


@pytest.mark.parametrize("compiled", [True, False])
def test_the_host_has_the_references_bits(compiled, monkeypatch):
    """But for noise, whose logarithms and cosines may differ by an ulp or two."""
    if not compiled:
        monkeypatch.setattr(_host_pixels, "library", lambda: None)
    elif _host_pixels.library() is None:
        pytest.skip(_host_pixels.status())
    for seed in range(1000):
        images, arguments = random_plan(seed)
        results = []
        for backend in ("reference", "host"):
            with kernels.use(backend):
                results.append(pixels(images, **arguments))
        torch.testing.assert_close(*results, rtol=0, atol=2e-6 if "erase" in arguments else 0)
        if seed % 10 == 0:
            channels_first = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
            with kernels.use("host"):
                assert torch.equal(pixels(channels_first, **arguments), results[1])


def test_the_reference_never_looks_at_values(monkeypatch):
    """Where it runs on a GPU, that would stall it."""
    images, arguments = plan()
    monkeypatch.setattr("fastdeit.kernels._checks.check_index", lambda *_: None)
    for name in ("nonzero", "item", "tolist", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, **__: pytest.fail("looked"))
    with kernels.use("reference"):
        pixels(images, **arguments)


def test_the_host_takes_no_other_device():
    with kernels.use("host"), pytest.raises(RuntimeError, match=r"pixels=host.*cannot run on meta.*CPUs only"):
        kernels.input.PIXELS.select(torch.device("meta"))


def test_nothing_to_mix_is_plain_normalisation():
    images, _ = plan()
    expected = (images.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(pixels(images, mean=MEAN, std=STD), expected, rtol=0, atol=1e-6)


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    images, arguments = plan()
    boxes, keys = arguments["erase"]
    alone = pixels(images[2:], mean=MEAN, std=STD, erase=(boxes[2:], keys[2:]))
    together = pixels(images, mean=MEAN, std=STD, erase=(boxes, keys))
    assert torch.equal(alone[0], together[2])


def test_patches_times_weight_is_the_patch_convolution():
    images, arguments = plan()
    weight = torch.randn(5, 3, P, P, dtype=torch.float64)
    patches = patchify(images, patch_size=P, **arguments, dtype=torch.float64)
    assert patches.shape == (B, (H // P) * (W // P), 3 * P * P)
    planes = torch.nn.functional.conv2d(pixels(images, **arguments, dtype=torch.float64), weight, stride=P)
    torch.testing.assert_close(patches @ weight.reshape(5, -1).T, planes.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("layout", ["view", "channels first"])
def test_strided_images(layout):
    images, arguments = plan()
    strided = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    if layout == "view":
        strided = torch.nn.functional.pad(images, (0, 0, 2, 1, 1, 1))[:, 1:-1, 2:-1]
    assert not strided.is_contiguous()
    assert torch.equal(pixels(strided, **arguments), pixels(images, **arguments))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": torch.zeros(B, H, W, 3)}, TypeError, "images is torch.float32, but must be torch.uint8"),
        ({"images": torch.zeros(B, 3, H, W, dtype=torch.uint8)}, ValueError, r"images has shape .* \[B, H, W, 3\]"),
        ({"patch_size": 5}, ValueError, "patch_size is 5, but must divide the images' height 8 and width 12"),
        ({"mean": (0.5,)}, ValueError, "mean has 1 values"),
        ({"std": (0.5, 0.0, 0.5)}, ValueError, r"std\[1\] is 0.0, but must be positive"),
        ({"dtype": torch.uint8}, TypeError, "dtype is torch.uint8"),
        ({"partner": None, "box": None}, ValueError, "partner is None, but lam is given"),
        ({"partner": None, "lam": None}, ValueError, "partner is None, but box is given"),
        ({"partner": torch.tensor([0, 3, 1])}, IndexError, r"partner holds 3, but must be in \[0, 3\)"),
        ({"lam": torch.ones(2)}, ValueError, r"lam has shape \[2\], but must be \[B\] = \[3\]"),
        ({"box": torch.zeros(B, 4)}, TypeError, "box is torch.float32, but must be torch.int32"),
        (
            {"erase": (torch.zeros(B, 4, dtype=torch.int32), torch.zeros(B))},
            TypeError,
            "erase: keys is torch.float32, but must be torch.int64",
        ),
    ],
)
def test_errors_name_the_argument(changes, error, message):
    images, arguments = plan()
    arguments = {"images": images, "patch_size": P} | arguments | changes
    with pytest.raises(error, match=message):
        patchify(arguments.pop("images"), **arguments)
