"""What probes measure, on networks and pictures of which the answer is known."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastdeit.experiments import probes


class Tokens(nn.Module):
    """A network of two blocks with given prefix tokens `[B, 2, 2]`: at the input, after block 0 and at the output."""

    def __init__(self, *given, logits=None):
        super().__init__()
        self.blocks, self.given, self.logits = [None, None], given, logits

    def tokens(self, x, stop=None):
        pair = self.given[-1 if stop is None else stop]
        return torch.cat((pair, 100 + torch.randn(len(pair), 3, 2)), 1)  # patches, which are not looked at

    def forward(self, x):
        return self.logits


def pairs(*angles):
    """Prefix tokens of one image each, at this angle in degrees and of unequal length."""
    turned = torch.deg2rad(torch.tensor(angles))
    return torch.stack(
        (torch.tensor([2.0, 0.0]).expand(len(angles), 2), torch.stack((turned.cos(), turned.sin()), 1)), 1
    )


def test_cosines_are_those_of_known_tokens():
    heads = torch.eye(3)[[0, 1, 2, 0]], torch.eye(3)[[0, 1, 1, 1]]
    network = Tokens(pairs(*[90.0] * 4), pairs(*[60.0] * 4), pairs(0.0, 0.0, 0.0, 60.0), logits=heads)
    found = probes.tokens(SimpleNamespace(model=network, images=torch.zeros(4, 3, 8, 8)))
    assert found["cosine_input"] == found["cosine_0"] == pytest.approx(0.0, abs=1e-6)
    assert found["cosine_1"] == pytest.approx(0.5)
    assert found["cosine_output"] == pytest.approx((3 + 0.5) / 4)
    assert found["cosine_least_rise"] == pytest.approx(0.375)
    assert found["disagreement"] == 50.0


def test_the_centred_cosine_forgets_what_all_images_share():
    first = torch.tensor([[5.0, 1.0], [5.0, -1.0]])
    output = torch.stack((first, first * torch.tensor([-1.0, 1.0])), 1)
    found = probes.tokens(SimpleNamespace(model=Tokens(output, output, output, logits=(first, first)), images=None))
    assert found["cosine_output"] == pytest.approx((1 - 25) / (1 + 25))
    assert found["cosine_centred"] == pytest.approx(1.0)


def answering(function, images, labels=None):
    return SimpleNamespace(answers=function, images=images, labels=labels)


def test_shifts_go_four_pixels_in_four_directions():
    """The answer is whether the bright pixel is in the right half. From column 13 only one shift leads there, from
    column 12 none does, and what lies at the border is repeated."""
    images = torch.zeros(2, 3, 32, 32)
    images[0, :, 16, 13] = images[1, :, 16, 11] = 1.0
    found = probes.shifts(answering(lambda x: (x[:, 0, :, 16:].amax((1, 2)) > 0).long(), images))
    assert found == {"shift_agreement": pytest.approx(100 * 7 / 8)}
    border = torch.zeros(1, 3, 32, 32)
    border[..., :, 0] = 1.0
    assert probes.shifts(answering(lambda x: (x[..., 0, 0, 0] > 0).long(), border)) == {"shift_agreement": 75.0}


def test_crops_show_a_share_of_the_picture():
    ramp = torch.linspace(0, 1, 41).expand(50, 3, 41, 41)
    seen, labels = [], torch.arange(50) % 2
    found = probes.crops(answering(lambda x: seen.append(x) or torch.zeros(50, dtype=torch.int64), ramp, labels))
    assert found == {"crop_100": 50.0, "crop_50": 50.0, "crop_25": 50.0, "crop_10": 50.0}
    assert torch.equal(seen[0], ramp)
    for x, columns in zip(seen, (41, 29, 20, 13), strict=True):  # 41 * share ** 0.5
        assert x.shape == ramp.shape
        width = x.amax((1, 2, 3)) - x.amin((1, 2, 3))
        torch.testing.assert_close(width, torch.full((50,), (columns - 1) / 40), rtol=1e-4, atol=1e-4)
    assert len(seen[-1].amin((1, 2, 3)).unique()) > 10  # of different places


def test_a_probe_of_the_teacher_compares_answers():
    taught = nn.Flatten()  # the largest of four pixels
    images = torch.eye(4).reshape(4, 1, 2, 2)
    found = probes.teacher(
        SimpleNamespace(answers=lambda x: torch.tensor([0, 1, 1, 3]), images=images, teacher=lambda: taught)
    )
    assert found == {"teacher_agreement": 75.0}
