import math
import random

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from scipy import stats
from torchvision import transforms

from fastdeit import rng
from fastdeit.data.plan import plan, policy

ALPHA = 1e-9  # some twenty comparisons: a false alarm below 1e-7, and the seeds are fixed


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


def erase_by_hand(uniforms, height, width):
    """timm's RandomErasing for one image, in scalar arithmetic."""
    for area_u, aspect_u, y_u, x_u in uniforms:
        area = height * width * (0.02 + area_u * (1 / 3 - 0.02))
        aspect = math.exp(math.log(0.3) + aspect_u * (math.log(1 / 0.3) - math.log(0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w < width and h < height:
            y, x = int(y_u * (height - h + 1)), int(x_u * (width - w + 1))
            return [y, x, y + h, x + w]
    return [0, 0, 0, 0]


def views(n: int, **options) -> plan.Plan:
    """Plans of n square images of 300 pixels."""
    return plan.samples(plan.Augment(**options), 0, 0, np.arange(n), np.zeros(n, int), *np.full((2, n), 300))


def mixes(groups: int, size=(224, 224), **options) -> plan.Mix:
    return plan.mix(plan.Mixing(group_size=2, **options), size, 0, 0, slice(0, groups))


def test_pinned_values():
    geometry = plan.samples(plan.Augment(), 1, 2, [0, 5, 5], [0, 0, 1], [500, 300, 300], [375, 400, 400])
    assert geometry.box.tolist() == [[62, 62, 250, 216], [51, 25, 305, 264], [52, 11, 173, 174]]
    assert geometry.flip.tolist() == [True, True, False]
    mix = plan.mix(plan.Mixing(group_size=4), (224, 224), 1, 2, slice(4, 8))
    assert mix.lam[::4].tolist() == pytest.approx([0.7696907, 0.10287441, 0.94140625, 0.41838893], abs=1e-6)
    assert mix.box[::4].tolist() == [[0, 0, 107, 108], [0, 0, 0, 0], [19, 175, 79, 224], [0, 0, 0, 0]]
    noise = plan.noise(1, 2, [0, 9], 2)
    np.testing.assert_allclose(noise, [[0.02994257, 0.31830388], [0.40043586, 0.49891317]], atol=1e-7)


def test_pinned_values_of_the_deit_recipe():
    augment = plan.Augment(policy=policy.parse("rand-m9-mstd0.5-inc1-p1"), erase=0.9)
    view = plan.samples(augment, 1, 2, [0, 5, 5], [0, 0, 1], [500, 300, 300], [375, 400, 400])
    assert view.box.tolist() == [[62, 62, 250, 216], [51, 25, 305, 264], [52, 11, 173, 174]]
    assert view.flip.tolist() == [True, True, False]
    assert view.ops.kind.tolist() == [[2, 8], [13, 13], [14, 5]]
    values = [[0.0, 1.887336], [0.287881, -0.271612], [93.916245, 1.0]]
    np.testing.assert_allclose(view.ops.value, values, atol=1e-6)
    assert view.erase_box.tolist() == [[5, 6, 74, 224], [154, 31, 216, 143], [0, 0, 0, 0]]
    assert view.erase_key.tolist() == [-1563867559137949817, -4601373734792287329, 3557153503048176286]


def test_an_augmentation_changes_no_other():
    bare = views(50)
    full = views(50, policy=policy.parse("3a", color_jitter=0.3), erase=1.0)
    assert (full.box == bare.box).all()
    assert (full.flip == bare.flip).all()
    assert (full.erase_key == bare.erase_key).all()
    assert (views(50, erase=1.0).erase_box == full.erase_box).all()
    assert (views(50, policy=policy.parse("3a")).ops.value == full.ops.value[:, :1]).all()
    assert (views(50, policy=policy.parse("none", color_jitter=0.3)).ops.value == full.ops.value[:, 1:]).all()
    assert (views(50, erase=0.3).erase_box == full.erase_box).all(axis=1).mean() == pytest.approx(0.3, abs=0.2)


def test_every_augmentation_has_a_key_purpose_of_its_own(monkeypatch):
    purposes, key = [], rng.key
    monkeypatch.setattr(rng, "key", lambda seed, purpose, *ids: purposes.append(purpose) or key(seed, purpose, *ids))
    views(3)
    views(3, crop="simple", policy=policy.parse("three_augment"), erase=0.5)
    common = ["color_jitter", "erase", "erase_box", "flip", "policy"]
    assert sorted(purposes) == sorted([*common, *common, "crop", "simple_crop"])


def test_off_by_default():
    view = views(20)
    assert view.ops.kind.shape == view.ops.value.shape == (20, 0)
    assert not view.erase_box.any()
    assert view.resize is view.start is None


def test_erase_boxes_equal_scalar_arithmetic():
    uniforms = np.random.default_rng(2).random((300, 10, 4))
    for size in ((224, 224), (96, 160), (160, 96), (3, 200)):
        boxes = plan.erase_boxes(uniforms, size)
        assert boxes.dtype == np.int32
        assert boxes.tolist() == [erase_by_hand(u, *size) for u in uniforms]
    assert not plan.erase_boxes(uniforms, (2, 200)).any()  # every rectangle is 2 pixels high or more: none fits


def test_erasing_is_distributed_as_timms():
    class Canvas:
        box = (0, 0, 0, 0)

        def __setitem__(self, where, _):
            _, y, x = where
            self.box = (y.start, x.start, y.stop, x.stop)

    n, height, width = 20_000, 96, 160
    ours = views(n, size=(height, width), erase=0.25).erase_box
    random.seed(3)
    eraser = timm.data.random_erasing.RandomErasing(0.25, device="cpu")
    canvases = [Canvas() for _ in range(n)]
    for canvas in canvases:
        eraser._erase(canvas, 3, height, width, torch.float32)
    theirs = np.array([canvas.box for canvas in canvases])
    hit = [boxes[:, 2] > 0 for boxes in (ours, theirs)]
    assert stats.chi2_contingency([np.bincount(h, minlength=2) for h in hit]).pvalue > ALPHA
    for measure in (*range(4), area, aspect):
        values = [
            boxes[h][:, measure] if isinstance(measure, int) else measure(boxes[h])
            for boxes, h in zip((ours, theirs), hit, strict=True)
        ]
        assert stats.ks_2samp(*values).pvalue > ALPHA, measure


def area(boxes):
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def aspect(boxes):
    return (boxes[:, 2] - boxes[:, 0]) / (boxes[:, 3] - boxes[:, 1])


def test_erase_keys_are_unrelated_64_bit_numbers():
    view = views(4000, erase=0.3)
    keys = view.erase_key[view.erase_box.any(axis=1)]
    assert keys.dtype == np.int64
    bits = (keys[:, None] >> np.arange(64)) & 1
    assert abs(bits.mean(0) - 0.5).max() < 6 * 0.5 / math.sqrt(len(keys))
    assert len(np.unique(view.erase_key)) == 4000
    other = plan.samples(plan.Augment(), 0, 1, np.arange(4000), np.zeros(4000, int), *np.full((2, 4000), 300)).erase_key
    assert not np.isin(other, view.erase_key).any()


def test_simple_crop_is_torchvisions():
    sizes = [(500, 375), (375, 500), (300, 300), (225, 1000), (1, 7)]
    for width, height in sizes:
        resized = transforms.Resize(64)(Image.new("L", (width, height)))
        box, resize, start = plan.simple_crops(np.array([[0.0, 1 - 2.0**-32]]), width, height, (64, 64))
        assert resize.tolist() == [[resized.height, resized.width]]
        assert box.tolist() == [[0, 0, height, width]]
        assert start.tolist() == [[-4, resized.width - 64 + 4]]
        assert {array.dtype for array in (box, resize, start)} == {np.dtype(np.int32)}
    n = 20_000
    augment = plan.Augment(size=(64, 64), crop="simple")
    view = plan.samples(augment, 0, 0, np.arange(n), np.zeros(n, int), np.full(n, 140), np.full(n, 128))
    torch.manual_seed(0)
    padded = torch.zeros(1, *(view.resize[0] + 2 * plan.PAD))
    theirs = np.array([transforms.RandomCrop.get_params(padded, (64, 64))[:2] for _ in range(n)]) - plan.PAD
    for axis in (0, 1):
        table = [np.bincount(starts[:, axis] + plan.PAD, minlength=15) for starts in (view.start, theirs)]
        table = np.array(table)
        assert stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue > ALPHA
    assert abs(np.corrcoef(view.start.T)[0, 1]) < 6 / math.sqrt(n)
    assert (view.flip == views(n).flip).all()


def test_a_view_of_every_policy_depends_on_its_own_ids_alone():
    augment = plan.Augment(crop="simple", policy=policy.parse("three_augment"), erase=0.6)
    sample, copy, width, height = np.arange(50), np.arange(50) % 3, np.arange(50) + 40, np.arange(50) + 60
    whole = plan.samples(augment, 9, 4, sample, copy, width, height)
    rows = np.array([31, 2, 17])
    part = plan.samples(augment, 9, 4, sample[rows], copy[rows], width[rows], height[rows])
    for name in ("box", "flip", "erase_box", "erase_key", "resize", "start"):
        assert (getattr(part, name) == getattr(whole, name)[rows]).all(), name
    assert (part.ops.kind == whole.ops.kind[rows]).all()
    assert (part.ops.value == whole.ops.value[rows]).all()
    other = plan.samples(augment, 9, 4, sample, copy + 1, width, height)
    assert (other.ops.value != whole.ops.value).any(axis=1).all()
    assert (other.erase_key != whole.erase_key).all()


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
    mix = plan.mix(plan.Mixing(group_size=4), (224, 224), 0, 3, slice(6, 8))
    assert mix.partner.tolist() == [3, 2, 1, 0, 7, 6, 5, 4]
    assert mix.partner.dtype == np.int64
    for array in (mix.lam, mix.pixel_lam, mix.box):
        assert len(array) == 8
        assert (array[:4] == array[0]).all()


def test_a_group_is_mixed_alike_in_any_range_of_groups():
    whole = plan.mix(plan.Mixing(group_size=2), (224, 224), 0, 3, slice(0, 8))
    part = plan.mix(plan.Mixing(group_size=2), (224, 224), 0, 3, slice(5, 7))
    assert (part.lam == whole.lam[10:14]).all()
    assert (part.box == whole.box[10:14]).all()


def test_two_partners_share_a_draw_in_mode_pair():
    mix = plan.mix(plan.Mixing(group_size=6, mix_mode="pair"), (224, 224), 0, 3, slice(6, 40))
    assert (mix.partner.reshape(-1, 6) == np.arange(5, -1, -1) + np.arange(0, 34 * 6, 6)[:, None]).all()
    for array in (mix.lam, mix.pixel_lam, mix.box):
        assert (array == array[mix.partner]).all()
    assert len(np.unique(mix.lam)) > 0.9 * 34 * 3


def test_every_sample_has_its_draw_in_mode_element():
    mix = plan.mix(plan.Mixing(group_size=6, mix_mode="element"), (224, 224), 0, 3, slice(6, 40))
    assert (mix.partner.reshape(-1, 6) == np.arange(5, -1, -1) + np.arange(0, 34 * 6, 6)[:, None]).all()
    assert len(np.unique(mix.lam)) > 0.9 * 34 * 6


@pytest.mark.parametrize("mode", ["pair", "element"])
def test_other_modes_are_the_same_in_any_range_of_groups(mode):
    mixing = plan.Mixing(group_size=4, mix_mode=mode)
    whole, part = (plan.mix(mixing, (224, 224), 0, 3, groups) for groups in (slice(0, 8), slice(5, 7)))
    assert (part.lam == whole.lam[20:28]).all()
    assert (part.box == whole.box[20:28]).all()
    assert (part.partner == whole.partner[20:28] - 20).all()


def test_element_mode_is_distributed_as_timms():
    n = 20_000
    mixing = plan.Mixing(group_size=4, mix_mode="element", mix_probability=0.9, mix_switch=0.4)
    mix = plan.mix(mixing, (224, 224), 0, 0, slice(0, n // 4))
    np.random.seed(0)
    lam, cutmix = timm.data.Mixup(0.8, 1.0, prob=0.9, switch_prob=0.4, mode="elem", num_classes=10)._params_per_elem(n)
    kinds = np.where(lam == 1, 0, np.where(cutmix, 2, 1))
    ours = np.where(mix.lam == 1, 0, np.where(mix.pixel_lam == 1, 2, 1))
    assert stats.chi2_contingency([np.bincount(k, minlength=3) for k in (ours, kinds)]).pvalue > ALPHA
    assert stats.ks_2samp(mix.lam[ours == 1], lam[kinds == 1]).pvalue > ALPHA
    corrected = [timm.data.mixup.cutmix_bbox_and_lam((3, 224, 224), value)[1] for value in lam[kinds == 2]]
    assert stats.ks_2samp(mix.lam[ours == 2], corrected).pvalue > ALPHA


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
