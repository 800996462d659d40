"""pixels and patchify in Triton: any patch size, box, pair and address; the reference's noise."""

from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from fastdeit import kernels
from fastdeit.kernels import _checks, _op, _triton, input, noise
from tests.kernels.proof import assert_as_good, few, prove, repeated

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MIXES = {"none": [], "partner": ["partner"], "mixup": ["partner", "lam"], "cutmix": ["partner", "box"]}
MIXES["both"] = ["partner", "lam", "box"]
KEYS = 0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF


def random_images(device, batch, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8, generator=generator).to(device)


def random_boxes(batch, height, width, seed):
    """Inside, across the edges of the image, and empty ones whose sides are the wrong way round."""
    generator = torch.Generator().manual_seed(seed)
    y, x = (torch.randint(-3, size + 4, (batch, 2), generator=generator) for size in (height, width))
    return torch.stack([y[:, 0], x[:, 0], y[:, 1], x[:, 1]], 1).int()


def plan(device, batch, height, width, mix="both", erase=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lam = torch.rand(batch, generator=generator)
    lam[::3] = 1.0
    arrays = {
        "partner": torch.randperm(batch, generator=generator),
        "lam": lam,
        "box": random_boxes(batch, height, width, seed + 1),
    }
    arguments = {"mean": MEAN, "std": STD} | {name: arrays[name].to(device) for name in MIXES[mix]}
    if erase:
        keys = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator)
        arguments["erase"] = random_boxes(batch, height, width, seed + 2).to(device), keys.to(device)
    return arguments


# In the interpreter each of these takes seconds.
QUICK_IN_FP16 = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, marks=pytest.mark.slow),
        torch.float16,
        pytest.param(torch.bfloat16, marks=pytest.mark.slow),
    ],
    ids=["fp32", "fp16", "bf16"],
)


def on_triton(function, *args, **kwargs):
    with kernels.use("triton"):
        return function(*args, **kwargs)


@QUICK_IN_FP16
@given(
    batch=st.integers(1, 3),
    patch_size=st.sampled_from([1, 2, 3, 4, 6, 14, 16, 32]),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    mix=st.sampled_from(list(MIXES)),
    erase=st.booleans(),
    seed=st.integers(0, 10**6),
)
@few
def test_patches_as_good_as_pytorch(device, dtype, batch, patch_size, grid, mix, erase, seed):
    height, width = (patch_size * count for count in grid)
    images, arguments = (
        random_images(device, batch, height, width),
        plan(device, batch, height, width, mix, erase, seed),
    )
    prove(lambda dtype: kernels.patchify(images, patch_size=patch_size, **arguments, dtype=dtype), {"dtype": dtype})


@QUICK_IN_FP16
@given(
    batch=st.integers(1, 4),
    height=st.integers(1, 60),
    width=st.sampled_from([1, 6, 20, 33, 48]),
    mix=st.sampled_from(list(MIXES)),
    erase=st.booleans(),
    seed=st.integers(0, 10**6),
)
@few
def test_pixels_as_good_as_pytorch(device, dtype, batch, height, width, mix, erase, seed):
    images, arguments = (
        random_images(device, batch, height, width),
        plan(device, batch, height, width, mix, erase, seed),
    )
    prove(lambda dtype: kernels.pixels(images, **arguments, dtype=dtype), {"dtype": dtype})


@pytest.mark.parametrize(
    ("patch_size", "mix"), [(4, mix) for mix in MIXES] + [(size, "both") for size in (2, 14, 16, 32)]
)
def test_every_mix_and_every_patch_size_in_use(device, patch_size, mix):
    height, width = patch_size, 2 * patch_size
    images, arguments = random_images(device, 3, height, width), plan(device, 3, height, width, mix)
    prove(
        lambda dtype: kernels.patchify(images, patch_size=patch_size, **arguments, dtype=dtype),
        {"dtype": torch.float16},
    )


@pytest.mark.parametrize("mixed", [True, False], ids=["lam", "no lam"])
def test_boxes_that_start_and_end_anywhere_in_a_run(device, mixed):
    """A box is never widened to the runs of eight pixels that the kernel reads."""
    sides = [(left, right) for left in (0, 1, 7, 8, 9) for right in (1, 7, 8, 9, 15, 16) if left < right]
    boxes = torch.tensor([[0, left, 1, right] for left, right in sides], dtype=torch.int32, device=device)
    images = random_images(device, len(sides), 2, 16)
    arguments = {"mean": MEAN, "std": STD, "box": boxes, "partner": torch.arange(len(sides), device=device).roll(1)}
    arguments |= {"lam": torch.ones(len(sides), device=device)} if mixed else {}
    arguments["dtype"] = torch.float16
    torch.testing.assert_close(on_triton(kernels.pixels, images, **arguments), kernels.pixels(images, **arguments))


