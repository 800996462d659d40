"""What the compiler makes of every Triton kernel, without a card: `fastdeit kernels lint`.

The examples of each op run on tensors of the meta device at the sizes of DeiT (`lint_cases.py`), so that launches are
recorded instead of run. Triton's own just-in-time path, made to believe in a card of each architecture, compiles them:
types, divisibility and constants are specialised as they would be on that card. Read from the result:

    registers, spills, stack   what ptxas reports, in registers and bytes of a thread
    shared memory              bytes of a program
    loads, stores              global accesses in PTX by their width in bits, each counted once however often it runs
    instruction mix            SASS, from the bundled nvdisasm where it knows the architecture (that of CUDA 13 knows
                               no sm_70); likewise each instruction once

These are facts of the compiler. They show lost vectorisation, lost tensor cores, spilled registers and kernels that do
not fit; they show no races, no bank conflicts, and no time.

The instruction mix of one version of Triton is kept in tests/golden/kernels. The same source and the same compiler make
the same instructions, therefore any difference is a change to look at.
"""

import argparse
import io
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import MockTensor

from fastdeit.kernels import _triton
from fastdeit.kernels._table import aligned
from fastdeit.kernels.lint import cute
from fastdeit.kernels.lint.cases import Case, compiled_cases
from fastdeit.kernels.lint.disassembly import disassembled, mix

SHARED_MEMORY = {70: 98_304, 80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}
"""Bytes that one program may have on each architecture (CUDA C++ Programming Guide, "Technical Specifications per
Compute Capability": the opt-in maximum of a block)."""
ARCHS = tuple(SHARED_MEMORY)
SPILL = 64
"""Bytes a thread may spill: an address or two kept for after a loop cost nothing, more is traffic in the loop."""
GOLDEN = Path(__file__).parents[3] / "tests" / "golden" / "kernels"
MIX = (
    *("HMMA", "HGMMA", "UTCHMMA", "FFMA", "FFMA2", "FMUL", "FMUL2", "FADD", "FADD2", "MUFU", "F2F", "F2FP"),
    *("UTMALDG", "UTMASTG", "LDG", "STG", "LDGSTS", "LDS", "STS", "LDSM", "STSM", "LDL", "STL"),
    *("SHFL", "BAR", "ATOMG", "RED"),
)
"""Opcodes that the golden files hold, besides the number of all instructions."""


class LintError(Exception):
    """The lint cannot do what it was asked for."""


# ---- from launches to what is compiled -------------------------------------------------------------------------------


class Job(NamedTuple):
    """One specialisation of a kernel: all launches that Triton would compile to the same code, on one architecture.

    Tensors among the arguments stand as their dtypes, descriptors as their `Boxes`, run-time numbers as representatives
    of their class. Types stand beside the values because True == 1 == 1.0.
    """

    module: str
    kernel: str
    arguments: tuple[tuple[str, type, Any], ...]
    warps: int
    stages: int
    arch: int

    @property
    def name(self) -> str:
        """`module.function` of the kernel, as rows of the table call it."""
        return f"{self.module.rpartition('.')[2]}.{self.kernel}"


class Boxes(NamedTuple):
    """All of a tensor descriptor that a kernel is specialised on: the boxes' dtype and shape, and over how many bytes
    they are swizzled in shared memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    swizzled: int


class Row(NamedTuple):
    """One line of the table: what to compile, and whose it is. `place` numbers a kernel's specialisations in a case."""

    case: Case
    job: Job
    place: int

    @property
    def key(self) -> str:
        """Name in the golden file: "op | case | kernel | sm_N"."""
        nth = f"#{self.place}" if self.place > 1 else ""
        return f"{self.case.op} | {self.case.name} | {self.job.name}{nth} | sm_{self.job.arch}"


def plan(archs: Sequence[int] = ARCHS, ops: Sequence[str] | None = None) -> list[Row]:
    """What there is to compile for `ops` (default: all), each specialisation once an op, under its first case.

    LintError for an architecture or an op that does not exist, and in Triton's interpreter, which has no compiler.
    """
    if _triton.INTERPRETED:
        raise LintError("TRITON_INTERPRET is set, so that nothing is compiled; unset it and run the lint again")
    if unknown := [arch for arch in archs if arch not in ARCHS]:
        raise LintError(f"architecture {unknown[0]} is not one of: {', '.join(map(str, ARCHS))}")
    every = compiled_cases()
    for op in ops or ():
        if op not in every:
            raise LintError(f"the op {op!r} has no Triton kernels; those that have: {', '.join(every)}")
    rows = []
    for op in ops or every:
        seen = set()
        for case, arch in ((case, arch) for case in every[op] for arch in archs if case.runs_on(arch)):
            new = [row for row in record(case, arch) if row.job not in seen]
            seen |= {row.job for row in new}
            rows += new
    return rows


