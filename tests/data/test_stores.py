"""What stores and named noise bring to a batch: by which key it is asked for, and that it is shared out rightly."""

import numpy as np
import pytest
import torch

from fastdeit.data.loader import EvalLoader, TrainLoader
from fastdeit.data.plan import plan
from fastdeit.data.sources.source import DataError

AUGMENT, MIXING = plan.Augment(size=(16, 16)), plan.Mixing(group_size=4)
OPTIONS = {"seed": 2, "batch_size": 16, "repeats": 2, "threads": 1, "noise": {"drop_path": 3, "mask": 3}}


class Keys:
    """A store whose value for a sample is the key it is asked for."""

    def read(self, epoch, index, copy, place):
        return np.stack([np.full_like(index, epoch), index, copy], 1)


class Raises:
    def __init__(self, error):
        self.error = error

    def read(self, epoch, index, copy, place):
        if epoch == 1:
            raise self.error
        return np.zeros(len(index))


class Short(Keys):
    def read(self, epoch, index, copy, place):
        return super().read(epoch, index, copy, place)[1:]


def batches(source, stop=3, **options):
    return list(TrainLoader(source, [AUGMENT], MIXING, **OPTIONS | options).batches(0, stop))


@pytest.fixture
def source(memory, varied):
    return memory(varied[:32])


def test_a_store_is_asked_for_epoch_sample_and_copy(source):
    for (batch,) in batches(source, stores={"keys": Keys()}):
        expected = torch.stack([batch.step.epoch.expand(16), batch.index, batch.copy], 1)
        assert torch.equal(batch.extras["keys"], expected)
    assert batch.step.epoch == 1
    assert set(batch.copy.tolist()) == {0, 1}


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 2), (2, 2)])
def test_extras_and_noise_are_those_of_the_whole_batch_in_parts(source, world, accumulate):
    stores = {"keys": Keys()}
    whole = batches(source, stores=stores)
    parts = [batches(source, stores=stores, rank=rank, world=world, accumulate=accumulate) for rank in range(world)]
    for step, (batch,) in enumerate(whole):
        # A micro-batch is what all processes work on at once.
        pieces = [parts[rank][step][micro] for micro in range(accumulate) for rank in range(world)]
        for read in (lambda b: b.extras["keys"], lambda b: b.noise["mask"], lambda b: b.noise["drop_path"]):
            assert torch.equal(torch.cat([read(piece) for piece in pieces]), read(batch))


def test_a_substitute_brings_what_the_store_has_of_it(source):
    reported = []
    for bad in range(8):
        source.images[bad] = np.frombuffer(b"no picture", np.uint8)
    options = {"max_bad_fraction": 0.5, "on_bad": lambda path, why: reported.append(path)}
    for (batch,) in batches(source, stores={"keys": Keys()}, **options):
        assert torch.equal(batch.extras["keys"][:, 1:], torch.stack([batch.index, batch.copy], 1))
        assert batch.index.min() >= 8
    assert reported


@pytest.mark.parametrize("error", [KeyError("no logits of 7"), FileNotFoundError(2, "No such file", "epoch_1.npy")])
def test_what_a_store_does_not_hold_ends_the_run_with_a_sentence(source, error):
    words = r"^store 'logits' cannot give what step 2 of epoch 1 needs: .*(of 7|epoch_1.npy'); it must hold"
    with pytest.raises(DataError, match=words):
        batches(source, stores={"logits": Raises(error)})


def test_a_store_that_returns_too_few_rows_is_named(source):
    with pytest.raises(DataError, match=r"store 'short' returned a tensor of shape \[15, 3\] for 16 samples"):
        batches(source, stores={"short": Short()})


def test_noise_differs_by_name_and_by_step(source):
    first, second = batches(source, stop=2)
    streams = [batch[0].noise[name] for batch in (first, second) for name in ("drop_path", "mask")]
    flat = torch.cat([stream.flatten() for stream in streams])
    assert len(set(flat.tolist())) > 0.99 * len(flat)


@pytest.mark.parametrize(("world", "batch_size"), [(1, 5), (2, 3)])
def test_the_noise_of_evaluation_belongs_to_the_sample(source, world, batch_size):
    found = {}
    for rank in range(world):
        loader = EvalLoader(
            source, (16, 16), 1.0, rank=rank, world=world, batch_size=batch_size, threads=1, noise={"mask": 4}
        )
        for batch in loader.batches():
            found |= dict(zip(batch.index.tolist(), batch.noise["mask"], strict=True))
    expected = torch.from_numpy(plan.noise(0, 0, np.arange(32), 4, "mask"))
    assert torch.equal(torch.stack([found[index] for index in range(32)]), expected)
    assert len(set(expected.flatten().tolist())) == 128
