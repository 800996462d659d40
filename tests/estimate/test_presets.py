"""Which preset of kernels the model expects a trial to choose, and what a plan says of it."""

import json
from dataclasses import replace

import pytest

from fastdeit import cli
from fastdeit.bench.count_command import MODELS, cell
from fastdeit.bench.count_expected import of
from fastdeit.estimate import designs as estimate_designs
from fastdeit.estimate import model as estimate
from fastdeit.estimate import options, presets
from fastdeit.estimate.gpus import GPUS
from fastdeit.kernels.trial.presets import PRESETS
from tests.estimate.test_interval import WIDTHS, WORK, network

GOALS = {"base": 1.20, "small": 1.25, "tiny": 1.30}
PLAN = ["plan", "deit_tiny", "data.group_size=128", "--count", "1", "--json"]


def modelled(gpu="H200", width=192, work=WORK, **changes):
    gpu = replace(GPUS[gpu], **changes)
    return presets.modelled(network(width), work, estimate_designs.compared(gpu, work.precision, network(width)), gpu)


@pytest.mark.parametrize(("model", "size"), list(zip(MODELS, GOALS, strict=True)))
def test_the_step_that_a_trial_is_expected_to_choose_is_as_fast_as_it_shall_be(model, size):
    h200 = of(cell(model, 256), 90)[-1]
    assert (h200.gpu, h200.preset, h200.keep_activations) == ("H200", "epilogues", True)
    assert h200.forms == {"attention": "fused_backward", "mlp": "epilogue"}
    assert h200.low < h200.ratio < h200.high
    assert h200.ratio >= GOALS[size]


@pytest.mark.parametrize("width", WIDTHS.values())
def test_presets_of_a_trial_are_those_that_the_model_expects(width):
    found = modelled(width=width)
    assert {preset.name for preset in found} < PRESETS.keys()
    assert {(preset.attention, preset.mlp) for preset in found} == {
        (attention, mlp) for attention in ("triton", "fused_backward") for mlp in ("triton", "epilogue")
    }
    times = [sum(estimate.step(network(width), WORK, preset.design, GPUS["H200"])) for preset in found]
    assert times == sorted(times)
    # The design asks no table: on an A100 it has one for attention.
    split = next(p for p in modelled("A100") if (p.attention, p.mlp) == ("triton", "triton"))
    assert estimate_designs.selected(split.design, network(192).vit, WORK, GPUS["A100"]).attention == "triton"


def test_what_is_expected_follows_the_card():
    assert (modelled(epilogue=2.0)[0].mlp, modelled(epilogue=2.0)[0].name) == ("triton", "default")
    # Attention in one kernel takes 208 tokens; of two that are the same the default is named.
    long = replace(network(192), vit=replace(network(192).vit, patches=400))
    found = presets.modelled(long, WORK, estimate_designs.compared(GPUS["H200"], "bf16", long), GPUS["H200"])
    assert found[0].attention == "triton"


def test_where_there_is_nothing_to_choose():
    assert modelled("V100", work=replace(WORK, precision="fp16")) == []
    assert modelled(work=replace(WORK, precision="fp32")) == []
    tiny = cell(MODELS[-1], 8)
    assert of(tiny, 70) == of(replace(tiny, precision="fp32"), 90) == []
    eight = [options.eight_bit(design) for design in estimate_designs.compared(GPUS["H200"], "bf16", network(192))]
    found = presets.modelled(network(192), WORK, eight, GPUS["H200"])
    assert {preset.mlp for preset in found} == {"triton"}


def test_a_plan_says_what_a_trial_is_expected_to_choose(capsys):
    assert cli.main([*PLAN, "--gpu", "H200", "--gpu", "V100"]) == 0
    found = json.loads(capsys.readouterr().out)
    of_trial = [plan for plan in found["plans"] if plan["design"] == "trial"]
    assert [(plan["gpu"], plan["preset"]["name"]) for plan in of_trial] == [("H200", "epilogues")]
    others = [plan for plan in found["plans"] if plan["gpu"] == "H200" and plan["preset"] is None]
    ratio = of_trial[0]["ratio"]
    assert ratio["value"] >= max(plan["ratio"]["value"] for plan in others)
    assert ratio["low"] >= max(plan["ratio"]["low"] for plan in others)  # it takes the fastest of each draw
    (note,) = [note for note in found["notes"] if note.startswith("a trial is expected")]
    assert "the preset epilogues (attention=fused_backward, mlp=epilogue) on 1 H200 (modelled" in note
    assert cli.main([*PLAN, "--gpu", "H200", "engine.autotune=off"]) == 0
    assert "trial" not in [plan["design"] for plan in json.loads(capsys.readouterr().out)["plans"]]
