import shutil

import pytest

from tests.faults.faulty import save


@pytest.fixture(scope="module")
def prepare(tmp_path_factory):
    """`prepare(root, steps)` copies sound checkpoints of some of steps 1 to 3 to `root`; copies cost no fsync."""
    archive = tmp_path_factory.mktemp("archive")
    for step in (1, 2, 3):
        save(archive, step)

    def copy(root, steps):
        for step in steps:
            shutil.copytree(archive / f"step_{step:08d}", root / f"step_{step:08d}")
        root.mkdir(exist_ok=True)
        return root / f"step_{max(steps, default=0):08d}"

    return copy
