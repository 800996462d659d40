"""What a recipe means: its types, its base, overrides, and what it is once it is read."""

import json
import re
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdeit.data.sources.kinds import READERS
from fastdeit.recipe import resolve as recipes
from fastdeit.recipe.resolve import Recipe, RecipeError
from tests.recipe_texts import DISTILL, GOOD, refusal

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
    loaded = recipes.load(write(GOOD.replace("source: synthetic", f"val: {word}")))
    assert loaded.data.val == word.strip("'")


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
        ("deit_tny", "there is no recipe 'deit_tny'; did you mean deit_tiny or "),
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
    """The base's line is named; fields it might have are not reported as missing; other mistakes are still reported."""
    write("base: ./child.yaml\n", "grandchild.yaml")
    path = write(f"# a child\nbase: {base}\noptim: {{lr: x, epochs: 3}}\n", "child.yaml")
    first, *others = refusal(path)
    assert first.startswith(f"{path}:2: base: ")
    assert words in first
    assert [message.split(": ")[1] for message in others] == ["optim.epochs", "optim.lr"]


def test_mistakes_in_a_base_are_reported_with_its_file_and_line(write):
    parent = write(GOOD.replace("lr: 1e-3", "lr: fast"), "parent.yaml")
    child = write("base: ./parent.yaml\ntrain: {epochs: 0}\n", "child.yaml")
    first, second = refusal(child)
    assert first.startswith(f"{child}:2: train.epochs: must be at least 1")
    assert second.startswith(f"{parent}:12: optim.lr: must be a number")


def test_a_mistake_in_a_base_can_be_put_right(write):
    write(GOOD.replace("lr: 1e-3", "lr: fast"), "parent.yaml")
    assert recipes.load(write("base: ./parent.yaml\noptim: {lr: 2e-3}\n", "child.yaml")).optim.lr == 2e-3


def test_another_optimizer_takes_the_schedule_of_the_base_and_nothing_else(write):
    own = "optim:\n  lr: 1e-3\n  weight_decay: 0.3\n  betas: [0.9, 0.95]\n  warmup_epochs: 2\n  ema_decay: 0.99"
    write(GOOD.replace("optim:\n  lr: 1e-3", own), "parent.yaml")
    optim = recipes.load(write("base: ./parent.yaml\noptim: {name: sgd, lr: 0.5}\n", "child.yaml")).optim
    assert (optim.weight_decay, optim.momentum, optim.warmup_epochs, optim.ema_decay) == (1e-4, 0.9, 2, 0.99)
    assert "betas" not in optim.model_dump()
    same = recipes.load(write("base: ./parent.yaml\noptim: {name: adamw, eps: 1e-6}\n", "child.yaml")).optim
    assert (same.lr, same.weight_decay, same.betas, same.eps) == (1e-3, 0.3, (0.9, 0.95), 1e-6)
    path = write("base: ./parent.yaml\noptim: {name: lamb}\n", "child.yaml")
    assert refusal(path) == [f"{path}:2: optim.lr: is required"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adamw", {"weight_decay": 0.05, "clip_grad": None, "betas": (0.9, 0.999), "eps": 1e-8}),
        ("lamb", {"weight_decay": 0.05, "clip_grad": 1.0, "betas": (0.9, 0.999), "eps": 1e-8}),
        ("sgd", {"weight_decay": 1e-4, "clip_grad": None, "momentum": 0.9, "nesterov": True}),
    ],
)
def test_defaults_of_optimizers_survive_a_dump(write, name, expected):
    loaded = recipes.load(write(GOOD), [f"optim={{name: {name}, lr: 1e-3}}"])
    assert {field: getattr(loaded.optim, field) for field in expected} == expected
    assert recipes.load(write(recipes.dump(loaded))) == loaded
    assert recipes.Recipe.model_validate(loaded.model_dump(mode="json")) == loaded


def test_another_method_takes_nothing_from_the_base(write):
    write(DISTILL, "parent.yaml")
    other = recipes.load(write("base: ./parent.yaml\nmethod: {use: supervised}\n", "child.yaml"))
    own = {"use": "supervised", "fuse": "logit", "loss": "ce", "smoothing": 0.1, "class_weights": None}
    assert other.method.model_dump() == own
    same = recipes.load(write("base: ./parent.yaml\nmethod: {use: distill, alpha: 0.1}\n", "child.yaml"))
    assert (same.method.alpha, same.method.tau, same.method.teacher[0].timm) == (0.1, 2.0, "resnet18")


