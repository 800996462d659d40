"""Weights by every form of an address, in every state: the right values, or one sentence."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from fastdeit import models
from fastdeit.engine import checkpoint
from fastdeit.engine.checkpoint import Checkpoint
from fastdeit.errors import UsageError
from fastdeit.methods.config import TeacherConfig
from fastdeit.recipe import resolve as recipes
from fastdeit.run import build
from fastdeit.run.weights import Known, Weights, average_of, load, network, open_weights
from tests.run.noise_as_weights import CLASSES, DIGITS, DISTILLED, NAME, RECIPE, is_around, make_run, teacher, tensors

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


class Tied(nn.Module):
    head_names = ()

    def __init__(self):
        super().__init__()
        self.first = self.second = nn.Linear(2, 2)


def test_an_average_that_a_checkpoint_has_under_the_first_name_of_a_tied_tensor_alone():
    """As those have that earlier versions wrote."""
    model, average = Tied(), {f"model.first.{name}": torch.full((2,), 3.0) for name in ("weight", "bias")}
    average["model.first.weight"] = torch.full((2, 2), 2.0)
    found = Checkpoint(Path("step_00000004"), 4, {"ema": average}, {})
    weights = Weights("an earlier run", model.state_dict(), Known(), (), found)
    load(model, average_of(weights), purpose="student")
    assert model.second.weight.eq(2).all()
    assert model.second.bias.eq(3).all()


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


def test_a_grid_is_refused_where_there_are_no_positions(here):
    save_file(models.build("convnet_digits", image_size=32, num_classes=3).state_dict(), "convnet.safetensors")
    found = open_weights("convnet.safetensors")
    network(found, name="convnet_digits", image_size=32)
    with pytest.raises(UsageError, match="weights_grid describes a grid of positions, and there is none"):
        network(found, name="convnet_digits", image_size=32, grid=(2, 2))


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
    with pytest.raises(ValueError, match="weights_grid describes weights, and none are given"):
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
        (("cat", "dog", "eel", "owl"), "class 3 is 'fox' of the weights and 'owl' of the data", "have to learn these"),
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


def test_known_can_be_replaced():
    found = Weights("x", tensors(3), replace(Known(), name=NAME, image_size=(32, 32)))
    assert is_around(3, network(found).state_dict())
