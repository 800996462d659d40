"""`fastdeit bench count`: how a step is counted, and our counts, pinned.

`fastdeit bench count --update-golden` writes what is pinned: after a change that is meant, and for another torch.
"""

import json
from dataclasses import replace

import pytest
import torch

from fastdeit import cli
from fastdeit.bench import count, count_command, count_host, count_inductor, count_peers
from fastdeit.bench.count import CARD, FORMS, Count, Counted, CountError, Launch, counted_card
from fastdeit.engine.optimizers import Muon
from fastdeit.kernels import _asked, _op, _triton
from fastdeit.kernels.attention import libraries
from fastdeit.kernels.attention.forward import _one_pass_kernel
from fastdeit.kernels.mlp.gelu import _column_sums_kernel
from fastdeit.kernels.optimizer import _multi_tensor
from fastdeit.kernels.optimizer.adamw import _adamw_kernel

TINY = count_command.MODELS[-1]
SMALL = Counted("step", TINY, 4, 32, "bf16", None, True, depth=2)
QUICK = "auto", "mlp=epilogue,attention=fused_backward"
MEANT = "if that is meant: fastdeit bench count --update-golden"


def against_golden(found):
    file = count_command.golden_file()
    if not file.exists():
        pytest.skip(f"tests/golden/counts has no {file.name}; `fastdeit bench count --update-golden` writes it")
    return differences(json.loads(file.read_text()), found)


def differences(golden, found):
    """One line for every count and kind that differs from the golden one, and for every count that has none."""
    lines = []
    for key, new in found.items():
        old = golden.get(key)
        if old is None:
            lines.append(f"{key}: not in the golden file")
            continue
        for kind in sorted(old.keys() | new.keys()):
            before, now = old.get(kind, [0, 0, 0]), new.get(kind, [0, 0, 0])
            if before != now:
                lines.append(f"{key}: {kind}: {in_words(before)} -> {in_words(now)}")
    return lines


def in_words(found):
    if isinstance(found, dict):
        return ", ".join(f"{name} {size:,} bytes" for name, size in found.items())
    launches, moved, flops = found
    return f"{launches} launches, {moved:,} bytes, {flops:,} FLOPs"


# ---- our step, pinned ------------------------------------------------------------------------------------------------


def test_our_step_asks_no_more_of_a_card_than_it_did():
    """Two blocks, one whole and the last: every part of a step."""
    found = count_command.pinned([TINY], [90], QUICK, count_command.SHORT)
    assert all(
        counts.keys() >= {"products", "attention", "norm", "loss", "input", "update"} for counts in found.values()
    )
    assert against_golden(found) == [], MEANT


@pytest.mark.slow
def test_no_form_of_our_step_asks_more_of_any_card():
    assert against_golden(count_command.pinned([TINY], depth=count_command.SHORT)) == [], MEANT


@pytest.mark.slow
@pytest.mark.parametrize("model", count_command.MODELS)
def test_no_step_of_a_whole_model_asks_more_of_a_card(model):
    """What the other forms ask for is in their two blocks."""
    assert against_golden(count_command.pinned([model], [90], count_command.WHOLE)) == [], MEANT


def test_what_differs_from_the_golden_counts_is_said():
    golden = {"a": {"norm": [2, 100, 0], "memory": {"peak": 5}}, "gone": {}}
    found = {"a": {"norm": [3, 100, 0], "zeros": [1, 8, 0], "memory": {"peak": 6}}, "new": {}}
    assert differences(golden, golden) == []
    assert differences(golden, found) == [
        "a: memory: peak 5 bytes -> peak 6 bytes",
        "a: norm: 2 launches, 100 bytes, 0 FLOPs -> 3 launches, 100 bytes, 0 FLOPs",
        "a: zeros: 0 launches, 0 bytes, 0 FLOPs -> 1 launches, 8 bytes, 0 FLOPs",
        "new: not in the golden file",
    ]