def test_views_belong_to_the_method(write):
    path = write(GOOD + "\n")
    parent = recipes.load(path, ["data.views.main.size=[96, 64]", "data.views.main.crop_scale=[0.4, 1.0]"])
    assert (parent.data.views["main"].size, parent.data.views["main"].crop_scale) == ((96, 64), (0.4, 1.0))
    assert [name for name, *_ in recipes.difference(parent, recipes.load(path))] == [
        "data.views.main.crop_scale",
        "data.views.main.size",
    ]
    assert recipes.load(write(recipes.dump(parent))) == parent
    path = write(recipes.dump(parent), "parent.yaml")
    assert recipes.load(path, ["method.smoothing=0"]).data.views == parent.data.views
    teacher = "method.teacher={timm: resnet18, weights: w.safetensors}"
    assert recipes.load(path, ["method.use=distill", teacher]).data.views == {}
    anew = recipes.load(path, ["method.use=distill", teacher, "data.views.main.erase=0.1"]).data.views
    assert (anew["main"].size, anew["main"].erase) == (None, 0.1)


def test_a_cached_teacher_takes_the_place_of_the_bases_and_the_other_way_round(write):
    path = write(DISTILL)
    cached = recipes.load(path, ["method.cached=folder"])
    assert (cached.method.cached, cached.method.teacher) == ("folder", None)
    assert recipes.override(cached, ["method.alpha=0.2"]).method.cached == "folder"
    back = recipes.override(cached, ["method.teacher.timm=resnet18"]).method
    assert (back.cached, back.teacher[0].timm) == (None, "resnet18")
    assert refusal(path, ["method.cached=folder", "method.teacher.timm=resnet18"]) == [
        f"{path}:9: method.teacher: is one teacher too many beside method.cached folder; remove one of the two"
    ]
    elsewhere = recipes.override(cached, ["method.cached=moved"])
    assert recipes.difference(cached, elsewhere) == [], "the fingerprint of the cache is compared instead"


def test_another_teacher_takes_nothing_from_the_base(write):
    path = write(DISTILL)
    teacher = recipes.load(path, ["method.teacher.model=convnet_digits", "method.teacher.weights=x"]).method.teacher[0]
    assert (teacher.timm, teacher.model, teacher.weights) == (None, "convnet_digits", "x")
    assert recipes.load(path, ["method.teacher.timm=resnet34"]).method.teacher[0].weights is None
    assert recipes.load(path, ["method.teacher.image_size=96"]).method.teacher[0].weights == "w.safetensors"
    assert recipes.load(path, ["method.teacher.timm=resnet18"]).method.teacher[0].weights == "w.safetensors"


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
    path = write(GOOD.replace("  source: synthetic\n", "  root: /data\n  val: 10%\n"))
    for kind in READERS:
        data = recipes.load(path, [f"data.source={kind}", "data.root=/data"]).data
        assert (data.source, data.root) == (kind, "/data")
    own = recipes.load(path, ["data.source=mine.readers:KIND", "data.root=/data"]).data
    assert (own.source, own.root) == ("mine.readers:KIND", "/data")
    for kind in ("synthetic", "digits"):
        made = recipes.load(path, [f"data.source={kind}"]).data
        assert (made.root, made.val) == (None, "val")
        for word in ("root=/data", "train=fit", "val=10%", "image_column=i", "label_column=l", "classes=names.txt"):
            with pytest.raises(RecipeError, match=rf"data\.{word.split('=')[0]}: does not go with data.source {kind}"):
                recipes.load(path, [f"data.source={kind}", f"data.{word}"])


def test_overrides_are_typed_as_yaml(write):
    words = [
        *("optim.lr=5e-4", "optim.clip_grad=null", "optim.betas=[0.9, 0.95]", "optim.decay_dist_token=true"),
        *("data.train=no", "data.val='7'", "data.mean=[0,0,0]", "train={epochs: 20, seed: 3}"),
        *("model.weights=a=b", "engine.device=cpu"),
    ]
    loaded = recipes.load(write(GOOD.replace("  source: synthetic\n", "")), words)
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
    "lr=1": "lr: unknown field (1); did you mean optim.lr?",
    "optim.lrr=1": "optim.lrr: unknown field (1); did you mean lr?",
    "optm.lr=1": "optm: unknown field (a mapping); did you mean optim?",
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
    "method.smothing=1": "method.smothing: unknown field (1); did you mean smoothing?",
    "method.use=distil": "did you mean distill?",
    "engine.keep_checkpoints=1": "engine.keep_checkpoints: must be at least 2, got 1",
}
# The value given here is fine, it is another field that no longer fits: that one is named, at its own line.
ELSEWHERE = {
    "train.epochs=5": (
        11,
        "optim.warmup_epochs: must be less than train.epochs (5), got 5.0; add optim.warmup_epochs=0.25, or null, "
        "for a twentieth of the run",
    ),
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
        f"{path}:9: method.teacher.wieghts: unknown field ('w.safetensors'); did you mean weights or weights_grid?"
    ]
    (message,) = refusal(write(DISTILL.replace("timm: resnet18, weights: w.safetensors", "image_size: 96")))
    assert message.endswith(
        "r.yaml:9: method.teacher: a teacher is given by one of recipe, timm and model, or by weights alone"
    )


