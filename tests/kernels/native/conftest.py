import pytest

from tests.kernels.native import simt


@pytest.fixture(scope="session")
def native(tmp_path_factory):
    """The kernels of the head dim of DeiT, 64, on the CPU."""
    if simt.UNAVAILABLE:
        pytest.skip(simt.UNAVAILABLE)
    return simt.built(tmp_path_factory.mktemp("native"), head_dims=(64,))


@pytest.fixture(scope="session")
def every_native(tmp_path_factory):
    """All kernels on the CPU."""
    if simt.UNAVAILABLE:
        pytest.skip(simt.UNAVAILABLE)
    return simt.built(tmp_path_factory.mktemp("every_native"))