def test_every_backend_of_the_ops_with_a_choice_has_a_form():
    with counted_card(90):
        able = {
            (name, backend.name)
            for name in ("attention", "mlp", "layer_norm_mlp", "fused_adamw")
            for backend in _op.OPS[name].backends
            # Others' kernels, what is for other cards, and mixtures, whose halves are counted.
            if not backend.name.startswith("epilogue_")
            and backend.name not in ("apex", "quack", "native", *(b.name for b in libraries.BACKENDS))
            and backend.capability(CARD, True)[0]
        }
        taken = {
            (name, _op.OPS[name].select(CARD)[0].name if choice == _asked.AUTO else choice)
            for name, _ in able
            for choices in FORMS.values()
            for choice in [choices.get(name, choices[""])]
        }
    assert able == taken


@pytest.mark.slow
def test_skipping_what_is_dropped_asks_less_of_a_card():
    cell = replace(SMALL, batch=count.SKIP_GROUP, drop_path=0.5)
    whole, less = (count.ours(cell, 90, "auto", skip).by("kind") for skip in (False, True))
    for kind in ("products", "attention", "gelu", "norm"):
        assert less[kind].bytes < whole[kind].bytes
    assert 0.7 < less["products"].flops / whole["products"].flops < 0.9  # one of two blocks keeps half of the samples


def test_muon_asks_for_five_iterations_of_every_hidden_matrix():
    """r x c with r at most c: x x^T, the square of that, and the polynomial times x; 2 FLOPs a multiply-add."""
    muon = count.ours(replace(SMALL, depth=1), 90, "auto", optimizer=Muon)
    matrices = [(192, 576), (192, 192), (192, 768), (192, 768)]
    assert muon.by("phase")["update"].flops == 5 * sum(4 * r * r * c + 2 * r**3 for r, c in matrices)


@pytest.mark.slow
def test_tables_of_what_is_skipped_are_made_once_for_all_blocks():
    """A dozen launches, however many blocks there are, where each block asked for twenty-two."""
    cell = replace(SMALL, batch=count.SKIP_GROUP, drop_path=0.5)
    whole, less = (
        [count.ours(replace(cell, depth=depth), 90, "auto", skip).total.launches for depth in (2, 4)]
        for skip in (False, True)
    )
    assert less[0] - whole[0] == less[1] - whole[1] < 12


# ---- how a step is counted -------------------------------------------------------------------------------------------


def counted(run):
    """[(name, kind, bytes, FLOPs, launches)] of what `run` asks of the card."""
    with counted_card(90) as (_, watch):
        run_on = run()
        watch.counting = True
        run_on()
    return [(launch.name, launch.kind, launch.bytes, launch.flops, launch.launches) for launch in watch.launches]


def on_card(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device=CARD)


def operation(function, *shapes, dtype=torch.float32):
    def run():
        tensors = [on_card(*shape, dtype=dtype) for shape in shapes]
        return lambda: function(*tensors)

    return counted(run)


def test_an_operation_reads_its_tensors_and_writes_its_results_once():
    bf16 = torch.bfloat16
    assert operation(torch.mm, (8, 16), (16, 4), dtype=bf16) == [("mm", "products", 2 * (128 + 64 + 32), 1024, 1)]
    assert operation(lambda x: x + x, (8, 4)) == [("add", "other", 2 * 128, 0, 1)]
    assert operation(lambda x: x.expand(100, 8) * 2, (1, 8)) == [("mul", "other", 32 + 3200, 0, 1)]
    assert operation(lambda x: x.to(bf16), (8,)) == [("_to_copy", "casts", 32 + 16, 0, 1)]


def test_what_changes_in_place_is_read_and_written_and_what_is_overwritten_is_not_read():
    assert operation(lambda x, y: x.add_(y), (8,), (8,)) == [("add_", "other", 3 * 32, 0, 1)]
    assert operation(lambda x, y: x.copy_(y), (8,), (8,)) == [("copy_", "copies", 2 * 32, 0, 1)]
    assert operation(lambda x: x.zero_(), (8,)) == [("zero_", "zeros", 32, 0, 1)]
    assert operation(lambda x, y: torch.neg(x, out=y), (8,), (8,)) == [("neg", "other", 2 * 32, 0, 1)]


def test_lists_that_are_copied_to_another_dtype_are_casts():
    def copied(*dtypes):
        def run():
            new, old = ([on_card(8, dtype=dtype), on_card(3, dtype=dtype)] for dtype in dtypes)
            return lambda: torch._foreach_copy_(new, old)

        return [(kind, moved, launches) for _, kind, moved, _, launches in counted(run)]

    assert copied(torch.bfloat16, torch.float32) == [("casts", 6 * 11, 1)]
    assert copied(torch.float32, torch.float32) == [("update", 8 * 11, 1)]


