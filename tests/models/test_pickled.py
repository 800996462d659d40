"""Files of torch.save: the right entry, nothing executed, and one sentence for everything else."""

import argparse
import collections
import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from fastdeit.models import pickled

WEIGHTS = {"norm.weight": torch.arange(3.0), "head.bias": torch.ones(2)}
AVERAGE = {name: tensor + 10 for name, tensor in WEIGHTS.items()}
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
ARGS = argparse.Namespace(model="deit_tiny", lr=5e-4, betas=(0.9, 0.99), nested=argparse.Namespace(a=1))
TRAINING = {"model": WEIGHTS, "optimizer": OPTIMIZER, "epoch": 3, "args": ARGS, "scaler": {"scale": 65536.0}}


@pytest.fixture
def saved(tmp_path):
    def saved(content, name="w.pth", **options):
        torch.save(content, tmp_path / name, **options)
        return tmp_path / name

    return saved


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- the entry -------------------------------------------------------------------------------------------------------

LAYOUTS = {
    # What is in the file: (content, the entry that is taken, the weights that are)
    "bare": (WEIGHTS, "", WEIGHTS),
    "ordered": (collections.OrderedDict(WEIGHTS), "", WEIGHTS),
    "deit": ({"model": WEIGHTS}, "model", WEIGHTS),
    "deit of a training": (TRAINING | {"model_ema": AVERAGE}, "model", WEIGHTS),
    "cait": ({"model": {f"module.{k}": v for k, v in WEIGHTS.items()}}, "model", None),
    "timm": ({"state_dict": WEIGHTS, "state_dict_ema": AVERAGE, "arch": "x", "args": ARGS}, "state_dict", WEIGHTS),
    "only the average": ({"model_ema": AVERAGE, "epoch": 1}, "model_ema", AVERAGE),
    "dino": ({"student": WEIGHTS, "teacher": AVERAGE, "args": ARGS}, "teacher", AVERAGE),
    "nested": ({"checkpoint": {"model": WEIGHTS}, "epoch": 1}, "checkpoint.model", WEIGHTS),
    "of some other name": ({"ema_weights": AVERAGE, "optimizer": OPTIMIZER}, "ema_weights", AVERAGE),
    "an optimizer with names beside": ({"net": AVERAGE, "optimizer": {"exp_avg": WEIGHTS}}, "net", AVERAGE),
    "an optimizer with names": ({"model": WEIGHTS, "optimizer": {"exp_avg": WEIGHTS}}, "model", WEIGHTS),
}


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_entry_is_chosen_by_the_rule(saved, layout, options):
    content, entry, tensors = LAYOUTS[layout]
    found = pickled.read(saved(content, **options))
    assert found.entry == entry
    assert tensors is None or same(found.tensors, tensors)
    assert [note.startswith(f"took the entry {entry!r}") for note in found.notes] == [True] * bool(entry)


def test_what_was_not_taken_is_said(saved):
    found = pickled.read(saved(TRAINING | {"model_ema": AVERAGE}))
    assert found.notes == ("took the entry 'model', not model_ema (@model_ema would)",)


@pytest.mark.parametrize(
    ("content", "entry", "tensors"),
    [
        (TRAINING | {"model_ema": AVERAGE}, "model_ema", AVERAGE),
        ({"checkpoint": {"model": WEIGHTS, "average": AVERAGE}}, "checkpoint.average", AVERAGE),
        ({"student": WEIGHTS, "teacher": AVERAGE}, "student", WEIGHTS),
    ],
)
def test_another_entry_is_taken_where_it_is_named(saved, content, entry, tensors):
    found = pickled.read(saved(content), entry)
    assert same(found.tensors, tensors)
    assert (found.entry, found.notes) == (entry, ())