def record(case: Case, arch: int) -> list[Row]:
    """Every launch of a case on an architecture, each specialisation once."""
    with _triton.recording(arch) as recorded:
        case.run()
    jobs = dict.fromkeys(job_of(launch, arch) for launch in recorded.launches)
    places = Counter()
    rows = []
    for job in jobs:
        places[job.name] += 1
        rows.append(Row(case, job, places[job.name]))
    return rows


def job_of(launch: _triton.Launch, arch: int) -> Job:
    """The job that a launch is, equal for all launches that Triton would compile to the same code."""
    constants = {parameter.name for parameter in launch.kernel.params if parameter.is_constexpr}
    arguments = []
    for name, value in launch.arguments.items():
        value = value if name in constants else _representative(value)
        arguments.append((name, type(value), value))
    return Job(launch.kernel.__module__, launch.kernel.__name__, tuple(arguments), launch.warps, launch.stages, arch)


def _representative(value: Any) -> Any:
    """Triton looks at the dtype of a tensor, at whether an int is 1, divisible by 16 or beyond 32 bits, and only at the
    type of a float or bool."""
    if isinstance(value, Tensor):
        return value.dtype
    if (base := _triton.of_descriptor(value)) is not value:
        return Boxes(base.dtype, tuple(value.block_shape), value.layout.swizzle_byte_width)
    if isinstance(value, float | bool):
        return type(value)(True)
    if isinstance(value, int) and value != 1:
        return (0 if -(2**31) <= value < 2**31 else 2**40) + (16 if value % 16 == 0 else 17)
    return value


# ---- compilation -----------------------------------------------------------------------------------------------------


@dataclass
class Facts:
    """What the compiler made of a job. `mix` is None where nvdisasm does not know the architecture."""

    error: str | None = None
    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0
    serialised: bool = False
    loads: dict[int, int] = field(default_factory=dict)
    stores: dict[int, int] = field(default_factory=dict)
    mix: dict[str, int] | None = None


class Card:
    """Stands for the driver of a card that is not there: all that Triton asks one before it launches."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_target(self) -> GPUTarget:
        """What Triton compiles for."""
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        """The architecture: Triton keeps what it compiled by device."""
        return self._arch

    def get_current_stream(self, device: int) -> int:
        """The default stream; nothing runs on it."""
        return 0


def compile_all(rows: Iterable[Row]) -> dict[Job, Facts]:
    """Facts of every job among the rows, compiled by one process per core in a cache that is thrown away."""
    jobs = list(dict.fromkeys(row.job for row in rows))
    workers = min(len(os.sched_getaffinity(0)), len(jobs)) or 1
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(workers, get_context("fork"), _begin, (cache,)) as pool,
    ):
        return dict(zip(jobs, pool.map(compile_job, jobs), strict=True))


def _begin(cache: str) -> None:
    # Compiled here and now: a kernel from a cache comes without the assembler's report.
    os.environ |= {"TRITON_CACHE_DIR": cache, "TRITON_DUMP_PTXAS_LOG": "1"}


def compile_job(job: Job) -> Facts:
    """Compile one job and read the result; a job that does not compile has an `error`. Changes the active driver."""
    triton.runtime.driver.set_active(Card(job.arch))
    kernel = getattr(import_module(job.module), job.kernel)
    arguments = {name: _argument(value) for name, _, value in job.arguments}
    options = {"num_warps": job.warps, "num_stages": job.stages, "enable_fp_fusion": True}
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            compiled = kernel.warmup(grid=(1,), **arguments, **options)
    except Exception as error:  # whatever the compiler stumbles over is a fact about the kernel
        while error.__cause__ is not None:
            error = error.__cause__
        return Facts(error=f"{type(error).__name__}: {error}")
    ptx, sass = compiled.asm["ptx"], disassembled(compiled.asm["cubin"])
    return _read(compiled.metadata.shared, ptx, printed.getvalue() or _assembled(ptx), sass)


def _argument(value: Any) -> Any:
    """What stands for an argument of a job where it is compiled."""
    if not isinstance(value, Boxes):
        return MockTensor.wrap_dtype(value)
    # Here, since an older Triton has no such thing.
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    block, x = list(value.shape), torch.empty(value.shape, dtype=value.dtype)
    layout = NVMMASharedLayout(value.swizzled, 8 * x.itemsize, len(block))
    return TensorDescriptor(x, block, list(x.stride()), block, layout)


def _assembled(ptx: str) -> str:
    """The report of ptxas. Triton 3.4 keeps it to itself; this is its command again."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [triton.knobs.nvidia.ptxas.path, "-lineinfo", "-v", f"--gpu-name={target}", source, "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _read(shared: int, ptx: str, report: str, sass: str | None) -> Facts:
    stack, spill_stores, spill_loads = map(
        int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report).groups()
    )
    return Facts(
        registers=int(re.search(r"Used (\d+) registers", report)[1]),
        stack=stack,
        spill_stores=spill_stores,
        spill_loads=spill_loads,
        shared=shared,
        serialised="wgmma" in report,
        loads=widths(ptx, "ld"),
        stores=widths(ptx, "st"),
        mix=None if sass is None else mix(sass),
    )


