"""Weights by every form of an address, in every state: the right values, or one sentence."""

import argparse
import json
import shutil
import time
from dataclasses import replace
from functools import cache

import pytest
import timm
import torch
from safetensors.torch import save_file

from fastdeit import models
from fastdeit.engine import checkpoint
from fastdeit.errors import UsageError
from fastdeit.estimate.subject import subject
from fastdeit.methods.config import FeatureTeacherConfig, TeacherConfig
from fastdeit.models import timm_model
from fastdeit.models.vit import VisionTransformer, ViTConfig
from fastdeit.recipe import resolve as recipes
from fastdeit.run import build, reach
from fastdeit.run.weights import Known, Weights, load, network, open_weights

NAME, DISTILLED = "tests.run.test_weights:small", "tests.run.test_weights:small_distilled"
DIGITS = "deit_digits_patch8_32"
CLASSES = ("cat", "dog", "eel", "fox")
RECIPE = """\
model: {name: "NAME", image_size: SIZE}
method: {use: supervised}
data: {source: synthetic, synthetic_classes: 4, group_size: 8, mean: [0.1, 0.2, 0.3], std: [0.4, 0.5, 0.6],
       eval_crop_ratio: 0.9}
optim: {lr: 1e-3, warmup_epochs: 0}
train: {epochs: 1, batch_size: 16}
"""


def small(image_size=32, num_classes=4, drop_path=0.0, distilled=False):
    """A model that costs nothing, under its import path."""
    shape = ViTConfig(image_size, patch_size=8, dim=16, depth=2, heads=2, num_classes=num_classes, distilled=distilled)
    return VisionTransformer(replace(shape, drop_path=drop_path))


def small_distilled(**options):
    return small(distilled=True, **options)


def tensors(value, name=NAME, image_size=32, num_classes=4):
    """Of a model, each filled with noise around `value`."""
    size = tuple(image_size) if isinstance(image_size, list) else image_size
    return {key: value + tensor for key, tensor in noise(name, size, num_classes).items()}


@cache
def noise(name, image_size, num_classes):
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        state = models.build(name, image_size=image_size, num_classes=num_classes).state_dict()
    return {key: 0.05 * torch.randn(tensor.shape, generator=generator, device="cpu") for key, tensor in state.items()}


def is_around(value, some):
    return abs(some["pos_embed"].mean().item() - value) < 0.1


