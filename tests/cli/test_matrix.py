"""Every verb that takes weights, with every kind of address, in every state: what works, works, and nothing ends in a
traceback.

The table is generated. The default tests take each verb with each state once, by another kind of address each time;
the whole table is a long proof.
"""

import shutil
from dataclasses import dataclass
from itertools import product

import pytest
import timm
import torch
from safetensors.torch import save_file

from fastdeit import cli
from fastdeit.models import timm_model
from fastdeit.run import reach
from tests.painted_runs import RECIPE, paint
from tests.small_runs import stored

MODEL, TIMM = "deit_digits_distilled_patch8_32", "test_vit"
TRAINING = "weights", "teacher", "resume", "fork"
VERBS = "eval", "data show", "data preview", "predict", "show attention", "export", "plan", *TRAINING
KINDS = "run", "best", "step", "ema", "checkpoint", "safetensors", "pth", "timm"
OF_A_RUN = "run", "best", "step", "checkpoint"
STATES = "good", "missing", "damaged", "other names", "other count", "other grid"


@dataclass(frozen=True)
class Things:
    """Addresses by state and kind, data by state, a picture and the recipe of the run."""

    addresses: dict[str, dict[str, str]]
    data: dict[str, str]
    picture: str
    recipe: str


def addresses(run, safetensors, pth):
    checkpoint = f"{run}/checkpoints/step_00000002"
    run_alone = {"run": f"{run}", "best": f"{run}@best", "step": f"{run}@step=2", "ema": f"{run}@ema"}
    return {**run_alone, "checkpoint": checkpoint, "safetensors": f"{safetensors}", "pth": f"{pth}"}


@pytest.fixture(scope="session")
def things(run, bare, data, tmp_path_factory):
    root = tmp_path_factory.mktemp("matrix")
    (root / "r.yaml").write_text(RECIPE)
    torch.save({"model": stored(run, 2)["model.safetensors"]}, root / "w.pth")
    good = addresses(run, bare, root / "w.pth")
    cut = {"safetensors": root / "cut.safetensors", "pth": root / "cut.pth", "run": root / "cut"}
    cut["safetensors"].write_bytes(bare.read_bytes()[:-7])
    cut["pth"].write_bytes((root / "w.pth").read_bytes()[:-700])
    shutil.copytree(run, cut["run"])
    for file in cut["run"].rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-7])
    damaged = addresses(cut["run"], cut["safetensors"], cut["pth"])
    missing = addresses(root / "no", root / "no.safetensors", root / "no.pth")
    torch.manual_seed(0)
    save_file(timm.create_model(TIMM).state_dict(), root / "timm.safetensors")
    (root / "cut_timm.safetensors").write_bytes((root / "timm.safetensors").read_bytes()[:-7])
    by_state = {state: good | {"timm": f"timm:{TIMM}"} for state in STATES}
    by_state["missing"] = missing | {"timm": "timm:test_vit2"}
    by_state["damaged"] = damaged | {"timm": "timm:test_vit3"}
    sets = dict.fromkeys(STATES, str(data))
    names = {"other names": ("ash", "elm", "oak"), "other count": ("ash", "elm", "oak", "fir")}
    for state, others in names.items():
        painted = paint(root / state.replace(" ", "_"))
        for split, (number, name) in product(("train", "val"), enumerate(others)):
            source = painted / split / ("blue", "green", "red", "red")[number]
            shutil.copytree(source, painted / split / name)
        for split, name in product(("train", "val"), ("blue", "green", "red")):
            shutil.rmtree(painted / split / name)
        sets[state] = str(painted)
    return Things(by_state, sets, str(data / "val" / "red" / "0.png"), str(root / "r.yaml"))


