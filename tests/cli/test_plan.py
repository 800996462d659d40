"""`fastdeit plan`: what it prints, what it refuses, and figures that must agree with each other."""

import json

import pytest
import torch

from fastdeit import cli
from fastdeit.data.sources import digits, kinds
from fastdeit.data.sources.datasets import open_pair
from fastdeit.engine import optimizers
from fastdeit.engine.options import OPTIMIZERS
from fastdeit.estimate import memory, report, subject
from fastdeit.estimate import model as estimate
from fastdeit.estimate import rows as estimate_rows
from fastdeit.estimate.designs import FUSED
from fastdeit.estimate.gpus import DEFAULT_GPUS, GPUS
from fastdeit.estimate.machines import Machine
from fastdeit.estimate.networks import Work
from fastdeit.recipe import resolve as recipe
from fastdeit.run import build
from fastdeit.run.groups import param_groups

TINY = "deit_tiny", "data.group_size=64", "--gpu", "A100", "--count", "8"
KEYS = {"recipe", "model", "teachers", "data", "run", "published", "plans", "notes"}
PLAN_KEYS = {
    *("gpu", "count", "nodes", "design", "precision", "batch_per_gpu", "images_per_second", "mfu", "step"),
    *(
        "interval",
        "preset",
        "ratio",
        "sizes",
        "communication",
        "memory",
        "largest_batch",
        "largest_group",
        "fits",
        "accumulate",
        "seconds",
        "usd",
        "basis",
    ),
}