def make_run(folder, write, *, name=NAME, size=32, steps=(2, 4), record=None, ema=True, classes=CLASSES, **options):
    """A run with checkpoints of these steps: their weights are noise around the step, the averages 100 above."""
    recipe = recipes.load(write(RECIPE.replace("NAME", name).replace("SIZE", str(size))))
    record = {"best_step": steps[0], "best_by": "top1_class"} if record is None else record
    state = {
        "recipe": recipe.model_dump(mode="json"),
        "identity": {"train": "t", "val": "v", "classes": list(classes)},
        "record": record,
    }
    for step in steps:
        files = {"model": tensors(step, name, image_size=size, num_classes=len(classes), **options), "method": {}}
        if ema:
            files["ema"] = {f"model.{key}": tensor + 100 for key, tensor in files["model"].items()}
        checkpoint.save(folder / "checkpoints", step, files, state)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a run, and the same model in files of every kind."""
    folder = tmp_path_factory.mktemp("made")

    def write(text):
        (folder / "r.yaml").write_text(text)
        return str(folder / "r.yaml")

    make_run(folder / "run", write)
    ours = tensors(7)
    save_file(ours, folder / "w.safetensors")
    training = {"model": ours, "model_ema": tensors(8), "optimizer": {"state": {}}, "args": argparse.Namespace(a=1)}
    for ending in ("pth", "pt", "bin"):
        torch.save(training, folder / f"w.{ending}")
    torch.save({f"module.{key}": tensor for key, tensor in ours.items()}, folder / "ddp.pth")
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A copy of it to work in."""
    shutil.copytree(made, tmp_path / "here", dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


STEP_4 = "run/checkpoints/step_00000004"


@pytest.mark.parametrize(
    ("address", "value", "origin"),
    [
        ("run", 4, "run, step 4"),
        ("run@best", 2, "run, step 2"),
        ("run@step=2", 2, "run, step 2"),
        ("run@step=4", 4, "run, step 4"),
        ("run@ema", 104, "run, step 4, averaged weights"),
        ("run@best,ema", 102, "run, step 2, averaged weights"),
        ("run@step=2,ema", 102, "run, step 2, averaged weights"),
        (STEP_4, 4, "run, step 4"),
        (f"{STEP_4}@ema", 104, "run, step 4, averaged weights"),
        ("w.safetensors", 7, "w.safetensors"),
        ("w.pth", 7, "w.pth"),
        ("w.pt", 7, "w.pt"),
        ("w.bin", 7, "w.bin"),
        ("w.pth@model", 7, "w.pth@model"),
        ("w.pth@model_ema", 8, "w.pth@model_ema"),
        ("ddp.pth", 7, "ddp.pth"),
    ],
)
def test_every_form_gives_its_weights(made, monkeypatch, address, value, origin):
    monkeypatch.chdir(made)
    found = open_weights(address)
    assert found.origin == origin
    assert found.tensors.keys() == tensors(0).keys()
    assert is_around(value, found.tensors)
    assert (found.checkpoint is not None) == address.startswith("run")
    built = network(found, name=None if found.checkpoint else NAME)
    assert not built.training
    assert all(torch.equal(tensor, found.tensors[name]) for name, tensor in built.state_dict().items())


def test_a_run_tells_what_it_knows(here):
    known = open_weights("run").known
    assert known == Known(
        name=NAME,
        image_size=(32, 32),
        num_classes=4,
        classes=CLASSES,
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
        crop_ratio=0.9,
        method="supervised",
    )
    assert open_weights("w.pth").known == Known()


def test_what_was_done_is_told(here):
    assert open_weights("run").notes == ()
    assert open_weights("w.pth").notes == ("took the entry 'model', not model_ema (@model_ema would)",)
    assert open_weights("ddp.pth").notes == ("stripped module. from the names",)
    (here / f"{STEP_4}/model.safetensors").write_bytes(b"")
    (note,) = open_weights("run").notes
    assert note.startswith("skipped run/checkpoints/step_00000004, which is damaged: model.safetensors has 0 bytes")


# ---- every form of an address, in every bad state --------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[:200])


def all_steps(here, change):
    for step in (2, 4):
        change(here / f"run/checkpoints/step_{step:08d}")


def damaged(here):
    all_steps(here, lambda path: cut(path / "model.safetensors"))
    for name in ("w.safetensors", "w.pth", "w.pt", "w.bin"):
        cut(here / name)


def missing(here):
    shutil.rmtree(here / "run/checkpoints")
    for path in here.glob("w.*"):
        path.unlink()


def no_average(here):
    shutil.rmtree(here / "run")
    make_run(here / "run", lambda text: str(here / "r.yaml"), ema=False)


def never_evaluated(here):
    shutil.rmtree(here / "run")
    make_run(here / "run", lambda text: str(here / "r.yaml"), record={"best_step": 0, "best_by": None})


def nobodys(here):
    """Checkpoints and files without weights, or of another program."""
    for step in (2, 4):
        shutil.rmtree(here / f"run/checkpoints/step_{step:08d}")
        checkpoint.save(here / "run/checkpoints", step, {"model": {"a": torch.ones(1)}}, {"epoch": 3})
    save_file({}, here / "w.safetensors")
    for name in ("w.pth", "w.pt", "w.bin"):
        torch.save({"optimizer": {"state": {0: {"m": torch.ones(1)}}}}, here / name)


def without_a_model(here):
    for step in (2, 4):
        path = here / f"run/checkpoints/step_{step:08d}"
        found = checkpoint.load(path)
        shutil.rmtree(path)
        checkpoint.save(here / "run/checkpoints", step, {"method": {}}, found.state)


RUNS = ("run", "run@best", "run@step=4", "run@ema", "run@best,ema", STEP_4, f"{STEP_4}@ema")
FILES = ("w.safetensors", "w.pth", "w.pt", "w.bin", "w.pth@model_ema")
NEITHER = "is neither a run"
BAD = {
    damaged: {
        **dict.fromkeys(RUNS, r"model\.safetensors has 200 bytes, the manifest says"),
        **dict.fromkeys(FILES, "it is damaged, or no "),
    },
    missing: {
        **dict.fromkeys(RUNS[:5], NEITHER),
        **dict.fromkeys((*RUNS[5:], *FILES), "there is no "),
    },
    no_average: dict.fromkeys([form for form in RUNS if "ema" in form], "the run keeps no average of its weights"),
    never_evaluated: dict.fromkeys(["run@best", "run@best,ema"], "the run has no evaluation yet by which a best"),
    nobodys: {
        **dict.fromkeys(RUNS, "is no checkpoint of `fastdeit train`"),
        "w.safetensors": "there is no tensor in it",
        **dict.fromkeys(FILES[1:4], "it holds no weights; its entries are optimizer"),
        "w.pth@model_ema": "it has no weights under 'model_ema'",
    },
    without_a_model: dict.fromkeys(RUNS, "is a checkpoint without a model"),
}


@pytest.mark.parametrize("state", BAD, ids=lambda state: state.__name__)
def test_every_form_in_a_bad_state_is_refused_in_a_sentence(here, state):
    state(here)
    for address, message in BAD[state].items():
        with pytest.raises(UsageError, match=message) as caught:
            open_weights(address)
        assert str(caught.value).startswith(f"{address}: "), str(caught.value)
        assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("run@step=3", "there is no checkpoint of step 3; there are those of the steps 2, 4"),
        ("w.pth@teacher", "it has no weights under 'teacher'; there are model, model_ema"),
        ("w.pth@optimizer", "it has no weights under 'optimizer'"),
        ("r.yaml", r"r\.yaml does not look like weights"),
        (".", r"the directory \. is neither a run"),
    ],
)
def test_the_wrong_word_is_refused(here, address, message):
    with pytest.raises(UsageError, match=message):
        open_weights(address)


