"""`fastdeit bench step` and `bench forward`: both sides do the same work, and what cannot run is told."""

import json
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention import SDPBackend

from fastdeit import cli, methods, models
from fastdeit.bench import (
    cells,
    kernels,
    measure,
    places,
    step,
    stronger_peers,
    watching,
)
from fastdeit.bench import (
    peers as bench_peers,
)
from fastdeit.bench.measure import CannotRun
from fastdeit.bench.step import Cell
from fastdeit.engine.dist import World
from fastdeit.engine.guard import Guard
from fastdeit.engine.metrics import MetricsLog
from fastdeit.errors import UsageError
from fastdeit.methods.teacher import Teacher
from tests.toys import toy_context

CPU = torch.device("cpu")
PLAIN, DISTILLED, TEACHER = "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "test_resnet"
TINY = ["--image-size", "32", "--batch", "2", "--rounds", "2", "--device", "cpu"]


def tiny(what="step", model=DISTILLED, **changes):
    return Cell(**{"what": what, "model": model, "batch": 2, "image_size": 32, "precision": "fp32"} | changes)


@pytest.mark.parametrize(
    ("what", "kind", "method", "share"),
    [
        ("norm", watching.kernels, "global_norm", 1),
        ("guard", Guard, "judge", 1),
        ("drift", watching.replicas, "slots", 50),
        ("preemption", World, "stop_requested", 1),
        ("log", MetricsLog, "write", 50),
    ],
)
def test_each_part_of_watching_is_timed(monkeypatch, what, kind, method, share):
    ours, _, _ = step.engine(tiny(), CPU, "none")
    ours.step([step.batch(tiny(), ours.method.noise(), CPU)], 1e-4)
    monkeypatch.setattr(watching, "_CALLS", 2)
    usual = getattr(kind, method)

    def slow(*args, **options):
        time.sleep(0.02)
        return usual(*args, **options)

    monkeypatch.setattr(kind, method, slow)
    found = watching.seconds(ours, 1)
    assert found[what] >= 0.02 / share
    assert all(seconds > 0 for seconds in found.values())


# ---- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_row_of_a_step_has_all_that_is_needed_to_read_it(tmp_path, capsys):
    out = tmp_path / "new" / "rows.jsonl"
    flags = f"--model {DISTILLED} --teacher {TEACHER} --ema --peer timm --peer accelerate"
    flags += " --peer timm_compile_cudnn --peer timm_compile_graph"
    assert cli.main(["bench", "step", *TINY, *flags.split(), "--out", str(out)]) == 0
    row = json.loads(out.read_text())
    sides = ["fastdeit", "timm", "accelerate"]
    for field in ("seconds", "cpu_seconds", "flops", "peak_bytes"):
        assert list(row[field]) == sides
    assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in row["seconds"].values())
    assert (row["what"], row["model"], row["batch"], row["images"]) == ("step", DISTILLED, 2, 2)
    assert (row["image_size"], row["precision"], row["teacher"], row["ema"]) == (32, "fp32", TEACHER, True)
    assert set(row["watching_seconds"]) == {"norm", "guard", "drift", "heartbeat", "preemption", "progress", "log"}
    assert (row["drop_path"], row["capture"], row["threads"]) == (0.1, {"fastdeit": "none"}, torch.get_num_threads())
    graph = "a CUDA graph needs a CUDA device"
    assert row["failed"] == {
        "timm_compile_cudnn": "cuDNN's attention needs a CUDA device",
        "timm_compile_graph": graph,
    }
    assert list(row["ratio"]) == ["timm", "accelerate"]
    assert row["matrix_flops_per_s"] > 0
    assert row["copy_bytes_per_s"] > 0
    assert set(row["peak_bytes"].values()) == {None}
    assert row["kernels"]["attention"] == "reference"
    printed = capsys.readouterr().out
    assert "watching over a run takes " in printed
    assert "timm_compile_cudnn  cannot run: cuDNN's attention needs a CUDA device" in printed
    assert "of the matrix rate" in printed
    assert cells.CPU_NOTE in printed