@pytest.mark.parametrize("patch_size", [pytest.param(None, marks=pytest.mark.slow), 16])
def test_erase_box_anywhere_among_the_programs_of_an_image(device, patch_size):
    """One small box for each sample: in each row and column of patches, and in each corner."""
    boxes = [
        [16 * i + k, 16 * j + k, 16 * i + k + 1, 16 * j + k + 1] for i in (0, 1) for j in range(3) for k in (0, 15)
    ]
    erase = torch.tensor(boxes, dtype=torch.int32, device=device), torch.arange(len(boxes), device=device)
    images = random_images(device, len(boxes), 32, 48)
    arguments = {"mean": MEAN, "std": STD, "erase": erase}
    function = kernels.pixels if patch_size is None else partial(kernels.patchify, patch_size=patch_size)
    prove(lambda dtype: function(images, **arguments, dtype=dtype), {"dtype": torch.float32})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("patch_size", "lam"),
    [
        *((16, None), (16, 1.0), (None, 0.5)),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((16, 0.5), (None, None), (None, 1.0))),
    ],
)
def test_noise_of_both_images_shows_where_they_do(device, patch_size, lam):
    """Everything is erased, so the noise of an image is right or missing; tiles lie inside, outside and across the box
    of cutmix. A program has 512 pixels: two patches, of one row or of two."""
    boxes = [[0, 0, 32, 48], [16, 0, 32, 48], [0, 16, 16, 32], [20, 24, 22, 25], [0, 0, 0, 0], [15, 1, 17, 47]]
    box = torch.tensor(boxes, dtype=torch.int32, device=device)
    everything = torch.tensor([[0, 0, 32, 48]], dtype=torch.int32, device=device).expand(len(box), 4)
    arguments = {"mean": MEAN, "std": STD, "erase": (everything, torch.arange(len(box), device=device)), "box": box}
    arguments |= {"partner": torch.arange(len(box), device=device).roll(1)}
    if lam is not None:
        arguments["lam"] = torch.full((len(box),), lam, device=device)
    images = random_images(device, len(box), 32, 48)
    function = kernels.pixels if patch_size is None else partial(kernels.patchify, patch_size=patch_size)
    prove(lambda dtype: function(images, **arguments, dtype=dtype), {"dtype": torch.float32})


@pytest.mark.parametrize("std", [1e-3, 1e3])
def test_huge_and_tiny_values(device, std):
    images = random_images(device, 3, 16, 16)
    arguments = plan(device, 3, 16, 16) | {"std": (std,) * 3}
    prove(lambda dtype: kernels.pixels(images, **arguments, dtype=dtype), {"dtype": torch.float32})


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_weights_that_are_no_weights(device, value):
    images, arguments = random_images(device, 4, 16, 16), plan(device, 4, 16, 16)
    arguments["lam"][2] = value
    mine, theirs = on_triton(kernels.pixels, images, **arguments), kernels.pixels(images, **arguments)
    torch.testing.assert_close(mine, theirs, equal_nan=True)


@pytest.mark.parametrize("offset", [0, 1, 2, 4, 8])
def test_images_at_any_address(device, offset):
    images, arguments = random_images(device, 3, 16, 32), plan(device, 3, 16, 32)
    memory = torch.zeros(images.numel() + offset, dtype=torch.uint8, device=device)
    moved = memory[offset:].view(images.shape).copy_(images)
    run = on_triton(kernels.patchify, moved, patch_size=16, **arguments)
    assert torch.equal(run, on_triton(kernels.patchify, images, patch_size=16, **arguments))


@pytest.mark.parametrize(
    ("patch_size", "offset", "dtype", "run"),
    [
        (16, 0, torch.float16, 8),
        (16, 0, torch.float32, 4),
        (14, 0, torch.float16, 2),
        (7, 0, torch.float16, 1),
        (16, 4, torch.float16, 4),
        (16, 3, torch.float16, 1),
    ],
)
def test_words_are_as_wide_as_patches_and_address_allow(patch_size, offset, dtype, run):
    """The interpreter reads from any address; a card does not."""
    memory = torch.zeros(2 * patch_size**2 * 3 + offset, dtype=torch.uint8)
    images = memory[offset:].view(2, patch_size, patch_size, 3)
    with _triton.recording(90) as recorded:
        input.triton_patchify(images, patch_size, MEAN, STD, *[None] * 5, dtype)
    assert recorded.launches[0].arguments["RUN"] == run


def test_arguments_of_any_layout(device):
    images, arguments = random_images(device, 3, 16, 16), plan(device, 3, 16, 16)
    expected = on_triton(kernels.pixels, images, **arguments)
    arguments["lam"] = arguments["lam"].repeat_interleave(2)[::2]
    arguments["partner"] = arguments["partner"].repeat_interleave(2)[::2]
    arguments["box"] = arguments["box"].T.contiguous().T
    arguments["erase"] = arguments["erase"][0].T.contiguous().T, arguments["erase"][1].repeat_interleave(2)[::2]
    planes_first = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(on_triton(kernels.pixels, planes_first, **arguments), expected)