def test_tensors_of_a_card_and_parameters_are_read_on_the_cpu(saved, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
    path = saved({"model": {"a": nn.Parameter(torch.ones(2)), "b": torch.ones(2, dtype=torch.bfloat16)}})
    monkeypatch.undo()
    tensors = pickled.read(path).tensors
    assert {str(tensor.device) for tensor in tensors.values()} == {"cpu"}
    assert tensors["b"].dtype == torch.bfloat16
    assert torch.equal(tensors["a"], torch.ones(2))


# ---- nothing is executed ---------------------------------------------------------------------------------------------


class Calls:
    """An object whose unpickling calls `function(*args)`."""

    def __init__(self, function, *args, state=None):
        self.function, self.args, self.state = function, args, state

    def __reduce__(self):
        return (self.function, self.args) if self.state is None else (self.function, self.args, self.state)


class HasState:
    """An object that is made without a call, and handed a state."""

    def __setstate__(self, state):
        open(state["path"], "w").close()


def write(path):
    open(path, "w").close()


def canaries(path):
    """By name, contents that write the file `path` when they are unpickled as pickle does it."""
    has_state = HasState()
    has_state.path = str(path)
    nested = argparse.Namespace(model=Calls(write, str(path)))
    return {
        "a function": Calls(write, str(path)),
        "a command": Calls(os.system, f"touch {path}"),
        "built-in open": Calls(open, str(path), "w"),
        "eval": Calls(eval, f"open({str(path)!r}, 'w')"),
        "exec": Calls(exec, f"open({str(path)!r}, 'w')"),
        "an object with a state": has_state,
        "inside a Namespace": nested,
        "beside the weights": {"model": WEIGHTS, "args": Calls(write, str(path))},
        "a Namespace that is called": Calls(argparse.Namespace, state={"x": Calls(write, str(path))}),
        "FileType of argparse": Calls(argparse.FileType("w"), str(path)),
        "a getattr chain": Calls(getattr, Calls(__import__, "os"), "system"),
        "a partial": Calls(__import__("functools").partial(write, str(path))),
        "a file's own method": Calls(type(path).touch, path),
    }


NAMES = list(canaries(__import__("pathlib").Path("x")))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch, name, kind):
    canary, path = tmp_path / "canary", tmp_path / "w.pth"
    content = canaries(canary)[name]
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # what a user may have set to read other files
    with pytest.raises(ValueError, match=r"it uses |it is damaged|it holds no weights"):
        pickled.read(path)
    assert not canary.exists()


GLOBALS = """\
argparse FileType
argparse ArgumentParser
argparse Namespace.__init__
argparse Namespace.__init__.__globals__
argparse _sys.modules
os system
posix system
subprocess Popen
builtins eval
builtins exec
builtins getattr
builtins __import__
__builtin__ eval
importlib import_module
runpy run_path
functools partial
operator attrgetter
copyreg _reconstructor
pickle loads
_pickle loads
shutil rmtree
pathlib Path
pathlib PosixPath
torch load
torch.hub load
torch.storage _load_from_bytes
torch.utils.cpp_extension load
torch.jit load
numpy.core.multiarray _reconstruct
fastdeit.models.pickled read
"""


@pytest.mark.parametrize("line", GLOBALS.splitlines())
def test_no_name_but_that_of_a_namespace_is_allowed(tmp_path, line):
    """Each as the first thing that a pickle names and calls, on its own and inside the archive that torch writes."""
    module, name = line.split()
    program = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b")R."
    bare, archive = tmp_path / "bare.pth", tmp_path / "archive.pth"
    bare.write_bytes(program)
    buffer = io.BytesIO()
    torch.save({"model": WEIGHTS}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(archive, "w") as new:
        for part in old.namelist():
            new.writestr(part, program if part.endswith("data.pkl") else old.read(part))
    for path in (bare, archive):
        with pytest.raises(ValueError, match=r"it uses "):
            pickled.read(path)


@pytest.mark.parametrize("name", ["a function", "a command", "built-in open", "an object with a state", "eval"])
def test_the_canaries_sing(tmp_path, name):
    """By Python's own pickle they write the file, so that the test above sees something."""
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(canaries(canary)[name]))
    assert canary.exists()


def test_a_namespace_is_a_plain_object_and_stays_allowed_only_while_a_file_is_read(saved):
    path = saved({"model": WEIGHTS, "args": ARGS})
    assert same(pickled.read(path).tensors, WEIGHTS)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def test_a_namespace_cannot_be_given_methods_that_run(tmp_path):
    """A state with the names of special methods becomes attributes of the object, where Python does not look."""
    canary = tmp_path / "canary"
    state = {"__setstate__": 1, "__reduce__": 2, "__class__": "os.system", "__call__": str(canary)}
    torch.save({"model": WEIGHTS, "args": Calls(argparse.Namespace, state=state)}, tmp_path / "w.pth")
    try:
        found = pickled.read(tmp_path / "w.pth")
    except ValueError:
        return
    assert same(found.tensors, WEIGHTS)
    assert not canary.exists()


# ---- bad files -------------------------------------------------------------------------------------------------------


def module_file(path):
    torch.save(nn.Linear(2, 2), path)


def script_file(path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(path))


def truncated(path, share=0.5, **options):
    torch.save({"model": {"a": torch.randn(4000)}}, path, **options)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def flipped(path):
    """A zip whose pickle has other bytes in the middle."""
    buffer = io.BytesIO()
    torch.save({"model": WEIGHTS}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, data[:20] + b"\xff" * len(data[20:]) if name.endswith("data.pkl") else data)


