"""The recipe reader: every mistake is refused with its line, its field and a guess at what was meant, all at once."""

import json
import os
import re
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdeit import recipe as recipes
from fastdeit.cli import main as cli
from fastdeit.data.datasets import KINDS
from fastdeit.recipe import Recipe, RecipeError

GOOD = """\
about:
  summary: a recipe for tests
model:
  name: deit_tiny_patch16_224
  image_size: 64
method:
  use: supervised
data:
  source: synthetic
  group_size: 16
optim:
  lr: 1e-3
train:
  epochs: 10
  batch_size: 64
"""
DISTILL = GOOD.replace(
    "use: supervised", "use: distill\n  tau: 2.0\n  teacher: {timm: resnet18, weights: w.safetensors}"
)


@pytest.fixture
def write(tmp_path):
    """`write(text, name)` -> path of a recipe file, as a string."""

    def write(text, name="r.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def refusal(path, overrides=()):
    """Lines of the message with which the recipe is refused."""
    with pytest.raises(RecipeError) as caught:
        recipes.load(path, overrides)
    return str(caught.value).splitlines()


def edited(field, value):
    """(GOOD with `section.field` set to `value`, the line where it stands)"""
    section, _, key = field.partition(".")
    lines = GOOD.splitlines()
    if f"{section}:" not in lines:
        lines.append(f"{section}:")
    start = lines.index(f"{section}:") + 1
    end = next((number for number in range(start, len(lines)) if not lines[number].startswith(" ")), len(lines))
    same = [number for number in range(start, end) if lines[number].startswith(f"  {key}: ")]
    if same:
        lines[same[0]] = f"  {key}: {value}"
    else:
        lines.insert(start, f"  {key}: {value}")
    return "\n".join(lines) + "\n", (same[0] if same else start) + 1


# ---- bad files -------------------------------------------------------------------------------------------------------

FIELDS_GONE_WRONG = [  # field, what is written there, words of the message
    # unknown fields, and what was meant
    ("optim.weigth_decay", "0.1", "unknown field (0.1); did you mean 'weight_decay'?"),
    ("optim.batch_size", "2", "unknown field (2); did you mean 'train.batch_size'?"),
    ("optim.name", "x", "unknown field ('x'); did you mean 'model.name'?"),
    ("optim.xyzzy", "yes", "unknown field ('yes')"),
    ("method.smothing", "0.1", "unknown field (0.1); did you mean 'smoothing'?"),
    ("method.tau", "2.0", "unknown field (2.0)"),
    ("about.sumary", "x", "unknown field ('x'); did you mean 'summary'?"),
    ("optim.<<", "{lr: 2e-3}", "unknown field (a mapping)"),
    # types
    ("optim.lr", "fast", "must be a number, got 'fast'"),
    ("optim.lr", "'1e-3'", "must be a number, got '1e-3'"),
    ("optim.lr", "true", "must be a number, got true"),
    ("optim.lr", "", "must be a number, got null"),
    ("optim.lr", "[1e-3]", "must be a number, got [0.001]"),
    ("optim.lr", "{peak: 1e-3}", "must be a number, got a mapping"),
    ("optim.lr", "\n    peak: 1e-3", "must be a number, got a mapping"),
    ("train.epochs", "10.5", "must be a whole number, got 10.5"),
    ("train.batch_size", "64.0", "must be a whole number, got 64.0"),
    ("model.name", "16", "must be text, got 16"),
    ("optim.decay_dist_token", "no", "must be true or false, got 'no'"),
    ("data.mean", "0.5", "must be a list, got 0.5"),
    ("data.mean", "[0.5, 0.5]", "has too few entries"),
    ("optim.betas", "[0.9, 0.9, 0.9]", "must have at most 2 entries, got [0.9, 0.9, 0.9]"),
    ("data.mean[1]", "[0.5, x, 0.5]", "must be a number, got 'x'"),
    ("model.image_size[1]", "[64, x]", "must be a whole number, got 'x'"),
    ("model.image_size", "[64]", "has too few entries"),
    ("model.image_size", "large", "must be a whole number, got 'large'"),
    # ranges and choices
    ("optim.lr", "0", "must be above 0, got 0"),
    ("optim.lr", "-1e-3", "must be above 0, got -0.001"),
    ("optim.weight_decay", "-0.1", "must be at least 0, got -0.1"),
    ("train.epochs", "0", "must be at least 1, got 0"),
    ("train.seed", "-1", "must be at least 0, got -1"),
    ("data.flip", "1.5", "must be at most 1, got 1.5"),
    ("model.drop_path", "1.0", "must be below 1, got 1.0"),
    ("data.eval_crop_ratio", "0", "must be above 0, got 0"),
    ("data.eval_crop_ratio", "1.1", "must be at most 1, got 1.1"),
    ("data.erase", "1.5", "must be at most 1, got 1.5"),
    ("data.color_jitter", "-0.4", "must be at least 0, got -0.4"),
    ("data.color_jitter", "strong", "must be a number, got 'strong'"),
    ("data.color_jitter", "[0.4, 0.4]", "must have at least 3 entries, got [0.4, 0.4]"),
    ("data.color_jitter", "[0.4, 0.4, 0.4, 0.6]", "must have a hue of at most 0.5"),
    ("engine.keep_checkpoints", "1", "must be at least 2, got 1"),
    ("engine.checkpoint_every", "0", "must be above 0, got 0"),
    ("optim.lr", ".nan", "must be a finite number, got .nan"),
    ("optim.lr", "1e999", "must be a finite number, got 1e999"),
    ("data.std[2]", "[1, 1, -.inf]", "must be a finite number, got -.inf"),
    ("train.seed", "18446744073709551616", "must fit 64 bits, got 18446744073709551616"),
    ("train.epochs", "9" * 5000, "is a number of more digits than Python reads, 99999"),
    ("data.source", "folders", "must be one of folder, packed, tar, tfrecord, parquet, arrow, imagenet, cifar10"),
    ("data.source", "folders", "got 'folders'; did you mean 'folder'?"),
    ("data.crop", "src", "must be one of random_resized, simple, got 'src'"),
    ("data.mix_mode", "elem", "must be one of batch, pair, element, got 'elem'; did you mean 'element'?"),
    ("data.augment", "rand-m99-x", "has a section 'x' that is not valid; valid are m9 (magnitude), n2"),
    ("data.augment", "augmix-m5", "cannot be augmix, which blends several augmented copies of an image"),
    ("data.augment", "randaug", "must be one of none, rand-... as in rand-m9-mstd0.5-inc1, original"),
    ("data.augment", "3", "must be text, got 3"),
    ("engine.precision", "bf61", "must be one of fp32, fp16, bf16, got 'bf61'; did you mean 'bf16'?"),
    (
        "engine.sinks[0]",
        "[tensorbord]",
        "must be one of tensorboard, wandb, got 'tensorbord'; did you mean 'tensorboard'?",
    ),
    ("method.use", "supervized", "no method named 'supervized'"),
    ("method.use", "supervized", "did you mean 'supervised'?"),
    ("method.use", "'json:JSONDecoder'", "is not a method"),
    ("method.use", "'no_such_package:Method'", "cannot be imported: No module named 'no_such_package'"),
    ("method.use", "'..x:Method'", "'..x:Method' is not an import path 'package.module:Class'"),
    ("method.use", "':'", "':' is not an import path 'package.module:Class'"),
    ("method.use", "3", "must be the name of a method, got 3"),
    ("model.name", "''", "must not be empty, got ''"),
    ("about.top1", "'99.9'", "must name its source, as in '81.8 (source: ...)', or say unverified, got '99.9'"),
    ("about.hours", "53", "must name its source, as in '81.8 (source: ...)', or say unverified, got 53"),
    # fields against each other
    ("model.timm", "vit_tiny", "is one model too many beside model.name deit_tiny_patch16_224; remove one of the two"),
    ("data.group_size", "1", "must be even, because mixup and cutmix pair the samples of a group, got 1"),
    ("data.root", "/data", "has no place beside data.source synthetic, which reads no directory of yours, got '/data'"),
    ("data.crop_ratio", "[1.3, 0.7]", "must be [smallest, largest], got [1.3, 0.7]"),
    ("data.crop_scale", "[0.5, 1.5]", "must be at most 1: a crop is a part of the image, got [0.5, 1.5]"),
    ("train.batch_size", "50", "must be a multiple of data.group_size (16), got 50"),
    ("train.accumulate", "3", "must divide train.batch_size / data.group_size (4 groups), got 3"),
    ("optim.min_lr", "2e-3", "must not be above optim.lr (0.001), got 0.002"),
    ("optim.warmup_epochs", "10", "must be less than train.epochs (10), got 10.0"),
    # YAML that a recipe does without
    ("optim.lr", "!!float 1e-3", "tags are not allowed"),
    ("optim.lr", "!!python/object/apply:os.system ['true']", "tags are not allowed"),
    ("optim.lr", "&peak 1e-3", "anchors are not allowed (&peak)"),
    ("optim.lr", "*peak", "aliases are not allowed (*peak)"),
    ("model.name", '"\\ud800"', "must be Unicode text"),
    ("optim.lr" + "[0]" * 19, "[" * 50, "is nested deeper than 20 levels"),
]


@pytest.mark.parametrize(("field", "value", "words"), FIELDS_GONE_WRONG, ids=lambda text: text[:30])
def test_a_mistake_is_refused_where_it_stands(write, field, value, words):
    """With its line, its field and a guess at what was meant; once, and without what merely follows from it."""
    text, line = edited(field.partition("[")[0], value)
    path = write(text)
    (message,) = refusal(path)
    assert message.startswith(f"{path}:{line}: {field}: ")
    assert words in message


PLACES_GONE_WRONG = {  # what is replaced in GOOD, by what, the line and field to be named, words of the message
    "unknown section": ("train:", "trian:", 13, "trian", "unknown field (a mapping); did you mean 'train'?"),
    "field outside its section": (
        "train:",
        "lr: 1e-3\ntrain:",
        13,
        "lr",
        "unknown field (0.001); did you mean 'optim.lr'?",
    ),
    "section that is a list": ("  use: supervised", "  - use", 6, "method", 'must be a mapping, got ["use"]'),
    "section that is a word": ("optim:\n  lr: 1e-3", "optim: adam", 11, "optim", "must be a mapping, got 'adam'"),
    "empty section": ("train:", "engine:\ntrain:", 13, "engine", "must be a mapping, got null"),
    "missing method": ("  use: supervised", "  smoothing: 0.1", 6, "method.use", "is required"),
    "missing field": ("  lr: 1e-3", "  eps: 1e-6", 11, "optim.lr", "is required"),
    "missing section": ("optim:\n  lr: 1e-3\n", "", 1, "optim.lr", "is required"),
    "no model": ("  name: deit_tiny_patch16_224\n", "", 3, "model.timm", "is required where there is no model.name"),
    "smoothed bce": ("supervised", "supervised\n  loss: bce", 6, "method", "loss bce needs smoothing 0"),
    "default above the peak": (
        "1e-3",
        "1e-6",
        11,
        "optim.min_lr",
        "must not be above optim.lr (1e-06), got 1e-05 by default",
    ),
    "view that the method has not": (
        "  group_size: 16",
        "  group_size: 16\n  views:\n    mian: {size: 96}",
        12,
        "data.views.mian",
        "is no view of method supervised, which has main; did you mean 'main'?",
    ),
    "unknown field of a view": (
        "  group_size: 16",
        "  group_size: 16\n  views:\n    main: {szie: 96}",
        12,
        "data.views.main.szie",
        "unknown field (96); did you mean 'size'?",
    ),
    "field of data that a view has not": (
        "  group_size: 16",
        "  group_size: 16\n  views:\n    main: {mixup: 0.1}",
        12,
        "data.views.main.mixup",
        "unknown field (0.1); did you mean 'data.mixup'?",
    ),
    "crop of a view out of range": (
        "  group_size: 16",
        "  group_size: 16\n  views: {main: {\n    crop_scale: [0.5, 1.5]}}",
        12,
        "data.views.main.crop_scale",
        "must be at most 1: a crop is a part of the image, got [0.5, 1.5]",
    ),
    "policy of a view": (
        "  group_size: 16",
        "  group_size: 16\n  views: {main: {augment: randaug}}",
        11,
        "data.views.main.augment",
        "must be one of none, rand-...",
    ),
    "hue of a view": (
        "  group_size: 16",
        "  group_size: 16\n  views: {main: {color_jitter: [0.4, 0.4, 0.4, 0.6]}}",
        11,
        "data.views.main.color_jitter",
        "must have a hue of at most 0.5",
    ),
    "crop of a view that is not there": (
        "  group_size: 16",
        "  group_size: 16\n  views:\n    main:\n      crop_of: clean",
        13,
        "data.views.main.crop_of",
        "must name a view before main (it is the first), got 'clean'",
    ),
    "jitter of a view over the policy of all": (
        "  group_size: 16",
        "  augment: rand-m9\n  views: {main: {\n    color_jitter: 0.4}}",
        12,
        "data.views.main.color_jitter",
        "has no place beside augment rand-m9, which changes the colours itself; set it to null, or give the view an",
    ),
    "view that is a number": (
        "  group_size: 16",
        "  group_size: 16\n  views: {main: 96}",
        11,
        "data.views.main",
        "must be a mapping, got 96",
    ),
    "repeated field": ("  lr: 1e-3", "  lr: 1e-3\n  lr: 2e-3", 13, "optim.lr", "is given twice, first on line 12"),
    "repeated section": ("train:", "optim: {lr: 1e-4}\ntrain:", 13, "optim", "is given twice, first on line 11"),
    "number as a name": ("  lr: 1e-3", "  lr: 1e-3\n  5: 6", 13, "optim", "field names must be text, got 5"),
    "list as a name": ("  lr: 1e-3", "  lr: 1e-3\n  [a]: 6", 13, "optim", 'field names must be text, got ["a"]'),
    "alias as a name": ("  lr: 1e-3", "  lr: 1e-3\n  *a : 6", 13, "optim.?", "aliases are not allowed (*a)"),
}


@pytest.mark.parametrize("case", PLACES_GONE_WRONG)
def test_a_mistake_of_structure_is_refused_where_it_stands(write, case):
    old, new, line, field, words = PLACES_GONE_WRONG[case]
    assert GOOD.count(old) == 1, "the case replaces one place"
    path = write(GOOD.replace(old, new))
    first, *others = refusal(path)
    found = [message for message in (first, *others) if message.startswith(f"{path}:{line}: {field}: ")]
    assert len(found) == 1, (first, *others)
    assert words in found[0]
    assert not others or case == "unknown section", "the fields of the section it was meant to be are missing"


BOMB = b"a: &a [x, x]\n" + b"".join(
    b"%c: &%c [*%c, *%c]\n" % (c, c, c - 1, c - 1) for c in b"bcdefghijklmnopqrstuvwxyz"
)
FILES = {
    "empty": (b"", 1, "this is nothing"),
    "only comments": (b"# nothing\n", 1, "this is nothing"),
    "a word": (b"\nhello\n", 2, "this is 'hello'"),
    "a list": (b"- model\n", 1, 'this is ["model"]'),
    "not UTF-8": (GOOD.encode() + b"# caf\xe9\n", 16, "is not UTF-8 text (byte 0xe9)"),
    "control character": (GOOD.encode() + b"# \x01\n", 16, "is not valid YAML"),
    "unclosed": (b"model: {name: a\ntrain: {}\n", 2, "is not valid YAML"),
    "tab": (b"model:\n\tname: a\n", 2, "is not valid YAML"),
    "second document": (GOOD.encode() + b"---\na: 1\n", 16, "a second one starts here"),
    "directive": (b"%YAML 1.1\n---\n" + GOOD.encode(), 2, "YAML directives (%)"),
    "tagged": (b"!recipe\n" + GOOD.encode(), 1, "tags are not allowed (!recipe)"),
    "alias bomb": (BOMB, 1, "anchors are not allowed (&a)"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_recipe_is_refused(write, case):
    data, line, words = FILES[case]
    path = write(data)
    assert any(message.startswith(f"{path}:{line}: ") and words in message for message in refusal(path)), refusal(path)


@pytest.mark.parametrize(
    "data", [GOOD.encode() + b"#" * 2**18, b"[" * 2**18 + b"]", b"a: " + b"[1, " * 2**16, b"\xff" * 2**18 + b"x"]
)
def test_large_files_are_refused_unread(write, data):
    path = write(data)
    assert refusal(path) == [f"{path}: is larger than 256 KiB, which no recipe needs"]


def test_nested_brackets_are_refused(write):
    (message,) = refusal(write(b"[" * 20_000))
    assert "nested deeper" in message


def test_files_that_cannot_be_read(tmp_path, write):
    assert refusal(str(tmp_path / "none.yaml")) == [f"{tmp_path}/none.yaml does not exist"]
    assert refusal(str(tmp_path / "digit.yaml")) == [f"{tmp_path}/digit.yaml does not exist; did you mean 'digits'?"]
    assert refusal(f"{tmp_path}/") == [f"{tmp_path} is not a file"]
    assert refusal("a\0b/c.yaml")[0].endswith("does not exist")
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    assert refusal(str(pipe)) == [f"{pipe} is not a file"]
    if os.geteuid() != 0:
        locked = tmp_path / "locked.yaml"
        locked.touch(mode=0)
        assert refusal(str(locked)) == [f"{locked}: cannot be read: Permission denied"]


def test_a_name_that_is_no_recipe():
    assert refusal("deit_smal") == ["there is no recipe 'deit_smal'; did you mean 'deit_small'?"]
    (message,) = refusal("zzz")
    assert all(name in message for name in recipes.names())
    with pytest.raises(RecipeError, match="did you mean 'digits'"):
        recipes.text("digit")


def test_everything_is_reported_at_once_in_the_order_of_lines(write):
    text = GOOD
    for old, new in {
        "summary": "sumary",
        "image_size: 64": "image_size: big",
        "supervised": "supervized",
        "16\n": "15\n",
        "1e-3": "fast",
        "epochs: 10": "epochs: 0",
        "batch_size: 64": "batch_size: 6.4",
    }.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    path = write(text + "extra: 1\n")
    messages = refusal(path, ["train.sed=1", "optim.eps=x"])
    assert [message.split(": ")[:2] for message in messages] == [
        [f"{path}:2", "about.sumary"],
        [f"{path}:5", "model.image_size"],
        [f"{path}:7", "method.use"],
        [f"{path}:10", "data.group_size"],
        [f"{path}:12", "optim.lr"],
        [f"{path}:14", "train.epochs"],
        [f"{path}:15", "train.batch_size"],
        [f"{path}:16", "extra"],
        ["override 'optim.eps=x'", "optim.eps"],
        ["override 'train.sed=1'", "train.sed"],
    ]


def test_no_traceback_and_exit_code_2(write, capsys):
    assert cli(["train", write(GOOD.replace("lr: 1e-3", "lr: fast"))]) == 2
    error = capsys.readouterr().err
    assert "r.yaml:12: optim.lr: must be a number, got 'fast'" in error
    assert "Traceback" not in error


# ---- types -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "value"),
    [("5e-4", 5e-4), ("1e-3", 1e-3), ("1", 1.0), ("0.5", 0.5), (".5", 0.5), ("+1e+0", 1.0), ("1E-4", 1e-4)],
)
def test_numbers_are_numbers(write, written, value):
    lr = recipes.load(write(GOOD.replace("1e-3", written))).optim.lr
    assert lr == value
    assert isinstance(lr, float)


@pytest.mark.parametrize(
    "word", ["no", "yes", "on", "off", "y", "1:30", "2024-01-01", "deit", "'1'", "null_", "~x", "NO"]
)
def test_words_are_words(write, word):
    """YAML 1.1 would make a truth value, a number in base 60 or a date of most of these."""
    loaded = recipes.load(write(GOOD.replace("name: deit_tiny_patch16_224", f"name: {word}")))
    assert loaded.model.name == word.strip("'")


def test_octal_is_not_guessed(write):
    assert recipes.load(write(GOOD.replace("batch_size: 64", "batch_size: 0160"))).train.batch_size == 160


def test_sequences_become_tuples(write):
    text = GOOD.replace("image_size: 64", "image_size: [64, 96]").replace(
        "source: synthetic", "source: synthetic\n  crop_scale: [0.2, 1]"
    )
    loaded = recipes.load(write(text))
    assert loaded.model.image_size == (64, 96)
    assert loaded.data.crop_scale == (0.2, 1.0)


def test_byte_order_mark_and_windows_lines(write):
    assert recipes.load(write(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())) == recipes.load(write(GOOD))


def test_the_name_is_the_stem(write):
    assert recipes.load(write(GOOD, "my.recipe.yml")).name == "my.recipe"


def test_recipes_are_frozen(write):
    loaded = recipes.load(write(GOOD))
    for section, field in ((loaded, "name"), (loaded.optim, "lr"), (loaded.method, "smoothing")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(section, field, 1)


# ---- base ------------------------------------------------------------------------------------------------------------


def test_a_base_is_merged_field_by_field(write):
    write(GOOD, "parent.yaml")
    child = recipes.load(
        write("base: ./parent.yaml\noptim: {weight_decay: 0.1}\nmodel: {drop_path: 0.2}\n", "child.yaml")
    )
    assert (child.name, child.optim.lr, child.optim.weight_decay) == ("child", 1e-3, 0.1)
    assert (child.model.name, child.model.drop_path) == ("deit_tiny_patch16_224", 0.2)


def test_what_is_claimed_of_a_base_is_not_claimed_of_its_child(write):
    child = recipes.load(write("base: deit_tiny\n", "child.yaml"))
    assert recipes.load("deit_tiny").about.top1 != "unverified"
    assert (child.about.top1, child.about.hours, child.about.summary) == ("unverified", "unverified", "")


def test_a_shipped_recipe_is_a_base_by_name(write):
    child = recipes.load(write("base: deit_tiny\ntrain: {epochs: 7}\n", "child.yaml"))
    assert recipes.difference(recipes.load("deit_tiny"), child) == [("train.epochs", 300, 7)]


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("deit_tny", "there is no recipe 'deit_tny'; did you mean 'deit_tiny'?"),
        ("./none.yaml", "does not exist"),
        ("./child.yaml", "a recipe cannot be its own base"),
        ("./grandchild.yaml", "has a base itself; only one level is allowed, so name './child.yaml'"),
        ("deit_small", "has a base itself; only one level is allowed, so name 'deit_tiny'"),
        ("3", "must be the name or path of a recipe, got 3"),
        ("[deit_tiny]", "must be the name or path of a recipe"),
        ("", "must be the name or path of a recipe, got null"),
    ],
)
def test_bad_bases(write, base, words):
    """The base's line is named; fields it might have are not said to be missing; other mistakes are still reported."""
    write("base: ./child.yaml\n", "grandchild.yaml")
    path = write(f"# a child\nbase: {base}\noptim: {{lr: x, epochs: 3}}\n", "child.yaml")
    first, *others = refusal(path)
    assert first.startswith(f"{path}:2: base: ")
    assert words in first
    assert [message.split(": ")[1] for message in others] == ["optim.epochs", "optim.lr"]


def test_mistakes_in_a_base_are_told_with_its_file_and_line(write):
    parent = write(GOOD.replace("lr: 1e-3", "lr: fast"), "parent.yaml")
    child = write("base: ./parent.yaml\ntrain: {epochs: 0}\n", "child.yaml")
    first, second = refusal(child)
    assert first.startswith(f"{child}:2: train.epochs: must be at least 1")
    assert second.startswith(f"{parent}:12: optim.lr: must be a number")


def test_a_mistake_in_a_base_can_be_put_right(write):
    write(GOOD.replace("lr: 1e-3", "lr: fast"), "parent.yaml")
    assert recipes.load(write("base: ./parent.yaml\noptim: {lr: 2e-3}\n", "child.yaml")).optim.lr == 2e-3


def test_another_method_takes_nothing_from_the_base(write):
    write(DISTILL, "parent.yaml")
    other = recipes.load(write("base: ./parent.yaml\nmethod: {use: supervised}\n", "child.yaml"))
    assert other.method.model_dump() == {"use": "supervised", "loss": "ce", "smoothing": 0.1}
    same = recipes.load(write("base: ./parent.yaml\nmethod: {use: distill, alpha: 0.1}\n", "child.yaml"))
    assert (same.method.alpha, same.method.tau, same.method.teacher.timm) == (0.1, 2.0, "resnet18")


def test_views_belong_to_the_method(write):
    path = write(GOOD + "\n")
    parent = recipes.load(path, ["data.views.main.size=96", "data.views.main.crop_scale=[0.4, 1.0]"])
    assert (parent.data.views["main"].size, parent.data.views["main"].crop_scale) == (96, (0.4, 1.0))
    assert [name for name, *_ in recipes.difference(parent, recipes.load(path))] == [
        "data.views.main.size",
        "data.views.main.crop_scale",
    ]
    assert recipes.load(write(recipes.dump(parent))) == parent
    path = write(recipes.dump(parent), "parent.yaml")
    assert recipes.load(path, ["method.smoothing=0"]).data.views == parent.data.views
    teacher = "method.teacher={timm: resnet18, weights: w.safetensors}"
    assert recipes.load(path, ["method.use=distill", teacher]).data.views == {}
    anew = recipes.load(path, ["method.use=distill", teacher, "data.views.main.erase=0.1"]).data.views
    assert (anew["main"].size, anew["main"].erase) == (None, 0.1)


def test_another_teacher_takes_nothing_from_the_base(write):
    path = write(DISTILL)
    teacher = recipes.load(path, ["method.teacher.model=convnet_digits", "method.teacher.weights=x"]).method.teacher
    assert (teacher.timm, teacher.model, teacher.weights) == (None, "convnet_digits", "x")
    assert recipes.load(path, ["method.teacher.timm=resnet34"]).method.teacher.weights is None
    assert recipes.load(path, ["method.teacher.image_size=96"]).method.teacher.weights == "w.safetensors"
    assert recipes.load(path, ["method.teacher.timm=resnet18"]).method.teacher.weights == "w.safetensors"


def test_another_source_and_another_model(write):
    path = write(GOOD.replace("source: synthetic", "root: /data\n  val: held_out\n  flip: 0.1"))
    other = recipes.load(path, ["data.source=digits"]).data
    assert (other.root, other.val, other.flip, other.group_size) == (None, "val", 0.1, 16)
    same = recipes.load(path, ["data.source=folder"]).data
    assert (same.root, same.val) == ("/data", "held_out")
    model = recipes.load(path, ["model.timm=vit_tiny_patch16_224"]).model
    assert (model.name, model.timm, model.image_size) == (None, "vit_tiny_patch16_224", 64)


# ---- overrides -------------------------------------------------------------------------------------------------------


def test_every_kind_of_data_set_can_be_chosen_and_only_files_have_a_root(write):
    path = write(GOOD.replace("  source: synthetic\n", "  root: /data\n"))
    for kind in KINDS:
        data = recipes.load(path, [f"data.source={kind}", "data.root=/data"]).data
        assert (data.source, data.root) == (kind, "/data")
    for kind in ("synthetic", "digits"):
        assert recipes.load(path, [f"data.source={kind}"]).data.root is None
        with pytest.raises(RecipeError, match=f"has no place beside data.source {kind}"):
            recipes.load(path, [f"data.source={kind}", "data.root=/data"])


def test_overrides_are_typed_as_yaml(write):
    words = [
        *("optim.lr=5e-4", "optim.clip_grad=null", "optim.betas=[0.9, 0.95]", "optim.decay_dist_token=true"),
        *("data.train=no", "data.val='7'", "data.mean=[0,0,0]", "train={epochs: 20, seed: 3}"),
        *("model.weights=a=b", "engine.device=cpu"),
    ]
    loaded = recipes.load(write(GOOD), words)
    optim, data, train = loaded.optim, loaded.data, loaded.train
    assert (optim.lr, optim.clip_grad, optim.betas, optim.decay_dist_token) == (5e-4, None, (0.9, 0.95), True)
    assert (data.train, data.val, data.mean) == ("no", "7", (0.0, 0.0, 0.0))
    assert (train.epochs, train.seed, train.batch_size) == (20, 3, 64)
    assert (loaded.model.weights, loaded.engine.device) == ("a=b", "cpu")


def test_the_order_of_overrides_does_not_matter(write):
    words = ["method.use=distill", "method.teacher.weights=w", "method.teacher.timm=resnet18", "method.alpha=0.1"]
    assert recipes.load(write(GOOD), words) == recipes.load(write(GOOD), words[::-1])


BAD_OVERRIDES = {
    "optim.lr": "must look like section.field=value",
    "=3": "must look like section.field=value",
    "optim..lr=3": "must look like section.field=value",
    "base=digits": "base: cannot be overridden",
    "lr=1": "lr: unknown field (1); did you mean 'optim.lr'?",
    "optim.lrr=1": "optim.lrr: unknown field (1); did you mean 'lr'?",
    "optm.lr=1": "optm: unknown field (a mapping); did you mean 'optim'?",
    "optim.lr=fast": "optim.lr: must be a number, got 'fast'",
    "optim.lr=": "optim.lr: must be a number, got null",
    "optim.lr=[1": "optim.lr: is not valid YAML",
    "optim.lr=.nan": "optim.lr: must be a finite number, got .nan",
    "optim.lr=!!float 1": "optim.lr: tags are not allowed",
    "optim.lr=\x00": "optim.lr: is not valid YAML",
    "optim.lr=\udc80": "optim.lr: is not valid YAML",
    "optim.lr.peak=1": "optim.lr: must be a number, got a mapping",
    "optim=fast": "optim: must be a mapping, got 'fast'",
    "optim={lr: 1, lr: 2}": "optim.lr: is given twice",
    "train.epochs=5": "train.epochs",
    "data.group_size=48": "data.group_size",
    "method.use=distill": "method.teacher: is required",
    "method.smothing=1": "method.smothing: unknown field (1); did you mean 'smoothing'?",
    "method.use=distil": "did you mean 'distill'?",
    "engine.keep_checkpoints=1": "engine.keep_checkpoints: must be at least 2, got 1",
}
# The value given here is fine, it is another field that no longer fits: that one is named, at its own line.
ELSEWHERE = {
    "train.epochs=5": (11, "optim.warmup_epochs: must be less than train.epochs (5), got 5.0"),
    "data.group_size=48": (15, "train.batch_size: must be a multiple of data.group_size (48), got 64"),
}


@pytest.mark.parametrize("word", BAD_OVERRIDES)
def test_bad_overrides(write, word):
    path = write(GOOD)
    (message,) = refusal(path, [word])
    if word in ELSEWHERE:
        line, words = ELSEWHERE[word]
        assert message == f"{path}:{line}: {words}"
    else:
        assert message.startswith(f"override {word!r}: ")
        assert BAD_OVERRIDES[word] in message


@pytest.mark.parametrize(
    ("one", "two"), [("optim.lr=1", "optim.lr=2"), ("optim={lr: 1}", "optim.lr=2"), ("optim.lr=2", "optim={lr: 1}")]
)
def test_contradicting_overrides(write, one, two):
    (message,) = refusal(write(GOOD), [one, two])
    assert message == f"override {two!r}: {two.split('=')[0]}: is given twice, also by {one!r}"


def test_an_error_inside_a_teacher_names_the_nearest_field(write):
    path = write(DISTILL.replace("weights: w.safetensors", "wieghts: w.safetensors"))
    assert refusal(path) == [
        f"{path}:9: method.teacher.wieghts: unknown field ('w.safetensors'); did you mean 'weights'?"
    ]
    (message,) = refusal(write(DISTILL.replace("timm: resnet18, ", "")))
    assert message.endswith("r.yaml:9: method.teacher: a teacher is given by exactly one of recipe, timm and model")


def test_override_of_a_recipe_in_memory(write):
    loaded = recipes.load(write(DISTILL))
    changed = recipes.override(loaded, ["optim.lr=2e-3", "method.teacher.image_size=96"])
    assert recipes.difference(loaded, changed) == [("method.teacher.image_size", None, 96), ("optim.lr", 1e-3, 2e-3)]
    assert recipes.override(loaded, []) == loaded
    with pytest.raises(RecipeError, match=r"^override 'optim.lr=x': optim.lr: must be a number, got 'x'$"):
        recipes.override(loaded, ["optim.lr=x"])


# ---- dump, difference, and the model itself --------------------------------------------------------------------------

plain_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)
ranges = st.tuples(st.floats(1e-9, 1), st.floats(1e-9, 1)).map(sorted)


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=plain_text
    | st.sampled_from(
        ["no", "5e-4", "1_000", "0x1f", "2024-01-01", "=", "<<", "~", "1:30", " a ", "-", "# x", "a: b", "*a"]
    ),
    lr=st.floats(1e-300, 1e300),
    scale=ranges,
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_dump_loads_as_an_equal_recipe(tmp_path, name, lr, scale, betas, seed):
    values = recipes.load("digits").model_dump(mode="json")
    values["model"] |= {"name": None, "timm": name}
    values["about"]["summary"] = name
    values["optim"] |= {"lr": lr, "min_lr": 0.0, "betas": betas}
    values["data"]["crop_scale"] = scale
    values["train"]["seed"] = seed
    recipe = Recipe.model_validate(values)
    file = tmp_path / f"{recipe.name}.yaml"
    file.write_text(recipes.dump(recipe), encoding="utf-8")
    assert recipes.load(str(file)) == recipe


