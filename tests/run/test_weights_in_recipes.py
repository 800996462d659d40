"""Weights of students and teachers as a recipe names them: those of runs and files, and timm's."""

import time

import pytest
import timm
import torch
from safetensors.torch import save_file

from fastdeit.errors import UsageError
from fastdeit.estimate.subject import subject
from fastdeit.methods.config import FeatureTeacherConfig, TeacherConfig
from fastdeit.models import timm_model
from fastdeit.recipe import resolve as recipes
from fastdeit.run import build, reach
from fastdeit.run.weights import network, open_weights
from tests.run.noise_as_weights import CLASSES, DISTILLED, NAME, RECIPE, is_around, make_run, teacher, tensors

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
    assert "have to learn these: class 3 is 'fox'" in said[0]


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