def test_views_and_allocations_launch_nothing():
    assert operation(lambda x: torch.empty_like(x.view(4, 2).transpose(0, 1)[:1].detach()), (8,)) == []


def test_a_step_of_an_optimizer_is_counted_by_its_lists():
    """Of each list every element; in place what is updated; as many launches as multi_tensor_apply makes of them."""
    lists = [(100,), (3,)]
    found = operation(lambda *x: torch._foreach_lerp_(list(x[:2]), list(x[2:]), 0.5), *lists, *lists)
    assert found == [("_foreach_lerp_", "update", 3 * 4 * 103, 0, 1)]
    chunks = operation(lambda *x: torch._foreach_neg_(list(x)), *[(65_536 * 200,)] * 2)
    assert [launches for *_, launches in chunks] == [2]  # of 320 blocks
    tensors = operation(lambda *x: torch._foreach_neg_(list(x)), *[(1,)] * 111)
    assert [launches for *_, launches in tensors] == [2]  # of 110 tensors


@pytest.mark.slow
def test_adamw_of_our_own_moves_36_bytes_a_parameter():
    step = count.ours(SMALL, 90, "auto")
    adamw = [launch for launch in step.launches if launch.name == "optimizer.adamw._adamw_kernel"]
    parameters = sum(launch.bytes for launch in step.launches if launch.name == "optimizer.norm._squares_kernel") / 4
    assert parameters > 5e5
    assert sum(launch.bytes for launch in adamw) == pytest.approx(36 * parameters, rel=1e-2)
    assert list(step.by("phase")) == list(count.PHASES)
    assert step.state < step.live < step.peak


def test_memory_is_that_of_the_tensors_that_are_still_there():
    with counted_card(90) as (_, watch):
        first = on_card(100)
        second = first.view(10, 10) + 1
        assert (watch.now, watch.peak) == (800, 800)
        del first
        assert watch.now == 400
        del second
        assert (watch.now, watch.peak) == (0, 800)


def test_flops_of_a_product_that_nobody_counts_are_an_error(monkeypatch):
    monkeypatch.delitem(count._SCORES, "_one_pass_kernel")
    assert count._flops_of(_column_sums_kernel, {}) == 0
    with pytest.raises(CountError, match="_one_pass_kernel multiplies matrices; count its FLOPs"):
        count._flops_of(_one_pass_kernel, {})
    with pytest.raises(CountError, match=r"new\.kernel is of no kind"):
        count._kind_of_kernel("new.kernel")


def test_updated_in_place_are_arguments_that_a_kernel_has():
    """A renamed argument would otherwise be counted once, in silence."""
    assert count._IN_PLACE & set(_adamw_kernel.arg_names) == {"masters", "exp_avgs", "exp_avg_sqs", "emas"}


def test_products_of_8_bits_are_not_counted_where_a_training_refuses_them():
    """They would be counted as PyTorch's operations that imitate them on a CPU."""
    with pytest.raises(RuntimeError, match="sm_89 or newer, not sm_80"):
        count.ours(SMALL, 80, "auto", fp8=True)


def test_a_form_that_the_card_cannot_run_is_refused(monkeypatch):
    monkeypatch.setitem(count.FORMS, "mlp=quack", {"": "auto", "mlp": "quack", "layer_norm_mlp": "quack"})
    with pytest.raises(_op.ChoiceError, match="mlp=quack, which cannot run on cuda"):
        count.ours(SMALL, 90, "mlp=quack")


# ---- the peer --------------------------------------------------------------------------------------------------------


def test_inductor_is_not_asked_of_another_torch_or_card(monkeypatch):
    monkeypatch.setattr(count_inductor, "TORCH", tuple(map(int, torch.__version__.split(".")[:2])))
    with pytest.raises(count_inductor.CannotRun, match="a card of sm_60 are not known; known are 70, 80, 90, 100"):
        count_inductor.launches(None, SMALL, 60)
    monkeypatch.setattr(count_inductor, "TORCH", (1, 0))
    with pytest.raises(count_inductor.CannotRun, match=r"is counted with torch 1\.0; this is"):
        count_inductor.launches(None, SMALL, 90)


