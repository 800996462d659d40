"""The recipe reader: every mistake is refused with its line, its field and similar names, all at once."""

import os

import pytest

from fastdeit.cli import main as cli
from fastdeit.recipe import resolve as recipes
from fastdeit.recipe.resolve import RecipeError
from tests.recipe_texts import GOOD, edited, refusal

FIELDS_GONE_WRONG = [  # field, what is written there, words of the message
    # unknown fields, and similar names
    ("optim.weigth_decay", "0.1", "unknown field (0.1); did you mean weight_decay or weight_decay_end or ema_decay"),
    ("optim.batch_size", "2", "unknown field (2); did you mean train.batch_size?"),
    ("train.name", "x", "unknown field ('x'); did you mean model.name?"),
    # optimizers and their options
    ("optim.name", "adam", "no optimizer named 'adam'; there are adamw, lamb, sgd, muon, or an import path"),
    ("optim.name", "adam", "; did you mean adamw or lamb?"),
    ("optim.name", "7", "must be the name of an optimizer, got 7"),
    ("optim.name", "fastdeit.nowhere:Adam", "optimizer 'fastdeit.nowhere:Adam' cannot be imported: No module named"),
    ("optim.name", "fastdeit.rng:key", "is not an optimizer: it is no subclass of fastdeit.engine.optim.Optimizer"),
    ("optim.momentum", "0.9", "unknown field (0.9); it belongs to optim.name sgd"),
    ("optim.xyzzy", "yes", "unknown field ('yes')"),
    ("method.smothing", "0.1", "unknown field (0.1); did you mean smoothing?"),
    ("method.tau", "2.0", "unknown field (2.0); it belongs to method.use distill"),
    ("about.sumary", "x", "unknown field ('x'); did you mean summary?"),
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
    ("data.eval_crop_ratio", "0", "must be at least 0.01, got 0"),
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
    ("data.source", "folders", "must be one of folder, packed, tar, tfrecord, parquet, arrow, list, imagenet, "),
    ("data.source", "folders", "digits, an import path package.module:KIND, got 'folders'; did you mean folder or "),
    ("data.crop", "src", "must be one of random_resized, simple, got 'src'"),
    ("data.mix_mode", "elem", "must be one of batch, pair, element, got 'elem'; did you mean element?"),
    ("data.augment", "rand-m99-x", "has a section 'x' that is not valid; valid are m9 (magnitude), n2"),
    ("data.augment", "augmix-m5", "cannot be augmix, which blends several augmented copies of an image"),
    ("data.augment", "randaug", "must be one of none, rand-... as in rand-m9-mstd0.5-inc1, original"),
    ("data.augment", "3", "must be text, got 3"),
    ("engine.precision", "bf61", "must be one of fp32, fp16, bf16, auto, got 'bf61'; did you mean bf16 or fp16?"),
    (
        "engine.sinks[0]",
        "[tensorbord]",
        "must be one of tensorboard, wandb, got 'tensorbord'; did you mean tensorboard?",
    ),
    ("method.use", "supervized", "no method named 'supervized'"),
    ("method.use", "supervized", "did you mean supervised?"),
    ("method.use", "'json:JSONDecoder'", "is not a method"),
    ("method.use", "'no_such_package:Method'", "cannot be imported: No module named 'no_such_package'"),
    ("method.use", "'..x:Method'", "'..x:Method' is not an import path 'package.module:name'"),
    ("method.use", "':'", "':' is not an import path 'package.module:name'"),
    ("method.use", "3", "must be the name of a method, got 3"),
    ("model.name", "''", "must not be empty, got ''"),
    ("about.top1", "'99.9'", "must name its source, as in '81.8 (source: ...)', or say unverified, got '99.9'"),
    ("about.hours", "53", "must name its source, as in '81.8 (source: ...)', or say unverified, got 53"),
    ("optim.layer_decay", "0", "must be above 0, got 0"),
    ("optim.layer_decay", "1.5", "must be at most 1, got 1.5"),
    ("optim.layer_decay", "[0.5]", "must be a number, got [0.5]"),
    ("optim.clip_mode", "value", "must be one of norm, agc, got 'value'"),
    ("optim.momentum", "0.9", "unknown field (0.9); it belongs to optim.name sgd or muon"),
    ("method.class_weights", "equal", "must be balanced, got 'equal'"),
    ("method.class_weights[1]", "[1, -1]", "must be at least 0, got -1"),
    ("method.class_weights[0]", "[a]", "must be a number, got 'a'"),
    ("optim.warmup_epochs", "-1", "must be at least 0, got -1"),
    ("train.steps", "0", "must be at least 1, got 0"),
    ("train.steps", "10.5", "must be a whole number, got 10.5"),
    ("train.eval_every", "0", "must be above 0, got 0"),
    ("train.eval_every_steps", "0.5", "must be a whole number, got 0.5"),
    ("train.eval_every_steps", "0", "must be at least 1, got 0"),
    ("train.stop_after", "0", "must be at least 1, got 0"),
    ("train.epochs", "null", "is required, or train.steps; only a run that starts from model.weights may leave both"),
    ("model.drop_path_mode", "uniform", "must be one of linear, constant, got 'uniform'"),
    ("model.drop_path_skip", "true", "skips what model.drop_path drops, which is 0 here"),
    ("model.dropout", "1", "must be below 1, got 1"),
    ("model.dropout", "-0.1", "must be at least 0, got -0.1"),
    ("engine.checkpoint_blocks", "all", "must be true or false, got 'all'"),
    ("model.freeze", "blocks", "must be a list, got 'blocks'"),
    ("model.freeze[0]", "[3]", "must be text, got 3"),
    ("model.freeze[0]", "['']", "must not be empty, got ''"),
    # fields against each other
    (
        "engine.reduce",
        "fp16",
        "fp16 needs engine.precision fp16, not fp32: without a loss scale small gradients would become",
    ),
    ("train.steps", "100", "is one length too many beside train.epochs 10; remove one of the two, got 100"),
    ("optim.clip_mode", "agc", "agc needs an optim.clip_grad below 1, such as 0.01; it is null, got 'agc'"),
    ("model.timm", "vit_tiny", "is one model too many beside model.name deit_tiny_patch16_224; remove one of the two"),
    ("data.group_size", "1", "must be even, because mixup and cutmix pair the samples of a group, got 1"),
    ("data.root", "/data", "does not go with data.source synthetic, which reads no directory of yours, got '/data'"),
    ("data.crop_ratio", "[1.3, 0.7]", "must be [smallest, largest], got [1.3, 0.7]"),
    ("data.crop_scale", "[0.5, 1.5]", "must be at most 1: a crop is a part of the image, got [0.5, 1.5]"),
    ("train.batch_size", "50", "must be a multiple of data.group_size (16), got 50"),
    ("train.accumulate", "3", "must divide train.batch_size / data.group_size (4 groups), got 3"),
    ("optim.min_lr", "2e-3", "must not be above optim.lr (0.001), got 0.002"),
    ("optim.warmup_lr", "2e-3", "must not be above optim.lr (0.001), got 0.002"),
    ("optim.warmup_epochs", "10", "must be less than train.epochs (10), got 10.0"),
    ("optim.weight_decay_end", "-0.1", "must be at least 0, got -0.1"),
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
    """With its line, its field and similar names; once, and without what merely follows from it."""
    text, line = edited(field.partition("[")[0], value)
    path = write(text)
    (message,) = refusal(path)
    assert message.startswith(f"{path}:{line}: {field}: ")
    assert words in message


PLACES_GONE_WRONG = {  # what is replaced in GOOD, by what, the line and field to be named, words of the message
    "unknown section": ("train:", "trian:", 13, "trian", "unknown field (a mapping); did you mean train?"),
    "field outside its section": (
        "train:",
        "lr: 1e-3\ntrain:",
        13,
        "lr",
        "unknown field (0.001); did you mean optim.lr?",
    ),
    "section that is a list": ("  use: supervised", "  - use", 6, "method", 'must be a mapping, got ["use"]'),
    "section that is a word": ("optim:\n  lr: 1e-3", "optim: adam", 11, "optim", "must be a mapping, got 'adam'"),
    "empty section": ("train:", "engine:\ntrain:", 13, "engine", "must be a mapping, got null"),
    "options of another optimizer": (
        "  lr: 1e-3",
        "  name: sgd\n  lr: 1e-3\n  betas: [0.9, 0.99]",
        14,
        "optim.betas",
        "unknown field ([0.9, 0.99]); it belongs to optim.name adamw or lamb",
    ),
    "Nesterov without momentum": (
        "  lr: 1e-3",
        "  name: sgd\n  lr: 1e-3\n  momentum: 0\n  nesterov: true",
        15,
        "optim.nesterov",
        "must be false where optim.momentum is 0, got true",
    ),
    "a schedule of coupled decay": (
        "  lr: 1e-3",
        "  name: sgd\n  lr: 1e-3\n  weight_decay_end: 0.4",
        14,
        "optim.weight_decay_end",
        "needs an optimizer with decoupled weight decay, such as adamw or muon, and sgd has not; for sgd add "
        "optim.decoupled_decay=true",
    ),
    "a schedule of lamb's decay": (
        "  lr: 1e-3",
        "  name: lamb\n  lr: 1e-3\n  weight_decay_end: 0.4",
        14,
        "optim.weight_decay_end",
        "needs an optimizer with decoupled weight decay, such as adamw or muon, and lamb has not",
    ),
    "a schedule from no decay": (
        "  lr: 1e-3",
        "  lr: 1e-3\n  weight_decay: 0\n  weight_decay_end: 0.4",
        14,
        "optim.weight_decay_end",
        "needs an optim.weight_decay above 0, to begin with; give a small one, such as 1e-6",
    ),
    "mixed pictures for a method that asks for boxes": (
        "  use: supervised\ndata:",
        '  use: "tests.plugins.detection:Detection"\n  window: 2\n  whole: [3]\ndata:\n  cutmix: 0',
        10,
        "data.mixup",
        "must be 0 for method tests.plugins.detection:Detection, which asks where things lie, and a mixed picture "
        "shows those of two; add data.mixup=0",
    ),
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
        "is no view of method supervised, which has main; did you mean main?",
    ),
    "unknown field of a view": (
        "  group_size: 16",
        "  group_size: 16\n  views:\n    main: {szie: 96}",
        12,
        "data.views.main.szie",
        "unknown field (96); did you mean size?",
    ),
    "field of data that a view has not": (
        "  group_size: 16",
        "  group_size: 16\n  views:\n    main: {mixup: 0.1}",
        12,
        "data.views.main.mixup",
        "unknown field (0.1); did you mean data.mixup?",
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
        "does not go with augment rand-m9, which changes the colours itself; set it to null, or give the view an",
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
    assert not others or case == "unknown section", "the fields of the misspelt section are missing"


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
    assert refusal(str(tmp_path / "digit.yaml")) == [f"{tmp_path}/digit.yaml does not exist; did you mean digits?"]
    assert refusal(f"{tmp_path}/") == [f"{tmp_path} is not a file"]
    assert refusal("a\0b/c.yaml")[0].endswith("does not exist")
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    assert refusal(str(pipe)) == [f"{pipe} is not a file"]
    if os.geteuid() != 0:
        locked = tmp_path / "locked.yaml"
        locked.touch(mode=0)
        assert refusal(str(locked)) == [f"{locked}: cannot be read: Permission denied"]


def test_a_run_is_no_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.yaml").touch()
    for word in ("mine", "./mine", f"{tmp_path}/mine/"):
        (message,) = refusal(word)
        assert "mine is a run and not a recipe: go on with it by `fastdeit train --resume " in message


def test_a_name_that_is_no_recipe():
    assert refusal("x" * 300)[0].startswith("there is no recipe")
    (message,) = refusal("deit_smal")
    assert message.startswith("there is no recipe 'deit_smal'; did you mean deit_small or ")
    (message,) = refusal("zzz")
    assert all(name in message for name in recipes.names())
    with pytest.raises(RecipeError, match="did you mean digits"):
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


def test_views_are_checked_beside_a_model_that_is_wrong(write):
    path = write(GOOD.replace("image_size: 64", "image_size: big"))
    size, view = refusal(path, ["data.views.mian.size=96"])
    assert size.startswith(f"{path}:5: model.image_size: ")
    assert view.startswith("override 'data.views.mian.size=96': data.views.mian: is no view of method supervised")


def test_no_traceback_and_exit_code_2(write, capsys):
    assert cli(["train", write(GOOD.replace("lr: 1e-3", "lr: fast"))]) == 2
    error = capsys.readouterr().err
    assert "r.yaml:12: optim.lr: must be a number, got 'fast'" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("use", "field"), [("distill", "class_weights"), ("cosub", "class_weights"), ("cosub", "loss")]
)
def test_a_setting_of_another_method_is_refused_with_its_name(write, use, field):
    """Such as class weights, which only the loss of method supervised has."""
    owners = {"class_weights": "supervised", "loss": "supervised or distill"}[field]
    section = {"distill": "distill, teacher: {timm: resnet18}", "cosub": "cosub"}[use]
    text = GOOD.replace("method:\n  use: supervised", f"method: {{use: {section}}}")
    assert f"method.{field}: unknown field ('ce'); it belongs to method.use {owners}" in str(
        refusal(write(text), [f"method.{field}=ce"])
    )
