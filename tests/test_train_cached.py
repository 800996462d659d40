"""Distillation from cached logits: training is that with the teacher itself, and a cache of other images is refused."""

import contextlib
import io
import json
import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastdeit.cli import main as cli
from fastdeit.data import bad, logits
from fastdeit.data.logits import Cache
from fastdeit.engine.dist import World
from fastdeit.errors import FastdeitError, Interrupted, UsageError
from fastdeit.methods.config import DistillConfig, TeacherConfig
from fastdeit.recipe import config as sections
from fastdeit.recipe import resolve as recipes
from fastdeit.run import build, cached, fork
from fastdeit.run.request import Request
from fastdeit.training import train
from fastdeit.verbs import cache as verb
from fastdeit.verbs.dry_run import lines
from tests.small_runs import StopAt, Tiny, assert_same_weights, logged, stored, train_rank

TINY = "tests.small_runs:Tiny"
RECIPE = f"""\
model: {{name: "{TINY}", image_size: 16}}
method: {{use: distill, distillation: soft, alpha: 0.7, teacher: {{model: "{TINY}", weights: WEIGHTS}}}}
data:
  {{source: synthetic, synthetic_samples: 40, synthetic_classes: 5, augment: rand-m9-mstd0.5-inc1, erase: 0.5,
   mixup: 0.8,
   cutmix: 1.0, group_size: 4, mix_mode: pair, repeats: 2, threads: 1,
   mean: [0.3, 0.4, 0.5], std: [0.2, 0.25, 0.3]}}
optim: {{lr: 1e-2, warmup_epochs: 0}}
train: {{epochs: 2, batch_size: 8}}
engine: {{device: cpu, threads: 1, precision: fp32, log_every: 1, checkpoint_every: 9}}
"""
STEPS_PER_EPOCH, TOTAL = 5, 10
CPU = World(torch.device("cpu"))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A prediction from two steps."""
    monkeypatch.setattr(verb, "_WARM_STEPS", 1)
    monkeypatch.setattr(verb, "_TRIAL_STEPS", 2)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a recipe and its teacher's weights."""
    folder = tmp_path_factory.mktemp("cached")
    teacher_weights(folder / "teacher.safetensors", seed=0)
    (folder / "small.yaml").write_text(RECIPE.replace("WEIGHTS", str(folder / "teacher.safetensors")))
    return folder


def teacher_weights(path, seed):
    torch.manual_seed(seed)
    network = Tiny((16, 16), 5)
    for head in (network.head, network.head_dist):
        head.weight.data *= 8
    save_file(network.state_dict(), path)


def recipe_of(place, *overrides):
    return recipes.load(str(place / "small.yaml"), list(overrides))


def made(recipe, folder, top_k=5, world=CPU, **options):
    verb.fill(recipe, recipe.method.teachers(), folder, world, top_k=top_k, **options)
    return folder


@pytest.fixture(scope="module")
def cache(place):
    return made(recipe_of(place), place / "all")


@pytest.fixture(scope="module")
def online(place):
    """The run with the teacher itself."""
    train(recipe_of(place), place / "online", CPU)
    return place / "online"


