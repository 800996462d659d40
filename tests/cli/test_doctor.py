"""The environment report."""

import json
import subprocess

import pytest

from fastdeit.run import environment
from fastdeit.verbs import doctor


@pytest.fixture(scope="module")
def found():
    return environment.report()


def test_report_is_plain_and_complete(found):
    assert json.loads(json.dumps(found)) == found
    assert found["torch"]["version"] == str(environment.torch.__version__)
    assert found["machine"]["memory"] > 2**28
    assert found["machine"]["cpu_cores"] >= 1
    assert found["packages"]["timm"]
    assert all(item["name"] and item["backend"] for item in found["kernels"])
    assert found["kernels"]


def test_rendered_for_reading(found, capsys):
    doctor.main(None)
    text = capsys.readouterr().out
    for section in ("software\n", "machine\n", "kernels\n", "warnings\n"):
        assert section in text
    for item in found["kernels"]:
        assert item["name"] in text
        assert (item["reason"] or "") in text
    assert found["native"] in text
    if not found["gpus"]:
        assert found["native"] == "not used here: no CUDA device"
        assert "none that torch can use" in text


def test_warnings(found):
    def place(free, total):
        return {"path": "/x", "free": free, "total": total}

    small = {"runs": place(doctor.GIB, 2), "cache": place(10 * doctor.GIB, 2), "shared memory": place(0, 2**26)}
    said = doctor.warnings({"space": small, "dali": None, "apex": "not installed"})
    assert len(said) == 3
    assert "only 1.0 GiB free at /x (runs)" in said[0]
    assert "has only 0.1 GiB" in said[1]
    assert "pip install nvidia-dali-cuda120" in said[2]


def test_apex_is_told_from_its_namesake(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert environment.apex_status().startswith("not installed")
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise ImportError('never imported')")
    assert "PyPI's apex is an unrelated project" in environment.apex_status()
    (tmp_path / "apex" / "optimizers").mkdir()
    assert environment.apex_status() == "NVIDIA apex is installed"


def test_code_version(tmp_path):
    def git(*words):
        options = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *options, *words], check=True, capture_output=True)

    assert environment.code_version(tmp_path) is None
    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "a")
    clean = environment.code_version(tmp_path)
    (tmp_path / "a").write_text("2")
    assert len(clean) == 12
    assert environment.code_version(tmp_path) == f"{clean}-dirty"
