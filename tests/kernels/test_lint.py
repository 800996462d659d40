"""The lint of kernels: it sees every kernel, and what is wrong with bad ones; and the kernels of the package are good.

Each run compiles the kernels of one small op, slow runs a sample of all (`lint_report.py`), and `fastdeit kernels lint`
everything. Instruction mixes are compared where tests/golden/kernels has a file for the installed version of Triton, of
all rows or of the sample. `fastdeit kernels lint --update-golden` writes the first, `lint_report.py` the second: for a
new version, and after a change that is meant.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton

from fastdeit import cli
from fastdeit.kernels import _op, _triton
from fastdeit.kernels.attention import libraries
from fastdeit.kernels.lint import cases, cute, lint
from fastdeit.kernels.lint.cases import Case
from fastdeit.kernels.lint.lint import Facts, Job, Row

ROOT = Path(__file__).parents[2]
_ONE_PASS = "forward._one_pass_kernel | sm_100"
_FUSED = "attention | deit_base fp16, fused_backward | fused_backward._fused_kernel"
_COLUMNS = "fp8_columns | deit_base bf16 | cast._columns_kernel"
_NARROW = "widest stores have 32 bits, less than 128"
BROKEN = {
    "3.4.0": {
        f"attention | deit_base fp16 | {_ONE_PASS}": "80 bytes spilled, more than 64",
        f"query_attention | deit_base fp16 | {_ONE_PASS}": "84 bytes spilled, more than 64",
        f"{_FUSED} | sm_80": "308 bytes spilled, more than 64",
        f"{_FUSED} | sm_90": "68 bytes spilled, more than 64",
        **{f"{_COLUMNS} | sm_{arch}": _NARROW for arch in (89, 90, 100)},
    }
}
"""Limits that rows of the sample break, by version of Triton: that of the oldest supported PyTorch. No other row breaks
one there."""

PTX = """
\t@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
\t@%p1 ld.global.L1::evict_last.v2.b64 { %rd2, %rd3 }, [ %rd1 + 0 ];
\tld.global.b16 { %rs1 }, [ %rd1 + 2 ];
\t@%p2 st.global.v2.b32 [ %rd4 + 0 ], { %r1, %r2 };
\tld.shared.v4.b32 {%r5, %r6, %r7, %r8}, [%r9];
\tcp.async.cg.shared.global [ %r10 + 0 ], [ %rd5 + 0 ], 0x10, %r11;
\tcp.async.ca.shared.global [ %r10 + 0 ], [ %rd5 + 0 ], 0x4, %r11;
"""
SASS = """
.text._kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/             @!UPT UIADD3 URZ, UPT, UPT, URZ, URZ, URZ ;
        /*0030*/                   LDG.E.U16 R8, desc[UR4][R2.64+0x10] ;
        /*0040*/                   EXIT ;