def files(folder):
    """{path: bytes} of the shards."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.logits"))}


# ---- it is the same training -----------------------------------------------------------------------------------------


def test_training_from_all_logits_is_that_with_the_teacher(place, cache, online, tmp_path):
    """With mixing, erasing, operations and repeats, bit for bit."""
    train(recipe_of(place, f"method.cached={cache}"), tmp_path / "run", CPU)
    assert_same_weights(online, tmp_path / "run", TOTAL)
    keep = [record for record in logged(online) if record["kind"] != "teacher"]
    assert logged(tmp_path / "run") == keep


def test_one_logit_is_enough_for_hard_distillation(place, tmp_path):
    hard = "method.distillation=hard", "train.accumulate=2", "train.epochs=1"
    folder = made(recipe_of(place, *hard), tmp_path / "one", top_k=1)
    assert Cache.open(folder).layout.record.itemsize == 10
    train(recipe_of(place, *hard), tmp_path / "online", CPU)
    train(recipe_of(place, *hard, f"method.cached={folder}", "method.tau=2"), tmp_path / "run", CPU)
    assert_same_weights(tmp_path / "online", tmp_path / "run", STEPS_PER_EPOCH)


def test_several_teachers_are_cached_as_one(place, tmp_path):
    """Their common answer is stored, and each of them is in the fingerprint."""
    teacher_weights(tmp_path / "second.safetensors", seed=1)
    names = place / "teacher.safetensors", tmp_path / "second.safetensors"
    both = ", ".join(f'{{model: "{TINY}", weights: "{name}"}}' for name in names)
    recipe = recipe_of(place, f"method.teacher=[{both}]", "train.epochs=1")
    folder = made(recipe, tmp_path / "cache")
    assert len(Cache.open(folder).fingerprint["teacher.weights"]) == 2
    train(recipe, tmp_path / "online", CPU)
    train(recipe_of(place, f"method.cached={folder}", "train.epochs=1"), tmp_path / "run", CPU)
    assert_same_weights(tmp_path / "online", tmp_path / "run", STEPS_PER_EPOCH)


def test_an_interrupted_run_ends_with_the_same_weights(place, cache, online, tmp_path):
    recipe = recipe_of(place, f"method.cached={cache}")
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "run", StopAt(STEPS_PER_EPOCH + 2))
    train(recipe, tmp_path / "run", CPU, resume=True)
    assert_same_weights(online, tmp_path / "run", TOTAL)


def fill_and_train(rank, size, path, folder, run):
    """Fill a cache, and train from it, as one process of several (fixture `ranks`)."""
    made(recipes.load(str(path)), folder, world=World(torch.device("cpu"), rank, size))
    train_rank(rank, size, path, [f"method.cached={folder}"], run)


@pytest.mark.slow
def test_two_processes_fill_and_use_it_as_one(place, cache, online, ranks, tmp_path):
    ranks(2, fill_and_train, place / "small.yaml", tmp_path / "two", tmp_path / "run")
    assert files(tmp_path / "two") == files(cache)
    for name, tensor in stored(online, TOTAL)["model.safetensors"].items():
        torch.testing.assert_close(
            stored(tmp_path / "run", TOTAL)["model.safetensors"][name], tensor, rtol=1e-5, atol=1e-6
        )


def test_no_weights_of_the_teacher_are_needed(place, cache, tmp_path, monkeypatch):
    made(recipe_of(place), cache, epochs=range(2, 3))
    monkeypatch.setattr(build, "teacher", None)
    recipe = recipe_of(place, f"method.cached={cache}")
    assert f"teacher   all 5 logits of {place / 'teacher.safetensors'}, cached in {cache}" in lines(Request(recipe), 1)
    run = tmp_path / "run"
    train(recipe, run, CPU)
    assert cli(["eval", str(run), "--json"]) == 0
    origin = fork.opened(f"{run}@step={TOTAL}", print)
    longer = recipes.override(origin.recipe, ["train.epochs=3"])
    train(longer, tmp_path / "fork", CPU, origin=origin)
    assert logged(tmp_path / "fork")[-1]["step"] == TOTAL + STEPS_PER_EPOCH


# ---- pictures that cannot be read ------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    """An image folder of 16 pictures, of which the first is none."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(16):
            folder = tmp_path / "photos" / split / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 255, (24, 24, 3), np.uint8)).save(folder / f"{number:02d}.png")
    path = tmp_path / "photos/train/a/00.png"
    picture = path.read_bytes()
    path.write_bytes(b"no picture")
    return path, picture


def test_substitutes_are_those_of_the_run(place, photos, tmp_path, capsys):
    path, picture = photos
    torch.manual_seed(0)
    save_file(Tiny((16, 16), 2).state_dict(), tmp_path / "two.safetensors")
    data = [f"data.root={tmp_path / 'photos'}", "data.source=folder", "data.max_bad_fraction=0.5", "train.seed=4"]
    recipe = recipe_of(place, *data, f"method.teacher.weights={tmp_path / 'two.safetensors'}")
    folder = made(recipe, tmp_path / "cache", top_k=2)
    said = capsys.readouterr().out
    assert said.count("image not used: ") == said.count(f"image not used: {path}: ") == 1
    train(recipe, tmp_path / "online", CPU)
    offline = recipes.override(recipe, [f"method.cached={folder}"])
    train(offline, tmp_path / "run", CPU)
    assert_same_weights(tmp_path / "online", tmp_path / "run", 4)
    assert f"1 images could not be used, others stand in for them: {folder / bad.FILE}\n" in said
    path.write_bytes(picture)
    made(recipe, folder, top_k=2)
    assert f"not used, and are sound now: '{path}'; make what is there of the cache anew\n" in capsys.readouterr().out
    with pytest.raises(
        FastdeitError, match=r"the teacher saw sample \d+ where this run has sample 0: one of the two is a"
    ):
        train(offline, tmp_path / "mended", CPU)


