"""Loading weights of another size, class count or number of heads: what changes, and that it is said."""

import math

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.beit import checkpoint_filter_fn
from torch import nn

from fastdeit import models
from fastdeit.models.timm_model import TimmModel
from fastdeit.models.vit import VisionTransformer, ViTConfig
from fastdeit.models.weights import LoadReport, load_weights, resize_pos_embed
from fastdeit.run.weights import Known, Weights, load
from tests.plugins.levit import LeViT

PLAIN, DISTILLED = "deit_digits_patch8_32", "deit_digits_distilled_patch8_32"


def build(name=PLAIN, seed=0, **options):
    torch.manual_seed(seed)
    return models.build(name, **({"depth": 1, "image_size": 32} | options))


def weights(name=PLAIN, **options):
    return {key: torch.randn_like(tensor) for key, tensor in build(name, seed=1, **options).state_dict().items()}


def timms(pos_embed, new, old=None, prefix=1):
    return resample_abs_pos_embed(pos_embed, new_size=new, old_size=old, num_prefix_tokens=prefix, antialias=False)


def test_weights_of_the_same_model_fit_exactly():
    vit, source = build(), weights()
    report = load_weights(vit, source)
    assert report.exact
    assert str(report) == "all tensors fit"
    assert all(torch.equal(source[name], tensor) for name, tensor in vit.state_dict().items())


@pytest.mark.parametrize(("name", "prefix"), [(PLAIN, 1), (DISTILLED, 2)])
@pytest.mark.parametrize("size", [48, 16, (48, 24)])
def test_positions_are_resized_as_timm_resizes_them(name, prefix, size):
    vit, source = build(name, image_size=size), weights(name)
    report = load_weights(vit, source)
    expected = timms(source["pos_embed"], vit.grid, prefix=prefix)
    torch.testing.assert_close(vit.pos_embed.detach(), expected, rtol=1e-5, atol=1e-5)
    assert report.resized == (f"pos_embed {prefix}+4x4 -> {prefix}+{vit.grid[0]}x{vit.grid[1]}",)
    assert not report.exact


def test_positions_of_a_grid_that_is_no_square():
    vit, source = build(image_size=32), weights(image_size=(24, 48))
    load_weights(vit, source, grid=(3, 6))
    torch.testing.assert_close(vit.pos_embed.detach(), timms(source["pos_embed"], (4, 4), (3, 6)), rtol=1e-5, atol=1e-5)
    assert load_weights(build(image_size=(24, 48)), source, grid=(3, 6)).exact
    for size in (32, (24, 48), (48, 24)):
        # As many patches are not the same grid: 18 can be 3x6, 6x3, 2x9, ...
        with pytest.raises(ValueError, match=r"19 positions, which is no square plus 1 prefix tokens; .*weights_grid="):
            load_weights(build(image_size=size), source)
    with pytest.raises(ValueError, match="pos_embed has 19 positions, neither grid 3x4 nor that plus 1 prefix tokens"):
        load_weights(build(image_size=32), source, grid=(3, 4))


def test_positions_of_which_two_grids_have_as_many():
    vit, source = build(image_size=(16, 64)), weights(image_size=32)
    with pytest.raises(
        ValueError, match=r"16 patches, which can be 4x4 or 2x8; .*model\.weights_grid=\[height, width\]"
    ):
        load_weights(vit, source)
    load_weights(vit, source, grid=(4, 4))
    torch.testing.assert_close(vit.pos_embed.detach(), timms(source["pos_embed"], (2, 8), (4, 4)), rtol=1e-5, atol=1e-5)
    assert load_weights(vit, source, grid=(2, 8)).exact


def test_half_precision_positions_are_rounded_once():
    vit = build(image_size=48)
    source = {key: tensor.bfloat16() for key, tensor in weights().items()}
    resized, _ = resize_pos_embed(source, vit)
    exact, _ = resize_pos_embed({key: tensor.double() for key, tensor in source.items()}, vit)
    assert resized.dtype == torch.bfloat16
    assert torch.equal(resized, exact.bfloat16())


def test_plain_weights_in_a_distilled_model():
    vit, source = build(DISTILLED), weights(PLAIN)
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    report = load_weights(vit, source)
    assert report.missing == ("dist_token", "head_dist.weight", "head_dist.bias")
    assert report.resized == ("pos_embed 1+4x4 -> 2+4x4 (position of the distillation token kept as initialised)",)
    assert not report.unexpected
    assert torch.equal(vit.pos_embed[:, :1], source["pos_embed"][:, :1])
    assert torch.equal(vit.pos_embed[:, 1], before["pos_embed"][:, 1])
    assert torch.equal(vit.pos_embed[:, 2:], source["pos_embed"][:, 1:])
    assert torch.equal(vit.dist_token, before["dist_token"])
    assert torch.equal(vit.head_dist.weight, before["head_dist.weight"])
    assert torch.equal(vit.head.weight, source["head.weight"])


