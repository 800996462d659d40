"""Policies against the samplers of timm and torchvision: one value at a time, and as distributions.

ALPHA bounds the probability of a false alarm: some two hundred comparisons below 1e-6 in total (and the seeds are
fixed).
"""

import random
from collections import Counter
from itertools import chain, permutations

import numpy as np
import pytest
import timm.data.auto_augment as theirs
import torch
from scipy import stats
from torchvision.transforms import ColorJitter, TrivialAugmentWide, autoaugment

from fastdeit.data.pixel_ops import FILL, KINDS
from fastdeit.data.plan import operations, policy
from fastdeit.data.plan.policy import Op, Policy

ALPHA = 1e-9
N = 12_000
SIZE = (96, 160)
KIND_OF = {
    **{name: name for name in KINDS},
    "translate_x_rel": "translate_x",
    "translate_y_rel": "translate_y",
    "desaturate": "color",
    "gaussian_blur": "blur",
    "gaussian_blur_rand": "blur",
}


def drawn(text: str, n: int = N, size: tuple[int, int] = SIZE, **options) -> operations.Ops:
    chosen = policy.parse(text, size, **options)
    noise = np.random.default_rng(0)
    return operations.draw(chosen, noise.random((n, chosen.uniforms)), noise.random((n, chosen.jitter_uniforms)))


def sequences(ops: operations.Ops) -> list[list[tuple[str, float]]]:
    """For each sample the (kind, value) of what is done to it, in order."""
    rows = zip(ops.kind.tolist(), ops.value.tolist(), strict=True)
    return [[(KINDS[k], v) for k, v in zip(*row, strict=True) if k] for row in rows]


class Image:
    """Stands for a PIL image of SIZE that is never touched: remembers what timm would do to it."""

    size = SIZE[::-1]

    def __init__(self) -> None:
        self.done: list[tuple[str, float]] = []

    def filter(self, blur) -> "Image":
        self.done.append(("blur", blur.radius))
        return self


def listen(op: theirs.AugmentOp) -> None:
    """Make timm's operation note its kind and argument in place of changing pixels."""
    function = op.aug_fn

    def note(image: Image, *arguments, **_) -> Image:
        kind = KIND_OF[function.__name__]
        if function.__name__ in ("gaussian_blur", "gaussian_blur_rand"):
            return function(image, *arguments)
        image.done.append((kind, as_value(function.__name__, *arguments)))
        return image

    op.aug_fn = note


def as_value(function: str, argument: float = 0.0) -> float:
    """timm's argument in the units of `KINDS`."""
    scale = {"translate_x_rel": SIZE[1], "translate_y_rel": SIZE[0]}.get(function, 1)
    if function == "desaturate":
        return 1 - argument
    return max(1, argument) if function == "posterize" else argument * scale


def timms(text: str) -> tuple[theirs.RandAugment | theirs.AutoAugment, list[list[theirs.AugmentOp]]]:
    """timm's transform and the rows it draws from."""
    options = {"translate_const": 100, "img_mean": FILL}
    if not text.startswith("rand"):
        transform = theirs.auto_augment_transform(text, options)
        return transform, transform.policy
    transform = theirs.rand_augment_transform(text, options)
    return transform, [[op] for op in transform.ops]


def timm_sequences(text: str, n: int = N) -> list[list[tuple[str, float]]]:
    random.seed(1)
    np.random.seed(1)
    transform, rows = timms(text)
    for op in chain(*rows):
        listen(op)
    images = [Image() for _ in range(n)]
    for image in images:
        transform(image)
    return [image.done for image in images]


def assert_same_shares(one: Counter, other: Counter) -> None:
    """Chi-square test of two samples of categories; the rare ones are counted together."""
    table = [[count[key] for key in {**one, **other}] for count in (one, other)]
    table = np.array(table)
    rare = table.sum(0) < 20
    table = np.column_stack((table[:, ~rare], table[:, rare].sum(1)))
    table = table[:, table.sum(0) > 0]
    if table.shape[1] > 1:
        assert stats.chi2_contingency(table).pvalue > ALPHA


def assert_same_draws(mine: list[list[tuple[str, float]]], others: list[list[tuple[str, float]]]) -> None:
    assert_same_shares(*(Counter(tuple(kind for kind, _ in done) for done in all_) for all_ in (mine, others)))
    for kind in KINDS:
        values = [np.float32([v for done in all_ for k, v in done if k == kind]) for all_ in (mine, others)]
        assert bool(len(values[0])) == bool(len(values[1])), kind
        if len(values[0]):
            assert stats.ks_2samp(*values, method="asymp").pvalue > ALPHA, kind
            assert_same_shares(*(Counter(np.sign(v).tolist()) for v in values))
            if kind == "posterize":
                assert_same_shares(*(Counter(v.tolist()) for v in values))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", sorted(set(operations.FORMS) & set(theirs.LEVEL_TO_ARG) - {"GaussianBlurRand"}))