@pytest.mark.slow
def test_a_row_of_a_forward(capsys):
    argv = ["bench", "forward", *TINY, "--precision", "bf16", "--peer", "all", "--peer", "timm", "--capture", "graph"]
    peers = {name: build for name, build in bench_peers.PEERS.items() if "compile" not in name}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_peers, "PEERS", peers | dict.fromkeys(bench_peers.PEERS.keys() - peers.keys(), broken))
        assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    assert "forward of deit_tiny_patch16_224 on cpu, batch 2, 32 px, bf16, 2 interleaved rounds" in printed
    told = dict(line.split(maxsplit=1) for line in printed.splitlines() if "cannot run" in line)
    assert told["fastdeit_graph"] == "cannot run: a CUDA graph needs a CUDA device"
    assert told["timm_compile"] == "cannot run: RuntimeError: it broke"
    assert "times as fast" not in printed  # none of ours ran


def broken(wanted, device):
    raise RuntimeError("it broke\nin two lines")


def test_a_side_that_breaks_in_a_round_is_taken_out_and_the_others_go_on(monkeypatch):
    calls = []

    def breaks(wanted, device):
        def run():
            calls.append("breaks")
            if len(calls) > 2:
                raise torch.OutOfMemoryError("no room")

        return step.Side(run, 1.0)

    good = step.Side(lambda: None, 1.0)
    builders = {"fastdeit": lambda wanted, device: good, "timm": breaks, "accelerate": broken}
    row = step.measure(tiny(), builders, 3, CPU)
    assert row["failed"] == {"timm": "OutOfMemoryError: no room", "accelerate": "RuntimeError: it broke"}
    assert list(row["seconds"]) == list(row["cpu_seconds"]) == list(row["flops"]) == ["fastdeit"]
    assert len(row["seconds"]["fastdeit"]) == len(row["matrix_seconds"]) == 3
    cells.finish(row, None)
    assert row["ratio"] == {}


def test_rounds_alternate_and_the_first_may_be_thrown_away():
    order = []

    def side(name):
        return lambda: (order.append(name), (float(len(order)), 0.5))[1]

    found = measure.interleave({"a": side("a"), "b": side("b")}, 2, CPU, discard=1)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert found["seconds"] == {"a": [4.0, 5.0], "b": [3.0, 6.0]}
    with pytest.raises(ZeroDivisionError):
        measure.interleave({"a": lambda: 1 / 0}, 1, CPU)


def test_flops_are_those_of_each_side_and_mfu_is_their_share_of_the_matrix_rate():
    ours, theirs = (models.build(PLAIN, image_size=32), models.build_timm(PLAIN, image_size=32))
    judge = models.build_timm(TEACHER)
    assert theirs.flops() > ours.flops()
    assert step.step_flops(ours, None, tiny("forward")) == 2 * ours.flops()
    assert step.step_flops(ours, None, tiny()) == 6 * ours.flops()
    assert step.step_flops(ours, judge, tiny()) == 6 * ours.flops() + 2 * judge.flops(32)
    row = {"flops": {"a": 6e9}, "seconds": {"a": [1.0, 2.0, 9.0]}, "matrix_flops_per_s": 10e9}
    assert cells.mfu(row, "a") == pytest.approx(0.3)
    assert cells.mfu(row | {"matrix_flops_per_s": None}, "a") is None
    rows = 2 * (4 + 2)
    shapes = [(rows, 576, 192), (rows, 192, 192), (rows, 768, 192), (rows, 192, 768)]
    assert step.products(tiny()) == shapes
    assert measure.flops_of_products(shapes) == 2 * rows * 192 * (576 + 192 + 768 + 768)