def test_the_best_is_of_the_average_is_told(here):
    shutil.rmtree(here / "run")
    record = {"best_step": 2, "best_by": "top1_class_ema"}
    make_run(here / "run", lambda text: str(here / "r.yaml"), record=record)
    assert open_weights("run@best").notes == (
        "the best top1_class_ema is that of the averaged weights, which @best,ema gives",
    )
    assert open_weights("run@best,ema").notes == ()


def test_a_best_that_was_removed_is_refused(here):
    shutil.rmtree(here / "run/checkpoints/step_00000002")
    with pytest.raises(UsageError, match="run@best: there is no checkpoint of step 2; there are those of the steps 4"):
        open_weights("run@best")


def test_a_manifest_that_was_changed_is_refused(here):
    path = here / STEP_4 / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["state"]["identity"]["classes"] = list(reversed(CLASSES))
    path.write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="does not match its own hash"):
        open_weights(STEP_4)


def test_an_average_of_buffers_lies_over_the_models(here, write):
    """It may hold buffers by their names, need not hold everything, and what is not the student's is not taken."""
    run = make_run(here / "partly", write)
    path = run / "checkpoints/step_00000004"
    found = checkpoint.load(path)
    shutil.rmtree(path)
    average = {"model.norm.weight": torch.full((16,), 50.0), "norm.bias": torch.full((16,), 60.0)}
    checkpoint.save(run / "checkpoints", 4, found.tensors | {"ema": average}, found.state)
    averaged, plain = open_weights("partly@ema").tensors, open_weights("partly").tensors
    assert averaged["norm.weight"].eq(50).all()
    assert averaged.keys() == plain.keys()
    assert all(torch.equal(averaged[name], plain[name]) for name in plain if name != "norm.weight")


# ---- the network -----------------------------------------------------------------------------------------------------


OTHERS = ("deit_tiny_patch16_224", "convnet_digits", "timm:test_resnet", DISTILLED, "timm:test_vit")