@pytest.fixture
def here(things, tmp_path, monkeypatch):
    """An empty folder, no network, and a cache of the hub that has one model whole and one cut off."""

    def look_up(repository, name, revision=None):
        root = things.recipe.removesuffix("r.yaml")
        files = {"timm/test_vit.r160_in1k": "timm", "timm/test_vit3.r160_in1k": "cut_timm"}
        return f"{root}{files[repository]}.safetensors" if repository in files and name.endswith("tensors") else None

    def no_network(*args):
        raise OSError("Name or service not known")

    monkeypatch.setattr(timm_model, "try_to_load_from_cache", look_up)
    monkeypatch.setattr(reach.socket, "create_connection", no_network)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(verb, kind, state, things, here):
    """The words of a command line."""
    address, data, bare = things.addresses[state][kind], things.data[state], kind in ("safetensors", "pth")
    if verb == "resume" and kind == "run" and state != "missing":
        address = str(shutil.copytree(address, here / "copy"))  # others read the run
    size = f"model.image_size={'[32,48]' if state == 'other grid' else '[16,32]'}"
    model = ["--model", MODEL] if bare else []
    grid = ["model.weights_grid=[2,4]"] if bare and state != "other grid" else []
    told = f"model: {MODEL}, " + "weights_grid: [2, 4], " * bool(grid) if bare else ""
    method = f'method={{use: distill, tau: 1, teacher: {{{told}weights: "{address}"}}}}'
    train = ["train", things.recipe, f"data.root={data}", size]
    out = ["--out", "x.png"]
    return {
        "eval": ["eval", address, "--data", data, *model, size, *grid],
        "predict": ["predict", address, things.picture, *model, size, *grid],
        "show attention": ["show", "attention", address, things.picture, *model, size, *grid, *out],
        "export": ["export", address, "out.safetensors", *model, size, *grid],
        "data show": ["data", "show", address, "--data", data, "--sample", "0", *out],
        "data preview": ["data", "preview", address, "--data", data, *out],
        "weights": [*train, f"model.weights={address}", *grid],
        "teacher": [*train, method],
        "plan": ["plan", things.recipe, method, "--gpu", "A100"],
        "resume": ["train", "--resume", address, f"data.root={data}"],
        "fork": ["train", "--from", address, f"data.root={data}", "train.epochs=3"],
    }[verb]


def works(verb, kind, state):
    """Whether it does what it says; None where that may be or not, by what is known of the weights."""
    if state in ("missing", "damaged"):
        # A plan looks at no tensor, where it is known without one which network they are of.
        return verb == "plan" and kind in ("timm", "safetensors", "pth")
    if state != "good":
        return None
    if verb == "resume":
        return kind == "run"
    if verb == "fork":
        return kind in OF_A_RUN
    if verb in ("data show", "data preview"):
        return kind not in ("safetensors", "pth")  # of bare files nothing tells the model
    if kind == "timm":  # another network than the student, and of 1,000 classes
        return verb in ("predict", "show attention", "export", "plan")
    return True


def check(things, here, capfd, verb, kind, state, *more):
    argv = [*command(verb, kind, state, things, here), *more]
    code = cli.main(argv)
    out, err = capfd.readouterr()
    assert "Traceback" not in err, (argv, err[-1500:])
    assert code in (0, 1, 2), argv
    expected = works(verb, kind, state)
    assert expected is None or (code == 0) == expected, (argv, code, out[-300:], err[-500:])
    if code:
        assert err.splitlines()[-1].startswith("fastdeit: "), (argv, err[-500:])


@pytest.mark.parametrize(("verb", "state"), list(product(VERBS, STATES)))
def test_no_traceback(verb, state, things, here, capfd):
    """Nothing is trained, which takes a second; a dry run opens the same weights."""
    kind = KINDS[(VERBS.index(verb) + 3 * STATES.index(state)) % len(KINDS)]
    check(things, here, capfd, verb, kind, state, *(["--dry-run"] if verb in TRAINING else []))


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "kind", "state"), list(product(VERBS, KINDS, STATES)))
def test_no_traceback_in_the_whole_table(verb, kind, state, things, here, capfd):
    check(things, here, capfd, verb, kind, state)