@pytest.fixture
def plan(capsys):
    """The report of a command line."""

    def run(*argv):
        assert cli.main(["plan", *argv, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def fused(found):
    return next(row for row in found["plans"] if row["design"] == "fused")


def fails(capsys, *argv):
    assert cli.main(["plan", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fastdeit: ")
    assert "Traceback" not in err
    return err


# ---- what it says ----------------------------------------------------------------------------------------------------


def test_json_is_complete(plan):
    found = plan("deit_tiny", "data.group_size=64")
    assert found.keys() == KEYS
    assert {row["gpu"] for row in found["plans"]} == set(DEFAULT_GPUS)
    assert {row["count"] for row in found["plans"]} == {1, 8}
    for row in found["plans"]:
        assert row.keys() == PLAN_KEYS
        assert row["basis"].keys() == {"speed", "teacher", "communication", "memory"}
        assert row["seconds"]["total"] == sum(row["seconds"][part] for part in ("training", "evaluation", "teacher"))
        assert row["memory"]["total"] == pytest.approx(memory.total(row["memory"]["parts"]))
        assert 0 < row["mfu"] < 1
    for row in found["published"]:
        assert row["source"]
        assert row["modelled"] != row["published"]


def test_text_names_every_plan_and_what_it_rests_on(capsys):
    assert cli.main(["plan", *TINY]) == 0
    text = capsys.readouterr().out
    for word in ("8 A100", "modelled", "deit_tiny_patch16_224", "1,281,167", "(assumed)", "memory of a process"):
        assert word in text
    errors = estimate_rows.errors(whole=False)
    assert f"{min(errors):+.0%} to {max(errors):+.0%}" in text
    assert all(line == line.rstrip() for line in text.splitlines())


def planned(*overrides):
    """The first plan of the student of DeiT-Ti on an A100."""
    found = recipe.load("deit_tiny", ["data.group_size=8", "train.batch_size=64", "optim.ema_decay=0.9", *overrides])
    return report.report(found, [Machine(GPUS["A100"], 8, 1)])["plans"][0]


def test_what_is_frozen_has_no_gradients_and_nothing_goes_back_below_it():
    whole, probe, half, attention = (
        planned(f"model.freeze=[{words}]")
        for words in ("", "all_but_head", "embedding,blocks.0-5", "all_but_attention")
    )
    parts = {name: plan["memory"]["parts"] for name, plan in zip("wpha", (whole, probe, half, attention), strict=True)}
    assert parts["p"]["gradients"] == 4 * (192 * 1000 + 1000)
    assert parts["p"]["moments"] == 2 * parts["p"]["gradients"] == 2 * parts["p"]["ema"]
    assert sum(parts["p"]["blocks"]) == parts["p"]["embedding"] == parts["h"]["embedding"] == 0
    assert parts["h"]["blocks"] == [0] * 6 + parts["w"]["blocks"][6:]
    assert parts["a"]["blocks"] == parts["w"]["blocks"]  # positions are trained, so gradients go through every block
    assert parts["p"]["weights"] == parts["w"]["weights"]
    order = [plan["step"]["seconds"] for plan in (probe, half, attention, whole)]
    assert order == sorted(set(order))
    sent = [plan["communication"]["bytes"] for plan in (whole, half)]
    assert sent[1] / sent[0] == pytest.approx(parts["h"]["gradients"] / parts["w"]["gradients"])
    assert 0 < probe["mfu"] < 1


def test_blocks_that_are_computed_again_keep_their_input():
    whole, again = planned(), planned("engine.checkpoint_blocks=true")
    parts = again["memory"]["parts"]
    assert parts["blocks"] == [4.0 * 8 * 197 * 192] * 12
    assert parts["recomputed"] == max(whole["memory"]["parts"]["blocks"])
    assert again["memory"]["total"] < whole["memory"]["total"]
    assert again["step"]["seconds"] > whole["step"]["seconds"]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("freeze", ["", "embedding,blocks.0-2", "all_but_head"])
def test_an_optimizer_keeps_what_it_says(name, freeze):
    """As it does on real parameters, whatever is frozen."""
    words = [f"optim.name={name}", "optim.lr=1e-3", f"model.freeze=[{freeze}]", "model.name=deit_digits_patch8_32"]
    asked = recipe.load("deit_tiny", [*words, "model.image_size=32"])
    student = build.model(asked, 10, print)
    method = build.method(asked, student, 10, 1, None)
    state = optimizers.find(name)(param_groups(method, asked), asked.optim).state
    expected = sum(tensor.numel() for kind in state.values() for tensor in kind.values())
    known = asked.model_copy(update={"model": asked.model.model_copy(update={"num_classes": 10})})
    assert subject.subject(known).trained.states == expected


def test_the_same_command_prints_the_same(capsys):
    texts = []
    for _ in range(2):
        cli.main(["plan", *TINY])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_figures_follow_from_each_other(plan):
    row = fused(plan(*TINY, "--price", "2.5"))
    assert row["images_per_second"] == pytest.approx(1024 / row["step"]["seconds"])
    assert row["seconds"]["training"] == pytest.approx(300 * (1_281_167 // 1024) * row["step"]["seconds"])
    assert row["usd"] == pytest.approx(2.5 * 8 * row["seconds"]["total"] / 3600)
    assert row["batch_per_gpu"] == 128


def test_speeds_and_ratios_to_the_peer_have_intervals(plan, capsys):
    rows = plan("deit_small", "--gpu", "H200", "--count", "1")["plans"]
    by_design = {row["design"]: row for row in rows}
    peer = by_design["timm_compile"]
    for row in rows:
        low, high = row["interval"]
        assert low < row["images_per_second"] < high
        assert row["ratio"]["to"] == "timm_compile"
        assert row["ratio"]["value"] == pytest.approx(row["images_per_second"] / peer["images_per_second"])
        assert row["ratio"]["low"] <= row["ratio"]["value"] <= row["ratio"]["high"]
    assert [peer["ratio"][name] for name in ("low", "value", "high")] == [1, 1, 1]
    assert cli.main(["plan", "deit_small", "--gpu", "H200", "--count", "1"]) == 0
    ratio = by_design["fused"]["ratio"]
    assert f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" in capsys.readouterr().out


def test_the_epochs_of_a_run_of_steps_are_rounded(capsys):
    assert (
        cli.main(
            [
                "plan",
                *TINY[:-1],
                "1",
                "train.epochs=null",
                "train.steps=12",
                "train.batch_size=64",
                "optim.warmup_epochs=null",
                "--images",
                "1408",
            ]
        )
        == 0
    )
    assert "\nrun       0.545455 epochs, 12 steps of 64 images, " in capsys.readouterr().out


@pytest.mark.parametrize("recipe_name", ["deit_tiny", "deit_tiny_distilled"])
def test_twice_the_epochs_take_twice_the_time(plan, recipe_name):
    once, twice = (
        fused(plan(recipe_name, *TINY[1:], f"train.epochs={epochs}"))["seconds"]["training"] for epochs in (100, 200)
    )
    assert twice == pytest.approx(2 * once)


def test_evaluations_are_counted_as_train_counts_them(plan):
    often, seldom, last = (plan(*TINY, "train.epochs=10", f"train.eval_every={every}") for every in (1, 4, 100))
    assert [found["run"]["evaluations"] for found in (often, seldom, last)] == [10, 3, 1]
    assert fused(often)["seconds"]["evaluation"] == pytest.approx(10 * fused(last)["seconds"]["evaluation"])


def test_averaged_weights_are_evaluated_too(plan):
    plain, averaged = (fused(plan(*TINY, *words))["seconds"]["evaluation"] for words in ((), ("optim.ema_decay=0.99",)))
    assert averaged == pytest.approx(2 * plain)


def test_more_gpus_take_less_time_and_communicate(plan):
    one, eight, sixteen = (
        fused(plan("deit_tiny", "data.group_size=64", "--gpu", "A100", "--count", count)) for count in ("1", "8", "16")
    )
    assert one["communication"]["seconds"] == 0
    assert one["seconds"]["total"] > eight["seconds"]["total"] > sixteen["seconds"]["total"]
    assert [row["nodes"] for row in (one, eight, sixteen)] == [1, 1, 2]
    assert sixteen["communication"]["seconds"] > eight["communication"]["seconds"] > 0


def test_kept_activations_are_said_to_cost_memory(plan):
    without, kept = (plan(*TINY, f"engine.keep_activations={on}") for on in ("false", "true"))
    said = [note for note in kept["notes"] if note.startswith("engine.keep_activations=true takes ")]
    assert said == [note for note in without["notes"] if note.startswith("engine.keep")]
    more = (fused(kept)["memory"]["total"] - fused(without)["memory"]["total"]) / 2**30
    assert f"takes {more:,.2f} GiB of a GPU more than false" in said[0]
    assert more > 0
    assert fused(kept)["step"]["seconds"] < fused(without)["step"]["seconds"]
    assert not any("keep_activations" in note for note in plan(*TINY, "engine.checkpoint_blocks=true")["notes"])
    both = plan("deit_base", "--gpu", "H200", "--gpu", "A100", "--count", "1")["notes"]
    assert "engine.keep_activations=auto is planned as true on 1 H200; false on 1 A100" in both


@pytest.mark.parametrize("option", ["model.drop_path_skip=true", "engine.residual=bf16"])
def test_options_that_move_less_take_ours_less_time_and_memory(plan, option):
    """timm has neither of them."""
    without, found = plan(*TINY), plan(*TINY, option)
    assert fused(found)["step"]["seconds"] < fused(without)["step"]["seconds"]
    assert fused(found)["memory"]["total"] < fused(without)["memory"]["total"]
    peers = [[row["step"] for row in each["plans"] if row["design"] == "timm"] for each in (without, found)]
    assert peers[0] == peers[1]


def test_products_of_8_bits_are_planned_where_a_gpu_has_them_and_said_to_be_missing_elsewhere(plan):
    words = "deit_base", "data.group_size=64", "--gpu", "A100", "--gpu", "H200", "--count", "8"
    without, found = plan(*words), plan(*words, "engine.products=fp8")
    seconds = [
        {(row["gpu"], row["design"]): row["step"]["seconds"] for row in each["plans"]} for each in (without, found)
    ]
    faster = {key for key, value in seconds[0].items() if seconds[1][key] < value}
    assert faster == {("H200", "fused"), ("H200", "epilogue"), ("H200", "trial")}
    assert all(seconds[1][key] == value for key, value in seconds[0].items() if key not in faster)
    said = [note for note in found["notes"] if note not in without["notes"]]
    on_a100, on_h200 = said.pop(-2), said.pop()
    assert "preset epilogues (attention=fused_backward, mlp=epilogue) on 8 A100 (" in on_a100
    assert "preset default (attention=fused_backward, mlp=triton) on 8 H200 (" in on_h200
    assert said == [
        "A100 has no products of 8 bits: engine.products is planned there as precision",
        "how fast products of 8 bits are is judged, and its range is not in 5 to 95 %",
    ]


def test_samples_that_no_group_can_skip_are_refused(capsys):
    assert cli.main(["plan", *TINY, "model.drop_path_skip=true", "model.drop_path=0.001"]) == 2
    assert "model.drop_path_skip: of " in capsys.readouterr().err


@pytest.mark.parametrize("decay", ["null", "0.999"])
def test_checkpoints_beside_the_training_cost_a_copy_of_the_state(plan, decay):
    chosen = recipe.load("deit_tiny", [f"optim.ema_decay={decay}"])
    network = build.model(chosen, 1000, lambda text: None)
    count = sum(parameter.numel() for parameter in network.parameters())
    gib = 4 * count * (3 if decay == "null" else 4) / 2**30  # weights, two moments of AdamW, averages
    notes = plan(*TINY, f"optim.ema_decay={decay}", "engine.async_checkpoints=true")["notes"]
    assert any(f"async_checkpoints takes {gib:.2f} GiB of memory of the host" in note for note in notes), notes
    assert not any("async_checkpoints" in note for note in plan(*TINY)["notes"])


def test_the_steps_of_each_size_of_a_schedule_add_up(plan):
    """Epochs 0 to 9 with 160 pixels, the others with 224, which also take the memory."""
    words = *TINY, "train.epochs=30"
    small, whole = (fused(plan(*words, *size)) for size in (["model.image_size=160"], []))
    found = plan(*words, "data.size_schedule=[[0, 160], [10, 224]]")
    both, steps = fused(found), found["run"]["steps"]
    assert [part["steps"] for part in both["sizes"]] == [steps // 3, steps - steps // 3]
    seconds = [plan["step"]["seconds"] for plan in (small, whole)]
    # Fewer patches have fewer positions, of which the update at 160 pixels alone knows.
    assert [part["seconds"] for part in both["sizes"]] == pytest.approx(seconds, rel=1e-3)
    assert both["seconds"]["training"] == pytest.approx((seconds[0] + 2 * seconds[1]) / 3 * steps, rel=1e-3)
    assert both["step"]["seconds"] * steps == pytest.approx(both["seconds"]["training"])
    assert both["memory"]["total"] == whole["memory"]["total"]
    assert both["seconds"]["evaluation"] == whole["seconds"]["evaluation"]
    assert both["interval"][0] < both["images_per_second"] < both["interval"][1]
    parts = [small["mfu"] * seconds[0], 2 * whole["mfu"] * seconds[1]]
    assert both["mfu"] == pytest.approx(sum(parts) / (seconds[0] + 2 * seconds[1]), rel=1e-3)
    alone = fused(plan(*words, "data.size_schedule=[[0, 160]]"))
    assert alone["seconds"]["training"] == pytest.approx(small["seconds"]["training"], rel=1e-3)


def test_a_view_with_a_size_of_its_own_keeps_it_in_a_size_schedule(plan):
    schedule, view = "data.size_schedule=[[0, 96], [10, 160]]", "data.views={main: {size: 224}}"
    kept, whole = (fused(plan(*TINY, *words)) for words in ((schedule, view), ()))
    assert kept["seconds"]["training"] == pytest.approx(whole["seconds"]["training"])


def test_fsdp2_needs_less_memory_and_sends_more(plan):
    whole, parts = (plan(*TINY, f"engine.parallel={kind}", "--count", "8") for kind in ("ddp", "fsdp2"))
    assert parts["run"]["parallel"] == "fsdp2"
    assert fused(parts)["memory"]["parts"]["weights"] == fused(whole)["memory"]["parts"]["weights"] / 8
    assert fused(parts)["communication"]["bytes"] > fused(whole)["communication"]["bytes"]


def test_an_online_teacher_costs_time_and_memory(plan):
    alone, distilled = (fused(plan(name, *TINY[1:])) for name in ("deit_tiny", "deit_tiny_distilled"))
    assert alone["step"]["teacher_seconds"] == alone["memory"]["parts"]["teacher"] == 0
    assert distilled["step"]["teacher_seconds"] > 0.1 * distilled["step"]["seconds"]
    assert distilled["memory"]["parts"]["teacher"] > 4 * 83e6


def test_a_teacher_with_a_recipe_is_trained_first(plan):
    found = plan("digits", "--gpu", "A100")
    assert [each["name"] for each in found["teachers"]] == ["convnet_digits"]
    own = plan("digits_teacher", "--gpu", "A100")["plans"][0]["seconds"]
    assert fused(found)["seconds"]["teacher"] == pytest.approx(own["total"])


def test_bf16_on_a_v100_is_planned_in_fp16_and_said(plan):
    words = "data.group_size=64", "engine.precision=bf16", "--gpu", "V100", "--gpu", "A100", "--count", "8"
    found = plan("deit_tiny", *words)
    assert {row["gpu"]: row["precision"] for row in found["plans"]} == {"V100": "fp16", "A100": "bf16"}
    assert any("engine.precision=fp16" in note for note in found["notes"])
    assert not any("V100" in note for note in plan(*TINY)["notes"])


def test_what_does_not_fit_comes_with_what_would(plan, capsys):
    words = "deit_base_384", "--gpu", "V100", "--count", "1"
    row = fused(plan(*words))
    assert not row["fits"]
    advised = fused(plan(*words, f"train.accumulate={row['accumulate']}"))
    assert advised["fits"]
    assert advised["batch_per_gpu"] * 2 > advised["largest_batch"]
    cli.main(["plan", *words])
    assert f"train.accumulate={row['accumulate']}" in capsys.readouterr().out


def test_the_speed_of_what_does_not_fit_is_not_shown(capsys):
    assert cli.main(["plan", "deit_base_384", "--gpu", "V100", "--gpu", "H200", "--count", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines if line.startswith(("1 V100  ", "1 H200  "))]
    assert len(table) == 3 + 5  # the model knows no presets of a trial on a V100
    for row in table:
        does_not = row[-3:] == ["does", "not", "fit"]
        assert does_not == (row[1] == "V100")
        assert (row[3:7] == ["-"] * 4) == does_not


def test_a_remedy_names_the_designs_that_it_is_for(plan, capsys):
    words = "deit_base_384", "--gpu", "V100", "--count", "1"
    rows = {row["design"]: row["accumulate"] for row in plan(*words)["plans"]}
    assert cli.main(["plan", *words]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "do not fit" in line]
    assert len(said) == len(set(rows.values()))
    for line in said:
        machine, _, remedy = line.partition(": ")
        assert machine.startswith("1 V100, ")
        for design in machine.removeprefix("1 V100, ").split(", "):
            assert remedy.endswith(f"; with train.accumulate={rows.pop(design)} they do")
    assert not rows


def test_an_absurd_batch_has_the_remedy_of_any_other(plan):
    """The largest batch that a recipe can have."""
    row = fused(plan(*TINY, f"train.batch_size={2**24}"))
    assert row["batch_per_gpu"] == 2**21
    advised = fused(plan(*TINY, f"train.batch_size={2**24}", f"train.accumulate={row['accumulate']}"))
    assert advised["fits"]
    assert advised["batch_per_gpu"] * 2 > advised["largest_batch"]


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (("deit_base", "model.image_size=1536"), "nor does one mixing group of 64: set data.group_size to at most 10"),
        (("deit_base", "model.image_size=16384"), "nor does a single image: take a smaller model or smaller images"),
    ],
)
def test_where_not_even_a_mixing_group_fits(capsys, plan, words, remedy):
    words = *words, "--gpu", "V100", "--count", "1"
    assert cli.main(["plan", *words]) == 0
    assert f"fused: 1,024 images in a GPU do not fit; {remedy}\n" in capsys.readouterr().out
    row = fused(plan(*words))
    assert row["accumulate"] is None
    if row["largest_group"]:
        assert fused(plan(*words, "data.group_size=2", "train.accumulate=512"))["largest_batch"] == 10


def test_a_batch_larger_than_the_data_set_is_noted(plan):
    note = "a batch has more than the 1,281,167 training images: each is in it several times"
    assert note in plan(*TINY, "train.batch_size=2097152")["notes"]
    assert note not in plan(*TINY)["notes"]


def test_figures_of_absurd_runs_are_finite(plan):
    words = "train.epochs=1000000000000", "--images", str(2**63 - 1), "--price", "1000000"
    text = json.dumps(plan(*TINY, *words))
    assert "Infinity" not in text
    assert "NaN" not in text


def test_images_can_be_given(plan):
    found = plan(*TINY, "--images", "102400")
    assert found["data"] == {"images": 102_400, "held_out": 50_000, "assumed": None}
    assert found["run"]["steps"] == 300 * 100


def test_own_rows_are_used_and_named(tmp_path):
    found = recipe.load("deit_tiny", ["engine.precision=fp32", "data.source=synthetic"])
    machine = Machine(GPUS["A100"], 1, 1)
    student = subject.subject(found).student
    slow = 3 * sum(estimate.step(student, Work(64, "fp32", drop_path=False), FUSED, GPUS["A100"]))
    row = {"what": "step", "device": "cuda", "model": "deit_tiny_patch16_224", "batch": 64}
    row |= {"seconds": {"fastdeit": [slow]}, "environment": {"gpus": [{"name": "NVIDIA A100-SXM4-80GB"}]}}
    (tmp_path / "a100.jsonl").write_text(json.dumps(row) + "\n")

    (tmp_path / "empty").mkdir()
    before, after = (report.report(found, [machine], results=path) for path in (tmp_path / "empty", tmp_path))
    assert fused(after)["step"]["seconds"] == pytest.approx(3 * fused(before)["step"]["seconds"])
    assert fused(after)["basis"]["speed"] == "measured x3.00 (1 rows)"
    assert after["plans"][0] == before["plans"][0]
    assert any("nothing here is measured" in note for note in before["notes"])
    assert not any("nothing here is measured" in note for note in after["notes"])


# ---- networks and data -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_timm_transformers_are_recognised(plan, name):
    found = plan(*TINY, f"model.timm={name}")
    assert [row["design"] for row in found["plans"]] == ["timm", "timm_compile"]


def test_a_transformer_with_something_else_in_it_is_not(plan):
    found = plan(*TINY, "model.timm=vit_small_r26_s32_224")
    assert [row["design"] for row in found["plans"]] == ["eager"]
    assert any("not a plain vision transformer" in note for note in found["notes"])


def test_other_timm_models_follow_their_flops(plan):
    found = plan(*TINY, "model.timm=resnet18")
    assert [row["design"] for row in found["plans"]] == ["eager"]
    assert found["model"]["flops"] == pytest.approx(2 * 1.81e9, rel=0.01)
    assert any("FLOPs alone" in note for note in found["notes"])


def test_activations_of_other_networks_are_those_that_torch_keeps():
    layer = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU()).to("meta")
    counted = subject._activations(layer, (16, 16))
    pixels = 16 * 16 * 4
    assert counted == {"saved": (3 + 8) * pixels, "widest": (8 + 8) * pixels, "layers": 2}


def test_sizes_of_data_sets():
    of_one_size = {kind.name for kind in kinds.shipped() if not kind.named_splits}
    assert set(subject.SIZES) == {*of_one_size, "imagenet", "digits"}


def test_size_of_the_digits(tmp_path):
    train, held_out = open_pair("folder", digits.prepare(tmp_path))
    assert subject.SIZES["digits"] == (len(train), len(held_out), len(train.classes))


def test_size_of_synthetic_data(plan):
    found = plan(*TINY, "data.source=synthetic", "data.synthetic_samples=5000")
    assert found["data"] == {"images": 5000, "held_out": 500, "assumed": None}


# ---- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "name a recipe"),
        (("deit_tin",), "did you mean deit_tiny"),
        (("deit_tiny", "digits"), "expected one recipe"),
        (("deit_tiny", "--gpu", "H10"), "did you mean H100"),
        (("deit_tiny", "--count", "3"), "multiple of 256 x 1 x 3"),
        (("deit_tiny", "--count", "0"), "not a positive number"),
        (("deit_tiny", "--count", "16", "--nodes", "1"), "at most 8"),
        (("deit_tiny", "--count", "8", "--nodes", "3"), "the same number of GPUs"),
        (("deit_tiny", "--price", "2"), "one for each"),
        (("deit_tiny", "--gpu", "A100", "--price", "0"), "positive"),
        (("deit_tiny", "--gpu", "A100", "--price", "nan"), "positive"),
        (("deit_tiny", "--gpu", "A100", "--price", "inf"), "at most 1,000,000"),
        (("deit_tiny", "--gpu", "A100", "--price", "1e308"), "at most 1,000,000"),
        (("deit_tiny", "--gpu", ""), "known are V100, A100"),
        (("deit_tiny", "--count", "1000"), "multiple of 256 x 1 x 1000"),
        (("deit_tiny", "--images", "1" + 400 * "0"), "401 digits does not fit 64 bits"),
        (("deit_tiny", "--nodes", str(2**63)), "19 digits does not fit 64 bits"),
        (("deit_tiny", "train.epochs=1e400"), "must be a finite number"),
        (("deit_tiny", "model.image_size=100000"), "model.image_size: must be at most 16384, got 100000"),
        (("deit_tiny", "model.num_classes=1000000000"), "model.num_classes: must be at most 1000000"),
        (("deit_tiny", "engine.parallel=zero"), "must be one of ddp, fsdp2"),
        (("deit_tiny", "model.timm=vit_tinny_patch16_224"), "did you mean"),
        (("deit_tiny", "model.image_size=225"), "multiple of the patch size"),
    ],
)
def test_refused_with_a_reason(capsys, argv, message):
    assert message in fails(capsys, *argv)


def test_flops_that_cannot_be_counted_are_an_error(capsys, monkeypatch):
    def flops(self, image_size=None):
        raise NotImplementedError("no kernel on meta")

    from fastdeit.models import timm_model

    monkeypatch.setattr(timm_model.TimmModel, "flops", flops)
    assert "cannot be counted" in fails(capsys, *TINY, "model.timm=resnet26")


def test_a_model_by_import_path_gets_the_noise_of_its_training(plan):
    """Its activations are counted in a training forward."""
    found = plan(*TINY, "model.name=tests.plugins.sret:SReT", "model.drop_path=0")
    assert found["model"]["parameters"] > 0