def test_distilled_weights_in_a_plain_model():
    vit, source = build(PLAIN), weights(DISTILLED)
    report = load_weights(vit, source)
    assert report.unexpected == ("dist_token", "head_dist.bias", "head_dist.weight")
    assert report.resized == ("pos_embed 2+4x4 -> 1+4x4",)
    assert torch.equal(vit.pos_embed, torch.cat((source["pos_embed"][:, :1], source["pos_embed"][:, 2:]), 1))


def test_positions_without_a_slot_for_the_class_token():
    """DeiT III adds its class token after the positions: a position of zero gives the same tokens."""
    vit, source = build(PLAIN), weights(PLAIN)
    source["pos_embed"] = source["pos_embed"][:, 1:]
    report = load_weights(vit, source)
    assert report.resized == ("pos_embed 0+4x4 -> 1+4x4",)
    assert vit.pos_embed[:, 0].abs().max() == 0
    assert torch.equal(vit.pos_embed[:, 1:], source["pos_embed"])


def test_heads_of_another_class_count_are_initialised_anew():
    vit, source = build(DISTILLED, num_classes=300), weights(DISTILLED)
    torch.nn.init.ones_(vit.head.weight)
    torch.nn.init.ones_(vit.head.bias)
    report = load_weights(vit, source)
    assert report.reinitialised_heads == ("head", "head_dist")
    assert (report.missing, report.unexpected, report.resized) == ((), (), ())
    for head in (vit.head, vit.head_dist):
        assert head.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert head.bias.abs().max() == 0
    assert torch.equal(vit.norm.weight, source["norm.weight"])
    assert "heads initialised anew: head, head_dist" in str(report)


def test_weights_of_another_model_change_nothing():
    vit, source = build(), weights(dim=192)
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    with pytest.raises(
        ValueError,
        match=r"of this one for another image size: cls_token is \(1, 1, 192\), not \(1, 1, 96\); .* and \d+ more",
    ):
        load_weights(vit, source)
    assert all(torch.equal(before[name], tensor) for name, tensor in vit.state_dict().items())
    with pytest.raises(ValueError, match=r"no tensor name of the weights \(x\.cls_token, .*\) is one of the model's"):
        load_weights(vit, {f"x.{name}": tensor for name, tensor in weights().items()})


def without(source, *names):
    return {name: tensor for name, tensor in source.items() if name not in names}


def test_what_is_missing_or_left_over_is_refused_unless_it_may_differ():
    source = weights()
    cases = [
        (without(source, "norm.bias"), r"it needs norm\.bias, which they do not have"),
        (source | {"fc_norm.weight": torch.ones(96)}, r"they have fc_norm\.weight, for which it has no place"),
        (source | {"blocks.1.norm1.weight": torch.ones(96)}, r"they have blocks\.1\.norm1\.weight, for which"),
    ]
    for tensors, message in cases:
        vit, untouched = build(), build().state_dict()
        with pytest.raises(ValueError, match=f"the weights do not fit the model: {message}"):
            load_weights(vit, tensors)
        assert all(torch.equal(tensor, untouched[name]) for name, tensor in vit.state_dict().items())


HEADS = ("head.weight", "head.bias")


@pytest.mark.parametrize(
    ("may_differ", "tensors", "expected"),
    [
        (None, without(weights(), *HEADS), LoadReport(missing=HEADS)),
        ((), without(weights(), *HEADS), "it needs head.weight, head.bias"),
        (("head",), without(weights(), *HEADS), LoadReport(missing=HEADS)),
        ((), weights(DISTILLED), "they have dist_token, head_dist.bias, head_dist.weight, for which"),
        (("head",), weights(DISTILLED), "they have dist_token, head_dist.bias"),
        (None, weights(num_classes=3), LoadReport(reinitialised_heads=("head",))),
        ((), weights(num_classes=3), "head of the weights knows 3 classes, and that of the model 10"),
        # A name that only begins like a head is none.
        (None, weights() | {"header.weight": torch.ones(1)}, "they have header.weight"),
    ],
)
def test_what_may_differ(may_differ, tensors, expected):
    if isinstance(expected, LoadReport):
        assert load_weights(build(), tensors, may_differ=may_differ) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            load_weights(build(), tensors, may_differ=may_differ)