.L_x_0:
        /*0050*/                   BRA `(.L_x_0);
        /*0060*/                   NOP;
"""


def compiling(*command):
    """What a Python process says in which Triton compiles instead of interpreting."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def report():
    return json.loads(compiling("-m", "tests.kernels.lint_report"))


def test_every_backend_of_ours_has_a_case():
    """Others bring no Triton kernels of ours, and mixtures none of their own."""
    others = {"reference", "host", "aten", "native", "apex", "quack", *(backend.name for backend in libraries.BACKENDS)}
    others |= {"epilogue_forward", "epilogue_backward", "scaled_mm"}
    cased = {(case.op, case.backend) for found in cases.compiled_cases().values() for case in found}
    assert cased == {
        (op.name, backend.name) for op in _op.OPS.values() for backend in op.backends if backend.name not in others
    }


@pytest.mark.slow
def test_the_kernels_of_an_op_are_compiled_and_within_limits():
    """And have the golden instructions, where this version of Triton has any."""
    out = compiling("-m", "fastdeit", "kernels", "lint", "--arch", "90", "--op", "global_norm")
    assert out.endswith("\n4 rows, all within limits\n")
    assert "norm._root_kernel" in out


@pytest.mark.slow
def test_kernels_are_within_limits(report):
    assert sorted(report["ops"]) == sorted({op for op, _ in cases.backends()})
    known = BROKEN.get(triton.__version__, {})
    assert sorted(report["broken"]) == sorted(f"{row}: {what}" for row, what in known.items())


@pytest.mark.slow
def test_instructions_are_the_golden_ones(report):
    if not report["golden"]:
        pytest.skip(
            f"tests/golden/kernels has no {lint.golden_file().name}; `fastdeit kernels lint --update-golden` writes it"
        )
    assert report["differences"] + report["gone"] + report["missing"] == [], f"if that is meant: {report['update']}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "limits"),
    [
        ("error", ["does not compile: ValueError: arange's range must be a power of 2"]),
        ("narrow", ["widest loads have 16 bits, less than 128", "widest stores have 16 bits, less than 128"]),
        ("spills", ["bytes spilled, more than 64"]),
        ("shared", ["294912 bytes of shared memory, more than 232448"]),
        ("no wgmma", ["no HGMMA"]),
    ],
)
def test_bad_kernels_are_named(report, case, limits):
    found = report["bad"][case]
    assert len(found) == len(limits)
    assert all(limit in text for limit, text in zip(limits, found, strict=True))


@pytest.mark.slow
def test_arguments_are_one_job_where_triton_makes_one_program_of_them(report):
    assert report["disagreements"] == []


def row(kernel="f", arch=90, place=1, **facts):
    return Row(Case("op", "triton", "case", lambda: None, 70, **facts), Job("a.b", kernel, (), 4, 1, arch), place)


@pytest.fixture
def products(monkeypatch):
    """The kernel of `row` multiplies matrices."""
    monkeypatch.setitem(_triton.EXPECTED, ("a.b", "f"), _triton.Expected(products=True))


GOOD = {"registers": 64, "loads": {128: 4}, "stores": {128: 2}, "mix": {"all": 10, "HGMMA": 2}}


@pytest.mark.parametrize(
    ("facts", "limits"),
    [
        ({}, []),
        ({"spill_loads": 64}, []),
        ({"spill_stores": 68}, ["68 bytes spilled, more than 64"]),
        ({"registers": 32}, []),
        ({"registers": 32, "spill_loads": 8}, ["register allocation gave up: 8 bytes spilled at 32 registers"]),
        ({"shared": 232_448}, []),
        ({"shared": 232_449}, ["232449 bytes of shared memory, more than 232448"]),
        ({"loads": {64: 1, 16: 3}}, ["widest loads have 64 bits, less than 128"]),
        ({"stores": {}}, ["widest stores have 0 bits, less than 128"]),
        ({"mix": {"all": 1}}, ["no HGMMA: it does not use the tensor cores of sm_90 by their own instructions"]),
        ({"serialised": True}, ["ptxas serialises its wgmma instructions"]),
        ({"error": "E: x"}, ["does not compile: E: x"]),
    ],
)
def test_limits(facts, limits, products):
    assert lint.broken(row(), Facts(**GOOD | facts)) == limits


def test_what_is_not_expected_is_not_asked_for(products):
    without = Facts(**GOOD | {"mix": {"all": 1}})
    assert lint.broken(row("no product"), without) == []
    assert lint.broken(row(half=False), without) == []
    assert lint.broken(row(arch=80), without) == []
    assert lint.broken(row(odd=True), Facts(**GOOD | {"loads": {16: 1}})) == []
    assert lint.broken(row(arch=89), Facts(**GOOD | {"shared": 101_377})) != []


def test_a_kernel_states_narrower_accesses(monkeypatch):
    narrow = Facts(**GOOD | {"loads": {64: 1}, "stores": {32: 1}})
    assert len(lint.broken(row(), narrow)) == 2
    monkeypatch.setitem(_triton.EXPECTED, ("a.b", "f"), _triton.Expected(loads=64, stores=32))
    assert lint.broken(row(), narrow) == []


def test_kernels_that_say_so_load_and_store_by_tma(monkeypatch):
    monkeypatch.setitem(_triton.EXPECTED, ("a.b", "f"), _triton.Expected(boxes=True))
    assert lint.broken(row(), Facts(**GOOD | {"mix": {"UTMALDG": 1, "UTMASTG": 1}})) == []
    for mix in ({"UTMALDG": 1}, {"UTMASTG": 1}, None):
        broken = lint.broken(row(), Facts(**GOOD | {"mix": mix}))
        assert broken == ["no UTMALDG or no UTMASTG: it does not load and store by TMA"]


def test_a_case_is_compiled_for_the_architectures_of_its_backend():
    made = Case("op", "b", "case", lambda: None, 80)
    assert [arch for arch in lint.ARCHS if made.runs_on(arch)] == [80, 89, 90, 100]
    assert [arch for arch in lint.ARCHS if replace(made, needs=90, newest=90).runs_on(arch)] == [90]
    (hopper,) = {(case.needs, case.newest) for case in cases.compiled_cases()["attention"] if case.backend == "hopper"}
    assert hopper == (90, 90)


def test_a_descriptor_is_what_a_kernel_is_specialised_on():
    """Not the tensor's shape or address."""

    def specialised(*shape, block=64, dtype=torch.float16):
        layout = SimpleNamespace(swizzle_byte_width=128)
        return SimpleNamespace(base=torch.empty(shape, dtype=dtype), block_shape=[1, block, 64], layout=layout)

    one, *others = (
        lint._representative(value)
        for value in (
            specialised(2, 197, 192),
            specialised(3, 65, 384),
            specialised(2, 197, 192, block=16),
            specialised(2, 197, 192, dtype=torch.bfloat16),
        )
    )
    assert one == others[0] == lint.Boxes(torch.float16, (1, 64, 64), 128)
    assert one not in others[1:]


def test_widths_of_global_accesses():
    assert lint.widths(PTX, "ld") == {128: 3, 32: 1, 16: 1}
    assert lint.widths(PTX, "st") == {64: 1}


def test_mix_counts_opcodes_under_any_predicate():
    assert lint.mix(SASS) == {"all": 6, "BRA": 1, "EXIT": 1, "LDG": 2, "MOV": 1, "UIADD3": 1}


def test_golden_mixes_have_what_ptxas_repeats():
    assert lint.golden_mix(Facts(mix={"all": 9, "LDG": 2, "MOV": 7})) == {"all": 9, "LDG": 2}
    assert lint.golden_mix(Facts(mix={"all": 9, "UTMALDG": 2, "MOV": 7})) == {"UTMALDG": 2}


def test_differences_say_old_and_new():
    golden = {"a": {"all": 10, "LDG": 2}, "b": {"all": 1}}
    measured = {"a": {"all": 12, "LDG": 2, "STL": 1}, "b": {"all": 1}, "c": {"all": 1}}
    assert lint.differences(golden, measured) == ["a: all 10 -> 12, STL 0 -> 1", "c: not in the golden file"]


def test_an_update_replaces_what_was_measured_and_keeps_the_rest(monkeypatch, tmp_path):
    monkeypatch.setattr(lint, "GOLDEN", tmp_path / "kernels")
    rows = [row(), row(place=2)]
    old = {"op | old | b.f | sm_90": {}, "op | case | b.f | sm_80": {"all": 3}, "other | x | y | sm_90": {}}
    lint.update_golden(old, [])
    assert lint.gone(lint.read_golden(), rows) == ["op | old | b.f | sm_90: no such kernel any more"]
    lint.update_golden({rows[0].key: {"all": 1}, rows[1].key: {"all": 2}}, rows)
    assert lint.read_golden() == {
        "op | case | b.f | sm_80": {"all": 3},
        "op | case | b.f | sm_90": {"all": 1},
        "op | case | b.f#2 | sm_90": {"all": 2},
        "other | x | y | sm_90": {},
    }


def test_an_update_outside_a_checkout_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(lint, "GOLDEN", tmp_path / "none" / "kernels")
    with pytest.raises(lint.LintError, match="this is no checkout"):
        lint.update_golden({}, [])


def test_table_is_aligned():
    rows = [row(), row("longer", 80)]
    text = lint.table(rows, {rows[0].job: Facts(**GOOD), rows[1].job: Facts(error="E")})
    head, first, second = text.splitlines()
    assert [head.index("sm"), head.index("regs")] == [first.index("90"), first.index("64")]
    assert second.endswith("does not compile")
    assert first.endswith("128x4  128x2   2 HGMMA")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "TRITON_INTERPRET is set"),
        (["--op", "nothing"], "the op 'nothing' has no Triton kernels; those that have: "),
        (["--arch", "80", "81"], "architecture 81 is not one of: 70, 80, 89, 90, 100"),
    ],
)
def test_what_the_command_cannot_do(capsys, monkeypatch, argv, message):
    monkeypatch.setattr(lint._triton, "INTERPRETED", not argv)
    assert cli.main(["kernels", "lint", *argv]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """`compiled(**facts)`: from now on the command finds one kernel, with these facts."""
    monkeypatch.setattr(lint, "GOLDEN", tmp_path / "kernels")
    monkeypatch.setattr(lint, "plan", lambda archs, ops: [row()])
    monkeypatch.setattr(cute, "missing", lambda: "left out")

    def set_facts(**facts):
        monkeypatch.setattr(lint, "compile_all", lambda rows: {row.job: Facts(**GOOD | facts) for row in rows})

    return set_facts


def test_the_command_prints_and_writes(capsys, compiled, tmp_path):
    compiled()
    assert cli.main(["kernels", "lint", "--json", str(tmp_path / "facts.json")]) == 0
    out = capsys.readouterr().out
    assert "facts of the compiler, not speeds" in out
    assert "instruction mixes are not compared" in out
    assert out.endswith("1 rows, all within limits\n")
    written = json.loads((tmp_path / "facts.json").read_text())["rows"]
    assert [(found["kernel"], found["registers"], found["broken"]) for found in written] == [("b.f", 64, [])]


def test_the_command_fails_on_a_broken_limit(capsys, compiled):
    compiled(spill_loads=100)
    assert cli.main(["kernels", "lint"]) == 1
    assert capsys.readouterr().out.endswith("\nop | case | b.f | sm_90: 100 bytes spilled, more than 64\n")


def test_the_command_fails_on_other_instructions(capsys, compiled):
    compiled()
    assert cli.main(["kernels", "lint", "--update-golden"]) == 0
    assert cli.main(["kernels", "lint"]) == 0
    compiled(mix={"all": 11, "HGMMA": 2})
    capsys.readouterr()
    assert cli.main(["kernels", "lint"]) == 1
    out = capsys.readouterr().out
    assert out.endswith("\nop | case | b.f | sm_90: all 10 -> 11\n")
    assert "if that is meant: fastdeit kernels lint --update-golden" in out


USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function kernel_cutlass_0:
  REG:168 STACK:56 SHARED:1024 LOCAL:0 CONSTANT[0]:1356 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
CUTE_SASS = """
        /*35d0*/                   STL [R1+0x20], R19 ;
        /*3610*/             @P0   LDL R19, [R1+0x20] ;
        /*3630*/                   HGMMA.64x192x16.F32.BF16 R24, gdesc[UR8] ;
        /*3670*/                   MUFU.EX2 R4, R5 ;
        /*3680*/                   MUFU.EX2 R4, R5 ;
"""


def test_facts_of_a_cute_program_are_read():
    facts = cute.read(USAGE, CUTE_SASS)
    assert facts == cute.Facts(None, 168, 56, {"all": 5, "HGMMA": 1, "LDL": 1, "MUFU": 2, "STL": 1})
    assert cute.cells({"gelu": facts})[1] == ["forward", "168", "56", "1/1", "5", "2", "1 HGMMA"]
    assert cute.broken(facts) == []
    assert cute.broken(cute.Facts(mix={"all": 1}))[0].startswith("no HGMMA")


def test_a_cute_product_that_does_not_compile_says_why(monkeypatch):
    said = SimpleNamespace(stderr="Traceback\nQuACK 0.6.5 or newer cannot be imported\n")
    monkeypatch.setattr(cute.subprocess, "run", lambda *args, **kwargs: said)
    facts = cute.compiled("gelu")
    assert cute.broken(facts) == ["does not compile: 0 programs were made; QuACK 0.6.5 or newer cannot be imported"]
    assert cute.cells({"gelu": facts})[1][:2] == ["forward", "does not compile"]


def test_the_command_names_products_of_quack_or_says_that_they_are_left_out(capsys, compiled, monkeypatch, tmp_path):
    compiled()
    assert cli.main(["kernels", "lint"]) == 0
    assert "\nleft out\n" in capsys.readouterr().out
    assert cli.main(["kernels", "lint", "--arch", "80"]) == cli.main(["kernels", "lint", "--op", "loss"]) == 0
    assert "left out" not in capsys.readouterr().out
    monkeypatch.setattr(cute, "missing", lambda: None)
    monkeypatch.setattr(cute, "compile_all", lambda: {"gelu": cute.Facts(mix={"all": 7})})
    assert cli.main(["kernels", "lint", "--op", "mlp", "--json", str(tmp_path / "facts.json")]) == 1
    out = capsys.readouterr().out
    assert "product  regs" in out
    assert out.endswith(
        "\nQuACK, gelu: no HGMMA: it does not use the tensor cores of sm_90 by their own instructions\n"
    )
    assert json.loads((tmp_path / "facts.json").read_text())["quack"]["gelu"]["mix"] == {"all": 7}


@pytest.mark.slow
@pytest.mark.skipif(cute.missing() is not None, reason="QuACK is not installed")
def test_quack_s_products_compile_without_a_card(monkeypatch):
    """One of the three: our GELU needs no special function forward."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    facts = cute.compiled("gelu")
    assert cute.broken(facts) == []
    assert facts.registers == 168
    assert "MUFU" not in facts.mix


def test_quack_is_looked_for(monkeypatch):
    monkeypatch.setattr(cute, "version", lambda name: "0.6.5")
    assert cute.missing() is None

    def absent(name):
        raise cute.PackageNotFoundError(name)

    monkeypatch.setattr(cute, "version", absent)
    assert "pip install 'fastdeit[quack]'" in cute.missing()


def test_info_is_the_default(capsys):
    assert cli.main(["kernels"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == set(_op.OPS)
