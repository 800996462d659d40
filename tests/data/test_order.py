import numpy as np
import pytest
import torch

from fastdeit import rng
from fastdeit.data.plan import order


def rasampler(permutation: list[int], rank: int, world: int, repeats: int = 3) -> list[int]:
    """The index stream of one process under DeiT's RASampler, written from its description, for a given permutation."""
    n = len(permutation)
    each = -(-n * repeats // world)
    stream = [index for index in permutation for _ in range(repeats)]
    stream += stream[: each * world - len(stream)]
    return stream[rank::world][: n // 256 * 256 // world]


def test_pinned_values():
    sample, copy = order.epoch(3, 0, 10, 4, 2)
    assert sample.tolist() == [1, 1, 7, 7, 2, 2, 0, 0]
    assert copy.tolist() == [0, 1, 0, 1, 0, 1, 0, 1]
    assert order.epoch(3, 1, 10, 4).sample.tolist() == [4, 6, 8, 9, 2, 3, 5, 1]
    assert [order.substitute(0, 0, 5, attempt, 10) for attempt in range(4)] == [2, 1, 6, 6]


@pytest.mark.parametrize("world", [1, 4, 8])
def test_equals_rasampler_with_groups_for_ranks(monkeypatch, world):
    permutation = np.random.default_rng(1).permutation(5000)
    monkeypatch.setattr(rng, "permutation", lambda key, n: permutation)
    batch_size, group_size = 256, 256 // world
    stream = order.epoch(0, 0, 5000, batch_size, repeats=3)
    assert len(stream.sample) == 5000 // 256 * 256
    for rank in range(world):
        mine = [order.groups(stream, step, batch_size, group_size).sample[rank] for step in range(19)]
        assert np.concatenate(mine).tolist() == rasampler(permutation.tolist(), rank, world)


def test_imagenet_epoch_with_three_repeats_has_427008_images_three_times():
    sample, copy = order.epoch(0, 0, 1_281_167, 256, repeats=3)
    assert len(sample) == 1_281_024
    images, times = np.unique(sample, return_counts=True)
    assert len(images) == 427_008
    assert (times == 3).all()
    assert (np.bincount(copy) == 427_008).all()


def test_every_sample_once_without_repeats_and_the_rest_dropped():
    sample, copy = order.epoch(7, 2, 103, 10)
    assert len(sample) == 100 == len(np.unique(sample))
    assert not copy.any()
    assert sample.tolist() != order.epoch(7, 3, 103, 10).sample.tolist()
    assert sample.tolist() != order.epoch(8, 2, 103, 10).sample.tolist()


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_data_set_smaller_than_the_batch_continues_with_new_permutations(repeats):
    sample, copy = order.epoch(0, 0, 5, 32, repeats)
    assert len(sample) == 32
    assert len(set(zip(sample.tolist(), copy.tolist(), strict=True))) == 32
    turns = [sample[i : i + 5 * repeats] for i in range(0, 5 * (32 // 5 // repeats) * repeats, 5 * repeats)]
    assert all(np.unique(turn, return_counts=True)[1].tolist() == [repeats] * 5 for turn in turns)
    assert len({tuple(turn.tolist()) for turn in turns}) == len(turns) > 1


def test_copies_of_a_sample_fall_into_different_groups():
    stream = order.epoch(0, 0, 300, 48, repeats=3)
    for step in range(6):
        grouped = order.groups(stream, step, 48, 8)
        assert grouped.sample.shape == (6, 8)
        assert all(len(np.unique(group)) == 8 for group in grouped.sample)


@pytest.mark.parametrize(("accumulate", "world"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 2)])
def test_shares_cover_the_groups_once_and_in_order(accumulate, world):
    shares = [order.slice_of(16, a, accumulate, r, world) for a in range(accumulate) for r in range(world)]
    assert [g for share in shares for g in range(share.start, share.stop)] == list(range(16))


def test_groups_that_cannot_be_shared_are_refused_with_all_numbers_and_a_way_out():
    with pytest.raises(ValueError, match=r"16 mixing groups .* accumulate 2 x nproc 3 = 6; change the batch size"):
        order.slice_of(16, 0, 2, 0, 3)
    with pytest.raises(
        ValueError, match=r"batch size 1000 .* groups of 64 .* accumulate 2 x nproc 8 .* = 1024\): use a"
    ):
        order.groups_per_batch(1000, 64, 2, 8)
    with pytest.raises(
        ValueError, match=r"batch size 96 .* multiple of 128, or a group size that divides 48, or change"
    ):
        order.groups_per_batch(96, 64, 2, 1)
    assert order.groups_per_batch(1024, 64, 2, 8) == 16


def test_substitute_is_never_the_sample_and_reaches_all_others():
    drawn = [order.substitute(1, 0, 4, attempt, 6) for attempt in range(100)]
    assert set(drawn) == {0, 1, 2, 3, 5}
    assert order.substitute(1, 0, 0, 0, 1) == 0
    assert drawn != [order.substitute(1, 1, 4, attempt, 6) for attempt in range(100)]


@pytest.mark.parametrize("n", [1, 2, 101])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_shards_are_disjoint_complete_and_even(n, world):
    shards = [order.shard(n, rank, world) for rank in range(world)]
    assert sorted(np.concatenate(shards).tolist()) == list(range(n))
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1


def test_invalid_sizes_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        order.epoch(0, 0, 0, 8)


def test_orders_feed_torch_without_conversion():
    assert torch.from_numpy(order.epoch(0, 0, 8, 4).sample).dtype == torch.int64
