import math

import numpy as np
import pytest
import timm.data
from scipy import stats

from fastdeit import rng
from fastdeit.data import plan


def crop_by_hand(uniforms, width, height, scale, ratio):
    """torchvision's RandomResizedCrop.get_params, one image in scalar arithmetic."""
    for area_u, ratio_u, y_u, x_u in uniforms:
        area = width * height * (scale[0] + area_u * (scale[1] - scale[0]))
        aspect = math.exp(math.log(ratio[0]) + ratio_u * (math.log(ratio[1]) - math.log(ratio[0])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return [int(y_u * (height - h + 1)), int(x_u * (width - w + 1)), h, w]
    shape = width / height
    w, h = width, height
    if shape < ratio[0]:
        h = round(w / ratio[0])
    elif shape > ratio[1]:
        w = round(h * ratio[1])
    return [(height - h) // 2, (width - w) // 2, h, w]


def mixes(groups: int, **options) -> plan.Mix:
    return plan.mix(plan.Augment(group_size=2, **options), 0, 0, slice(0, groups))


def test_pinned_values():
    augment = plan.Augment(group_size=4)
    geometry = plan.samples(augment, 1, 2, [0, 5, 5], [0, 0, 1], [500, 300, 300], [375, 400, 400])
    assert geometry.box.tolist() == [[62, 62, 250, 216], [51, 25, 305, 264], [52, 11, 173, 174]]
    assert geometry.flip.tolist() == [True, True, False]
    mix = plan.mix(augment, 1, 2, slice(4, 8))
    assert mix.lam[::4].tolist() == pytest.approx([0.7696907, 0.10287441, 0.94140625, 0.41838893], abs=1e-6)
    assert mix.box[::4].tolist() == [[0, 0, 107, 108], [0, 0, 0, 0], [19, 175, 79, 224], [0, 0, 0, 0]]
    noise = plan.noise(1, 2, [0, 9], 2)
    np.testing.assert_allclose(noise, [[0.02994257, 0.31830388], [0.40043586, 0.49891317]], atol=1e-7)


def test_crop_equals_scalar_arithmetic_with_the_fallback():
    sizes = np.random.default_rng(0).integers(1, 400, (400, 2))
    sizes[:40, 0] = 3  # thin: no attempt fits at this scale, so the central fallback is used
    uniforms = np.random.default_rng(1).random((400, 10, 4))
    for scale in ((0.08, 1.0), (0.9, 1.0)):
        boxes = plan.crop_boxes(uniforms, sizes[:, 0], sizes[:, 1], scale, (3 / 4, 4 / 3))
        expected = [
            crop_by_hand(u, *size, scale, (3 / 4, 4 / 3)) for u, size in zip(uniforms, sizes.tolist(), strict=True)
        ]
        assert boxes.dtype == np.int32
        assert boxes.tolist() == expected


def test_boxes_lie_inside_any_image():
    sizes = np.array([(1, 1), (1, 300), (300, 1), (2, 3), (5000, 7)] * 40)
    box = plan.samples(plan.Augment(), 0, 0, np.arange(200), np.zeros(200, int), *sizes.T).box
    assert (box[:, 2:] >= 1).all()
    assert (box[:, :2] >= 0).all()
    assert (box[:, 0] + box[:, 2] <= sizes[:, 1]).all()
    assert (box[:, 1] + box[:, 3] <= sizes[:, 0]).all()


def test_a_row_depends_on_its_own_ids_alone():
    sample, copy, width, height = np.arange(50), np.arange(50) % 3, np.arange(50) + 40, np.arange(50) + 60
    whole = plan.samples(plan.Augment(), 9, 4, sample, copy, width, height)
    rows = np.array([31, 2, 17])
    part = plan.samples(plan.Augment(), 9, 4, sample[rows], copy[rows], width[rows], height[rows])
    assert (part.box == whole.box[rows]).all()
    assert (part.flip == whole.flip[rows]).all()
    other = plan.samples(plan.Augment(), 9, 4, sample, copy + 1, width, height)
    assert (other.box != whole.box).any(axis=1).mean() > 0.95


def test_flip_rate_and_independence_of_the_crop():
    n = np.arange(4000)
    full = np.full(4000, 200)
    geometry = plan.samples(plan.Augment(flip=0.3), 0, 0, n, np.zeros(4000, int), full, full)
    assert abs(geometry.flip.mean() - 0.3) < 0.03
    assert abs(np.corrcoef(geometry.flip, geometry.box[:, 0])[0, 1]) < 0.05
    never = plan.samples(plan.Augment(flip=0.0), 0, 0, n, np.zeros(4000, int), full, full)
    assert not never.flip.any()
    assert (never.box == geometry.box).all()


def test_partners_are_the_groups_reversed():
    mix = plan.mix(plan.Augment(group_size=4), 0, 3, slice(6, 8))
    assert mix.partner.tolist() == [3, 2, 1, 0, 7, 6, 5, 4]
    assert mix.partner.dtype == np.int64
    for array in (mix.lam, mix.pixel_lam, mix.box):
        assert len(array) == 8
        assert (array[:4] == array[0]).all()


def test_a_group_is_mixed_alike_wherever_it_is_asked_for():
    whole = plan.mix(plan.Augment(group_size=2), 0, 3, slice(0, 8))
    part = plan.mix(plan.Augment(group_size=2), 0, 3, slice(5, 7))
    assert (part.lam == whole.lam[10:14]).all()
    assert (part.box == whole.box[10:14]).all()


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 3.0])
def test_mixup_lambda_is_beta_distributed(alpha):
    mix = mixes(4000, mixup=alpha, cutmix=0.0)
    assert not mix.box.any()
    assert (mix.pixel_lam == mix.lam).all()
    assert stats.kstest(mix.lam[::2], stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_lambda_is_the_inverse_cdf_of_one_uniform():
    mix = mixes(100, mixup=1.0, cutmix=0.0)  # Beta(1, 1): lambda is the uniform itself
    uniform = rng.uniform(rng.key(0, "mix", 0), np.arange(100), 5)[:, 2]
    np.testing.assert_allclose(mix.lam[::2], uniform, atol=1e-7)
    mix = mixes(100, mixup=0.8, cutmix=0.0)
    np.testing.assert_allclose(stats.beta(0.8, 0.8).cdf(mix.lam[::2].astype(float)), uniform, atol=1e-5)


def test_distribution_equals_timms_mixup():
    mix = mixes(6000, mixup=0.8, cutmix=1.0, mix_probability=0.9, mix_switch=0.4)
    theirs = timm.data.Mixup(0.8, 1.0, prob=0.9, switch_prob=0.4, num_classes=10)
    np.random.seed(0)
    kinds = {"none": [], "mixup": [], "cutmix": []}
    corners = []
    for _ in range(6000):
        lam, use_cutmix = theirs._params_per_batch()
        if use_cutmix:
            box, lam = timm.data.mixup.cutmix_bbox_and_lam((2, 3, 224, 224), lam)
            corners.append(box)
        kinds["cutmix" if use_cutmix else "none" if lam == 1.0 else "mixup"].append(lam)
    lam, box = mix.lam[::2], mix.box[::2]
    cut, none = (mix.pixel_lam[::2] == 1.0) & box.any(axis=1), mix.lam[::2] == 1.0
    ours = {"none": lam[none & ~cut], "mixup": lam[~cut & ~none], "cutmix": lam[cut]}
    for kind, lams in kinds.items():
        assert abs(len(lams) - len(ours[kind])) < 4 * math.sqrt(2 * 6000 * 0.25), kind
        assert stats.ks_2samp(lams, ours[kind]).pvalue > 0.01, kind
    corners = np.array(corners)  # timm: (y0, y1, x0, x1)
    for ours_at, theirs_at in ((0, 0), (2, 1), (1, 2), (3, 3)):
        assert stats.ks_2samp(box[cut, ours_at], corners[:, theirs_at]).pvalue > 0.01


def test_cutmix_geometry_and_corrected_lambda():
    mix = mixes(2000, mixup=0.0, cutmix=1.0, size=(96, 160))
    y0, x0, y1, x1 = mix.box.T
    assert (y0 >= 0).all()
    assert (x0 >= 0).all()
    assert (y1 <= 96).all()
    assert (x1 <= 160).all()
    np.testing.assert_allclose(mix.lam, 1 - (y1 - y0) * (x1 - x0) / (96 * 160), atol=1e-6)
    assert (mix.pixel_lam == 1).all()
    u = rng.uniform(rng.key(0, "mix", 0), np.arange(2000), 5)
    inside = (y0 > 0) & (x0 > 0) & (y1 < 96) & (x1 < 160)
    side = np.repeat(np.sqrt(1 - u[:, 2]), 2)[inside]  # Beta(1, 1)
    assert (y1 - y0)[inside].tolist() == [int(96 * s) // 2 * 2 for s in side]
    assert (x1 - x0)[inside].tolist() == [int(160 * s) // 2 * 2 for s in side]


def test_off_means_off():
    for options in ({"mixup": 0.0, "cutmix": 0.0}, {"mix_probability": 0.0}):
        mix = mixes(50, **options)
        assert (mix.lam == 1).all()
        assert (mix.pixel_lam == 1).all()
        assert not mix.box.any()


def test_noise_is_uniform_below_one_and_keyed_by_position(monkeypatch):
    noise = plan.noise(0, 5, np.arange(3000), 4)
    assert noise.dtype == np.float32
    assert stats.kstest(noise.reshape(-1), "uniform").pvalue > 0.01
    assert (plan.noise(0, 5, [17, 4], 4) == noise[[17, 4]]).all()
    assert (plan.noise(0, 6, np.arange(3000), 4) != noise).any(axis=1).all()
    assert plan.noise(0, 5, np.arange(3), 0).shape == (3, 0)
    monkeypatch.setattr(rng, "bits", lambda *args: np.full((1, 1), 0xFFFFFFFF, dtype=np.uint32))
    assert plan.noise(0, 0, [0], 1)[0, 0] < 1.0


def test_eval_window_rounds_half_to_even():
    resize, start = plan.eval_window(500, 375, (224, 224), 0.875)
    assert (resize.tolist(), start.tolist()) == ([[256, 341]], [[16, 58]])


def test_eval_window_of_other_shapes():
    resize, start = plan.eval_window([100, 300, 200, 200], [300, 100, 100, 150], (96, 192), 1.0)
    assert resize.tolist() == [[576, 192], [96, 288], [96, 192], [144, 192]]
    assert start.tolist() == [[240, 0], [0, 48], [0, 0], [24, 0]]
    with pytest.raises(ValueError, match=r"crop ratio 1.2 must lie in \(0, 1\]"):
        plan.eval_window(10, 10, (8, 8), 1.2)