@triton.jit
def _noise_kernel(counters, key, words, normals, N: tl.constexpr):
    at = tl.arange(0, N)
    counter, seed = tl.load(counters + at), tl.load(key)
    zero = tl.zeros_like(counter)
    word0, word1, word2, word3 = tl.philox(seed, counter, zero, zero, zero)
    tl.store(words + at, word0.to(tl.int64))
    tl.store(words + N + at, word1.to(tl.int64))
    tl.store(words + 2 * N + at, word2.to(tl.int64))
    tl.store(words + 3 * N + at, word3.to(tl.int64))
    red, green, blue = noise.triton_normals(counter, seed)
    tl.store(normals + at, red)
    tl.store(normals + N + at, green)
    tl.store(normals + 2 * N + at, blue)


@pytest.mark.parametrize("key", KEYS)
def test_noise_is_the_references(device, key):
    """The same words of Philox, bit for bit, and normal numbers as good as PyTorch's from them."""
    count = 4096
    counters, keys = torch.arange(count, device=device), torch.tensor(key, device=device)
    words = torch.empty(4, count, dtype=torch.int64, device=device)
    normals = torch.empty(3, count, device=device)
    _triton.launch(_noise_kernel, (1,), counters.int(), keys.reshape(1), words, normals, N=count, warps=4)
    assert torch.equal(words, torch.stack(noise.philox(counters, keys)))
    same, exact = (noise.normals(counters[None], keys, dtype)[:, 0] for dtype in (torch.float32, torch.float64))
    for channel, mine in enumerate(normals):
        assert_as_good(mine, same[channel], exact[channel], f"noise of channel {channel}")


@pytest.mark.parametrize("stranger", [4, -1, 2**40, -(2**40)])
def test_partner_outside_the_batch_is_never_read(device, stranger, monkeypatch):
    images, arguments = random_images(device, 4, 16, 16), plan(device, 4, 16, 16)
    expected = on_triton(kernels.patchify, images, patch_size=4, **arguments)
    arguments["partner"][1] = stranger
    monkeypatch.setattr(_checks, "check_index", lambda *_: None)  # it looks at the partners on the CPU only
    mine = on_triton(kernels.patchify, images, patch_size=4, **arguments)
    assert mine[1].isnan().all()
    assert torch.equal(mine[[0, 2, 3]], expected[[0, 2, 3]])


def test_partner_outside_the_batch_raises_on_the_cpu():
    if not _triton.INTERPRETED:
        pytest.skip("there is a card, hence no interpreter")
    images, arguments = random_images("cpu", 3, 8, 8), plan("cpu", 3, 8, 8)
    arguments["partner"][1] = 3
    with pytest.raises(IndexError, match=r"partner holds 3, but must be in \[0, 3\)"):
        on_triton(kernels.pixels, images, **arguments)


def test_no_samples(device):
    images, arguments = random_images(device, 0, 8, 8), plan(device, 0, 8, 8)
    assert on_triton(kernels.pixels, images, **arguments).shape == (0, 3, 8, 8)
    assert on_triton(kernels.patchify, images, patch_size=4, **arguments).shape == (0, 4, 48)


def test_what_triton_does_not_take_is_the_references(device):
    images, arguments = random_images(device, 2, 8, 8), plan(device, 2, 8, 8)
    with pytest.raises(RuntimeError, match=r"it does not compute in torch\.float64"):
        on_triton(kernels.pixels, images, **arguments, dtype=torch.float64)


def test_plan_on_another_device():
    images, arguments = random_images("cpu", 2, 8, 8), plan("cpu", 2, 8, 8)
    arguments["lam"] = arguments["lam"].to("meta")
    with pytest.raises(ValueError, match="lam is on meta, but must be on cpu like images"):
        kernels.pixels(images, **arguments)


@pytest.mark.parametrize("name", ["pixels", "patchify"])
def test_opcheck(device, name):
    images, arguments = random_images(device, 2, 4, 8), plan(device, 2, 4, 8)
    arrays = [arguments["partner"], arguments["lam"], arguments["box"], *arguments["erase"]]
    sizes = [4] if name == "patchify" else []
    with kernels.use("triton"):
        op = _op.OPS[name].registered
        torch.library.opcheck(op, (images, *sizes, list(MEAN), list(STD), *arrays, torch.float16))


@pytest.mark.parametrize("times", [3, pytest.param(50, marks=pytest.mark.card)])
def test_every_run_has_the_same_bits(device, times):
    batch, size = (64, 224) if device == "cuda" else (3, 32)
    images, arguments = random_images(device, batch, size, size), plan(device, batch, size, size)
    repeated(lambda: (on_triton(kernels.patchify, images, patch_size=16, **arguments),), times)
