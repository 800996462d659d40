import pytest

from fastdeit.kernels import _op


@pytest.fixture
def force(monkeypatch):
    """Sets `FASTDEIT_KERNELS` for one test; the process reads it only once."""

    def set_choice(value):
        monkeypatch.setenv(_op.VARIABLE, value)
        _op._choices.cache_clear()

    yield set_choice
    monkeypatch.undo()
    _op._choices.cache_clear()
