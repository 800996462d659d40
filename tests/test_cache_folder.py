"""Every part that keeps something finds the cache at the same place."""

from pathlib import Path

import pytest

from fastdeit.cache_folder import cache_folder
from fastdeit.kernels.native import cache
from fastdeit.kernels.trial import store


@pytest.mark.parametrize(
    ("said", "place"),
    [
        ("~/mine", "home/mine"),
        ("/somewhere", "/somewhere"),
        ("", "home/.cache/fastdeit"),
        (None, "home/.cache/fastdeit"),
    ],
)
def test_home_is_expanded_everywhere(monkeypatch, tmp_path, said, place):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FASTDEIT_CACHE") if said is None else monkeypatch.setenv("FASTDEIT_CACHE", said)
    expected = tmp_path / place
    assert (cache_folder(), cache.folder(), store.folder()) == (expected, expected / "native", expected / "kernels")


def test_nobody_else_reads_the_variable():
    package = Path(__file__).parents[1] / "fastdeit"
    readers = [path.name for path in package.rglob("*.py") if 'environ.get("FASTDEIT_CACHE")' in path.read_text()]
    assert sorted(readers) == ["cache.py", "cache_folder.py"]