def test_every_argument_is_timms(monkeypatch, name, sign):
    monkeypatch.setattr(theirs, "_randomly_negate", lambda v: sign * v)
    to_argument, function = theirs.LEVEL_TO_ARG[name], theirs.NAME_TO_OP[name].__name__
    for level in (*np.linspace(0, 10, 41), 12.5, 19.0):
        chosen = Policy(SIZE, rows=((Op(name, 1.0, level),),), draws=1, mmax=20)
        ops = operations.draw(chosen, np.array([[0.5, 0.5, 0.5, 0.5 - sign / 4]]), np.empty((1, 0)))
        arguments = to_argument(level, {}) if to_argument else ()
        if function == "desaturate":
            arguments = (min(1, arguments[0]),)
        assert KINDS[ops.kind[0, 0]] == KIND_OF[function]
        expected = max(as_value(function, *arguments), 0 if name == "PosterizeOriginal" else -np.inf)
        assert ops.value[0, 0] == np.float32(expected), level


TEXTS = [
    "rand-m9-mstd0.5-inc1",
    "rand",
    "rand-m7-n3-p0.7-mstd101-mmax12",
    "rand-n1-p1-m14-mstd2-mmax15-inc1",
    "rand-n3-tweights-mstd0.5",
    "rand-m8-n4-t3aw-p0.8-mstd1",
    "rand-t3a-mstd3",
    "original",
    "original-mstd0.5",
    "originalr-mstd1",
    "v0-mstd0.5",
    "v0r",
    "3a",
    "3a-mstd4",
]


@pytest.mark.parametrize("text", TEXTS)
def test_tables_are_timms(text):
    ours, (transform, rows) = policy.parse(text), timms(text)
    mine = sorted([(op.name, op.probability, op.magnitude) for op in row] for row in ours.rows)
    assert mine == sorted([(op.name, op.prob, op.magnitude) for op in row] for row in rows)
    assert ours.mstd == rows[0][0].magnitude_std
    assert ours.mmax == (rows[0][0].magnitude_max or 10)
    assert ours.draws == getattr(transform, "num_layers", 1)
    if getattr(transform, "choice_weights", None) is not None:
        weight = dict(zip((row[0].name for row in ours.rows), np.divide(ours.weights, sum(ours.weights)), strict=True))
        assert weight == pytest.approx(
            dict(zip((op.name for op in transform.ops), transform.choice_weights, strict=True))
        )
    else:
        assert ours.weights is None


@pytest.mark.parametrize(
    "text",
    [
        text
        if text in ("rand-m9-mstd0.5-inc1", "rand-n3-tweights-mstd0.5", "original-mstd0.5")
        else pytest.param(text, marks=pytest.mark.slow)
        for text in TEXTS
    ],
)
def test_draws_are_distributed_as_timms(text):
    assert_same_draws(sequences(drawn(text)), timm_sequences(text))


def test_magnitude_is_a_clipped_normal():
    value = drawn("rand-m9-mstd0.5-inc1").value.astype(float)[(k := drawn("rand-m9-mstd0.5-inc1").kind) > 0]
    rotated = np.abs(value[k[k > 0] == KINDS.index("rotate")]) / 3
    assert 0.01 < (rotated > 9.9999).mean() < 0.04  # P(N(9, 0.5) > 10) = 0.023
    below = rotated[rotated < 9.9999]
    assert stats.kstest(below, stats.truncnorm(-18, 2, loc=9, scale=0.5).cdf).pvalue > ALPHA


@pytest.mark.slow
def test_trivial_augment_is_torchvisions(monkeypatch):
    done: list[tuple[str, float]] = []
    monkeypatch.setattr(autoaugment, "_apply_op", lambda image, name, magnitude, **_: done.append((name, magnitude)))
    torch.manual_seed(0)
    transform = TrivialAugmentWide()
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    for _ in range(N):
        transform(image)
    snake = {name: "".join(f"_{c.lower()}" if c.isupper() else c for c in name)[1:] for name, _ in done}
    theirs_, ours = [], sequences(drawn("trivial"))
    for name, magnitude in done:
        value = int(magnitude) if name.startswith(("Translate", "Posterize")) else magnitude
        value += name in ("Brightness", "Color", "Contrast", "Sharpness")
        theirs_.append([] if name == "Identity" else [(snake[name], value)])
    assert_same_draws(ours, theirs_)
    for kind in set(snake.values()) - {"identity"}:
        values = [sorted({round(v, 3) + 0 for done in all_ for k, v in done if k == kind}) for all_ in (ours, theirs_)]
        # In float32 the 16 of torchvision's 31 translations is 15.999999, and it truncates.
        assert values[0] == pytest.approx(values[1], abs=1 if kind.startswith("translate") else 2e-3), kind


def test_colour_jitter_is_torchvisions():
    strengths = (0.4, 0.3, 1.2, 0.1)
    ours = sequences(drawn("none", color_jitter=strengths))
    torch.manual_seed(0)
    jitter, others = ColorJitter(*strengths), []
    for _ in range(N):
        order, *factors = ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        named = list(zip(("brightness", "contrast", "color", "hue"), factors, strict=True))
        others.append([named[i] for i in order.tolist()])
    assert_same_draws(ours, others)