def widths(ptx: str, access: str) -> dict[int, int]:
    """{bits: number of accesses} of "ld" or "st" to global memory in PTX, widest first. Asynchronous copies to shared
    memory are loads."""
    found = Counter(
        int(vector or 1) * int(bits)
        for vector, bits in re.findall(rf"\b{access}\.global\b[\w.:]*?(?:\.v(\d))?\.[a-z]+(\d+)\s", ptx)
    )
    if access == "ld":
        copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global\b[^\[]*\[[^]]*\],\s*\[[^]]*\],\s*(\w+)", ptx)
        found.update(8 * int(size, 0) for size in copies)
    return dict(sorted(found.items(), reverse=True))


# ---- judgement -------------------------------------------------------------------------------------------------------


def broken(row: Row, facts: Facts) -> list[str]:
    """Limits that the row breaks, in words."""
    if facts.error is not None:
        return [f"does not compile: {facts.error}"]
    spilled = max(facts.spill_stores, facts.spill_loads)
    found = []
    if spilled and facts.registers == 32:
        found.append(f"register allocation gave up: {spilled} bytes spilled at 32 registers")
    elif spilled > SPILL:
        found.append(f"{spilled} bytes spilled, more than {SPILL}")
    if facts.shared > SHARED_MEMORY[row.job.arch]:
        found.append(f"{facts.shared} bytes of shared memory, more than {SHARED_MEMORY[row.job.arch]}")
    expected = _triton.EXPECTED.get((row.job.module, row.job.kernel), _triton.Expected())
    if not row.case.odd:
        for name, bits, least in (
            ("loads", facts.loads, expected.loads),
            ("stores", facts.stores, expected.stores),
        ):
            if max(bits, default=0) < least:
                found.append(f"widest {name} have {max(bits, default=0)} bits, less than {least}")
    if row.job.arch == 90 and expected.products and row.case.half and not (facts.mix or {}).get("HGMMA"):
        found.append("no HGMMA: it does not use the tensor cores of sm_90 by their own instructions")
    if expected.boxes and not {"UTMALDG", "UTMASTG"} <= (facts.mix or {}).keys():
        found.append("no UTMALDG or no UTMASTG: it does not load and store by TMA")
    if facts.serialised:
        found.append("ptxas serialises its wgmma instructions")
    return found


def golden_file() -> Path:
    """File of the instruction mixes that the installed Triton made."""
    return GOLDEN / f"triton-{triton.__version__}.json"


def golden_mix(facts: Facts) -> dict[str, int]:
    """What of the mix the golden file holds. Of kernels that load by TMA that is not the number of all: of the same PTX
    ptxas makes programs there that differ by an instruction of the uniform datapath."""
    opcodes = MIX if "UTMALDG" in facts.mix else ("all", *MIX)
    return {opcode: facts.mix[opcode] for opcode in opcodes if opcode in facts.mix}


def differences(golden: dict[str, dict[str, int]], measured: dict[str, dict[str, int]]) -> list[str]:
    """One line for every measured mix that is not the golden one: opcode old -> new."""
    lines = []
    for key, new in measured.items():
        old = golden.get(key)
        if old is None:
            lines.append(f"{key}: not in the golden file")
        elif old != new:
            changed = (opcode for opcode in ("all", *MIX) if old.get(opcode, 0) != new.get(opcode, 0))
            lines.append(f"{key}: " + ", ".join(f"{o} {old.get(o, 0)} -> {new.get(o, 0)}" for o in changed))
    return lines


def read_golden() -> dict[str, dict[str, int]]:
    """Golden mixes of the installed Triton; empty where it has none."""
    return json.loads(golden_file().read_text()) if golden_file().exists() else {}