def test_another_model_is_refused_in_a_sentence(here):
    for address in ("run", "run@best,ema", "w.safetensors", "w.pth", "ddp.pth"):
        found = open_weights(address)
        for name in OTHERS if address in ("run", "ddp.pth") else (DISTILLED,):
            with pytest.raises(UsageError, match=r": (no tensor name|the weights|pos_embed)") as caught:
                network(found, name=name)
            assert str(caught.value).startswith(found.origin)
        with pytest.raises(UsageError, match="there is no model 'deit_digits_patch8_23'; did you mean deit_digits_"):
            network(found, name="deit_digits_patch8_23")
        with pytest.raises(UsageError, match=r"timm .* has no model 'resnet1'; did you mean resnet18"):
            network(found, name="timm:resnet1")


def test_a_bare_file_asks_which_model_it_is(here):
    save_file(tensors(0, DIGITS), "digits.safetensors")
    with pytest.raises(UsageError, match=rf"nothing tells which model .*; by their shapes they can be of {DIGITS}$"):
        network(open_weights("digits.safetensors"))
    with pytest.raises(UsageError, match=r"w\.pth: nothing tells which model .* a model of fastdeit or timm:NAME;"):
        network(open_weights("w.pth"))
    with pytest.raises(UsageError, match=r"a model of fastdeit or timm:NAME; they have a$"):
        network(Weights("x", {"a": torch.ones(1)}))


def test_a_network_is_built_as_the_weights_are(here):
    """Of a bare file its classes and size are read off its tensors."""
    save_file(tensors(0, image_size=48, num_classes=9), "big.safetensors")
    built = network(open_weights("big.safetensors"), name=NAME)
    assert (built.config.image_size, built.config.num_classes) == ((48, 48), 9)
    peer = network(open_weights("big.safetensors"), name=NAME, image_size=32)
    assert peer.config.image_size == (32, 32)