BAD = {
    "empty file": (lambda path: path.write_bytes(b""), "it is damaged, or no file of torch.save"),
    "text": (lambda path: path.write_text("hello\n"), "it is damaged, or no file of torch.save"),
    "a tokenizer": (lambda path: path.write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00" * 50), "it is damaged, or no"),
    "json": (lambda path: path.write_text('{"model": 3}'), "it is damaged, or no file of torch.save"),
    "zip of something else": (lambda path: zipfile.ZipFile(path, "w").writestr("a.txt", "x"), "it is damaged, or no"),
    "half a zip": (truncated, "it is damaged, or no file of torch.save"),
    "most of a zip": (lambda path: truncated(path, 0.99), "it is damaged, or no file of torch.save"),
    "half a legacy file": (
        lambda path: truncated(path, _use_new_zipfile_serialization=False),
        "it is damaged, or no file of torch.save",
    ),
    "other bytes in the pickle": (flipped, "it is damaged, or no file|it uses "),
    "a whole model": (module_file, r"it uses torch\.nn\.modules\.linear\.Linear, and nothing but tensors"),
    "TorchScript": (script_file, "it is a TorchScript archive"),
    "numpy": (lambda path: torch.save({"a": np.ones(2)}, path), "it uses numpy"),
    "a best accuracy of numpy": (
        lambda path: torch.save({"model": WEIGHTS, "best": np.float64(1)}, path),
        r"it uses numpy.*torch\.save\(model\.state_dict\(\)",
    ),
    "a pickle of numbers": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "it is damaged, or no file"),
    "an optimizer alone": (
        lambda path: torch.save(OPTIMIZER, path),
        "it holds no weights; its entries are state, para",
    ),
    "an optimizer in an entry": (
        lambda path: torch.save({"optimizer": OPTIMIZER, "epoch": 3}, path),
        "it holds no weights; its entries are optimizer, epoch",
    ),
    "nothing": (lambda path: torch.save({}, path), "it holds no weights; it is empty"),
    "an empty model": (lambda path: torch.save({"model": {}}, path), "it holds no weights; its entries are model"),
    "a tensor": (lambda path: torch.save(torch.ones(2), path), "it holds no weights; it is a Tensor"),
    "a list": (lambda path: torch.save([torch.ones(2)], path), "it holds no weights; it is a list"),
    "None": (lambda path: torch.save(None, path), "it holds no weights; it is a NoneType"),
    "numbers among tensors": (
        lambda path: torch.save({"a": torch.ones(2), "b": 3}, path),
        "it holds no weights; its entries are a, b",
    ),
    "keys that are no text": (lambda path: torch.save({0: torch.ones(2)}, path), "it holds no weights"),
    "two of them": (
        lambda path: torch.save({"net_g": WEIGHTS, "net_d": WEIGHTS}, path),
        "it holds weights under net_g, net_d; say which with @net_g",
    ),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("case", BAD)
def test_a_file_that_cannot_be_used_is_refused_in_a_sentence(tmp_path, case):
    make, message = BAD[case]
    path = tmp_path / "w.bin"
    make(path)
    with pytest.raises(ValueError, match=message) as caught:
        pickled.read(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("content", "entry", "message"),
    [
        (TRAINING, "model_ema", "it has no weights under 'model_ema'; there are model"),
        (TRAINING, "optimizer", "it has no weights under 'optimizer'; there are model"),
        (WEIGHTS, "model", "the file itself is the weights; leave the entry out"),
        (OPTIMIZER, "model", "it has no weights under 'model'; its entries are state, param_groups"),
    ],
)
def test_an_entry_that_is_not_there_is_refused(saved, content, entry, message):
    with pytest.raises(ValueError, match=message):
        pickled.read(saved(content), entry)


def test_a_file_that_cannot_be_opened_is_an_error_of_the_system(tmp_path):
    with pytest.raises(OSError, match="nothing"):
        pickled.read(tmp_path / "nothing.pth")


def test_every_truncation_is_refused(tmp_path):
    """Cut at any byte, of either format, a file is refused in a sentence."""
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        buffer = io.BytesIO()
        torch.save({"model": WEIGHTS}, buffer, **options)
        whole, path = buffer.getvalue(), tmp_path / "w.pth"
        for cut in range(0, len(whole), 37):
            path.write_bytes(whole[:cut])
            with pytest.raises(ValueError, match=r"it is damaged|it uses "):
                pickled.read(path)
