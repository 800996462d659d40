"""The instructions of a compiled program, read by the nvdisasm that Triton brings."""

import re
import subprocess
import tempfile
from collections import Counter

import triton


def disassembled(cubin: bytes) -> str | None:
    """SASS of a cubin; None where nvdisasm does not know the architecture."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None


def mix(sass: str) -> dict[str, int]:
    """{opcode: number} of a disassembly, without modifiers; "all" counts every instruction but padding."""
    found = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[\dT]+\s+)?([A-Z][A-Z0-9_]*)", sass))
    del found["NOP"]
    return {"all": found.total()} | {opcode: found[opcode] for opcode in sorted(found)}
