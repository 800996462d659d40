"""CRC-32C in numpy is the standard's, at every length around those at which it goes another way."""

import numpy as np
import pytest
from writers import crc32c as by_bits

from fastdeit.data import crc32c as module
from fastdeit.data.crc32c import crc32c, crc32c_of_8, masked


@pytest.mark.parametrize(
    ("data", "crc"),  # RFC 3720, B.4, and the check value of the catalogue of CRCs
    [
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"123456789", 0xE3069283),
        (b"", 0),
    ],
)
def test_published_values(data, crc):
    assert crc32c(data) == by_bits(data) == crc


SHORT, _, FAR = module._FOLD
EDGES = [0, 1, 3, 4, 5, FAR - 5, FAR - 4, FAR - 3, SHORT + FAR - 5, SHORT + FAR - 4, SHORT + FAR - 3, 2 * FAR, 40_000]


@pytest.mark.parametrize("length", EDGES)
def test_any_length(length):
    data = np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8)
    assert crc32c(data) == crc32c(data.tobytes()) == by_bits(data.tobytes())


def test_every_bit_counts():
    data = bytearray(12_000)
    whole = crc32c(data)
    for bit in np.random.default_rng(0).integers(0, 8 * len(data), 200):
        data[bit // 8] ^= 1 << bit % 8
        assert crc32c(data) != whole
        data[bit // 8] ^= 1 << bit % 8


def test_the_argument_is_not_written_to():
    data = np.arange(20_000).astype(np.uint8)
    before = data.copy()
    crc32c(data)
    assert np.array_equal(data, before)


def test_of_8_bytes():
    for seed in range(50):
        data = np.random.default_rng(seed).bytes(8)
        assert crc32c_of_8(data) == crc32c(data)


def test_masked_form_is_that_of_a_file_by_another_writer():
    assert masked(crc32c(bytes.fromhex("a000000000000000"))).to_bytes(4, "little") == bytes.fromhex("2a557225")