# ---- the same work ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "taught"), [(PLAIN, False), (DISTILLED, False), (DISTILLED, True), (PLAIN, True)])
def test_both_sides_minimise_the_same_loss(model, taught):
    torch.manual_seed(0)
    theirs, ours = models.build_timm(model, image_size=32), models.build(model, image_size=32)
    ours.load_state_dict(theirs.state_dict())
    judge = models.build_timm(TEACHER).eval().requires_grad_(False) if taught else None
    batch = step.batch(tiny(model=model, batch=4), {}, CPU)
    if taught:
        frozen = Teacher(judge, mean=measure.MEAN, std=measure.STD)
        use, config = "distill", {"teacher": {"timm": TEACHER}}
    else:
        use, config, frozen = "supervised", {}, None
    context = toy_context(1000, frozen)
    method = methods.find(use)(ours, methods.config(use)(**config), context)
    images = batch.pixels()
    one_hot = nn.functional.one_hot(torch.stack([*batch.targets[:2]]), 1000) * 0.9 + 0.1 / 1000
    lam = batch.targets.lam[:, None]
    targets = lam * one_hot[0] + (1 - lam) * one_hot[1]
    judged = judge(images) if taught else None
    theirs.inner.train()
    expected = bench_peers.loss(theirs.inner, images, targets, judged)
    torch.testing.assert_close(method(batch).loss, expected)


def test_both_averages_are_the_same_and_move():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    averages = [bench_peers._average(model, compiled) for compiled in (False, True)]
    before = model.weight.detach().clone()
    kept = [cell.cell_contents for average in averages for cell in average.__closure__]
    emas = next(item for item in kept if hasattr(item, "module"))
    (lists,) = (item for item in kept if isinstance(item, list) and item[0].data_ptr() != model.weight.data_ptr())
    with torch.no_grad():
        model.weight += 1
    for average in averages:
        average()
    expected = before + (1 - step.EMA_DECAY)
    torch.testing.assert_close(emas.module.weight.detach(), expected)
    torch.testing.assert_close(lists[0], expected)


@pytest.mark.parametrize("name", ["fastdeit", "timm", "accelerate"])
@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "fp16"])
def test_a_step_of_every_side_moves_the_weights_and_the_average(name, precision, monkeypatch):
    built = []

    def keep(build):
        return lambda *args, **options: built.append(build(*args, **options)) or built[-1]

    monkeypatch.setattr(models, "build", keep(models.build))
    monkeypatch.setattr(models, "build_timm", keep(models.build_timm))
    wanted = tiny(precision=precision, teacher=TEACHER, ema=True)
    side = (step.OURS | bench_peers.PEERS)[name](wanted, CPU)
    student = next(model for model in built if model.distilled)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    for _ in range(8):  # fp16's first loss scales may be too high
        side.run()
        after = student.state_dict()
        if not torch.equal(before["head.weight"], after["head.weight"]):
            break
    assert all(not torch.equal(before[key], after[key]) for key in before if "weight" in key)
    assert all(value.isfinite().all() for value in after.values())
    (judge,) = (model for model in built if not model.distilled)
    assert not judge.training
    assert not any(parameter.requires_grad for parameter in judge.parameters())


def test_random_teacher_unless_its_weights_are_on_disk(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args: None)
    assert not step.on_disk("regnety_160")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args: "/cache/model.safetensors")
    assert step.on_disk("regnety_160")
    assert not step.on_disk("vit_base_patch16_224.augreg_in21k")  # of other classes
    assert step.teacher(tiny()) is None


@pytest.fixture
def one_block(monkeypatch):
    """timm's transformers have one block: compiling takes time for each."""

    def build(name, **options):
        built = whole(name, **options)
        if hasattr(built.inner, "blocks"):
            built.inner.blocks = built.inner.blocks[:1]
        return built

    whole = models.build_timm
    monkeypatch.setattr(models, "build_timm", build)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["step", "forward"])
def test_the_compiled_peer(what, one_block, monkeypatch):
    compiled = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", lambda function, mode, **options: compiled(function, **options))
    wanted = tiny(what, **({"teacher": TEACHER, "ema": True} if what == "step" else {}))
    side = bench_peers.PEERS["timm_compile"](wanted, CPU)
    side.run()
    side.run()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["step", "forward"])
def test_the_peer_compiled_by_inductor(what, one_block):
    side = bench_peers.PEERS["timm_compile"](tiny(what), CPU)
    side.run()
    side.run()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["step", "forward"])
