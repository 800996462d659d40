"""What the lint finds, as JSON, from a process in which Triton compiles: the tests have it interpret.

For the two newest Tritons the golden instruction mixes are those of `fastdeit kernels lint`. For an older one that a
supported torch pins, a file has the mixes of `sample` alone; `python -m tests.kernels.lint_report --update-golden`
writes it.
"""

import json
import os
import sys
import tempfile
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.jit import MockTensor

from fastdeit.kernels._triton import Launch
from fastdeit.kernels.lint import lint
from fastdeit.kernels.lint.lint import Row
from tests.kernels import bad_kernels

OF_SAMPLE = lint.GOLDEN / "sample" / lint.golden_file().name
VALUES = -16, -1, 0, 1, 2, 16, 17, 48, 2**31 - 1, 2**31, 2**31 + 1, 2**40, 1.0, 2.5, True, False


def sample(rows: list[Row]) -> list[Row]:
    """Every kernel on sm_80 and sm_90, and one of every op on the other architectures."""
    chosen = {}
    for row in rows:
        what = row.job.name if row.job.arch in (80, 90) else row.case.op
        chosen.setdefault((what, row.job.arch), row)
    return list(chosen.values())


@triton.jit
def fill(x, value):
    tl.store(x, value)


def disagreements() -> list[tuple[Any, Any]]:
    """Pairs of values that are one job but two programs for Triton, or the other way round."""
    triton.runtime.driver.set_active(lint.Card(80))
    x = torch.empty(16, device="meta")
    jobs = [lint.job_of(Launch(fill, (1,), {"x": x, "value": value}, 4, 1), 80) for value in VALUES]
    options = {"grid": (1,), "num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    programs = [fill.warmup(MockTensor(x.dtype), value, **options) for value in VALUES]
    return [
        (VALUES[i], VALUES[j])
        for i in range(len(VALUES))
        for j in range(i)
        if (jobs[i] == jobs[j]) != (programs[i] is programs[j])
    ]


def main() -> None:
    rows = lint.plan()
    chosen = sample(rows)
    bad = [row for case in bad_kernels.CASES for row in lint.record(case, 90)]
    facts = lint.compile_all([*chosen, *bad])
    mixes = {row.key: lint.golden_mix(facts[row.job]) for row in chosen if facts[row.job].mix is not None}
    if "--update-golden" in sys.argv:
        lines = (f"  {json.dumps(key)}: {json.dumps(mix)}" for key, mix in sorted(mixes.items()))
        OF_SAMPLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        return
    sampled = OF_SAMPLE.exists()
    golden = json.loads(OF_SAMPLE.read_text()) if sampled else lint.read_golden()
    report = {
        "ops": sorted({row.case.op for row in rows}),
        "broken": [f"{row.key}: {limit}" for row in chosen for limit in lint.broken(row, facts[row.job])],
        "bad": {row.case.name: lint.broken(row, facts[row.job]) for row in bad},
        "disagreements": disagreements(),
        "golden": len(golden),
        "update": f"{'python -m tests.kernels.lint_report' if sampled else 'fastdeit kernels lint'} --update-golden",
        "differences": lint.differences(golden, mixes),
        "gone": lint.gone(golden, rows),
        "missing": [row.key for row in rows if row.job.arch != 70 and row.key not in golden and not sampled],
    }
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        main()