def fill_photos(rank, size, place, folder, overrides):
    """Fill a cache of photos as one process of several (fixture `ranks`). Returns what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        made(recipe_of(place, *overrides), folder, top_k=2, world=World(torch.device("cpu"), rank, size))
    return said.getvalue()


@pytest.mark.slow
def test_all_processes_share_one_list_of_bad_images(place, photos, ranks, tmp_path):
    """Each process makes an epoch, and meets the same image: it is told and counted once."""
    torch.manual_seed(0)
    save_file(Tiny((16, 16), 2).state_dict(), tmp_path / "two.safetensors")
    data = [f"data.root={tmp_path / 'photos'}", "data.source=folder", "data.max_bad_fraction=0.5", "train.epochs=4"]
    data += [f"method.teacher.weights={tmp_path / 'two.safetensors'}"]
    said = "".join(ranks(2, fill_photos, place, tmp_path / "cache", data))
    assert said.count("image not used: ") == said.count(f"image not used: {photos[0]}: ") == 1
    (entry,) = map(json.loads, (tmp_path / "cache" / bad.FILE).read_text().splitlines())
    assert (entry["path"], entry["index"], entry["split"]) == (str(photos[0]), 0, "train")


# ---- filling it ------------------------------------------------------------------------------------------------------


def test_what_is_missing_or_damaged_is_made_anew(place, cache, tmp_path, capsys):
    recipe, folder = recipe_of(place), tmp_path / "cache"
    with pytest.raises(Interrupted, match="keeps what is finished, and the same command goes on"):
        made(recipe, folder, world=StopAt(2))
    first, second = "epoch_00000/0000.logits", "epoch_00001/0000.logits"
    assert list(files(folder)) == [first]
    with pytest.raises(
        UsageError, match=r"of the 2 epochs of this run the cache lacks 1: 1; .*with the run's own train.epochs"
    ):
        cached.checked(*run_of(recipe_of(place, f"method.cached={folder}")))
    before = os.stat(folder / first).st_mtime_ns
    made(recipe, folder, epochs=range(1, 2))
    whole = files(folder)
    assert [whole[name] for name in (first, second)] == [files(cache)[name] for name in (first, second)]
    (folder / second).write_bytes(b"x" + whole[second][1:])
    capsys.readouterr()
    made(recipe, folder)
    said = capsys.readouterr().out
    assert files(folder) == whole
    assert os.stat(folder / first).st_mtime_ns == before
    assert f"all 5 logits of {place / 'teacher.safetensors'}, cached in {folder}: 1 of 2 shards are there" in said
    assert "size: 40 records of 24 bytes, 0.00098 MB; " in said
    assert re.search(r"time: about \S+ hours at [\d,]+ images/s, measured on 2 steps of 1 process\n", said)
    made(recipe, folder)
    assert "2 of 2 shards are there\ntrain from it" in capsys.readouterr().out


def test_overlays_are_laid_over_as_for_training(place, tmp_path):
    words = str(place / "small.yaml"), "--as", "augreg-light2", "--out", str(tmp_path / "cache")
    assert cli(["cache", *words, "--epochs", "0:1", "--top-k", "5"]) == 0
    laid_over = "data.augment=augreg-light2", "data.mixup=0.2"
    cached.checked(*run_of(recipe_of(place, f"method.cached={tmp_path / 'cache'}", "train.epochs=1", *laid_over)))


def test_gaps_are_filled_whatever_lies_between(place, tmp_path, monkeypatch):
    monkeypatch.setattr(logits, "_SHARD_STEPS", 2)
    folder = made(recipe_of(place), tmp_path / "cache")
    whole = files(folder)
    assert len(whole) == 6
    for name in list(whole)[::2]:
        (folder / name).unlink()
    made(recipe_of(place), folder)
    assert files(folder) == whole


def test_a_disk_without_room_is_said_before(place, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1))
    with pytest.raises(UsageError, match=r"has 1e-06 MB free, and the cache needs 0.00196 MB more"):
        made(recipe_of(place), tmp_path / "cache")
    assert files(tmp_path / "cache") == {}


def test_a_shard_that_cannot_be_written_is_named(place, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/epoch_00001").write_text("in the way")
    with pytest.raises(
        FastdeitError, match=r"cache/epoch_00001/0000.logits cannot be written: (Not a dir|File exists)"
    ):
        made(recipe_of(place), tmp_path / "cache")
    assert list(files(tmp_path / "cache")) == ["epoch_00000/0000.logits"]


def test_another_teacher_is_named(place, cache, tmp_path):
    teacher_weights(tmp_path / "other.safetensors", seed=1)
    other = TeacherConfig(model=TINY, weights=str(tmp_path / "other.safetensors"), mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(UsageError) as caught:
        verb.fill(recipe_of(place, "train.seed=5"), [other], cache, CPU, top_k=5)
    named = re.findall(r"^  (\S+): the cache has", str(caught.value), re.MULTILINE)
    assert named == ["train.seed", "data.mean", "data.std", "teacher.weights", "teacher.mean", "teacher.std"]
    with pytest.raises(UsageError, match=r"holds another cache:\n  --top-k: the cache has 5, this command 3\n"):
        made(recipe_of(place), cache, top_k=3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name the recipe whose images the teacher is to judge"),
        (["digits"], "the teacher of recipe digits is not trained yet: `fastdeit train digits_teacher` makes a run"),
        (["deit_tiny"], "recipe deit_tiny has no teacher; name one with --teacher ADDRESS"),
        (["digits", "--epochs", "3:3"], "3:3 is not A:B, the epochs from A up to but without B"),
        (["digits", "--teacher", "runs/no"], "runs/no"),
    ],
)
def test_commands_that_cannot_be(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli(["cache", *words]) == 2
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


# ---- whose images they are -------------------------------------------------------------------------------------------

MATTERS = {
    "model.image_size": "32",
    "data.size_schedule": "[[0, 16], [1, 32]]",
    "data.crop": "simple",
    "data.crop_scale": "[0.2, 0.9]",
    "data.crop_ratio": "[0.5, 2.0]",
    "data.flip": "0.1",
    "data.augment": "original",
    "data.erase": "0.0",
    "data.mixup": "0.1",
    "data.cutmix": "0.1",
    "data.mix_probability": "0.5",
    "data.mix_switch": "0.9",
    "data.mix_mode": "batch",
    "data.group_size": "8",
    "data.repeats": "1",
    "data.mean": "[0.1, 0.1, 0.1]",
    "data.std": "[0.1, 0.1, 0.1]",
    "train.batch_size": "16",
    "train.seed": "1",
    "method.tau": "2.0",
}
"""A value of each field that changes what the teacher sees, or what a record says of its answer."""
AS_OTHERS = {
    "data.color_jitter": ("0.9", "data.augment"),
    "data.views": ("{main: {flip: 0.1}}", "data.flip"),
    "data.synthetic_samples": ("48", "data (number of training images)"),
    "data.synthetic_classes": ("6", "data (training images)"),
}
"""Fields that do so, too, and by which name."""
OTHERS = {
    "model": {"name", "timm", "num_classes", "drop_path", "drop_path_mode", "dropout", "weights", "weights_grid"}
    | {"needs_weights", "freeze", "drop_path_skip"},
    "method": {"use", "loss", "smoothing", "alpha", "distillation", "reduction", "fuse", "cached", "teacher"},
    "data": {"source", "root", "train", "val", "eval_crop_ratio", "threads", "max_bad_fraction"}
    | {"image_column", "label_column", "classes"},
    "train": {"epochs", "steps", "accumulate", "eval_every", "eval_every_steps", "stop_after", "best_by"},
}
"""The other fields, but for the sections optim and engine, which have no part in it."""
CHANGED = [
    *["model.name=convnet_digits", "model.drop_path=0.2", "method.alpha=0.1", "method.loss=bce", "method.smoothing=0"],
    *["method.reduction=batchmean", "data.eval_crop_ratio=0.5", "data.threads=2", "data.max_bad_fraction=0.5"],
    *["train.epochs=1", "train.accumulate=2", "train.eval_every=0.5", "optim.name=sgd", "optim.lr=0.1"],
    *["optim.warmup_epochs=0.1", "engine.precision=bf16", "engine.log_every=7", "method.fuse=class"],
]
"""New values of them, all at once."""


def overrides_of(field):
    """What gives `field` another value. A jitter needs a policy that leaves the colours alone."""
    value = MATTERS[field] if field in MATTERS else AS_OTHERS[field][0]
    return [f"{field}={value}", *(["data.augment=three_augment"] if field == "data.color_jitter" else [])]


def run_of(recipe):
    source = build.sources(recipe)[0]
    return recipe, source, build.run_length(recipe, len(source))


@pytest.fixture(scope="module")
def top(place):
    return made(recipe_of(place), place / "top", top_k=2)


def test_every_field_has_been_decided_on():
    kinds = {"model": sections.ModelConfig, "data": sections.DataConfig, "train": sections.TrainConfig}
    for name, kind in (kinds | {"method": DistillConfig}).items():
        decided = [field.partition(".")[2] for field in (*MATTERS, *AS_OTHERS) if field.startswith(f"{name}.")]
        assert {*decided, *OTHERS[name]} == set(kind.model_fields)
        assert not OTHERS[name].intersection(decided)


@pytest.mark.parametrize("field", [*MATTERS, *AS_OTHERS])
def test_a_field_that_matters_is_named(place, top, field):
    name = AS_OTHERS[field][1] if field in AS_OTHERS else field
    with pytest.raises(UsageError) as caught:
        cached.checked(*run_of(recipe_of(place, f"method.cached={top}", *overrides_of(field))))
    named = re.findall(r"^  (.+?): the cache has .*, this run ", str(caught.value), re.MULTILINE)
    assert named[0] == name
    assert set(named[1:]) <= {"data.color_jitter", "data (training images)", "data (classes)"}, "noise follows"


def test_a_field_that_does_not_matter_changes_nothing(place, top):
    found = cached.checked(*run_of(recipe_of(place, f"method.cached={top}", *CHANGED)))
    assert found.folder == top


@pytest.mark.slow
def test_the_fields_that_matter_are_those_that_change_the_images(place):
    def seen(recipe):
        recipe, source, _ = run_of(recipe)
        batches = list(build.train_loader(recipe, source, CPU, {}, print).batches(0, TOTAL))
        return [torch.cat([batch.pixels() for batch in micro]) for micro in batches]

    first = seen(recipe_of(place))
    for field in (*MATTERS, *AS_OTHERS):
        if field == "method.tau":
            continue
        other = seen(recipe_of(place, *overrides_of(field)))
        assert not all(map(torch.equal, first, other)), field
    assert all(map(torch.equal, first, seen(recipe_of(place, *CHANGED))))


def test_all_logits_serve_any_temperature_and_a_teacher_with_its_own_normalisation_any_of_the_student(
    place, cache, tmp_path
):
    cached.checked(*run_of(recipe_of(place, f"method.cached={cache}", "method.tau=2")))
    own = ["method.teacher.mean=[0.5, 0.5, 0.5]", "method.teacher.std=[0.5, 0.5, 0.5]"]
    folder = made(recipe_of(place, *own), tmp_path / "own", epochs=range(2))
    cached.checked(*run_of(recipe_of(place, f"method.cached={folder}", "data.mean=[0.1, 0.1, 0.1]")))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (["train.epochs=3", "train.batch_size=16"], r"its records are not those of this run:\n  train.batch_size: "),
        (["train.epochs=3", "train.seed=9"], r"its records are not those of this run:\n  train.seed: "),
        (["train.epochs=9"], "of the 9 epochs of this run the cache lacks [67]: "),
    ],
)
def test_a_fork_with_other_images_is_refused(place, cache, online, tmp_path, changed, named):
    origin = fork.opened(f"{online}@step={TOTAL}", print)
    recipe = recipes.override(origin.recipe, [f"method.cached={cache}", *changed])
    with pytest.raises(UsageError, match=named):
        train(recipe, tmp_path / "fork", CPU, origin=origin)
    assert not (tmp_path / "fork").exists()


def test_a_run_goes_on_from_the_same_answers_alone(place, cache, tmp_path):
    """The fingerprint of the cache is a part of the run, wherever the cache lies."""
    with pytest.raises(Interrupted):
        train(recipe_of(place, f"method.cached={cache}"), tmp_path / "run", StopAt(3))
    moved, other = (shutil.copytree(cache, tmp_path / name) for name in ("moved", "other"))
    manifest = (other / logits.MANIFEST).read_text()
    (other / logits.MANIFEST).write_text(re.sub(r'("teacher.weights": ")\w+', r"\1cafe", manifest))
    words = r"is another run; .*\n  cache \(teacher.weights\): the run has '\w+', asked for 'cafe'"
    with pytest.raises(UsageError, match=words):
        train(recipe_of(place, f"method.cached={other}"), tmp_path / "run", CPU, resume=True)
    train(recipe_of(place, f"method.cached={moved}"), tmp_path / "run", CPU, resume=True)
    assert logged(tmp_path / "run")[-1]["step"] == TOTAL