def test_compiled_sides_in_one_process_have_the_attention_that_they_name(what, one_block, monkeypatch):
    compiled = []

    def keep(graph, inputs):
        compiled.append({str(node.target) for node in graph.graph.nodes})
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=aot_autograd(fw_compiler=keep)))
    torch.compiler.reset()
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        monkeypatch.setitem(bench_peers.VARIANTS, "pinned", bench_peers.Variant("default", backend))
        bench_peers.side(tiny(what, PLAIN), CPU, name="pinned").run()
    assert ["flash" in str(forward) for forward in compiled[:: 2 if what == "step" else 1]] == [True, False]


@pytest.mark.parametrize("model", [PLAIN, DISTILLED])
def test_a_pruned_peer_is_the_peer(model, one_block):
    """In float64: outputs and the gradients of all parameters, and fewer FLOPs."""
    torch.manual_seed(0)
    known = models.build_timm(model, **(tiny(model=model).options | {"drop_path": 0.0}))
    known.inner.train()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    found, flops = [], []
    for _ in range(2):
        flops.append(known.flops())
        out = known.inner.double()(x)
        loss = sum((part * part.softmax(1)).sum() for part in (out if isinstance(out, tuple) else (out,)))
        found.append([loss, *torch.autograd.grad(loss, list(known.inner.parameters()))])
        if not flops[1:]:
            stronger_peers.prune(known.inner.float())
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
    assert flops[1] < flops[0]


def test_a_model_whose_heads_read_more_is_not_pruned():
    with pytest.raises(CannotRun, match="heads of timm's ResNet read more than the class token"):
        stronger_peers.prune(models.build_timm("test_resnet").inner)
    known = models.build_timm("test_vit")
    stronger_peers.prune(known.inner)
    with pytest.raises(CannotRun, match="last block of timm's VisionTransformer is not a plain one"):
        stronger_peers.prune(known.inner)


