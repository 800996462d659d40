"""CRC-32C (Castagnoli), the checksum of TFRecord files, in numpy: about 1 GB/s, where a loop over bytes has 5 MB/s.

A CRC is the remainder of a division of polynomials over GF(2): linear in the message, so that every byte contributes on
its own, by a table of its distance from the end. A table for every distance would be larger than the message. But the
remainder stays the same when a multiple of the divisor is added, and there is one of only four terms,

    1 + x^(-8*4323) + x^(-8*5259) + x^(-8*5685) = 0  modulo the divisor, up to a power of x

by which a byte may be struck out if it is added to those 4323, 5259 and 5685 places further on. Adding 4323 bytes at a
time leaves the last 5685 bytes; they are looked up. (No multiple of four terms at whole bytes is shorter; with three
there is none, since the divisor contains x + 1.)
"""

import functools

import numpy as np
from numpy.typing import NDArray

_DIVISOR = 0x82F63B78  # bits reversed: the lowest bit is the coefficient of x^31
_FOLD = (4323, 5259, 5685)
# As the first bytes of a message, they turn the register from 0 to 0xFFFFFFFF, from where the checksum starts.
_START = np.frombuffer(bytes.fromhex("54641f64"), np.uint8)
_CRC_OF_8_ZEROS = 0x8C28B28A
_MASK_DELTA = 0xA282EAD8


def crc32c(data: bytes | NDArray[np.uint8]) -> int:
    """CRC-32C of `data` (uint8 `[n]`, any n); that of b"123456789" is 0xE3069283."""
    rest = np.concatenate((_START, np.frombuffer(data, np.uint8)))
    near, *_, far = _FOLD
    done = 0
    while len(rest) - done > far:
        part = rest[done : min(done + near, len(rest) - far)]
        for step in _FOLD:
            rest[done + step : done + step + len(part)] ^= part
        done += len(part)
    rest = rest[done:]
    table = _table()
    return int(np.bitwise_xor.reduce(table[np.arange(len(rest) - 1, -1, -1), rest])) ^ 0xFFFFFFFF


def crc32c_of_8(data: bytes) -> int:
    """CRC-32C of 8 bytes, in a microsecond."""
    crc = _CRC_OF_8_ZEROS
    for table, byte in zip(_tables_of_8(), data.rstrip(b"\0"), strict=False):  # zeros at the end contribute nothing
        crc ^= table[byte]
    return crc


def masked(crc: int) -> int:
    """The form in which TFRecord stores a CRC: rotated and displaced, so that the CRC of a record that contains CRCs is
    a good one."""
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


@functools.cache
def _table() -> NDArray[np.uint32]:
    """uint32 [5685, 256]: what a byte contributes to the register, by its distance from the end."""
    row = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        row = row >> 1 ^ (row & 1) * np.uint32(_DIVISOR)
    table = np.empty((_FOLD[-1], 256), np.uint32)
    table[0] = row
    for distance in range(1, len(table)):
        last = table[distance - 1]
        table[distance] = last >> 8 ^ row[last & 255]
    return table


@functools.cache
def _tables_of_8() -> list[list[int]]:
    return _table()[7::-1].tolist()