def test_numbers_of_another_kind_are_refused_and_other_floats_are_converted():
    source = weights()
    for dtype, message in ((torch.int8, "int8"), (torch.complex64, "complex64")):
        with pytest.raises(ValueError, match=rf"norm\.bias of the weights is torch\.{message}, and that of the model"):
            load_weights(build(), source | {"norm.bias": source["norm.bias"].to(dtype)})
    for odd in (source["norm.bias"].to_sparse(), source["norm.bias"].to("meta")):
        with pytest.raises(ValueError, match=r"norm\.bias of the weights are sparse or without data"):
            load_weights(build(), source | {"norm.bias": odd})
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        vit = build()
        assert load_weights(vit, {name: tensor.to(dtype) for name, tensor in source.items()}).exact
        assert torch.equal(vit.norm.bias, source["norm.bias"].to(dtype).float())


def test_a_model_without_positions():
    net, other = models.build("convnet_digits"), models.build("convnet_digits", num_classes=3)
    assert load_weights(net, models.build("convnet_digits").state_dict()).exact
    assert load_weights(net, other.state_dict()).reinitialised_heads == ("head",)


class Positions(nn.Module):
    """A model of somebody else's, which tells its grid and not how many positions lie before it."""

    head_names = ()

    def __init__(self, grid, prefix=1):
        super().__init__()
        self.grid, self.image_size = grid, (8 * grid[0], 8 * grid[1])
        self.pos_embed = nn.Parameter(torch.randn(1, prefix + grid[0] * grid[1], 4))


@pytest.mark.parametrize("prefix", [0, 1])
def test_positions_before_the_grid_are_what_is_left_of_them(prefix):
    model, source = Positions((3, 5), prefix), Positions((4, 4), prefix).state_dict() | {}
    if prefix:
        source["cls_token"], model.cls_token = torch.randn(1, 1, 4), nn.Parameter(torch.zeros(1, 1, 4))
    assert load_weights(model, source).resized == (f"pos_embed {prefix}+4x4 -> {prefix}+3x5",)
    torch.testing.assert_close(model.pos_embed.detach(), timms(source["pos_embed"], (3, 5), prefix=prefix))


def test_a_run_tells_the_grid_of_a_model_that_tells_its_own():
    """Which is no square, and which no layer of a known name tells."""
    model, source = Positions((4, 6), 0), Positions((2, 8), 0)
    weights = Weights("a run", dict(source.state_dict()), Known(image_size=(16, 64)))
    assert "pos_embed 0+2x8 -> 0+4x6" in load(model, weights, purpose="student")[0]
    torch.testing.assert_close(model.pos_embed.detach(), timms(source.pos_embed.detach(), (4, 6), (2, 8), prefix=0))


def test_a_model_resizes_what_only_it_knows():
    model, source = LeViT((48, 32), 10), LeViT((32, 32), 10).state_dict()
    for tensor in source.values():
        tensor.random_(0, 9)
    report = load_weights(model, source)
    assert report.resized == (
        "first.biases (2, 64) -> (2, 96)",
        "shrink.biases (4, 64) -> (4, 96)",
        "last.biases (4, 16) -> (4, 24)",
    )
    assert torch.equal(model.first.query.linear.weight, source["first.query.linear.weight"])
    columns = model.last.biases.detach().unflatten(1, (6, 4))
    assert 0 < (columns.mean((1, 2)) - source["last.biases"].mean(1)).abs().max() < 1


class Table(Positions):
    """Positions, which are interpolated for it, and a table that it resizes itself."""

    def __init__(self, grid):
        super().__init__(grid, prefix=0)
        self.table = nn.Parameter(torch.zeros(grid[0]))

    def resized_weights(self, tensors):
        return tensors | {"table": tensors["table"][:1].expand(len(self.table))}


def test_a_model_may_leave_its_positions_to_us():
    report = load_weights(Table((6, 6)), Table((4, 4)).state_dict())
    assert report.resized == ("table (4,) -> (6,)", "pos_embed 0+4x4 -> 0+6x6")


def test_weights_of_another_kind_are_refused_where_a_model_resizes_them():
    with pytest.raises(ValueError, match=r"Table.resized_weights asks for 'table', .* of another kind of model"):
        load_weights(Table((6, 6)), {"head.weight": torch.zeros(4, 4)})


