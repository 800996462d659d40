"""Pinned values: these numbers must never change, or every published seed means something else."""

import numpy as np
import pytest

from fastdeit import rng


def test_philox_known_answer():
    """Random123's known-answer vectors for Philox4x32-10."""
    assert [hex(word) for word in rng.bits(0, [0], 4)[0].tolist()] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]


def test_pinned_keys():
    assert rng.key(0, "order", 1) == 8849209487881895705
    assert rng.key(-1, "x", 2**63) == 15056652042835199623


def test_pinned_permutation_of_imagenet():
    permutation = rng.permutation(rng.key(0, "order", 1), 1281167)
    assert permutation[:5].tolist() == [367226, 1188116, 1131424, 1031554, 211032]
    assert (np.bincount(permutation, minlength=1281167) == 1).all()


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 1023, 1024, 1025])
def test_permutation_is_one(n):
    assert sorted(rng.permutation(7, n).tolist()) == list(range(n))


def test_purposes_seeds_and_ids_are_told_apart():
    keys = [
        rng.key(0, "a"), rng.key(1, "a"), rng.key(0, "b"), rng.key(0, "a", 0), rng.key(0, "a", 0, 0), rng.key(0, "a",
        1), rng.key(1, "a", 0),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)


def test_a_row_depends_on_its_own_id_only():
    together = rng.uniform(5, np.arange(100), 11, stream=3)
    alone = np.concatenate([rng.uniform(5, [i], 11, stream=3) for i in range(100)])
    assert (together == alone).all()
    assert (together[:, :4] == rng.uniform(5, np.arange(100), 4, stream=3)).all()
    assert not (together == rng.uniform(5, np.arange(100), 11, stream=4)).any(axis=1).any()


def test_ids_beyond_32_bits_differ():
    low, high = rng.bits(5, [7], 4), rng.bits(5, [7 + 2**32], 4)
    assert (low != high).any()


def test_uniforms_are_uniform_and_uncorrelated():
    u = rng.uniform(5, np.arange(100_000), 8)
    assert ((u >= 0) & (u < 1)).all()
    # Standard errors: 1/sqrt(12 n) of the mean, about 1/sqrt(n) of a correlation; five of them.
    assert np.abs(u.mean(0) - 0.5).max() < 5 / np.sqrt(12e5)
    correlation = np.corrcoef(u.T) - np.eye(8)
    assert np.abs(correlation).max() < 5 / np.sqrt(1e5)