def test_a_dump_states_every_field(write):
    loaded = recipes.load(write(GOOD))
    text = recipes.dump(loaded)
    for section in ("about", "model", "method", "data", "optim", "train", "engine"):
        for field in type(getattr(loaded, section)).model_fields:
            assert re.search(rf"^  {field}: \S", text, re.MULTILINE) or field in ("command",), field
    assert "  crop_scale: [0.08, 1.0]\n" in text
    assert "  root: null\n" in text


def test_difference_names_what_would_train_differently(write):
    a = recipes.load(write(GOOD), ["about.top1=unverified, a"])
    b = recipes.load(
        write(GOOD, "other.yaml"),
        ["data.threads=3", "engine.device=cpu", "engine.precision=bf16", "engine.sinks=[wandb]"],
    )
    assert recipes.difference(a, b) == []
    c = recipes.load(write(GOOD), ["model.image_size=[64, 64]", "train.batch_size=32", "data.mean=[0,0,0]"])
    assert recipes.difference(a, c) == [
        ("model.image_size", 64, (64, 64)),
        ("data.mean", (0.485, 0.456, 0.406), (0.0, 0.0, 0.0)),
        ("train.batch_size", 64, 32),
    ]
    method = {field: values for field, *values in recipes.difference(a, recipes.load(write(DISTILL)))}
    assert method["method.use"] == ["supervised", "distill"]
    assert method["method.tau"] == [None, 2.0]
    assert method["method.teacher.timm"] == [None, "resnet18"]