def test_positions_come_from_the_true_grid_of_a_run(here, write):
    """[16, 64] has as many patches as 32: without the run's word the positions would be taken as they are."""
    make_run(here / "wide", write, size=[16, 64], steps=(1,))
    found, said = open_weights("wide"), []
    assert found.grid == (2, 8)
    built = network(found, image_size=32, say=said.append)
    assert said == ["wide, step 1: resized: pos_embed 1+2x8 -> 1+4x4"]
    assert not torch.equal(built.pos_embed, found.tensors["pos_embed"])
    expected = timm.layers.resample_abs_pos_embed(
        found.tensors["pos_embed"], new_size=(4, 4), old_size=(2, 8), num_prefix_tokens=1, antialias=False
    )
    torch.testing.assert_close(built.pos_embed.detach(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(network(found).pos_embed, found.tensors["pos_embed"])
    assert torch.equal(network(found, grid=(2, 8)).pos_embed, found.tensors["pos_embed"])
    with pytest.raises(UsageError, match=r"wide.*: weights_grid says 4 x 4 patches, but the weights .* say 2 x 8"):
        network(found, grid=(4, 4))


def test_a_file_of_an_ambiguous_grid_asks_for_it(here, write):
    save_file(tensors(0, image_size=(16, 64)), "wide.safetensors")

    def student(size, *overrides):
        text = RECIPE.replace("NAME", NAME).replace("SIZE", size)
        recipe = recipes.load(write(text), ["model.weights=wide.safetensors", *overrides])
        return build.model(recipe, 4, lambda line: None)

    with pytest.raises(UsageError, match=r"model\.weights: wide.*16 patches, which can be 4x4 or 2x8; .*weights_grid="):
        student("[16, 64]")
    wide = student("[16, 64]", "model.weights_grid=[2, 8]")
    assert torch.equal(wide.pos_embed, open_weights("wide.safetensors").tensors["pos_embed"])
    square = student("32", "model.weights_grid=[2, 8]")
    assert not torch.equal(square.pos_embed, wide.pos_embed)
    with pytest.raises(UsageError, match="neither grid 3x5 nor that plus 1 prefix"):
        student("32", "model.weights_grid=[3, 5]")
    of_file = {"model": NAME, "weights": "wide.safetensors"}
    with pytest.raises(UsageError, match=r"16 patches, which can be .* with method\.teacher\.weights_grid$"):
        teacher(TeacherConfig(**of_file), size=(16, 64))
    made, said = teacher(TeacherConfig(**of_file, weights_grid=(2, 8)), size=(16, 64))
    assert torch.equal(made.model.pos_embed, wide.pos_embed)
    assert said == []
    with pytest.raises(ValueError, match="weights_grid is of weights, and there are none"):
        TeacherConfig(timm="resnet18", weights_grid=(2, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_converted_and_said(here, dtype):
    save_file({name: tensor.to(dtype) for name, tensor in tensors(1).items()}, "w.safetensors")
    said = []
    built = network(open_weights("w.safetensors"), name=NAME, say=said.append)
    assert said == [f"w.safetensors: converted from {str(dtype)[6:]} to float32"]
    assert built.norm.bias.dtype == torch.float32
    assert torch.equal(built.norm.bias, tensors(1)["norm.bias"].to(dtype).float())


def test_names_that_are_the_networks_own_are_not_stripped():
    """A network whose parts are called as a wrapper calls them."""
    inner = models.build("convnet_digits")
    wrapped = torch.nn.Module()
    wrapped.backbone, wrapped.extra, wrapped.head_names = inner, torch.nn.Linear(2, 2), ()
    state = {name: tensor + 1 for name, tensor in wrapped.state_dict().items()}
    save = {name.removeprefix("backbone."): tensor for name, tensor in state.items() if name.startswith("backbone.")}
    load(wrapped, Weights("x", save, as_named=state), purpose="teacher")
    assert all(torch.equal(tensor, state[name]) for name, tensor in wrapped.state_dict().items())


# ---- a folder of the hub ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(here):
    """timm's test_vit of four classes, as timm saves it for the hub."""
    torch.manual_seed(2)
    made = timm.create_model("test_vit", num_classes=4)
    made.pretrained_cfg = dict(made.pretrained_cfg, mean=(0.1, 0.2, 0.3), crop_pct=0.9, input_size=(3, 96, 64))
    timm.models.save_for_hf(made, "folder", {"label_names": list(CLASSES)}, safe_serialization="both")
    return here / "folder"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_config_beside_the_weights_tells_whose_they_are(folder, name):
    found = open_weights(f"folder/{name}")
    assert found.known == Known(
        timm="test_vit",
        image_size=(96, 64),
        num_classes=4,
        classes=CLASSES,
        mean=(0.1, 0.2, 0.3),
        std=(0.5, 0.5, 0.5),
        crop_ratio=0.9,
    )
    assert found.notes == ("test_vit, as config.json beside it says",)


def test_a_config_may_name_a_model_of_fastdeits(folder):
    save_file(tensors(5, DIGITS), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": DIGITS}))
    assert is_around(5, network(open_weights("folder/model.safetensors")).state_dict())


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("{", True),
        ("\udcff", True),
        ('{"architecture": "test_vit", "pretrained_cfg": {"input_size": 3}}', True),
        ('{"architecture": "test_vit", "pretrained_cfg": {"input_size": [3, -1, 2]}}', True),
        ('{"architecture": "test_vit", "pretrained_cfg": [1]}', True),
        ('{"architecture": "test_vit", "pretrained_cfg": {"mean": ["x"]}}', True),
        ('{"architecture": "test_vit", "num_classes": 3, "label_names": ["a"]}', True),
        ('{"architecture": "test_vit", "label_names": 3}', True),
        ('{"architecture": "test_vit"}', False),
        ('{"architectures": ["ViTForImageClassification"]}', False),
        ("[]", False),
    ],
)
def test_a_config_that_is_damaged_is_named_and_one_of_others_left_alone(folder, text, refused):
    (folder / "config.json").write_text(text, errors="surrogateescape")
    if refused:
        with pytest.raises(UsageError, match=r"^folder/model\.safetensors: folder/config\.json is damaged \("):
            open_weights("folder/model.safetensors")
    else:
        assert open_weights("folder/model.safetensors").known in (Known(), Known(timm="test_vit"))


# ---- classes ---------------------------------------------------------------------------------------------------------


def logits_by_class(built, classes):
    with torch.no_grad():
        scores = built(torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32))
    scores = scores if isinstance(scores, tuple) else (scores,)
    return [dict(zip(classes, one[0].tolist(), strict=True)) for one in scores]


@pytest.mark.parametrize("name", [NAME, DISTILLED])
def test_a_head_is_permuted_to_the_order_of_the_data(here, write, name):
    make_run(here / "pets", write, name=name)
    found, said = open_weights("pets"), []
    theirs = logits_by_class(network(found), CLASSES)
    ours = ("fox", "cat", "eel", "dog")
    assert logits_by_class(network(found, classes=ours, say=said.append), ours) == theirs
    assert said == ["pets, step 4: the classes are in another order: put the rows of the heads into that of the data"]
    assert logits_by_class(network(found, classes=CLASSES), CLASSES) == theirs


@pytest.mark.parametrize("purpose", ["student", "teacher", "features"])
@pytest.mark.parametrize(
    ("classes", "refused", "said"),
    [
        (CLASSES, None, None),
        (("dog", "cat", "eel", "fox"), None, "another order"),
        (("cat", "dog", "eel", "owl"), "class 3 is 'fox' of the weights and 'owl' of the data", "have them to learn"),
        (("cat", "dog"), "know 4 classes, and the data have 2", "heads initialised anew: head"),
    ],
)
def test_classes_by_what_the_network_is_for(here, purpose, classes, refused, said):
    found = open_weights("run")
    built = models.build(NAME, num_classes=len(classes))
    if purpose == "teacher" and refused:
        with pytest.raises(UsageError, match=refused):
            load(built, found, purpose=purpose, classes=classes)
        return
    notes = load(built, found, purpose=purpose, classes=classes)
    if purpose == "features" and len(classes) == 4:
        said = None  # nobody reads its head
    assert len(notes) == (said is not None)
    assert all(said in note for note in notes)


# ---- in a recipe -----------------------------------------------------------------------------------------------------


@pytest.fixture
def student(here, write):
    def student(*overrides, classes=CLASSES):
        recipe, said = recipes.load(write(RECIPE.replace("NAME", NAME).replace("SIZE", "32")), overrides), []
        return build.model(recipe, len(classes), said.append, classes), said

    return student


@pytest.mark.parametrize(("address", "value"), [("run@best,ema", 102), ("w.pth@model_ema", 8), ("w.safetensors", 7)])
def test_a_student_begins_with_the_weights_of_an_address(student, address, value):
    built, said = student(f"model.weights={address}")
    assert is_around(value, built.state_dict())
    assert len(said) == 1
    assert said[0].startswith("weights of ")


def test_what_is_done_to_the_weights_of_a_student_is_said(student):
    _, said = student("model.weights=w.pth", "model.image_size=48")
    assert said == [
        "weights of w.pth: took the entry 'model', not model_ema (@model_ema would)",
        "weights of w.pth: resized: pos_embed 1+4x4 -> 1+6x6",
    ]
    _, said = student("model.weights=w.pth@model", f"model.name={DISTILLED}")
    assert len(said) == 1
    assert "kept as initialised: dist_token, head_dist.weight, head_dist.bias" in said[0]
    built, said = student("model.weights=run", classes=("cat", "dog"))
    assert said == ["weights of run, step 4: heads initialised anew: head"]
    assert built.head.weight.abs().max() < 0.1
    _, said = student("model.weights=run", classes=("cat", "dog", "eel", "owl"))
    assert "have them to learn: class 3 is 'fox'" in said[0]


def test_weights_of_a_student_that_do_not_fit_name_the_field(student):
    for address, message in {
        "nothing.pth": "there is no nothing.pth",
        "run@bset": "did you mean best",
        "w.pth@x": "no weights under 'x'",
    }.items():
        with pytest.raises(UsageError, match=f"^model.weights: {address}: .*{message}"):
            student(f"model.weights={address}")
    with pytest.raises(UsageError, match=r"^model\.weights: run, step 4: .* do not fit the model: it needs convs"):
        student("model.weights=run", "model.name=convnet_digits")


def teacher(config, classes=CLASSES, trained=None, size=(32, 32)):
    said = []
    made = build.teacher(config, size, len(classes), trained, classes=classes, say=said.append)
    return made, said


def test_a_teacher_by_an_address_sees_its_own_size_and_normalisation(here, write):
    make_run(here / "small", write, size=16)
    made, said = teacher(TeacherConfig.model_validate("small@best,ema"), size=(48, 48))
    assert (made.size, made.mean, made.std) == ((16, 16), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert made.logits(torch.randn(2, 3, 48, 48)).shape == (2, 4)
    assert said == [
        "teacher: small, step 2, averaged weights: sees 16x16 pixels, the student 48x48 pixels "
        "(method.teacher.image_size)"
    ]
    own, _ = teacher(TeacherConfig(weights="small"))
    trained, _ = teacher(TeacherConfig(recipe="x"), trained="small")
    assert all(torch.equal(a, b) for a, b in zip(own.model.parameters(), trained.model.parameters(), strict=True))
    made, _ = teacher(TeacherConfig(weights="small", image_size=24, mean=(0,) * 3, std=(1,) * 3))
    assert (made.size, made.mean) == ((24, 24), (0,) * 3)
    made, _ = teacher(TeacherConfig(model=NAME, weights="w.safetensors"), size=(48, 48))
    assert (made.size, made.mean) == (None, None)  # a bare file tells neither: it sees what the student sees


@pytest.mark.parametrize(
    ("config", "classes", "message"),
    [
        ({"weights": "w.pth"}, CLASSES, r"^method\.teacher\.weights: w\.pth: nothing tells which model"),
        ({"weights": "gone"}, CLASSES, r"^method\.teacher\.weights: gone: there is no gone"),
        ({"weights": "run"}, ("cat", "dog"), "the weights know 4 classes, but the data set has 2"),
        ({"weights": "run"}, ("cat", "dog", "eel", "owl"), "the classes of the data are not those of the weights"),
        (
            {"model": DISTILLED, "weights": "run"},
            CLASSES,
            r"is of .*:small, but method.teacher.model says .*:small_distilled",
        ),
        (
            {"model": NAME, "weights": "double"},
            CLASSES,
            r"is of .*:small_distilled, but method.teacher.model says .*:small;",
        ),
        ({"model": NAME, "weights": "more.safetensors"}, CLASSES, "they have extra.weight, for which it has no place"),
        ({"timm": "resnet1"}, CLASSES, r"^method\.teacher: timm:resnet1: timm .* has no model 'resnet1'; did you mean"),
    ],
)
def test_a_teacher_that_does_not_fit_whole_is_refused(here, write, config, classes, message):
    make_run(here / "double", write, name=DISTILLED)
    save_file(tensors(0) | {"extra.weight": torch.ones(1)}, "more.safetensors")
    with pytest.raises(UsageError, match=message):
        teacher(TeacherConfig(**config), classes)


def test_a_teacher_of_features_may_have_a_head_of_its_own(here):
    made, said = teacher(FeatureTeacherConfig(weights="run"), classes=("a", "b", "c", "d", "e"))
    assert said == []
    assert torch.equal(made.model.head.weight, open_weights("run").tensors["head.weight"])


def test_a_run_with_the_classes_in_another_order_teaches_the_same(here):
    ours = ("fox", "eel", "dog", "cat")
    (one, said), (other, _) = teacher(TeacherConfig(weights="run"), ours), teacher(TeacherConfig(weights="run"))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(one.logits(x), other.logits(x).flip(1))
    assert "the classes are in another order" in said[0]


def test_a_plan_knows_the_teacher_of_an_address(here, write):
    text = (
        RECIPE.replace("NAME", DISTILLED).replace("SIZE", "32").replace("use: supervised", "use: distill, teacher: run")
    )
    path = write(text)
    expected = subject(recipes.load(path, [f"method.teacher={{model: '{NAME}', weights: run}}"])).teachers
    assert subject(recipes.load(path)).teachers == expected
    assert subject(recipes.load(path, ["method.teacher=timm:test_vit"])).teachers[0].name == "test_vit"
    with pytest.raises(UsageError, match=r"w\.pth does not tell which network it is of; add method\.teacher\.model"):
        subject(recipes.load(path, ["method.teacher=w.pth"]))


# ---- timm ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cached(here, monkeypatch):
    """The weights of timm's test_vit are in the hub's cache; nothing else is, and there is no network."""
    torch.manual_seed(1)
    save_file(timm.create_model("test_vit").state_dict(), "cached.safetensors")

    def look_up(repository, name, revision=None):
        return str(here / "cached.safetensors") if (repository, name) == ("timm/test_vit.r160_in1k", SAFE) else None

    def no_network(*args, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr(timm_model, "try_to_load_from_cache", look_up)
    monkeypatch.setattr(timm.models._hub, "hf_hub_download", no_network)
    monkeypatch.setattr(reach.socket, "create_connection", no_network)


SAFE = "model.safetensors"


def test_weights_of_timm_come_from_the_cache(cached):
    found = open_weights("timm:test_vit")
    expected = open_weights("cached.safetensors").tensors
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.tensors.items())
    known = found.known
    assert (known.name, known.timm, known.image_size, known.num_classes) == (None, "test_vit", (160, 160), 1000)
    assert (known.mean, known.std, known.crop_ratio) == ((0.5,) * 3, (0.5,) * 3, 0.95)
    assert known.classes[:2] == ("n01440764", "n01443537")
    built = network(found, image_size=64)
    assert built.grid == (4, 4)


def test_a_teacher_of_timm(cached):
    names = [f"class_{label}" for label in range(1000)]
    made, _ = teacher(TeacherConfig(timm="test_vit"), names)
    assert (made.size, made.mean, made.std) == (None, (0.5,) * 3, (0.5,) * 3)
    x = torch.randn(2, 3, 32, 32)
    synsets = list(open_weights("timm:test_vit").known.classes)
    flipped, said = teacher(TeacherConfig(weights="timm:test_vit"), synsets[::-1])
    assert torch.equal(flipped.logits(x), made.logits(x).flip(1))
    assert "another order" in said[0]
    with pytest.raises(UsageError, match="the weights know 1000 classes, but the data set has 4"):
        teacher(TeacherConfig(timm="test_vit"))


def test_without_a_network_the_way_out_is_told(cached):
    with pytest.raises(UsageError) as caught:
        open_weights("timm:test_vit2")
    message = str(caught.value)
    assert message.startswith("timm:test_vit2: timm's weights are not on this machine and cannot be downloaded (")
    assert "give its path instead, as in PATH.safetensors" in message
    assert "timm.create_model('test_vit2', pretrained=True)" in message


def test_without_a_network_nothing_is_tried_twice(cached, monkeypatch):
    """The client of the hub tries ten times with growing pauses, for more than a minute."""
    monkeypatch.setattr(timm.models._hub, "hf_hub_download", lambda *args, **options: pytest.fail("asked the hub"))
    with pytest.raises(UsageError, match=r"cannot be downloaded \(huggingface.co: Name or service not known\)"):
        open_weights("timm:test_vit2")
    monkeypatch.setenv("https_proxy", "http://proxy.example:8080")
    with pytest.raises(UsageError, match=r"\(proxy.example: Name or service not known\)"):
        open_weights("timm:test_vit2")
    monkeypatch.setattr(reach, "PATIENCE_S", 0.01)

    def late(*args):
        time.sleep(0.1)
        raise OSError

    monkeypatch.setattr(reach.socket, "create_connection", late)
    with pytest.raises(UsageError, match=r"\(proxy.example: no answer within 0.01 s\)"):
        open_weights("timm:test_vit2")
    monkeypatch.setattr(reach.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"\(HF_HUB_OFFLINE is set\)"):
        open_weights("timm:test_vit2")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("timm:test_vi", r"timm .* has no model 'test_vi'; did you mean test_vit"),
        ("timm:test_vit.nobody", r"timm .* has no weights 'nobody' of test_vit; there are test_vit\.r160_in1k"),
        ("timm:vit_small_patch16_18x2_224", "timm publishes no weights for it"),
    ],
)
def test_a_model_that_timm_has_no_weights_for(cached, address, message):
    with pytest.raises(UsageError, match=message):
        open_weights(address)


def test_known_can_be_replaced():
    found = Weights("x", tensors(3), replace(Known(), name=NAME, image_size=(32, 32)))
    assert is_around(3, network(found).state_dict())
