"""What trials leave in the cache, damaged caches, and cards that are not there."""

import json
from types import SimpleNamespace

import pytest
import torch

from fastdeit import kernels
from fastdeit.bench.count_card import pretended_card
from fastdeit.kernels import Tuning, _op
from fastdeit.kernels._op import REFERENCE
from fastdeit.kernels.trial import store
from tests.kernels.trials import (
    chosen,
    clock,
    raises,
    step,
    x,
)


def test_the_next_run_takes_what_was_found(make, begin, cache):
    op = make("slow", "quick")
    step(first := begin(), op)
    first.close()
    op.calls.clear()
    step(tuner := begin(), op)
    assert op.calls == ["quick"]
    (file,) = cache.glob("*.json")
    assert tuner.said == [f"kernels: {op.name} quick (4.0x PyTorch); as found before ({file})"]


def damaged(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


UNTIMED = {"calls": "0", "preset": "epilogues", "seconds": {"default": 1.0}, "failed": {}}
DAMAGE = {
    "no JSON": (lambda file: file.write_text("{"), "is not used: it is damaged"),
    "bytes": (lambda file: file.write_bytes(b"\xff\xfe"), "is not used: it is damaged"),
    "another value": (lambda file: file.write_text("[1]"), "is not used: it is damaged"),
    "later format": (lambda file: damaged(file, lambda c: c.update(format=2)), "it has format 2, and this fastdeit"),
    "another card": (lambda file: damaged(file, lambda c: c["place"].update(card="B900")), "it is of another card"),
    "no rows": (lambda file: damaged(file, lambda c: c.pop("rows")), "is not used: it is damaged (KeyError"),
    "half a row": (lambda file: damaged(file, lambda c: c["rows"][0].pop("backend")), "it is damaged (TypeError"),
    "short shape": (lambda file: damaged(file, lambda c: c["rows"][0]["shape"].pop()), "it is damaged (TypeError"),
    "no time": (lambda file: damaged(file, lambda c: c["rows"][0].update(seconds={})), "it is damaged (ValueError"),
    "a word for a time": (
        lambda file: damaged(file, lambda c: c["rows"][0]["seconds"].update(slow="x")),
        "it is damaged (ValueError",
    ),
    "a preset with a word for a time": (
        lambda file: damaged(
            file, lambda c: c["wholes"].append(UNTIMED | {"seconds": {"epilogues": 1, "default": "x"}})
        ),
        "it is damaged (ValueError: the preset epilogues has no time of default",
    ),
    "no presets": (lambda file: damaged(file, lambda c: c.pop("wholes")), "is not used: it is damaged (KeyError"),
    "a preset without time": (
        lambda file: damaged(file, lambda c: c["wholes"].append(UNTIMED)),
        "it is damaged (ValueError: the preset epilogues has no time",
    ),
    "a word for times": (
        lambda file: damaged(file, lambda c: c["wholes"].append(UNTIMED | {"seconds": "x"})),
        "it is damaged (TypeError",
    ),
    "a word": (lambda file: damaged(file, lambda c: c["rows"][0].update(seconds="x")), "it is damaged (TypeError"),
    "a folder": (lambda file: file.unlink() or file.mkdir(), "is not used: Is a directory"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_cannot_be_used_is_as_good_as_none(make, begin, cache, damage):
    spoil, sentence = DAMAGE[damage]
    op = make("slow", "quick")
    step(first := begin(), op)
    first.close()
    (file,) = cache.glob("*.json")
    spoil(file)
    op.calls.clear()
    step(tuner := begin(), op)
    assert "slow" in op.calls  # tried anew
    assert sentence in tuner.said[0]
    assert len(tuner.said) == (3 if damage == "a folder" else 2)
    if damage != "a folder":
        assert len(json.loads(file.read_text())["rows"]) == 1
    assert not list(cache.glob(".*"))


def test_a_backend_that_this_version_does_not_have(make, begin, cache):
    op = make("slow", "quick")
    step(first := begin(), op)
    first.close()
    (file,) = cache.glob("*.json")

    def rename(content):
        content["rows"][0].update(backend="marvel", seconds={"marvel": 1.0, REFERENCE: 2.0})

    damaged(file, rename)
    step(tuner := begin(), op)
    assert f"has marvel for {op.name}, which is not used: {op.name} has slow, quick, reference" in tuner.said[0]
    assert chosen(tuner) == {op.name: "quick"}


def test_a_cache_that_cannot_be_written_costs_a_sentence(make, begin, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTDEIT_CACHE", str(tmp_path / "file"))
    op, tuner = make("off", "slow", "quick"), begin()
    step(tuner, op)
    notes = [line for line in tuner.said if "cannot be written: Not a directory. Set FASTDEIT_CACHE=FOLDER" in line]
    assert notes
    assert "Please send" not in " ".join(tuner.said)
    assert tuner.said[-1] == f"kernels: {op.name} quick (4.0x PyTorch)"


def test_two_runs_at_once_keep_each_others_rows(make, begin, cache):
    one, other = make("quick"), make("quick")
    first, second = begin(), begin()
    with first.trying():
        one(x(), 2.0)
    step(second, other)
    (file,) = cache.glob("*.json")
    assert {row["op"] for row in json.loads(file.read_text())["rows"]} == {one.name, other.name}


def card(monkeypatch, name="NVIDIA B900", units=200, driver="610.10.01"):
    properties = SimpleNamespace(name=name, multi_processor_count=units)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(store, "_driver", lambda: driver)


def test_every_card_and_version_has_a_file_of_its_own(cache, monkeypatch):
    cuda = torch.device("cuda", 0)

    def path(timed="wall"):
        return store.Store(store.place(cuda, timed)).path

    card(monkeypatch)
    paths = [path(), path("device")]
    assert path() == paths[0]
    assert paths[0].name.startswith("nvidia-b900-")
    for change in ({"name": "NVIDIA B901"}, {"units": 100}, {"driver": "610.10.02"}):
        card(monkeypatch, **change)
        paths.append(path())
    card(monkeypatch)
    for where, name in ((torch, "__version__"), (store.triton, "__version__")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, "9.9.9")
            paths.append(path())
    with monkeypatch.context() as patch:
        patch.setattr(store, "_code", lambda: "other")
        paths.append(path())
    assert len(set(paths)) == len(paths) == 8


def test_the_driver_is_read_where_the_kernel_tells_it(tmp_path, monkeypatch):
    told = tmp_path / "version"
    monkeypatch.setattr(store, "_DRIVER", told)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    assert store._driver() == "CUDA 13000"
    told.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release\nGCC version: 12.3.0")
    assert store._driver() == "580.65.06"


def test_a_card_with_measurements_is_left_to_them(cache, monkeypatch):
    card(monkeypatch)
    at_width = {"backend": "triton", "because": "measured: 2.00 times reference"}
    row = {"backend": "triton", "because": "as compiled", "widths": {"48": at_width}}
    monkeypatch.setattr(_op, "_measured", lambda: {"sm_90": {"attention": row}})
    tuner = Tuning("auto", torch.device("cuda", 0), clock=clock, say=str)
    tried = []
    monkeypatch.setattr(tuner, "_decide", lambda op, args, shape: (tried.append(shape.width), (None, {}))[1])
    try:
        with pretended_card(), tuner.trying(), torch.no_grad():
            for width in (48, 96):
                kernels.attention(torch.zeros(1, 2, width, device="cuda"), 1)
    finally:
        tuner.close()
    assert tried == [96]


def test_nothing_is_tried_while_a_graph_is_recorded(cache, monkeypatch):
    card(monkeypatch)
    tuner = Tuning("on", torch.device("cuda", 0), clock=clock, say=str)
    monkeypatch.setattr(tuner, "_decide", raises(AssertionError("tried")))
    try:
        with pretended_card(capturing=True) as pretended, tuner.trying(), torch.no_grad():
            kernels.attention(torch.zeros(1, 2, 48, device="cuda"), 1)
            assert not pretended.launched
    finally:
        tuner.close()