def update_golden(measured: dict[str, dict[str, int]], rows: Sequence[Row]) -> None:
    """Write the measured mixes in place of all that the golden file holds for the ops and architectures of the rows."""
    if not GOLDEN.parent.is_dir():
        raise LintError(f"--update-golden writes to {GOLDEN}, but there is no {GOLDEN.parent}: this is no checkout")
    fresh = {_scope(row.key) for row in rows}
    kept = {key: value for key, value in read_golden().items() if _scope(key) not in fresh}
    GOLDEN.mkdir(exist_ok=True)
    lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in sorted({**kept, **measured}.items()))
    golden_file().write_text("{\n" + ",\n".join(lines) + "\n}\n")


def gone(golden: Iterable[str], rows: Sequence[Row]) -> list[str]:
    """One line for every golden mix that the rows, all of their ops and architectures, should have and have not."""
    present, scopes = {row.key for row in rows}, {_scope(row.key) for row in rows}
    return [f"{key}: no such kernel any more" for key in golden if _scope(key) in scopes and key not in present]


def _scope(key: str) -> tuple[str, str]:
    op, *_, arch = key.split(" | ")
    return op, arch


# ---- command ---------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row], facts: dict[Job, Facts]) -> str:
    """The facts as aligned text, one row a line."""
    lines = [
        ("op", "case", "kernel", "sm", "warps", "regs", "spill", "shared", "instr", "loads", "stores", "tensor cores")
    ]
    for row in rows:
        fact, job = facts[row.job], row.job
        lines.append((row.case.op, row.case.name, job.name, str(job.arch), str(job.warps), *_cells(fact)))
    return aligned(lines)


def _cells(fact: Facts) -> tuple[str, ...]:
    if fact.error is not None:
        return "does not compile", *[""] * 6
    found = fact.mix or {}
    return (
        str(fact.registers),
        f"{fact.spill_stores}/{fact.spill_loads}",
        str(fact.shared),
        str(found.get("all", "?")),
        *(" ".join(f"{bits}x{number}" for bits, number in seen.items()) for seen in (fact.loads, fact.stores)),
        " ".join(f"{found[opcode]} {opcode}" for opcode in ("HMMA", "HGMMA", "UTCHMMA") if opcode in found),
    )


def main(args: argparse.Namespace) -> int:
    """`fastdeit kernels lint`: print the table and what is wrong with it; 1 if anything is, else 0."""
    archs = args.arch or ARCHS
    rows = plan(archs, [args.op] if args.op else None)
    facts = compile_all(rows)
    print(f"Triton {triton.__version__}, compiled without a card: facts of the compiler, not speeds\n")
    print(table(rows, facts) + "\n")
    products: dict[str, cute.Facts] = {}
    if cute.ARCH in archs and args.op in (None, *cute.OPS):
        if why := cute.missing():
            print(why)
        else:
            products = cute.compile_all()
            print(aligned(cute.cells(products)) + "\n")
    wrong = [f"{row.key}: {limit}" for row in rows for limit in broken(row, facts[row.job])]
    wrong += [f"QuACK, {name}: {limit}" for name, found in products.items() for limit in cute.broken(found)]
    measured = {row.key: golden_mix(facts[row.job]) for row in rows if facts[row.job].mix is not None}
    if args.json is not None:
        _write_json(args.json, rows, facts, products)
    if args.update_golden:
        update_golden(measured, rows)
        print(f"wrote {len(measured)} instruction mixes to {golden_file()}")
    elif golden := read_golden():
        changes = [*differences(golden, measured), *gone(golden, rows)]
        wrong += changes
        if changes:
            print(
                "instruction mixes differ from the golden ones; if that is meant: fastdeit kernels lint --update-golden"
            )
    else:
        print(f"instruction mixes are not compared: there is no {golden_file()}")
    print("\n".join(wrong) or f"{len(rows) + len(products)} rows, all within limits")
    return 1 if wrong else 0


def _write_json(file: str, rows: Sequence[Row], facts: dict[Job, Facts], products: dict[str, cute.Facts]) -> None:
    found = [
        {
            "op": row.case.op,
            "case": row.case.name,
            "kernel": row.job.name,
            "arch": row.job.arch,
            "warps": row.job.warps,
            "stages": row.job.stages,
            "broken": broken(row, facts[row.job]),
            **vars(facts[row.job]),
        }
        for row in rows
    ]
    quack = {name: vars(fact) for name, fact in products.items()}
    text = json.dumps({"triton": triton.__version__, "rows": found, "quack": quack}, indent=1)
    Path(file).write_text(text + "\n")
