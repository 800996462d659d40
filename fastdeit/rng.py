"""Noise as a pure function of what it is for.

Every random thing in fastdeit is `f(key(seed, purpose, *ids))`. Nothing random is carried state, so a run resumed at
any step, spread over any number of processes, or replayed for one sample sees exactly the noise of the original run.

`key` turns a purpose into 64 bits; `bits` and `uniform` expand a key into per-id streams with Philox4x32-10 (Salmon
et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the counter is (block, id low, id high, stream), so
the value of one id never depends on which other ids are asked for. Pinned values: `tests/test_rng.py`.
"""

from hashlib import blake2b

import numpy as np
from numpy.typing import ArrayLike, NDArray

_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def key(seed: int, purpose: str, *ids: int) -> int:
    """64-bit key of a purpose: equal inputs give equal keys on any machine, different inputs unrelated ones.

    `seed` and `ids` may be any integers in [-2**63, 2**64); `purpose` names the consumer ("order", "crop", "mix", ...).
    """
    digest = blake2b(purpose.encode(), digest_size=8, person=b"fastdeit")
    for number in (seed, *ids):
        digest.update(int(number).to_bytes(9, "little", signed=True))
    return int.from_bytes(digest.digest(), "little")


def bits(key: int, ids: ArrayLike, count: int, stream: int = 0) -> NDArray[np.uint32]:
    """`[len(ids), count]` random 32-bit words; row i depends on (key, ids[i], stream) alone."""
    ids = np.atleast_1d(np.asarray(ids)).astype(np.uint64)
    blocks = (count + 3) // 4
    shape = (len(ids), blocks)
    c0 = np.broadcast_to(np.arange(blocks, dtype=np.uint64)[None, :], shape)
    c1 = np.broadcast_to((ids & _LOW)[:, None], shape)
    c2 = np.broadcast_to((ids >> _SHIFT)[:, None], shape)
    c3 = np.full(shape, stream, dtype=np.uint64)
    k0, k1 = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    for _ in range(_ROUNDS):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0), p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1), p0 & _LOW
        k0, k1 = k0 + _WEYL[0] & 0xFFFFFFFF, k1 + _WEYL[1] & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3), axis=-1).reshape(len(ids), blocks * 4)[:, :count].astype(np.uint32)


def uniform(key: int, ids: ArrayLike, count: int, stream: int = 0) -> NDArray[np.float64]:
    """`[len(ids), count]` uniforms in [0, 1) with 32 random bits each; row i depends on (key, ids[i], stream) alone."""
    return bits(key, ids, count, stream) * 2.0**-32


def permutation(key: int, n: int) -> NDArray[np.int64]:
    """A permutation of `range(n)`, n < 2**40.

    Sorting (random word, index) packed into one integer makes every sort key distinct, so the result depends neither
    on the sort algorithm nor on the numpy version.
    """
    width = max(n - 1, 1).bit_length()
    words = bits(key, np.arange((n + 1) // 2), 4).view(np.uint64).reshape(-1)[:n]
    packed = words >> np.uint64(width) << np.uint64(width) | np.arange(n, dtype=np.uint64)
    packed.sort()
    return (packed & np.uint64((1 << width) - 1)).astype(np.int64)