def test_a_teacher_that_is_trained_takes_no_weights(write):
    """Which of the two it was would show nowhere: the weights were taken, after the training of the other."""
    path = write(DISTILL.replace("timm: resnet18, weights: w.safetensors", "recipe: digits_teacher"))
    (message,) = refusal(path, ["method.teacher={weights: w.safetensors}"])
    assert "a teacher with a recipe is trained here, and takes no weights; to take weights instead, name" in message


def test_lists_of_a_teacher_are_read(write):
    words = ["mean=[0.1, 0.2, 0.3]", "std=[1, 1, 1]", "weights_grid=[2, 4]"]
    read = recipes.load(write(DISTILL), [f"method.teacher.{word}" for word in words]).method.teacher[0]
    assert (read.mean, read.std, read.weights_grid) == ((0.1, 0.2, 0.3), (1.0, 1.0, 1.0), (2, 4))
    path = write(DISTILL)
    assert "has too few entries" in refusal(path, ["method.teacher.mean=[0.1]", "method.teacher.std=[1, 1, 1]"])[0]


def test_a_teacher_is_given_by_an_address_alone(write):
    path = write(DISTILL.replace("{timm: resnet18, weights: w.safetensors}", "runs/x@best"))
    assert recipes.load(path).method.teacher[0].weights == "runs/x@best"
    loaded = recipes.load(write(DISTILL), ["method.teacher=runs/x@best,ema"])
    assert (loaded.method.teacher[0].timm, loaded.method.teacher[0].weights) == (None, "runs/x@best,ema")
    assert recipes.override(loaded, []) == loaded


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
    values["model"] |= {"name": None, "timm": name.replace("\n", " ")}  # a line break is refused but in `about`
    values["about"]["summary"] = name
    values["optim"] |= {"lr": lr, "warmup_lr": 0.0, "min_lr": 0.0, "betas": betas}
    values["data"]["crop_scale"] = scale
    values["train"]["seed"] = seed
    recipe = Recipe.model_validate(values)
    file = tmp_path / f"{recipe.name}.yaml"
    file.write_text(recipes.dump(recipe), encoding="utf-8")
    assert recipes.load(str(file)) == recipe


def test_a_dump_states_every_field_in_order(write):
    loaded = recipes.load(write(GOOD))
    text = recipes.dump(loaded)
    for section in ("about", "model", "method", "data", "optim", "train", "engine"):
        for field in type(getattr(loaded, section)).model_fields:
            assert re.search(rf"^  {field}: \S", text, re.MULTILINE) or field in ("command",), field
    assert "  crop_scale: [0.08, 1.0]\n" in text
    assert "  root: null\n" in text
    places = [text.index(f"\n{line}:") for line in ("model", "method", "data", "  source", "  root", "  crop", "optim")]
    assert places == sorted(places)


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
        "from fastdeit.methods.base import Method\n"
        "from fastdeit.methods.config import MethodConfig\n"
        "class Theirs(Method):\n"
        "    class Config(MethodConfig):\n"
        "        layers: int | list[int]\n"
        "class NoMethod:\n"
        "    Config = MethodConfig\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = write(GOOD.replace("use: supervised", "use: their_method:Theirs\n  layers: [1, 2]"))
    assert recipes.load(path).method.layers == [1, 2]
    assert refusal(path, ["method.layers=all"]) == [
        "override 'method.layers=all': method.layers: must be a whole number or a list, got 'all'"
    ]
    (message,) = refusal(path, ["method.use=their_method:NoMethod"])
    assert "'their_method:NoMethod' is not a method: that is a subclass of fastdeit.methods.base.Method" in message


def test_reading_recipes_imports_no_torch():
    code = (
        "import sys\nfrom fastdeit.recipe import resolve as recipe\n"
        "assert recipe.names() and recipe.summaries() and recipe.text('digits')\n"
        "assert not {'torch', 'numpy', 'fastdeit.methods.base'} & set(sys.modules), 'imports too much'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
