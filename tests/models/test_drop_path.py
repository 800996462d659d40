"""Stochastic depth that skips what it drops: the same mathematics as dropping a fixed number of samples."""

import pytest
import torch

from fastdeit import models
from fastdeit.models.drop_path import Kept, dropped_of, skipping
from fastdeit.models.vit import VisionTransformer, ViTConfig

SMALL = ViTConfig(image_size=16, patch_size=8, dim=16, depth=3, heads=2, num_classes=5, distilled=True, drop_path=0.4)
GROUP = 4
SHAPES = {
    "deit": {},
    "deit3": {"distilled": False, "layer_scale": 0.5, "no_embed_class": True, "drop_path_mode": "constant"},
    "parallel": {"parallel": 2, "drop_path_mode": "constant"},
    "mean of the patches": {"distilled": False, "pool": "avg", "fc_norm": True},
}


def model(**options):
    torch.manual_seed(0)
    built = VisionTransformer(ViTConfig(**(vars(SMALL) | options))).double().train()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built


def uniforms(vit, batch):
    return torch.rand(batch, vit.noise_per_sample, generator=torch.Generator().manual_seed(1))


def by_factors(kept, batch):
    """What is kept as a factor for every sample, 0 for those that are skipped."""
    if kept.samples is None:
        return kept
    return Kept(torch.zeros(batch).index_copy(0, kept.samples, kept.factor))


def outcome(vit, x, noise):
    """Logits, and gradients of the input and of all parameters."""
    vit.zero_grad()
    x = x.clone().requires_grad_()
    out = vit(x, noise)
    logits = torch.stack(out) if isinstance(out, tuple) else out
    (logits * torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).view_as(logits)).sum().backward()
    return [logits.detach(), x.grad, *(p.grad.clone() for p in vit.parameters() if p.grad is not None)]


@pytest.mark.parametrize("shape", SHAPES)
def test_skipping_samples_is_dropping_them(shape, monkeypatch):
    """In float64, outputs and all gradients."""
    vit, batch = model(**SHAPES[shape]), 2 * GROUP
    x = torch.randn(batch, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    noise = uniforms(vit, batch)
    vit.set_drop_path_skip(GROUP)
    computed = []
    for block in vit.blocks:
        mlp = block.mlp if hasattr(block, "mlp") else block.ffns[0].mlp
        mlp.register_forward_pre_hook(lambda _, args: computed.append(len(args[0])))
    skipped = outcome(vit, x, noise)
    each = len(dropped_of(vit.config, GROUP)) // len(vit.blocks)
    assert computed == [2 * (GROUP - dropped) for dropped in dropped_of(vit.config, GROUP)[each - 1 :: each]]
    keeps = vit._keeps
    monkeypatch.setattr(
        vit, "_keeps", lambda *given: [[by_factors(k, batch) for k in block] for block in keeps(*given)]
    )
    dropped = outcome(vit, x, noise)
    assert computed[len(vit.blocks) :] == [batch] * len(vit.blocks)
    assert len(skipped) == len(dropped) > 20
    for ours, exact in zip(skipped, dropped, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


def test_a_group_keeps_the_samples_with_the_largest_uniforms():
    noise = torch.tensor([[0.3, 0.0], [0.1, 0.0], [0.2, 0.0], [0.9, 0.0], [0.5, 0.0], [0.5, 0.0]])
    first, second = skipping(noise, (1, 0), 3)
    assert sorted(first.samples.tolist()) == [0, 2, 3, 4]  # of equal ones the first
    assert first.factor.tolist() == [1.5] * 4
    assert second == Kept()


def test_every_group_draws_for_itself():
    """So micro-batches and processes, which have whole groups, draw as one process with the whole batch does."""
    vit = model()
    dropped = dropped_of(vit.config, GROUP)
    noise = uniforms(vit, 3 * GROUP)
    whole = skipping(noise, dropped, GROUP)
    for part in range(3):
        rows = slice(part * GROUP, (part + 1) * GROUP)
        for kept, alone in zip(whole, skipping(noise[rows], dropped, GROUP), strict=True):
            if alone.samples is None:
                assert kept.samples is None
                continue
            mine = [sample for sample in kept.samples.tolist() if sample // GROUP == part]
            assert mine == [part * GROUP + sample for sample in alone.samples.tolist()]


def test_the_mean_over_draws_is_one():
    """Kept with probability (G - d) / G and scaled by its inverse: the expectation of a branch is what it was."""
    noise = torch.rand(512 * GROUP, 1, generator=torch.Generator().manual_seed(3))
    (kept,) = skipping(noise, (1,), GROUP)
    factors = by_factors(kept, len(noise)).factor
    assert factors.sum().item() == pytest.approx(len(noise))
    assert factors.view(-1, GROUP).mean(0) == pytest.approx(torch.ones(GROUP), abs=0.1)


@pytest.mark.parametrize(
    ("options", "group", "expected"),
    [
        ({"drop_path": 0.1}, 64, (0, 0, 3, 3, 6, 6)),
        ({"drop_path": 0.1, "depth": 1}, 64, None),
        ({"drop_path": 0.1, "drop_path_mode": "constant", "depth": 1}, 64, (6, 6)),
        ({"drop_path": 0.2, "drop_path_mode": "constant", "parallel": 2}, 10, (2,) * 12),
        ({"drop_path": 0.1}, 4, None),
        ({"drop_path": 0.9, "drop_path_mode": "constant"}, 4, None),
    ],
)
def test_how_many_of_a_group_lose_a_branch(options, group, expected):
    config = ViTConfig(**(vars(SMALL) | options))
    if expected is None:
        with pytest.raises(ValueError, match=f"of {group} samples (none|all) would lose a branch at drop_path 0"):
            dropped_of(config, group)
    else:
        assert dropped_of(config, group) == expected


def test_what_cannot_be_skipped_is_refused():
    with pytest.raises(ValueError, match="drop_path is 0"):
        models.build("deit_digits_patch8_32").set_drop_path_skip(8)
    vit = model()
    vit.set_drop_path_skip(GROUP)
    with pytest.raises(ValueError, match="6 samples are no multiple of the groups of 4"):
        vit(torch.zeros(6, 3, 16, 16, dtype=torch.float64), uniforms(vit, 6))


def test_evaluation_skips_nothing_and_needs_no_groups():
    vit, x = model().eval(), torch.randn(3, 3, 16, 16, dtype=torch.float64)
    before = vit(x)
    vit.set_drop_path_skip(GROUP)
    assert all(map(torch.equal, vit(x), before))


def test_places_say_where_the_samples_of_a_branch_stand():
    noise = torch.rand(2 * GROUP, 3, generator=torch.Generator().manual_seed(0))
    kept = skipping(noise, (2, 0, 3), GROUP)
    for branch in (0, 2):
        places = torch.full((2 * GROUP,), -1, dtype=torch.int32)
        places[kept[branch].samples] = torch.arange(len(kept[branch].samples), dtype=torch.int32)
        assert torch.equal(kept[branch].places, places)
    assert kept[1] == (None, None, None)
