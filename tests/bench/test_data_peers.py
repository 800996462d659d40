"""The peers of `fastdeit bench data` make what their `work` says, of every kind of row."""

import io
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdeit.bench import data as bench_data
from fastdeit.bench import data_peers
from fastdeit.bench.input_peers import timm, torchvision
from fastdeit.bench.measure import CannotRun
from fastdeit.data.execute import dali
from fastdeit.data.plan.plan import PAD
from fastdeit.engine.dist import World
from fastdeit.recipe import resolve as recipes
from fastdeit.run import build

SIZE, BATCH, FILES = 64, 4, 16
FLOATS = ["fastdeit", "fastdeit_loader", "timm", "deit", "torchvision", "dali"]
PLAIN = ["data.augment=none", "data.erase=0", "data.mixup=0", "data.cutmix=0"]
KINDS = {
    "deit": [],
    "three_augment": ["data.augment=three_augment", "data.erase=0"],
    "three_augment_simple": ["data.augment=three_augment", "data.crop=simple", "data.erase=0"],
    "jitter": ["data.augment=none", "data.color_jitter=[0.4,0.4,0.4,0.1]", "data.erase=0"],
    "auto_augment": ["data.augment=original", "data.erase=0"],
    "trivial": ["data.augment=trivial", "data.erase=0"],
    "plain": PLAIN,
    "evaluation": [],
}
LACKING = {("timm", "trivial"), ("deit", "trivial")}
ROWS = [(name, kind) for name in FLOATS for kind in KINDS if (name, kind) not in LACKING]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """24 different files in either split."""
    root = tmp_path_factory.mktemp("files")
    for split in ("train", "val"):
        bench_data._write(root / split, FILES)
    return root


@pytest.fixture
def setting(root):
    """`setting(*overrides, evaluation=False, size=64)`: 4 a batch."""

    def make(*overrides, evaluation=False, size=SIZE):
        own = [f"data.root={root}", "data.repeats=1", "data.threads=1", f"model.image_size={size}"]
        own += [f"train.batch_size={BATCH}", f"data.group_size={BATCH}"]
        return bench_data.Setting(recipes.load("deit_tiny", [*own, *overrides]), torch.device("cpu"), evaluation)

    return make


def taken(name: str, setting: bench_data.Setting, batches: int = 1) -> torch.Tensor:
    """The first batches of a side, as one. Workers of DataLoader would cost more than what they do here."""
    if name in ("timm", "deit", "torchvision"):
        data = setting.data.model_copy(update={"threads": 0})
        setting = replace(setting, recipe=setting.recipe.model_copy(update={"data": data}))
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    stream = data_peers._SIDES[name](setting).stream()
    found = torch.cat([next(stream) for _ in range(batches)])
    stream.close()
    return found


def levels(images: torch.Tensor, setting: bench_data.Setting) -> np.ndarray:
    """float64 `[B, H, W, 3]` in levels of 255, from normalised images."""
    mean, std = np.array(setting.data.mean), np.array(setting.data.std)
    return 255 * (images.permute(0, 2, 3, 1).double().numpy() * std + mean)


def resized(setting: bench_data.Setting, side: int) -> list[np.ndarray]:
    """The training files in the order of evaluation, by Pillow, their short side `side`."""
    images = []
    for path in sorted(Path(setting.folder).rglob("*.jpg")):
        image = Image.open(path).convert("RGB")
        width, height = image.size
        image = image.resize((side * width // height, side), Image.Resampling.BICUBIC)
        images.append(np.asarray(image, np.float64))
    return images


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), ROWS)
def test_every_side_ends_with_the_models_input(setting, name, kind):
    made = setting(*KINDS[kind], evaluation=kind == "evaluation")
    images = taken(name, made)
    assert (images.dtype, images.shape) == (torch.float32, (BATCH, 3, SIZE, SIZE))
    assert abs(images.mean()) < 1.5
    assert 0.3 < images.std() < 2.5
    if kind != "deit":  # noise in erased boxes has no limits
        assert levels(images, made).min() > -0.01
        assert levels(images, made).max() < 255.01


@pytest.mark.gpu
@pytest.mark.card
@pytest.mark.parametrize("evaluation", [False, True])
@pytest.mark.parametrize("name", FLOATS)
def test_on_a_gpu_every_side_ends_there(setting, name, evaluation):
    made = replace(setting(evaluation=evaluation), device=torch.device("cuda"))
    images = taken(name, made)
    assert (images.device.type, images.dtype, images.shape) == ("cuda", torch.float32, (BATCH, 3, SIZE, SIZE))
    assert abs(images.mean()) < 1.5


@pytest.mark.parametrize("evaluation", [False, True])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("fastdeit_uint8", (BATCH, SIZE, SIZE, 3)),
        ("timm_uint8", (BATCH, 3, SIZE, SIZE)),
        ("torchvision_uint8", (BATCH, 3, SIZE, SIZE)),
        pytest.param("dali_uint8", (BATCH, SIZE, SIZE, 3), marks=pytest.mark.slow),
    ],
)
def test_the_hosts_part_ends_with_bytes(setting, name, shape, evaluation):
    images = taken(name, setting(evaluation=evaluation))
    assert (images.dtype, images.shape) == (torch.uint8, shape)
    assert images.max() > 128


