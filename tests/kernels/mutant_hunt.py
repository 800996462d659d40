"""Plants each of the faults of `mutants.py` and sees which proof finds it.

    TRITON_INTERPRET=1 python -m tests.kernels.mutant_hunt       hunts them all and writes docs/proofs.md

A fault is planted into the running process: the function that it changes is compiled anew from the changed file, and
every kernel that calls it has the new one, until it is taken back.
"""

import ast
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton import JITFunction
from triton.runtime.interpreter import InterpretedFunction

from fastdeit import kernels
from fastdeit.kernels.lint import bounds
from fastdeit.kernels.lint.interpreter import Fault
from tests.kernels.checked_cases import CheckedCase, every_case, same_bits
from tests.kernels.kernel_coverage import jit_functions
from tests.kernels.mutants import MUTANTS, Mutant

FOLDER = Path(kernels.__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "proofs.md"


@dataclass(frozen=True)
class Finding:
    """What found a mutant, and in which case."""

    mutant: Mutant
    by: str
    case: str


@contextmanager
def planted(mutant: Mutant) -> Iterator[None]:
    """Inside, kernels have the fault. ValueError if the text is not in the file exactly once."""
    path, name = FOLDER / mutant.file, _changed(mutant)
    module = import_module(f"{kernels.__name__}.{mutant.file.removesuffix('.py').replace('/', '.')}")
    with tempfile.TemporaryDirectory() as folder:
        changed = Path(folder, path.name)
        changed.write_text(path.read_text().replace(mutant.old, mutant.new))
        function = next(n for n in _functions(changed.read_text()) if n.name == name)
        made: dict[str, Any] = {}
        exec(compile(ast.Module([function], []), changed, "exec"), vars(module), made)
        with _instead(getattr(module, name), made[name]):
            yield


def _changed(mutant: Mutant) -> str:
    """Name of the function that a mutant changes."""
    source = (FOLDER / mutant.file).read_text()
    if source.count(mutant.old) != 1:
        raise ValueError(f"{mutant.file} has {source.count(mutant.old)} times the text that {mutant.name!r} changes")
    line = source[: source.index(mutant.old)].count("\n") + 1
    return next(node.name for node in _functions(source) if node.lineno <= line <= node.end_lineno)


def _functions(source: str) -> list[ast.FunctionDef]:
    return [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]


@contextmanager
def _instead(old: Any, new: Any) -> Iterator[None]:
    """Inside, `old` does what `new` does, wherever it was imported to."""
    if isinstance(old, InterpretedFunction):
        with mock.patch.object(old, "fn", new.fn), mock.patch.object(old, "rewriter", new.rewriter):
            yield
        return
    if isinstance(old, JITFunction):
        before = old.src
        _compile_from(old, new.src)
        try:
            yield
        finally:
            _compile_from(old, before)
        return
    code = old.__code__
    old.__code__ = new.__code__
    try:
        yield
    finally:
        old.__code__ = code


def _compile_from(function: JITFunction, source: str) -> None:
    function._unsafe_update_src(source)
    for caller in jit_functions().values():
        caller.hash = None  # that of the sources of all functions that it calls


def hunt(mutant: Mutant) -> Finding | None:
    """The first proof that finds the mutant, None if it survives: the cases of its ops in the checked interpreter, of
    which those of its hint come first, or one of the lints where the hint says so."""
    wanted = mutant.cases.split("/")
    if mutant.hint == "compiler":
        return _found_by_lint(mutant)
    if mutant.hint == "huge":
        with planted(mutant):
            return _found_far_away(mutant, *wanted)
    found = [case for case in every_case().values() if [case.op.name, case.backend.name][: len(wanted)] == wanted]
    with planted(mutant):
        for case in sorted(found, key=lambda case: mutant.hint not in case.name):
            if by := _found_by(case):
                return Finding(mutant, by, case.name)
    return None


def _found_by(case: CheckedCase) -> str | None:
    try:
        outcome = case.run("forward")
        case.judge(outcome)
        if not same_bits(outcome, case.run("reverse")):
            return "checked interpreter: another order gives other bits"
    except Fault as fault:
        return f"checked interpreter: {fault.kind}"
    except AssertionError:
        return "error rule"
    except Exception as error:
        return f"checked interpreter: {type(error).__name__}"
    return None


def _found_far_away(mutant: Mutant, op: str, backend: str | None = None) -> Finding | None:
    for case in bounds.huge_cases()[op]:
        if backend in (None, case.backend):
            for checked in bounds.check(case):
                if checked.fault:
                    return Finding(mutant, f"lint --bounds: {checked.fault.partition(':')[0]}", f"{op}, {case.name}")
    return None


_LINT = """
import sys
from pathlib import Path
from fastdeit.kernels.lint import lint
op, kernel, golden = sys.argv[1:]
lint.GOLDEN = Path(golden)
row = next(row for row in lint.plan([90], [op]) if row.job.kernel == kernel)
facts = lint.compile_job(row.job)
wrong = lint.broken(row, facts) or lint.differences(lint.read_golden(), {row.key: lint.golden_mix(facts)})
print(row.key, "|", wrong[0].partition(":")[0] if wrong else "")
"""


def _found_by_lint(mutant: Mutant) -> Finding | None:
    """What the compiler makes of the changed kernel, in a process of its own: this one interprets."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(FOLDER.parent, Path(folder, "fastdeit"), ignore=shutil.ignore_patterns("__pycache__"))
        path = Path(folder, "fastdeit", "kernels", mutant.file)
        path.write_text(path.read_text().replace(mutant.old, mutant.new))
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"PYTHONPATH": folder, "TRITON_DUMP_PTXAS_LOG": "1", "TRITON_CACHE_DIR": f"{folder}/cache"}
        golden = FOLDER.parents[1] / "tests" / "golden" / "kernels"
        command = [sys.executable, "-c", _LINT, mutant.cases.partition("/")[0], _changed(mutant), golden]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    *case, wrong = done.stdout.strip().split(" |")
    return Finding(mutant, f"lint:{wrong}", " |".join(case)) if wrong.strip() else None


# ---- docs/proofs.md --------------------------------------------------------------------------------------------------

_INTRODUCTION = """# Proofs of the kernels

Four proofs run without a GPU. Each fault below was planted alone into a kernel, and the proof beside it found it first.
`TRITON_INTERPRET=1 python -m tests.kernels.mutant_hunt` writes this page;
`pytest -m slow tests/kernels/test_mutants.py` plants the faults again and compares.

**Checked interpreter** (`tests/kernels/test_checked.py`). No access leaves its tensor or is misaligned. No int32
wraps. The promises of `tl.multiple_of` hold. No two programs touch one address where one of them writes, unless an
acquire and release orders them. A program reads its own writes only behind a barrier. Any order of programs gives
the same bits. Every loop runs at least twice, and every branch and mask takes both values. It does not show what
the compiler makes of a kernel, products of bfloat16, or what the threads of one program do between two barriers.

**Error rule** (`tests/kernels/proof.py`). Results and gradients are as good as PyTorch's, measured against float64, and
products are added up in float32.

**Bounds** (`fastdeit kernels lint --bounds`). The programs at the corners of the grids stay inside their tensors and
wrap no int32, at DeiT's sizes and where the largest argument has more than 2**31 elements. Addresses that depend on
data are taken where the data is 0.

**Lint** (`fastdeit kernels lint`). A kernel compiles, fits, does not spill, and has the instructions it had.

A fifth is optional, because it needs Python 3.12: [compiled kernels run on the CPU](compiled.md), where products of
bfloat16 are right, too. It has a table of its own of the faults that it finds.

| fault | kind | file | found by | in |
|---|---|---|---|---|
"""


def row(mutant: Mutant, finding: Finding | None) -> str:
    """The line of the table of a mutant."""
    by, case = (finding.by, finding.case.replace("|", "/")) if finding else ("**nothing**", "")
    return f"| {mutant.name} | {mutant.kind} | `{mutant.file}` | {by} | {case} |"


if __name__ == "__main__":
    torch.set_num_threads(1)  # as in tests: sums on the CPU depend on the number
    text = _INTRODUCTION + "\n".join(row(mutant, hunt(mutant)) for mutant in MUTANTS) + "\n"
    PAGE.write_text(text)
