"""Without DALI and other packages that only images and tables need, the rest works: on a borrowed card one measures
steps, kernels and tests."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[:2] == ["nvidia", "dali"] or name in ("google_crc32c", "pyarrow"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
"""


def without_dali(code):
    command = [sys.executable, "-c", BLOCK + code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_everything_but_reading_images_works(tmp_path):
    names = "command", "calibrate", "kernels", "peers", "report", "step", "suite"
    arguments = ["train", "digits", "--run-dir", str(tmp_path / "run")]
    code = f"from fastdeit.bench import {', '.join(names)}\nfrom fastdeit.run import evaluate\n"
    code += "from fastdeit import cli, training\nprint('imported')\n"
    done = without_dali(f"{code}sys.exit(cli.main({arguments}))")
    assert done.stdout.startswith("imported\n"), done.stderr
    assert done.returncode == 1
    assert "NVIDIA DALI, which is not installed: pip install nvidia-dali-cuda120" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_tests_of_a_card_can_be_collected():
    """There is no card here, so that none is left."""
    code = (
        "import pytest\nsys.exit(pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', '-m', 'gpu', 'tests']))"
    )
    done = without_dali(code)
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout[-3000:]