@pytest.mark.parametrize("evaluation", [False, True])
def test_the_decoder_alone_makes_the_boxes_that_ours_decodes(setting, evaluation):
    made = setting("data.crop=simple", evaluation=evaluation)
    stream = data_peers._SIDES["fastdeit_decoder"](made).stream()
    source, held_out = build.sources(made.recipe)
    world = World(made.device)
    if evaluation:
        works = list(build.eval_loader(made.recipe, held_out, world, {}, print).works())
    else:
        works = list(build.train_loader(made.recipe, source, world, {}, print).works(0, bench_data.TIMED_BATCHES))
    for work in [*works, works[0]]:  # it begins again where they end
        boxes = next(stream)
        parts = np.concatenate(dali._hull(work.views, [made.size]), axis=1).tolist()
        for box, encoded, (y, x, height, width) in zip(boxes, work.encoded, parts, strict=True):
            whole = np.asarray(Image.open(io.BytesIO(encoded.data)))
            assert np.array_equal(box, whole[y : y + height, x : x + width])
            assert box.size < whole.size or not evaluation  # the simple crop of these pictures needs most of each
    stream.close()


def test_on_a_gpu_the_decoder_is_not_alone(setting):
    with pytest.raises(CannotRun, match="part of one graph and is not measured alone"):
        bench_data.decoder(replace(setting(), device=torch.device("cuda")))


# Levels of 255, mean: the resize is what differs (docs/augmentation.md, whole plans without operations): 0.005 between
# ours and Pillow's, 0.2 with DALI's; torchvision's is ours.
@pytest.mark.parametrize(("name", "bound"), [("timm", 0.02), ("deit", 0.02), ("torchvision", 1e-4), ("dali", 0.5)])
def test_in_evaluation_all_make_the_same_pixels(setting, name, bound):
    made = setting(evaluation=True)
    batches = FILES // BATCH
    apart = np.abs(levels(taken(name, made, batches), made) - levels(taken("fastdeit", made, batches), made))
    assert apart.mean() < bound
    assert apart.mean((1, 2, 3)).max() < 2 * bound


@pytest.mark.parametrize("name", FLOATS)
def test_evaluation_keeps_the_recipes_crop_ratio(setting, name):
    made = setting("data.eval_crop_ratio=1.0", evaluation=True)
    first = levels(taken(name, made), made)
    for image, whole in zip(first, resized(made, SIZE), strict=False):
        left = round((whole.shape[1] - SIZE) / 2)
        assert np.abs(image - whole[:, left : left + SIZE]).mean() < 0.5


@pytest.mark.parametrize(
    ("name", "pad"), [("fastdeit", PAD), ("timm", 0), ("deit", PAD), ("torchvision", PAD), ("dali", 0)]
)
def test_the_simple_crop_is_a_window_of_the_resized_image(setting, name, pad):
    operations = ["data.augment=three_augment", "data.color_jitter=0"] if name == "deit" else PLAIN[:1]
    made = setting(*operations, *PLAIN[1:], "data.crop=simple", "data.flip=0")
    windows = {}  # every fourth pixel tells them apart
    for number, image in enumerate(resized(made, SIZE)):
        padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="reflect")
        for top in range(len(padded) - SIZE + 1):
            for left in range(padded.shape[1] - SIZE + 1):
                windows[number, top, left] = padded[top : top + SIZE : 4, left : left + SIZE : 4]
    images = levels(taken(name, made, 3), made)
    limit = 0.7
    if name == "deit":  # it has no simple crop without 3-Augment
        images = np.array([image for image in images if not grey(image) and not solarised(image)])
        limit = 12.0  # the blur is left
    every = np.array(list(windows.values()), np.float32)
    tops = set()
    for image in images[:, ::4, ::4].astype(np.float32):
        apart = np.abs(every - image).mean((1, 2, 3))
        assert apart.min() < limit
        tops.add(list(windows)[int(apart.argmin())][1])
    assert (len(tops) > 1) == (pad > 0)  # up and down it moves among the reflected pixels alone


def grey(image: np.ndarray) -> bool:
    return bool(np.ptp(image, axis=-1).max() < 0.01)


def solarised(image: np.ndarray) -> bool:
    return bool(image.max() < 127.01)


@pytest.mark.parametrize("name", FLOATS)
def test_three_augment_is_one_of_three(setting, name):
    three = ["data.augment=three_augment", "data.color_jitter=0", "data.erase=0", "data.mixup=0", "data.cutmix=0"]
    made = setting(*three)
    images = levels(taken(name, made, 4), made)
    kinds = [(grey(image), solarised(image)) for image in images]
    assert set(kinds) == {(True, False), (False, True), (False, False)}


@pytest.mark.parametrize("name", FLOATS)
def test_colour_jitter_moves_colours(setting, name):
    still, moved = (
        levels(taken(name, made := setting(*PLAIN, f"data.color_jitter={strength}"), 3), made).mean((1, 2, 3)).std()
        for strength in (0, 0.9)
    )
    assert moved > 2 * still