@pytest.mark.slow
def test_timm_compiled_does_the_same_products_with_fewer_bytes_and_launches():
    cell = count_command.cell(TINY, 256)
    eager = count_peers.eager(cell, 90)
    assert eager.total.flops == pytest.approx(cell_flops(cell), rel=0.15)  # attention's backward has 5 products, not 4
    try:
        compiled = count_peers.compiled(cell, 90)
    except count_inductor.CannotRun as error:
        pytest.skip(str(error))
    assert compiled.total.flops == eager.total.flops
    assert compiled.total.bytes < 0.8 * eager.total.bytes
    assert compiled.total.launches < eager.total.launches
    assert compiled.by("phase")["update"] == eager.by("phase")["update"]
    assert compiled.by("name")["_scaled_dot_product_flash_attention"].launches == 12


def cell_flops(cell):
    from fastdeit import models

    return 3 * cell.batch * models.build_timm(cell.model, **cell.options).flops()


@pytest.mark.slow
def test_host_time_is_of_both_sides_and_launches_nothing():
    launched = _triton.launch
    found = count_host.seconds(TINY, ema=True)
    assert found.keys() == {"fastdeit", "timm"}
    assert all(0 < seconds < 60 for seconds in found.values())
    assert _triton.launch is launched


# ---- the verb --------------------------------------------------------------------------------------------------------


def one_launch(cell, arch):
    return Count((Launch("mm", "forward", "products", 2_000_000_000, 3_000_000_000_000),), 1, 2**30, None)


def impossible(cell, arch):
    raise count_inductor.CannotRun("not here")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(count_command, "SIDES", {"fastdeit": one_launch, "timm_compile": impossible})
    monkeypatch.setattr(count_host, "seconds", lambda model, ema: {"fastdeit": 0.002})


def test_a_row_has_what_is_counted_and_why_the_rest_is_not(quick, capsys):
    assert cli.main(["bench", "count", "--model", TINY, "--batch", "8", "--arch", "80", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["what"], row["model"], row["batch"], row["arch"], row["ema"]) == ("count", TINY, 8, 80, True)
    assert row["launches"] == {"fastdeit": 1}
    assert row["kinds"]["fastdeit"]["products"] == {"launches": 1, "bytes": 2 * 10**9, "flops": 3 * 10**12}
    assert row["peak_bytes"] == {"fastdeit": None}
    assert row["failed"] == {"timm_compile": "not here"}
    assert {"torch", "packages"} <= row["environment"].keys()


def test_the_table_has_a_line_for_each_side(quick, capsys):
    assert cli.main(["bench", "count", "--model", TINY]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{TINY}, batch 256, 224 px, bf16, drop-path 0.1, EMA, sm_90: counted without a card"
    assert lines[2].split() == ["fastdeit", "1", "2.0", "3.00", "1.00", "2.0"]
    assert "timm_compile is not counted: not here" in lines


def test_a_model_that_does_not_exist_is_a_mistake_of_the_user(capsys):
    assert cli.main(["bench", "count", "--model", "deit_huge"]) == 2
    assert "there is no model 'deit_huge'" in capsys.readouterr().err


def test_the_golden_file_is_written_by_one_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        count_command, "pinned", lambda models, **options: {"b": {}} if "depth" in options else {"a": {}}
    )
    monkeypatch.setattr(count_command, "GOLDEN", tmp_path / "counts")
    assert cli.main(["bench", "count", "--update-golden"]) == 0
    assert "wrote 2 counts to" in capsys.readouterr().out
    assert json.loads(count_command.golden_file().read_text()) == {"a": {}, "b": {}}
    monkeypatch.setattr(count_command, "GOLDEN", tmp_path / "nowhere" / "counts")
    assert cli.main(["bench", "count", "--update-golden"]) == 2
    assert "this is no checkout" in capsys.readouterr().err


def test_lists_know_their_elements():
    """What a row of addresses stands for."""
    with counted_card(90):
        lists = [on_card(10), on_card(6, 2)], [on_card(10), on_card(6, 2)]
        assert sum(part.elements for part in _multi_tensor.split(*lists)) == 22