@pytest.mark.parametrize(
    ("side", "capability", "device", "why"),
    [
        ("timm_compile_fa3", (9, 0), "cpu", "FA3 needs a CUDA device"),
        ("timm_compile_fa4_pruned", (9, 0), "cpu", "FA4 needs a CUDA device"),
        ("timm_compile_fa3", (8, 0), "cuda", "FA3 needs sm_90, not sm_80"),
        ("timm_compile_fa3", (10, 0), "cuda", "FA3 needs sm_90, not sm_100"),
        ("timm_compile_fa4", (8, 9), "cuda", "FA4 needs sm_90 or sm_100, not sm_89"),
        ("timm_compile_fa3", (9, 0), "cuda", "FA3 is not installed: there is no package absent"),
        ("timm_compile_fa4", (10, 0), "cuda", "FA4 is not installed: there is no package absent.inner"),
    ],
)
def test_newer_flash_attention_that_cannot_run_says_why(side, capability, device, why, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for name, package in (("FA3", "absent"), ("FA4", "absent.inner")):
        monkeypatch.setitem(stronger_peers.FLASH, name, stronger_peers.FLASH[name]._replace(package=package))
    with pytest.raises(CannotRun, match=f"^{why}$"):
        bench_peers.PEERS[side](tiny(), torch.device(device, 0 if device == "cuda" else None))


def test_a_torch_that_no_flash_attention_can_be_given_to(monkeypatch):
    monkeypatch.delattr(torch.nn.attention, "activate_flash_attention_impl")
    with pytest.raises(CannotRun, match="FA3 needs a torch that other FlashAttentions can be given to, not 2"):
        bench_peers.PEERS["timm_compile_fa3"](tiny(), CPU)


def test_flash_attention_is_changed_for_the_calls_of_its_side_alone_and_outside_of_the_time(monkeypatch):
    events = []

    class Handle:
        def remove(self):
            events.append("restored")

    def activate():
        events.append("activated")
        return Handle()

    monkeypatch.setitem(torch.nn.attention._registry._FLASH_ATTENTION_IMPLS, "fake", activate)
    clock = time.perf_counter
    monkeypatch.setattr(measure.time, "perf_counter", lambda: events.append("clock") or clock())
    fast = step.Side(lambda: events.append("run"), 1.0, around=partial(stronger_peers.flash, "fake"))
    timer, _, _ = step.ready(lambda wanted, device: fast, tiny(), CPU)
    assert (events[0], events[-1]) == ("activated", "restored")
    events.clear()
    timer()
    assert events == ["activated", "clock", "run", "clock", "restored"]


@pytest.mark.gpu
@pytest.mark.card
@pytest.mark.parametrize("what", ["step", "forward"])
def test_every_side_on_a_card(what):
    device = torch.device("cuda", 0)
    changes = {"teacher": TEACHER, "ema": True} if what == "step" else {}
    wanted = replace(tiny(what, **changes), batch=16, precision=step.default_precision(device))
    row = step.measure(wanted, cells.builders(step.CAPTURES, cells.STEP_PEERS), 2, device)
    assert {"fastdeit", "fastdeit_compile", "fastdeit_graph", "timm", "accelerate"} <= row["seconds"].keys()
    if row["precision"] != "fp16":  # before sm_80 there is no FlashAttention
        assert {"timm_compile", "timm_compile_graph"} <= row["seconds"].keys()
    assert all(peak > 0 for peak in row["peak_bytes"].values())
    assert row["clocks"] is None or row["clocks"]["sm_mhz"] > 0


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["step", "--model", "deit_tini_patch16_224"], "did you mean deit_tiny_patch16_224"),
        (["step", "--model", "convnet_digits"], "convnet_digits is no vision transformer"),
        (["step", "--batch", "0"], "0 is not a positive number"),
        (["step", "--peer", "tim"], "invalid choice: 'tim'"),
        (
            ["step", "--peer", "dali"],
            "invalid choice: 'dali' (choose from 'timm', 'timm_compile', 'timm_compile_cudnn'",
        ),
        (["step", "--precision", "fp8"], "invalid choice: 'fp8'"),
        (["step", "--image-size", "100"], "not a multiple of the patch size 16"),
        (["step", "--teacher", "regnety_16"], "did you mean regnety_160"),
        (["forward", "--ema"], "fastdeit bench forward has no flag --ema"),
        (["data", "--peer", "accelerate"], "invalid choice: 'accelerate' (choose from 'timm', 'deit', 'torchvision'"),
    ],
)
def test_mistakes_are_told_before_anything_runs(argv, message, capsys, monkeypatch):
    monkeypatch.setattr(step, "measure", None)
    assert cli.main(["bench", *argv, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("place", ["", "file/rows.jsonl"])
@pytest.mark.parametrize("verb", [["bench", "step"], ["kernels", "bench"]])
def test_rows_that_cannot_be_written_are_told_before_anything_is_measured(verb, place, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(step, "measure", None)
    monkeypatch.setattr(kernels, "measure", None)
    assert cli.main([*verb, "--device", "cpu", "--out", str(tmp_path / place)]) == 2
    assert f"--out {tmp_path / place} cannot be written: " in capsys.readouterr().err


def test_looking_whether_rows_can_be_written_changes_nothing(tmp_path):
    new, old = tmp_path / "new" / "rows.jsonl", tmp_path / "old.jsonl"
    old.write_text("{}\n")
    for path in (new, old):
        places.check_out(str(path))
    assert not new.exists()
    assert old.read_text() == "{}\n"


def test_a_precision_that_the_card_does_not_have(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    card = torch.device("cuda", 0)
    with pytest.raises(UsageError, match="Tesla V100 has no bf16 products; use fp16"):
        step.cell("step", PLAIN, card, batch=2, precision="bf16")
    assert step.cell("step", PLAIN, card, batch=2).precision == "fp16"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert step.cell("step", PLAIN, card, batch=2).precision == "bf16"


@pytest.mark.slow
def test_a_model_that_timm_does_not_have_is_no_reason_to_stop():
    row = step.measure(tiny("forward", "deit_digits_patch8_32"), cells.builders(("none",), ("timm",)), 1, CPU)
    assert "has no model 'deit_digits_patch8_32'" in row["failed"]["timm"]
    assert list(row["seconds"]) == ["fastdeit"]