# ---- what they say ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("fastdeit", "deit", "replayable"),
        ("timm", "deit", "PosterizeIncreasing keeps at least 1 bit"),
        ("timm", "deit", "FastCollateMixup on uint8; PrefetchLoader normalises and erases"),
        ("timm", "three_augment_simple", "no reflected pixels"),
        ("timm", "three_augment", "augment 3a"),
        ("timm_uint8", "deit", "the DataLoader inside PrefetchLoader, which normalises and erases"),
        ("timm_uint8", "plain", "which normalises"),
        ("deit", "deit", "timm's Mixup of the float batch on the device"),
        ("deit", "deit", "without its repeated augmentation"),
        ("torchvision", "deit", "torchvision's RandAugment (every operation applied, one magnitude, bilinear)"),
        ("torchvision", "deit", "MixUp or CutMix"),
        ("torchvision", "three_augment", "Gaussian of 9 x 9 pixels"),
        ("dali", "deit", "nothing erased or mixed"),
        ("dali", "three_augment", "nothing mixed"),
        ("dali", "three_augment_simple", "no reflected pixels"),
        ("dali", "jitter", "color_twist: in one order"),
        ("dali", "trivial", "DALI's TrivialAugment"),
        ("dali", "auto_augment", "DALI's AutoAugment"),
    ],
)
def test_a_side_says_what_it_does_otherwise(setting, name, kind, said):
    assert said in data_peers._SIDES[name](setting(*KINDS[kind])).work


@pytest.mark.parametrize("name", data_peers._SIDES)
def test_nothing_random_is_said_of_what_is_not(setting, name):
    for made in (setting(evaluation=True), setting(*PLAIN)):
        work = data_peers._SIDES[name](made).work
        assert not [word for word in ("eras", "mix", "Mix", "RandAugment", "Posterize", "jitter") if word in work]


@pytest.mark.parametrize(
    ("name", "overrides", "reason"),
    [
        ("timm", ["data.augment=trivial"], "timm has no augment trivial"),
        ("deit", ["data.augment=augreg-light2"], "timm has no augment augreg-light2"),
        ("deit", ["data.crop=simple"], "simple crop with 3-Augment only"),
        ("torchvision", ["data.augment=v0"], "torchvision has no augment v0"),
        ("dali", ["data.augment=v0"], "DALI has no augment v0"),
        ("torchvision", ["data.augment=rand-m9-t3a"], "torchvision has RandAugment with its own operations"),
        ("dali", ["data.augment=rand-m15-mmax20"], "up to magnitude 10"),
        ("dali", ["data.augment=rand-m9-tweights"], "DALI has RandAugment with its own operations"),
    ],
)
def test_a_peer_that_has_nothing_like_it_says_so(setting, name, overrides, reason):
    with pytest.raises(CannotRun, match=reason.replace("(", r"\(")):
        data_peers._SIDES[name](setting(*overrides))


@pytest.mark.parametrize(("name", "evaluation"), [("torchvision", False), ("torchvision", True), ("deit", True)])
def test_torchvision_resizes_to_squares_only(setting, name, evaluation):
    with pytest.raises(CannotRun, match="an input that is not square"):
        data_peers._SIDES[name](setting("data.crop=simple", evaluation=evaluation, size="[64,80]"))


def test_the_others_go_on(setting):
    built, failed = data_peers._built(setting("data.augment=v0"), data_peers._PEERS["all"])
    ours = ["fastdeit", "fastdeit_uint8", "fastdeit_loader", "fastdeit_decoder"]
    assert list(built) == [*ours, "timm", "timm_uint8", "deit"]
    assert failed["torchvision"] == failed["torchvision_uint8"] == "torchvision has no augment v0"


# ---- the parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("switch", "probability", "usually"),
    [(0.0, 1.0, (True, False)), (1.0, 1.0, (False, True)), (1.0, 0.05, (False, False)), (1.0, 0.0, (False, False))],
)
def test_torchvision_mixes_as_the_recipe_says(setting, switch, probability, usually):
    mix = torchvision._mixing(setting(f"data.mix_switch={switch}", f"data.mix_probability={probability}"), [])
    images = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 3, SIZE, SIZE)
    torch.manual_seed(0)
    flat = cut = 0
    for _ in range(20 if mix else 0):
        first = mix(images, torch.tensor([0, 1]))[0][0]
        mixed, even = 0 < first.mean() < 1, first.max() - first.min() < 1e-6
        flat, cut = flat + bool(mixed and even), cut + bool(mixed and not even)
    assert (flat > 10, cut > 10) == usually


def test_posterize_of_timm_keeps_a_bit_and_is_left_as_it_was():
    from timm.data import auto_augment

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    before = auto_augment.NAME_TO_OP["PosterizeIncreasing"]
    with timm.posterize_keeps_a_bit():
        kept = auto_augment.NAME_TO_OP["PosterizeIncreasing"](image, 0)
    assert set(np.unique(np.asarray(kept))) <= {0, 128}
    assert auto_augment.NAME_TO_OP["PosterizeIncreasing"] is before
