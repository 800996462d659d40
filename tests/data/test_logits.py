"""Logits on disk: what a record keeps of them, how far off that is, and what becomes of writers and files that fail."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import log

import numpy as np
import pytest
import torch

from fastdeit import kernels
from fastdeit.data.logits import MANIFEST, Cache, CachedLogits, Layout
from fastdeit.data.sources.source import DataError

EXACT = Layout(classes=7, top_k=7, tau=1.0, batch_size=4, steps_per_epoch=40)
TOP = replace(EXACT, top_k=2)


def logits(rows, classes, scale=3.0, seed=0):
    return scale * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))


# ---- one record ------------------------------------------------------------------------------------------------------


def test_all_logits_come_back_bit_for_bit():
    given = logits(4, 7)
    given[0, :3] = torch.tensor([-0.0, 1e-42, 3e38])
    found = EXACT.decode(EXACT.encode(np.arange(4), given))
    assert found.tobytes() == given.numpy().tobytes()


@pytest.mark.parametrize(
    ("classes", "top_k", "size"), [(1000, 10, 46), (1000, 1, 10), (65_536, 100, 406), (65_537, 100, 606), (7, 7, 32)]
)
def test_the_size_of_a_record(classes, top_k, size):
    assert Layout(classes, top_k, 1.0, 4, 40).record.itemsize == size


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_the_top_k_target_has_the_teachers_shares_and_an_even_rest(tau):
    layout, given = Layout(50, 5, tau, 4, 40), logits(64, 50)
    target = (torch.from_numpy(layout.decode(layout.encode(np.arange(64), given))) / tau).softmax(1)
    truth = (given.double() / tau).softmax(1)
    best = truth.topk(5).indices
    torch.testing.assert_close(target.gather(1, best).double(), truth.gather(1, best), rtol=2**-8, atol=0)
    others = target.scatter(1, best, torch.nan)
    others = others[~others.isnan()].reshape(64, 45)
    torch.testing.assert_close(others, others[:, :1].expand(-1, 45))
    torch.testing.assert_close(others.double().sum(1), 1 - truth.gather(1, best).sum(1), rtol=2**-6, atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_the_teachers_answer_survives_rounding(top_k):
    """Logits that float16 cannot tell apart, and equal ones, of which `argmax` takes the first."""
    near = 1 + logits(200, 7, scale=1e-5)
    rows = torch.cat([near, near.round(decimals=5), torch.zeros(1, 7), logits(50, 7, scale=100)])
    for tau in (1.0, 0.7, 3.0):
        layout = Layout(7, top_k, tau, 4, 40)
        found = torch.from_numpy(layout.decode(layout.encode(np.zeros(len(rows), int), rows)))
        assert torch.equal(found.argmax(1), rows.argmax(1))


def test_logits_far_apart_stay_finite():
    layout = replace(TOP, tau=0.001)
    found = layout.decode(layout.encode(np.arange(1), torch.tensor([[900.0, 0, -900, 1, 2, 3, 4]])))
    assert np.isfinite(found).all()


def test_an_answer_that_is_not_finite_is_refused():
    given = logits(4, 7)
    given[2, 3] = torch.nan
    with pytest.raises(ValueError, match="sample 12 is not finite"):
        TOP.encode(np.arange(10, 14), given)


@pytest.mark.parametrize("tau", [1.0, 3.0])
@pytest.mark.parametrize("top_k", [1, 5, 20, 49])
def test_the_error_of_a_top_k_target_is_bounded(top_k, tau):
    """docs/cache.md: with r the mass of the rest and H the entropy of the stored shares, all at the temperature,

    gradient by the student's logits   |g - g'|_1 <= tau / D * (2 r + 2**-10 H)
    loss                               |L - L'|   <= tau**2 / D * (r (log(K - k) + s) + 2**-10 H (1 + s'))

    s and s' being what the student's log-probabilities range over among the rest, and among all.
    """
    layout, given = Layout(50, top_k, tau, 4, 40), logits(1, 50, seed=top_k)
    student = logits(1, 50, scale=2.0, seed=99)
    cached = torch.from_numpy(layout.decode(layout.encode(np.arange(1), given)))
    values, gradients = [], []
    for teacher in (given, cached):
        leaf = student.double().requires_grad_()
        targets = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), torch.ones(1).double()
        loss = kernels.distillation_loss(
            leaf, leaf, targets, teacher.double(), distillation="soft", alpha=1.0, tau=tau, reduction="batchmean"
        ).total
        loss.backward()
        values.append(loss.item())
        gradients.append(leaf.grad)
    share = (given.double() / tau).softmax(1)
    best = given.topk(top_k).indices
    rest = 1 - share.gather(1, best).sum().item()
    stored = torch.cat([share.gather(1, best)[0], torch.tensor([rest])])
    rounding = 2**-10 * -(stored * stored.log()).sum().item()
    sure = (student.double() / tau).log_softmax(1)
    among = sure.scatter(1, best, torch.nan)
    spread, widest = (x[~x.isnan()].max() - x[~x.isnan()].min() for x in (among, sure))
    assert (gradients[0] - gradients[1]).abs().sum() <= tau * (2 * rest + rounding)
    bound = tau**2 * (rest * (log(50 - top_k) + spread) + rounding * (1 + widest))
    assert 0 < abs(values[0] - values[1]) <= bound


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path):
    made = Cache(tmp_path / "cache", TOP, {"train.seed": 3}, {"teacher": "t"})
    made.create()
    return made


def blocks(shard, seed=0):
    return [
        TOP.encode(np.arange(4) + 4 * step, logits(4, 7, seed=seed + 100 * shard.epoch + step)) for step in shard.steps
    ]


def filled(cache, epochs):
    for shard in cache.layout.shards(range(epochs)):
        cache.write(shard, blocks(shard))
    return cache.layout.shards(range(epochs))


def read(cache, epoch, step, samples=None):
    place = 4 * step + np.arange(4)
    return CachedLogits(cache.folder).read(epoch, place if samples is None else samples, np.zeros(4), place)


def test_shards_hold_every_step_once_and_follow_each_other():
    shards = TOP.shards(range(2))
    assert [(shard.epoch, step) for shard in shards for step in shard.steps] == [
        (e, s) for e in (0, 1) for s in range(40)
    ]
    assert [shard.following for shard in shards[:-1]] == shards[1:]
    assert [len(shard.steps) for shard in shards] == [32, 8, 32, 8]
    assert Layout(1000, 1000, 1.0, 4096, 300).shard_steps == 1, "16 MiB at most"


def test_a_manifest_comes_back(cache):
    assert Cache.open(cache.folder) == cache


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "holds no cache of logits: .*No such file or directory; `fastdeit cache"),
        ("{", "cache.json is damaged"),
        ("{}", "cache.json is damaged"),
        ('{"format": 2}', "has format 2, and this version of fastdeit reads 1"),
    ],
)
def test_a_manifest_that_cannot_be_read(cache, text, words):
    (cache.folder / MANIFEST).unlink()
    if text is not None:
        (cache.folder / MANIFEST).write_text(text)
    with pytest.raises(DataError, match=words):
        Cache.open(cache.folder)


def test_what_is_written_is_read(cache):
    store = CachedLogits(cache.folder)
    for shard in filled(cache, 2):
        assert cache.is_sound(shard)
        for step, block in zip(shard.steps, blocks(shard), strict=True):
            place = 4 * step + np.arange(4)
            assert store.read(shard.epoch, place, np.zeros(4), place).tobytes() == TOP.decode(block).tobytes()


def test_the_parts_of_a_step_are_those_of_the_whole(cache):
    filled(cache, 1)
    store, place = CachedLogits(cache.folder), 4 * 33 + np.arange(4)
    parts = [store.read(0, place[part], np.zeros(2), place[part]) for part in (slice(0, 2), slice(2, 4))]
    assert np.array_equal(np.concatenate(parts), read(cache, 0, 33))


def test_another_sample_than_the_teacher_saw_is_refused(cache):
    filled(cache, 1)
    with pytest.raises(DataError, match="step 1 of epoch 0 the teacher saw sample 6 where this run has sample 60"):
        read(cache, 0, 1, np.array([4, 5, 60, 7]))


class Killed(BaseException):
    """What no handler of an error catches, as of a process that is gone."""


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_writer_that_is_killed_leaves_no_shard(cache, monkeypatch, function):
    """Before its bytes are on the disk, or before they have their name; the next writer clears up."""
    (shard,) = cache.layout.shards(range(1))[1:]

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(os, function, killed)
        with pytest.raises(Killed):
            cache.write(shard, blocks(shard))
    folder = (cache.folder / shard.path).parent
    assert not cache.is_there(shard)
    assert len(os.listdir(folder)) == 1
    cache.write(shard, blocks(shard))
    assert cache.is_sound(shard)
    assert os.listdir(folder) == [shard.path.name]


@pytest.mark.parametrize("kept", [0, 1, 23, -5, -1])
def test_a_shard_that_was_cut_short_is_not_there(cache, kept):
    first, second = filled(cache, 1)
    path = cache.folder / second.path
    os.truncate(path, kept if kept >= 0 else path.stat().st_size + kept)
    assert cache.is_sound(first)
    assert not cache.is_there(second)
    assert not cache.is_sound(second)
    with pytest.raises(
        DataError, match=r"0001.logits: the records of step 39 of epoch 0 are damaged; the same `fastdeit"
    ):
        cache.block(0, 39)


def test_a_damaged_block_is_named_and_no_other_is_lost(cache):
    first, _ = filled(cache, 1)
    path, size = cache.folder / first.path, TOP.block_bytes
    data = bytearray(path.read_bytes())
    for at in (0, size - 1, 5 * size + 7, 32 * size + 4 * 9):  # of steps 0, 0 and 5, and the checksum of step 9
        path.write_bytes(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])
        step = at // size if at < 32 * size else 9
        assert cache.is_there(first)
        assert not cache.is_sound(first)
        with pytest.raises(
            DataError, match=rf"epoch_00000/0000.logits: the records of step {step} of epoch 0 are damaged"
        ):
            read(cache, 0, step)
        assert len(read(cache, 0, step + 1)) == 4


def test_a_block_is_not_taken_for_another(cache, tmp_path):
    """A file of another epoch, or of another cache, does not fit."""
    filled(cache, 2)
    other = replace(cache, folder=tmp_path / "other", fingerprint={"train.seed": 4})
    other.create()
    (other.folder / "epoch_00000").mkdir()
    (cache.folder / "epoch_00001/0000.logits").replace(cache.folder / "epoch_00000/0000.logits")
    (cache.folder / "epoch_00000/0001.logits").replace(other.folder / "epoch_00000/0001.logits")
    for where, step in ((cache, 0), (other, 39)):
        with pytest.raises(DataError, match="damaged"):
            where.block(0, step)


def test_a_missing_shard_is_named(cache):
    with pytest.raises(DataError, match=r"epoch_00003/0001.logits: No such file or directory; the same"):
        cache.block(3, 32)


def test_writers_of_the_same_shards_do_no_harm(cache):
    """As with two machines that were given the same epochs."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: filled(cache, 3), range(4)))
    shards = cache.layout.shards(range(3))
    assert all(map(cache.is_sound, shards))
    assert sum(len(files) for _, _, files in os.walk(cache.folder)) == 1 + len(shards)
    assert json.loads((cache.folder / MANIFEST).read_text())["layout"]["top_k"] == 2
