"""The SIMT shim does what a card does with right kernels, and finds what is wrong with wrong ones (`examples.cu`)."""

import ctypes
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.kernels.native import simt

FAULTS = {
    "no_barrier": "of shared memory: another thread (reads|writes) there",
    "barrier_of_the_warp_only": "of shared memory: another thread (reads|writes) there",
    "no_barrier_before_the_next_write": "of shared memory: another thread (reads|writes) there",
    "two_write_one_place": "writes 4 bytes at offset .* of shared memory: another thread writes there",
    "shuffle_for_a_barrier": "of shared memory: another thread (reads|writes) there",
    "reads_beyond_the_end": "thread 63 of block 0 reads 4 bytes at offset 512 of in: that is outside",
    "writes_before_the_start": "thread 0 of block 0 writes 4 bytes at offset -4 of out: that is outside",
    "writes_its_input": "writes 4 bytes at offset .* of in: it is an input",
    "blocks_write_one_place": "of block 1 writes .* of out: another thread has written there",
    "reads_what_another_block_wrote": "of block 1 reads .* of out: another thread has written there",
    "more_shared_memory_than_asked": "offset 256 of shared memory: the launch has asked for less of it",
    "some_threads_at_the_barrier": "threads wait for others that never come",
    "lanes_in_different_operations": "lanes of a warp meet in different operations",
    "shuffle_of_some_lanes": "a shuffle of some lanes only",
    "matrix_that_is_not_aligned": "a matrix in memory is not 32-byte aligned",
    "pitch_that_is_not_a_multiple": "the pitch of a matrix in memory is not a multiple of 16 bytes",
    "vector_that_is_not_aligned": "an access to memory is not aligned as its type has to be",
}
"""What the shim says of each kernel that is wrong."""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if simt.UNAVAILABLE:
        pytest.skip(simt.UNAVAILABLE)
    folder = tmp_path_factory.mktemp("simt")
    simt.laid_out(folder)
    shutil.copy(Path(__file__).parent / "examples.cu", folder)
    return simt.linked(
        folder, "examples.so", *(simt.compiled(folder, name, f"{name}.o") for name in ("simt.cpp", "examples.cu"))
    )


@pytest.fixture
def run(library):
    """`run(kernel, values, outputs, ...)` gives the outputs, a float32 array; raises `simt.Fault`."""

    def launch(name, values, outputs, blocks=1, threads=64, shared=4096, seed=0):
        out = np.full(outputs, math.nan, np.float32)
        library.simt_seed(ctypes.c_uint64(seed))
        library.simt_forget_regions()
        simt.named(library, "in", values.ctypes.data, values.nbytes)
        simt.named(library, "out", out.ctypes.data, out.nbytes, written := simt.writers(out.nbytes))
        pointers = (ctypes.c_void_p(array.ctypes.data) for array in (values, out))
        status = library.simt_launch(getattr(library, name), blocks, threads, ctypes.c_size_t(shared), *pointers)
        assert len(written)  # alive until here
        if status:
            raise simt.Fault(library.simt_fault().decode())
        return out

    return launch


@pytest.mark.parametrize("seed", range(3))
def test_threads_meet_at_barriers(run, seed):
    values = np.arange(128, dtype=np.float32)
    assert np.array_equal(run("reversed", values, 128, blocks=2, seed=seed), values.reshape(2, 64)[:, ::-1].ravel())
    of_warps = values.reshape(4, 32)[:, ::-1].ravel()
    assert np.array_equal(run("reversed_in_warp", values, 128, blocks=2, seed=seed), of_warps)


@pytest.mark.parametrize("seed", range(3))
def test_lanes_exchange_values(run, seed):
    values = np.arange(64, dtype=np.float32)
    assert np.array_equal(run("exchanged", values, 64, seed=seed), (np.arange(64) ^ 5).astype(np.float32))


@pytest.mark.parametrize("seed", range(3))
def test_matrices_are_multiplied_wherever_their_elements_are(run, seed):
    a, b, c = np.random.default_rng(0).integers(-9, 10, (3, 16, 16))
    given = np.concatenate([a.astype(np.float16).ravel(), b.astype(np.float16).ravel()]).view(np.float32)
    given = np.concatenate([given, c.astype(np.float32).ravel()])
    out = run("product", given, 256, threads=32, seed=seed)
    assert np.array_equal(out.reshape(16, 16), a @ b + a @ b.T + c)


def test_numbers_are_rounded_to_16_bit_as_numpy_rounds_them(run):
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    steps = np.abs(np.diff(np.sort(halves[np.isfinite(halves)]))) / 2
    between = np.sort(halves[np.isfinite(halves)])[:-1] + steps
    values = np.concatenate([halves, between, np.nextafter(between, np.float32(1e9)), np.nextafter(between, -between)])
    values = np.concatenate([values, np.float32([65504, 65519.996, 65520, 1e9, -1e9, 1e-9])])
    values = np.pad(values, (0, -len(values) % 32)).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(np.float16).astype(np.float32)
    out = run("rounded", values, len(values), blocks=len(values) // 32, threads=32)
    assert np.array_equal(out, expected, equal_nan=True)


def test_memory_that_nobody_wrote_is_not_a_number(run):
    assert np.isnan(run("unwritten", np.zeros(64, np.float32), 64)).all()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kernel", FAULTS)
def test_what_no_kernel_may_do_is_found(run, kernel, seed):
    values = np.zeros(128, np.float32)
    with pytest.raises(simt.Fault, match=FAULTS[kernel]):
        run(kernel, values, 128, blocks=2, shared=256, seed=seed)


def test_more_shared_memory_than_a_kernel_may_have_is_refused(run):
    values = np.zeros(64, np.float32)
    run("unwritten", values, 64, shared=48 * 1024)
    with pytest.raises(simt.Fault):
        run("unwritten", values, 64, shared=48 * 1024 + 1)