def test_colour_jitter_of_one_strength_leaves_the_hue_alone():
    done = sequences(drawn("none", 600, color_jitter=0.4))
    assert {tuple(kind for kind, _ in row) for row in done} == set(permutations(("brightness", "contrast", "color")))
    values = [v for row in done for _, v in row]
    assert 0.6 <= min(values) < 0.61
    assert 1.39 < max(values) < 1.4
    assert not drawn("none", 5, color_jitter=0).kind.size
    assert drawn("none", 5, color_jitter=(0.0, 0.2, 0.0)).kind.tolist() == [[KINDS.index("contrast")]] * 5


def test_three_augment_is_one_of_three_then_jitter():
    done = sequences(drawn("three_augment"))
    assert {len(row) for row in done} == {4}
    first = Counter(row[0][0] for row in done)
    assert set(first) == {"grayscale", "solarize", "blur"}
    assert stats.chisquare(list(first.values())).pvalue > ALPHA
    assert {row[0][1] for row in done if row[0][0] == "solarize"} == {128.0}
    assert stats.kstest([row[0][1] for row in done if row[0][0] == "blur"], "uniform", (0.1, 1.9)).pvalue > ALPHA
    orders = Counter(tuple(kind for kind, _ in row[1:]) for row in done)
    assert set(orders) == set(permutations(("brightness", "contrast", "color")))
    assert stats.chisquare(list(orders.values())).pvalue > ALPHA
    assert stats.kstest([v for row in done for _, v in row[1:]], "uniform", (0.7, 0.6)).pvalue > ALPHA
    assert {len(row) for row in sequences(drawn("three_augment", 50, color_jitter=0))} == {1}


def test_none_does_nothing():
    ops = drawn("none", 3)
    assert (ops.kind.shape, ops.kind.dtype, ops.value.shape, ops.value.dtype) == ((3, 0), np.uint8, (3, 0), np.float32)


def test_types_and_layers():
    ops = drawn("rand-m9-n3-inc1", 5)
    assert (ops.kind.shape, ops.kind.dtype, ops.value.dtype) == ((5, 3), np.uint8, np.float32)
    assert not ops.value[ops.kind == 0].any()


def test_extreme_uniforms_are_valid():
    for text in ("rand-m9-mstd0.5-inc1", "rand-n15-tweights", "v0-mstd9", "trivial", "three_augment"):
        chosen = policy.parse(text, SIZE)
        for u in (0.0, 1 - 2.0**-32):
            ops = operations.draw(chosen, np.full((1, chosen.uniforms), u), np.full((1, chosen.jitter_uniforms), u))
            assert ops.kind.max() < len(KINDS)
            assert np.isfinite(ops.value).all()


@pytest.mark.parametrize(
    ("level", "text"),
    [("none", "none"), ("light1", "rand-m0-n2-p1"), ("light2", "rand-m10-n2-p1"), ("strong2", "rand-m20-n2-p1-mmax20")],
)
def test_augreg_levels_are_randaugment_always_applied(level, text):
    ours, expected = drawn(f"augreg-{level}", 200), drawn(text, 200)
    assert (ours.kind == expected.kind).all()
    assert (ours.value == expected.value).all()
    assert level == "none" or ours.kind.all()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("rand-m99-x", r"has a section 'x' that is not valid; valid are m9 \(magnitude\), n2"),
        ("rand-m9-w0", "section 'w0'"),
        ("rand-m9.5", "section 'm9.5'"),
        ("rand-m", "section 'm'"),
        ("rand-p1.5", "section 'p1.5'"),
        ("rand-inc2", "section 'inc2'"),
        ("rand-n0", "section 'n0'"),
        ("rand-mmax0", "section 'mmax0'"),
        ("rand-tother", "section 'tother'"),
        ("rand-", "section ''"),
        ("rand-m9-m8", "two sections 'm': m9 and m8"),
        ("rand-n16-tweights", "n16, but tweights draws without repetition from 15"),
        ("original-m9", r"section 'm9' that is not valid; valid are mstd0.5"),
        ("randaugment-m9", "must be one of none, rand-... as in rand-m9-mstd0.5-inc1, original"),
        ("trivial-m3", "must be one of none"),
        ("augreg-medium", "must be one of none"),
        ("", "must be one of none"),
        ("augmix-m5-w4", "cannot be augmix, which blends several augmented copies of an image"),
    ],
)
def test_what_is_not_valid_is_named(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        policy.parse(text)


def test_jitter_that_timm_would_ignore_is_refused():
    for text in ("rand-m9", "original", "trivial", "augreg-light1"):
        with pytest.raises(ValueError, match=f"does not go with augment {text}, which changes the colours itself"):
            policy.parse(text, color_jitter=0.4)
    assert policy.parse("3a", color_jitter=0.4).jitter == (0.4, 0.4, 0.4, 0.0)
    with pytest.raises(ValueError, match=r"a hue of at most 0\.5"):
        policy.parse("none", color_jitter=(0.1, 0.1, 0.1, 0.6))
