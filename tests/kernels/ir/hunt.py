"""Plants the faults of `tests/kernels/mutants.py` once more, and sees which of them show in compiled kernels.

    FASTDEIT_IR=90 python -m tests.kernels.ir.hunt       hunts them all, in two minutes, and writes docs/compiled.md

The faults that need tensors of more than 2**31 elements are left out.
"""

import os
from collections import Counter
from functools import partial

import torch

from fastdeit.kernels.lint.interpreter import Fault
from tests.kernels.checked_cases import CheckedCase, every_case, same_bits
from tests.kernels.ir.executed import executed, unavailable
from tests.kernels.mutant_hunt import PAGE, planted
from tests.kernels.mutants import MUTANTS, Mutant

COMPILED_PAGE = PAGE.with_name("compiled.md")
MISSED = "**nothing**"
TRIED = [mutant for mutant in MUTANTS if mutant.hint != "huge"]


def found_by(mutant: Mutant, arch: int) -> str:
    """What shows that a kernel with the fault is wrong, in the cases that the fault names, or all of its ops."""
    wanted = mutant.cases.split("/")
    cases = [case for case in every_case().values() if [case.op.name, case.backend.name][: len(wanted)] == wanted]
    hinted = [case for case in cases if mutant.hint in case.name]
    with planted(mutant):
        return next(filter(None, (_shown(case, arch) for case in hinted or cases)), MISSED)


def _shown(case: CheckedCase, arch: int) -> str | None:
    within = partial(executed, arch=arch)
    try:
        outcome = case.run("forward", within=within)
        case.judge(outcome)
        if not same_bits(outcome, case.run("reverse", within=within)):
            return "another order gives other bits"
    except Fault as fault:
        return fault.kind
    except AssertionError:
        return "error rule"
    except Exception as error:
        return f"it fails: {type(error).__name__}"
    return None


_INTRODUCTION = """# Compiled kernels on the CPU

```bash
pip install -e '.[test,ir]'                  # Python 3.12 and Triton 3.8
FASTDEIT_IR=90 pytest -m gpu tests/kernels   # the tests that need a GPU, on kernels compiled for sm_90
```

Without a GPU, this runs on the CPU what Triton compiles for one. Triton compiles each kernel for the architecture
that `FASTDEIT_IR` names. [ttsem](https://pypi.org/project/ttsem/) then runs TTIR, the compiler's first intermediate
code, on tensors of the CPU (`tests/kernels/ir/executed.py`). If a package is missing, the tests are skipped with
the reason.

**What it shows.** The same as the [checked interpreter](proofs.md): bounds, alignment, races, barriers and the
order of programs. But it shows them of the compiled kernel, in which helpers are inlined, constants folded, and
types those of a card. Products of bfloat16 are right, which Triton's interpreter gets wrong, so the error rule
holds for them as well. A fault comes with the tensor and the line of the kernel. Happens-before proves that the
last program may read what the others wrote: it has an acquire that saw their releases, each behind a barrier.

**Attention for Hopper** is in Gluon, which has no TTIR. ttsem runs its next intermediate code, TTGIR, in which
layouts and views of shared memory, loads by TMA and products by wgmma have been chosen. Here none of these is ever
late. [The machine](hopper.md) tests lateness.

**What it does not show.** Layouts, shared memory, pipelines and instructions of other kernels, which the compiler
decides after TTIR. int32 that wraps, and promises of `tl.multiple_of`, which the interpreter checks. Streams,
graphs, clocks and Inductor, whose tests have the mark `card`.

## Planted faults

`FASTDEIT_IR=90 python -m tests.kernels.ir.hunt` plants the faults of [Proofs of the kernels](proofs.md) into compiled
kernels, runs the cases that each fault names, and writes this page. Those that show only in tensors of more than 2**31
elements are left out. `FASTDEIT_IR=90 pytest -m gpu tests/kernels/ir` plants them again and compares.

"""


def row(mutant: Mutant, by: str) -> str:
    """The line of a mutant in the page."""
    return f"| {mutant.name} | `{mutant.file}` | {by} |"


def _page(findings: dict[Mutant, str]) -> str:
    missed = [mutant for mutant, by in findings.items() if by == MISSED]
    kinds, finders = sorted({mutant.kind for mutant in findings}), Counter(findings.values())
    counts = Counter((mutant.kind, by) for mutant, by in findings.items())
    columns = sorted(finders, key=lambda by: (by == MISSED, by))
    lines = [
        f"{len(findings) - len(missed)} of {len(findings)} are found:",
        "",
        f"| kind | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
        *(f"| {kind} | {' | '.join(str(counts[kind, by] or '') for by in columns)} |" for kind in kinds),
        f"| all | {' | '.join(str(finders[by]) for by in columns)} |",
        "",
        "| fault | file | shown by |",
        "|---|---|---|",
        *(row(mutant, by) for mutant, by in findings.items()),
    ]
    return _INTRODUCTION + "\n".join(lines) + "\n"


if __name__ == "__main__":
    if reason := unavailable():
        raise SystemExit(f"compiled kernels cannot be run: {reason}")
    torch.set_num_threads(1)  # as in tests: sums on the CPU depend on the number
    arch = int(os.environ.get("FASTDEIT_IR", "90"))
    COMPILED_PAGE.write_text(_page({mutant: found_by(mutant, arch) for mutant in TRIED}))
