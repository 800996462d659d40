"""The batch: what moves with it, and what stands in for its pixels."""

import pytest
import torch

from fastdeit.batch import Step, map_tensors, renormalised, tensors_of
from tests.toys import toy_batch

B, SIDE = 4, 8
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def full_batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (B, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)
    erase = torch.tensor([[0, 0, 4, 4]] * B, dtype=torch.int32), torch.arange(B)
    return toy_batch(
        (images, images[:, ::2, ::2].contiguous()),
        torch.arange(B),
        lam=torch.full((B,), 0.3),
        partner=torch.arange(B).flip(0),
        mean=MEAN,
        std=STD,
        noise={"drop_path": torch.rand(B, 2), "mask": torch.rand(B, 3)},
        erase=(None, erase),
        extras={"logits": torch.rand(B, 5)},
        step=7,
    )


def test_to_moves_every_tensor_and_nothing_else():
    batch = full_batch()
    moved = batch.to(torch.device("meta"))
    assert len(tensors_of(moved)) == len(tensors_of(batch)) == 18
    assert {tensor.device.type for tensor in tensors_of(moved)} == {"meta"}
    assert [t.shape for t in tensors_of(moved)] == [t.shape for t in tensors_of(batch)]
    assert (moved.mean, moved.std, moved.erase[0], moved.rendered) == (MEAN, STD, None, None)
    assert type(moved.targets) is type(batch.targets)
    assert moved.noise.keys() == batch.noise.keys()
    assert len(batch) == B


def test_a_step_is_three_scalars_that_schedules_are_functions_of():
    step = Step.at(12, steps_per_epoch=5, total=48)
    assert (step.number.item(), step.epoch.item(), step.progress.item()) == (12, 2, 0.25)
    assert (step.number.dtype, step.epoch.dtype, step.progress.dtype) == (torch.int64, torch.int64, torch.float64)
    momentum = map_tensors(lambda tensor: tensor + 1, step)
    assert momentum.number.item() == 13


def test_rendered_pixels_stand_in_for_the_first_view_and_have_gradients():
    batch = full_batch()
    x = batch.pixels().requires_grad_()
    disturbed = batch.rendered_as(x)
    assert disturbed.pixels() is x
    torch.testing.assert_close(disturbed.patches(4), batch.patches(4))
    assert torch.equal(disturbed.pixels(view=1), batch.pixels(view=1))
    other = (0.1, 0.2, 0.3), (0.5, 0.4, 0.3)
    torch.testing.assert_close(disturbed.pixels(mean=other[0], std=other[1]), batch.pixels(0, *other))
    disturbed.patches(4).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())


def test_an_image_in_its_own_normalisation_is_left_alone():
    x = torch.rand(2, 3, 4, 4)
    assert renormalised(x, (MEAN, STD), (list(MEAN), list(STD))) is x


@pytest.mark.parametrize("value", [{"a": 1, "b": (torch.ones(1), [torch.zeros(2)])}, torch.ones(3), None])
def test_mapping_keeps_the_tree(value):
    doubled = map_tensors(lambda tensor: 2 * tensor, value)
    assert [t.tolist() for t in tensors_of(doubled)] == [(2 * t).tolist() for t in tensors_of(value)]
    assert type(doubled) is type(value)