def test_data_may_move(write):
    path = write(GOOD.replace("source: synthetic", "source: folder"))
    folder = recipes.load(path, ["data.root=/a"])
    assert recipes.difference(folder, recipes.load(path, ["data.root=/b"])) == []
    packed = ["data.source=packed", "data.root=/b", "data.train=train.pack", "data.val=val.pack"]
    assert recipes.difference(folder, recipes.load(path, packed)) == []


def test_a_recipe_survives_json(write):
    """As checkpoints keep it."""
    loaded = recipes.load(write(DISTILL))
    assert Recipe.model_validate(json.loads(json.dumps(loaded.model_dump(mode="json")))) == loaded


def test_sections_are_held_against_each_other_in_memory_too(write):
    values = recipes.load(write(GOOD)).model_dump(mode="json")
    values["train"]["batch_size"] = 50
    with pytest.raises(ValueError, match=r"train\.batch_size must be a multiple of data\.group_size"):
        Recipe.model_validate(values)
    with pytest.raises(ValueError, match=r"method\.use must name a method"):
        Recipe.model_validate(values | {"method": {}})


def test_a_method_of_somebody_else(write, tmp_path, monkeypatch):
    """By import path, with its own configuration; a value that fits no member of a union is explained once."""
    (tmp_path / "their_method.py").write_text(
        "from pydantic import BaseModel, ConfigDict\n"
        "class Config(BaseModel):\n"
        "    model_config = ConfigDict(extra='forbid', frozen=True)\n"
        "    use: str\n"
        "    layers: int | list[int]\n"
        "class Theirs:\n"
        "    pass\n"
        "Theirs.Config = Config\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = write(GOOD.replace("use: supervised", "use: their_method:Theirs\n  layers: [1, 2]"))
    assert recipes.load(path).method.layers == [1, 2]
    assert refusal(path, ["method.layers=all"]) == [
        "override 'method.layers=all': method.layers: must be a whole number or a list, got 'all'"
    ]


def test_reading_recipes_imports_no_torch():
    code = (
        "import sys\nfrom fastdeit import recipe\n"
        "assert recipe.names() and recipe.summaries() and recipe.text('digits')\n"
        "assert not {'torch', 'numpy', 'fastdeit.methods'} & set(sys.modules), 'imports too much'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- fuzz: nothing but RecipeError, whatever the file says -----------------------------------------------------------

# fmt: off
SCRAPS = [
    "&a", "*a", "!!int", "!x", "<<:", "[", "]", "{", "}", "?", ":", "-", "|", ">-", "---", "...", "'", '"', "#", ",",
    "\\", "@", "`", "=", "~", "null", ".nan", "-.inf", "1e999", "0x", "0o8", "0b1", "1_", "+", "-0", "true", "lr",
    "use", "distill", "2024-01-01", "1:30", "9" * 30, '"\\ud800"', '"\\x"', "\ufeff", "\x85", "\u2028", "é",
]
# fmt: on
SCRAPS += ["\t", "\r", "\n", "\n  ", "- ", ": ", "? ", "|\n", "---\n", "...\n", "%YAML 1.1\n", "%TAG ! x\n"]
SCRAPS += ["base: digits\n", "base: ./r.yaml\n", "method:\n", "use: ", "teacher: {", "recipe: ", "engine: {sinks: ["]
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(SCRAPS)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = [
    (section, field)
    for section, model in recipes._SECTIONS.items()
    for field in (model.model_fields if model else ("use", "teacher", "loss", "smoothing"))
]
edits = st.lists(
    st.tuples(st.integers(0, len(DISTILL)), st.integers(0, 8), st.sampled_from(SCRAPS) | st.text(max_size=4)),
    min_size=1,
    max_size=5,
)
fuzz = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def only_recipe_errors(path, overrides=()):
    try:
        recipe = recipes.load(path, overrides)
    except RecipeError:
        return
    assert isinstance(recipe, Recipe)


@fuzz
@given(edits)
def test_fuzz_edited_recipes(tmp_path, edits):
    text = DISTILL
    for at, length, scrap in edits:
        text = text[:at] + scrap + text[at + length :]
    (tmp_path / "r.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    only_recipe_errors(str(tmp_path / "r.yaml"))


@fuzz
@given(st.lists(st.tuples(st.sampled_from(FIELDS), values), min_size=1, max_size=4))
def test_fuzz_values_of_fields(tmp_path, fields):
    document = {"optim": {"lr": 1}, "train": {"epochs": 1, "batch_size": 64}, "method": {"use": "supervised"}}
    for (section, field), value in fields:
        document.setdefault(section, {})[field] = value
    (tmp_path / "r.yaml").write_text(json.dumps(document))
    only_recipe_errors(str(tmp_path / "r.yaml"))


@fuzz
@given(
    st.binary(max_size=40) | st.lists(st.sampled_from(SCRAPS), max_size=12).map(lambda scraps: "".join(scraps).encode())
)
def test_fuzz_files(tmp_path, data):
    (tmp_path / "r.yaml").write_bytes(data)
    only_recipe_errors(str(tmp_path / "r.yaml"))


@fuzz
@given(
    st.lists(
        st.tuples(
            st.sampled_from(FIELDS).map(".".join) | st.text(max_size=6), st.sampled_from(SCRAPS) | st.text(max_size=8)
        ).map("=".join)
        | st.text(max_size=10),
        min_size=1,
        max_size=4,
    )
)
def test_fuzz_overrides(tmp_path, words):
    (tmp_path / "r.yaml").write_text(DISTILL)
    only_recipe_errors(str(tmp_path / "r.yaml"), words)