class Tied(nn.Module):
    head_names = ()

    def __init__(self):
        super().__init__()
        self.first = self.second = nn.Linear(2, 2)


def test_a_tied_tensor_has_one_value():
    model, source = Tied(), Tied().state_dict()
    once = {name: tensor for name, tensor in source.items() if name.startswith("first")}
    assert load_weights(model, once).exact
    assert torch.equal(model.second.weight, source["first.weight"])
    with pytest.raises(ValueError, match=r"first.weight and second.weight are one tensor of the model, but two"):
        load_weights(model, source | {"second.weight": torch.zeros(2, 2)})


TABLES = {
    "levit_128s": {"embed_dim": (32, 48, 64), "num_heads": (2, 3, 4), "depth": (1, 1, 1), "key_dim": 8},
    "beit_base_patch16_224": {"embed_dim": 32, "depth": 1, "num_heads": 2},
}


def with_tables(kind, *size):
    """A small network of timm's for images of `size`, with tables of attention's biases that are no constants."""
    inner = timm.create_model(kind, img_size=size, num_classes=5, **TABLES[kind])
    for name, parameter in inner.named_parameters():
        if name.endswith(("attention_biases", "relative_position_bias_table")):
            nn.init.normal_(parameter)
    return TimmModel(kind, inner, size)


def test_tables_of_levit_are_resized_as_pictures():
    small, large = with_tables("levit_128s", 96, 96), with_tables("levit_128s", 192, 192)
    weights = small.state_dict()
    tables = [name for name in weights if name.endswith("attention_biases")]
    assert len(load_weights(large, weights).resized) == len(tables) > 3
    for name in tables:
        found = large.state_dict()[name]
        picture = weights[name].unflatten(1, (math.isqrt(weights[name].shape[1]), -1))[None]
        side = math.isqrt(found.shape[1])
        expected = nn.functional.interpolate(picture, (side, side), mode="bicubic", antialias=True)
        torch.testing.assert_close(found, expected[0].flatten(1))
    with pytest.raises(ValueError, match="or of this one for another image size: stages"):
        load_weights(with_tables("levit_128s", 96, 192), weights)


@pytest.mark.parametrize("size", [(192, 192), (96, 192)])
def test_tables_of_beit_are_resized_as_timm_resizes_them(size):
    small, large = (with_tables("beit_base_patch16_224", *each) for each in ((96, 96), size))
    expected = checkpoint_filter_fn(small.state_dict(), large.inner)
    assert len(load_weights(large, small.state_dict()).resized) == 1
    assert all(torch.equal(tensor, expected[name]) for name, tensor in large.state_dict().items())
    if size[0] != size[1]:  # of such a table nobody knows the window
        with pytest.raises(ValueError, match="or of this one for another image size: blocks"):
            load_weights(small, large.state_dict())


def test_a_timm_model_is_loaded_as_ours_is():
    peer = models.build_timm("deit_tiny_distilled_patch16_224", image_size=96, num_classes=5)
    source = weights(DISTILLED, dim=192, depth=12, patch_size=16, image_size=64, num_classes=7)
    report = load_weights(peer, source)
    assert report.resized == ("pos_embed 2+4x4 -> 2+6x6",)
    assert report.reinitialised_heads == ("head", "head_dist")
    torch.testing.assert_close(peer.inner.pos_embed.detach(), timms(source["pos_embed"], (6, 6), prefix=2))


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("distilled", [False, True])
def test_positions_of_the_prefix_go_into_its_tokens(distilled, size):
    """DeiT's weights in a model that adds its class token behind the positions, as DeiT III does: the same function."""
    common = {"patch_size": 8, "dim": 16, "depth": 1, "heads": 2, "num_classes": 4, "distilled": distilled}
    torch.manual_seed(0)
    theirs = VisionTransformer(ViTConfig(32, **common))
    source = {name: torch.randn_like(tensor) for name, tensor in theirs.state_dict().items()}
    ours, same = (VisionTransformer(ViTConfig(size, **common, no_embed_class=less)) for less in (True, False))
    report = load_weights(ours, source)
    load_weights(same, source)
    prefix, side = 1 + distilled, size // 8
    told = f"pos_embed {prefix}+4x4 -> 0+{side}x{side} (positions of the prefix tokens added to these)"
    assert report.resized == (told,)
    x = torch.randn(2, 3, size, size)
    assert torch.equal(ours.tokens(x), same.tokens(x))
    assert not torch.equal(ours.cls_token, source["cls_token"])
    assert load_weights(ours, ours.state_dict()).exact
