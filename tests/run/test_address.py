"""Every form of an address, and what is said of words that are none."""

import pytest

from fastdeit.errors import UsageError
from fastdeit.run.address import PICKLES, Address, parse


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a run, its checkpoint, and files that hold nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    step = tmp_path / "runs" / "x" / "checkpoints" / "step_00000010"
    step.mkdir(parents=True)
    (step / "manifest.json").touch()
    (tmp_path / "runs" / "no_run").mkdir()
    (tmp_path / "a@b" / "checkpoints" / "step_00000001").mkdir(parents=True)
    (tmp_path / "hub").mkdir()
    for name in ("hub/model.safetensors", "w.safetensors", "w.npz", "w", "me@home.pth"):
        (tmp_path / name).touch()
    for ending in PICKLES:
        (tmp_path / f"w{ending}").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("text", "kind", "path", "chosen"),
    [
        ("runs/x", "run", "runs/x", {}),
        ("runs/x/", "run", "runs/x", {}),
        ("runs/x@best", "run", "runs/x", {"best": True}),
        ("runs/x@ema", "run", "runs/x", {"ema": True}),
        ("runs/x@step=10", "run", "runs/x", {"step": 10}),
        ("runs/x@step=0", "run", "runs/x", {"step": 0}),
        ("runs/x@best,ema", "run", "runs/x", {"best": True, "ema": True}),
        ("runs/x@ema,best", "run", "runs/x", {"best": True, "ema": True}),
        ("runs/x@ema,step=10", "run", "runs/x", {"step": 10, "ema": True}),
        ("runs/x/checkpoints/step_00000010", "checkpoint", "runs/x/checkpoints/step_00000010", {}),
        ("runs/x/checkpoints/step_00000010@ema", "checkpoint", "runs/x/checkpoints/step_00000010", {"ema": True}),
        ("a@b", "run", "a@b", {}),
        ("a@b@best", "run", "a@b", {"best": True}),
        ("w.safetensors", "safetensors", "w.safetensors", {}),
        *((f"w{ending}", "pickle", f"w{ending}", {}) for ending in PICKLES),
        ("w.pth@model_ema", "pickle", "w.pth", {"entry": "model_ema"}),
        ("w.pth.tar@checkpoint.model", "pickle", "w.pth.tar", {"entry": "checkpoint.model"}),
        ("me@home.pth", "pickle", "me@home.pth", {}),
        ("me@home.pth@model", "pickle", "me@home.pth", {"entry": "model"}),
    ],
)
def test_every_form(here, text, kind, path, chosen):
    assert parse(text) == Address(text, kind, parse(path).path, **chosen)
    assert parse(text).path.samefile(path)
    assert parse(f"~/{text}").path.samefile(path)
    assert parse(f"{here}/{text}").kind == kind


def test_a_model_of_timm(here):
    assert parse("timm:vit_base_patch16_224.augreg_in21k") == Address(
        "timm:vit_base_patch16_224.augreg_in21k", "timm", name="vit_base_patch16_224.augreg_in21k"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"the directory \. is neither a run"),
        ("runs/no_rum", r"there is no runs/no_rum; did you mean no_run"),
        ("runs/elsewhere", r"there is no runs/elsewhere; weights are addressed as RUN, RUN@best"),
        ("nowhere/y", r"there is no nowhere/y; there is no nowhere either"),
        ("w.pt_", r"there is no w\.pt_; did you mean w\.pt"),
        ("runs", r"the directory runs is neither a run \(it has no checkpoints/\) nor a checkpoint"),
        ("hub", r"is neither a run .* nor a checkpoint; its file hub/model\.safetensors can be addressed"),
        ("x" * 300, "it cannot be looked for: File name too long"),
        ("~nobody_of_that_name/x", "it cannot be looked for: Could not determine home directory"),
        ("a\0b", "there is no a"),
        ("runs/no_run@best", r"the directory runs/no_run is neither a run"),
        ("a@b/checkpoints/step_00000001", "has no manifest.json, so it is no whole checkpoint"),
        ("runs/x@bset", "@bset says nothing of a run; did you mean best"),
        ("runs/x@", "@ says nothing of a run; there are @best, @ema and @step=1250"),
        ("runs/x@best,", "@ says nothing of a run"),
        ("runs/x@step", "@step says nothing of a run; did you mean step=1250"),
        ("runs/x@step=", "@step= says nothing of a run; did you mean step=1250"),
        ("runs/x@step=-1", "says nothing of a run"),
        ("runs/x@step=1e3", "says nothing of a run"),
        ("runs/x@step=123456789", "says nothing of a run"),
        ("runs/x@key", "@key says nothing of a run"),
        ("runs/x@best=1", "@best=1 says nothing of a run"),
        ("runs/x@ema,ema", "ema stands there twice"),
        ("runs/x@step=1,step=2", "step stands there twice"),
        ("runs/x@best,step=10", "best and step each name a checkpoint; give one of them"),
        ("runs/x/checkpoints/step_00000010@best", "a checkpoint takes only @ema, not @best"),
        ("runs/x/checkpoints/step_00000010@", "a checkpoint takes only @ema, not @;"),
        ("w.safetensors@ema", "a safetensors file holds one set of weights; leave out @ema"),
        ("w.pth@", r"name an entry behind the @, as in w\.pth@model_ema"),
        ("w.npz", r"w\.npz does not look like weights; they are addressed as RUN"),
        ("w", "w does not look like weights"),
        ("timm:", "name a model of timm"),
        ("timm:vit@ema", "timm's models have one set of weights; leave out @ema"),
        ("timm:@ema", "name a model of timm"),
    ],
)
def test_words_that_are_no_address(here, text, message):
    with pytest.raises(UsageError, match=message) as caught:
        parse(text)
    assert str(caught.value).startswith(f"{text}: ")
    assert "\n" not in str(caught.value)
