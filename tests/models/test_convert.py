"""Weights under other names give the same outputs: wrappers, LayerScale, and the layouts of published files."""

from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from fastdeit import models
from fastdeit.models.config import ViTConfig
from fastdeit.models.convert import bare, deit_names, layer_scale, levit
from fastdeit.models.timm_model import TimmModel
from fastdeit.models.vit import VisionTransformer
from fastdeit.models.weights import load_weights

TOLERANCE = {"rtol": 2e-6, "atol": 2e-6}
"""Of logits around 1, where LayerScale is folded: rounding each weight once, instead of each product."""


def vit(seed=0, **options):
    torch.manual_seed(seed)
    made = timm.models.VisionTransformer(
        **{"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 3, "num_classes": 10} | options
    )
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made.eval()


@pytest.fixture(scope="module")
def plain():
    """The names and tensors of a small vision transformer."""
    return models.build("deit_digits_patch8_32", depth=1).state_dict()


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ("", ()),
        ("module.", ("stripped module.",)),
        ("_orig_mod.", ("stripped _orig_mod.",)),
        ("module._orig_mod.", ("stripped _orig_mod. and module.",)),
        ("_orig_mod.module.", ("stripped _orig_mod. and module.",)),
        ("backbone.", ("took what is under backbone.",)),
        ("model.", ("took what is under model.",)),
        ("teacher.backbone.", ("took what is under teacher.backbone.",)),
        ("module.backbone.", ("stripped module.", "took what is under backbone.")),
        ("module.model._orig_mod.", ("stripped _orig_mod. and module.", "took what is under model.")),
        ("model.model.backbone.", ("took what is under backbone.", "took what is under model.")),
    ],
)
def test_what_stands_before_every_name_is_stripped_and_said(plain, prefix, said):
    named, notes = bare({f"{prefix}{name}": tensor for name, tensor in plain.items()})
    assert list(named) == list(plain)
    assert all(named[name] is tensor for name, tensor in plain.items())
    assert len(notes) >= len(said)
    for part in said:
        assert any(part in note for note in notes), (part, notes)
    assert bool(notes) == bool(prefix)


def test_a_compiled_part_is_named_as_the_part(plain):
    inner = {name.replace("blocks.0.", "blocks.0._orig_mod."): tensor for name, tensor in plain.items()}
    named, notes = bare(inner)
    assert named.keys() == plain.keys()
    assert notes == ("stripped _orig_mod. from the names",)


def test_what_is_beside_a_chosen_part_is_said(plain):
    beside = {"teacher.dino_head.mlp.0.weight": torch.ones(1), "student.backbone.cls_token": torch.ones(1)}
    named, (note,) = bare({f"teacher.backbone.{name}": tensor for name, tensor in plain.items()} | beside)
    assert named.keys() == plain.keys()
    assert note == (
        "took what is under teacher.backbone., and left out teacher.dino_head.mlp.0.weight, student.backbone.cls_token"
    )


def test_the_teachers_part_is_taken_first():
    both = {"backbone.a": torch.zeros(1), "teacher.backbone.a": torch.ones(1), "model.a": torch.zeros(1)}
    named, notes = bare(both)
    assert named == {"a": both["teacher.backbone.a"]}
    assert notes == ("took what is under teacher.backbone., and left out backbone.a, model.a",)


@pytest.mark.parametrize(
    "names",
    [("module.a", "a"), ("blocks.0._orig_mod.a", "blocks.0.a"), ("backbone.a", "a"), ("module.module.a", "module.a")],
)
def test_two_tensors_of_one_name_are_refused(names):
    with pytest.raises(ValueError, match="are two tensors of one name"):
        bare({name: torch.ones(1) for name in names})


# ---- LayerScale ------------------------------------------------------------------------------------------------------


def as_deit_names_it(tensors):
    """timm's LayerScale under the names of DeiT III."""
    return {name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t for name, t in tensors.items()}


def test_layer_scale_is_renamed_both_ways():
    tensors = vit(init_values=0.1).state_dict()
    theirs = as_deit_names_it(tensors)
    for one, other in ((theirs, tensors), (tensors, theirs)):
        named, notes = layer_scale(other, one)
        assert named.keys() == other.keys()
        assert all(torch.equal(named[name], tensor) for name, tensor in other.items())
        assert len(notes) == 2
        assert all(note.startswith("renamed ") for note in notes)
    assert layer_scale(tensors, tensors) == (tensors, ())


@torch.no_grad()
@pytest.mark.parametrize("names", [dict, as_deit_names_it])
def test_folded_layer_scale_gives_the_same_outputs(names):
    scaled, ours = vit(init_values=0.1), models.build("deit_digits_patch8_32", depth=2).eval()
    source = names(scaled.state_dict())
    before = {name: tensor.clone() for name, tensor in source.items()}
    report = load_weights(ours, source, may_differ=())
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(ours(x), scaled(x), **TOLERANCE)
    assert not torch.allclose(ours(x), vit()(x), atol=1e-2)
    assert len(report.converted) == 1
    assert report.converted[0].startswith("folded LayerScale (4 tensors, blocks.0.")
    assert all(torch.equal(source[name], tensor) for name, tensor in before.items())  # the caller's are left alone


@torch.no_grad()
@pytest.mark.parametrize("names", [dict, deit_names])
def test_folded_layer_scale_of_parallel_blocks_gives_the_same_outputs(names):
    config = ViTConfig(
        image_size=32, patch_size=8, dim=64, depth=2, heads=2, parallel=2, num_classes=5, layer_scale=0.1
    )
    scaled, ours = (VisionTransformer(each).eval() for each in (config, replace(config, layer_scale=None)))
    for name, parameter in scaled.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.normal_(parameter, 1, 0.3)
    report = load_weights(ours, names(scaled.state_dict()), may_differ=())
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(ours(x), scaled(x), **TOLERANCE)
    assert report.converted[-1].startswith("folded LayerScale (8 tensors, blocks.0.")


def test_folding_is_exact_where_the_product_is():
    """By powers of two no bit is lost, in any dtype."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        source = vit(init_values=0.1).to(dtype).state_dict()
        for name in source:
            if name.endswith("gamma"):
                source[name] = torch.full_like(source[name], 0.25)
        named, _ = layer_scale({}, source)
        for layer in ("blocks.0.attn.proj", "blocks.1.mlp.fc2"):
            for part in ("weight", "bias"):
                assert torch.equal(named[f"{layer}.{part}"], source[f"{layer}.{part}"] * 0.25)
                assert named[f"{layer}.{part}"].dtype == dtype


def test_layer_scale_that_cannot_be_placed_is_refused():
    source = vit(init_values=0.1).state_dict()
    lonely = {name: tensor for name, tensor in source.items() if name != "blocks.1.mlp.fc2.weight"}
    with pytest.raises(ValueError, match=r"blocks\.1\.ls2\.gamma cannot be folded into blocks\.1\.mlp\.fc2\.weight"):
        layer_scale({}, lonely)
    with pytest.raises(ValueError, match=r"blocks\.0\.ls1\.gamma cannot be folded"):
        layer_scale({}, source | {"blocks.0.ls1.gamma": torch.ones(5)})
    with pytest.raises(ValueError, match=r"blocks\.0\.ls1\.gamma is torch\.complex64 and .* cannot be folded"):
        layer_scale({}, source | {"blocks.0.ls1.gamma": torch.ones(96, dtype=torch.complex64)})
    with pytest.raises(ValueError, match=r"blocks\.0\.gamma_1 and blocks\.0\.ls1\.gamma are two tensors of one name"):
        layer_scale(source, source | {"blocks.0.gamma_1": torch.ones(96)})


# ---- published layouts (restated from the names in their files) ------------------------------------------------------


@torch.no_grad()
def test_deit_3_adds_its_class_token_behind_the_positions():
    """No slot of the class token in `pos_embed`, `gamma_1` and `gamma_2` in each block."""
    theirs = vit(init_values=0.1, no_embed_class=True)
    source = as_deit_names_it(theirs.state_dict())
    assert source["pos_embed"].shape == (1, 16, 96)
    ours, x = models.build("deit_digits_patch8_32", depth=2).eval(), torch.randn(4, 3, 32, 32)
    report = load_weights(ours, source, may_differ=())
    torch.testing.assert_close(ours(x), theirs(x), **TOLERANCE)
    assert report.resized == ("pos_embed 0+4x4 -> 1+4x4",)


@torch.no_grad()
def test_cait_has_a_class_token_and_no_position_for_it():
    """`module.` before every name, `gamma_1`, `gamma_2`, and positions of the patches alone, at another size too."""
    torch.manual_seed(0)
    small = {"depth": 1, "depth_token_only": 1, "embed_dim": 32, "num_heads": 2, "patch_size": 16}
    theirs, x = timm.models.Cait(img_size=32, num_classes=10, **small).eval(), torch.randn(2, 3, 32, 32)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    source, _ = bare({f"module.{name}": tensor for name, tensor in theirs.state_dict().items()})
    assert source["pos_embed"].shape == (1, 4, 32)
    assert any(name.endswith("gamma_1") for name in source)

    def peer(size):
        inner = timm.models.Cait(img_size=size, num_classes=10, **small)
        inner.pretrained_cfg = {"classifier": "head"}
        return TimmModel("cait", inner, (size, size)).eval()

    same = peer(32)
    assert same.prefix_positions == 0
    assert load_weights(same, source, may_differ=()).exact
    assert torch.equal(same(x), theirs(x))
    report = load_weights(peer(64), source, may_differ=())
    assert report.resized == ("pos_embed 0+2x2 -> 0+4x4",)


def levit_names(depths=(2, 3, 4)):
    """Names of the tensors in LeViT's own files, in their order, without those of BatchNorm but `bn.weight`."""
    layer = ("c.weight", "bn.weight")
    names = [f"patch_embed.{place}.{one}" for place in (0, 2, 4, 6) for one in layer]
    biases, number = ("attention_biases", "attention_bias_idxs"), 0

    def add(parts, layers):
        nonlocal number
        names.extend(f"blocks.{number}.{part}" for part in (*parts, *(f"{at}.{one}" for at in layers for one in layer)))
        number += 1

    for stage, depth in enumerate(depths):
        for _ in range(depth):
            add([f"m.{bias}" for bias in biases], ("m.qkv", "m.proj.1"))
            add([], ("m.0", "m.2"))
        if stage < len(depths) - 1:
            add(biases, ("kv", "q.1", "proj.1"))
            add([], ("m.0", "m.2"))
    return [*names, *(f"{head}.{one}" for head in ("head", "head_dist") for one in ("bn.weight", "l.weight", "l.bias"))]


def test_levit_has_other_names_for_the_same_network():
    """timm converted the published files by the order of their tensors; by name each goes to the same place."""
    with torch.device("meta"):
        theirs = timm.create_model("levit_128s")
    counted = ("bn.bias", "running_mean", "running_var", "num_batches_tracked")
    expected = [name for name in theirs.state_dict() if not name.endswith(counted)]
    source = {name: torch.tensor(place) for place, name in enumerate(levit_names())}
    named, notes = levit((), source)
    assert list(named) == expected
    kept = [tensor for name, tensor in source.items() if not name.endswith("attention_bias_idxs")]
    assert all(one is other for one, other in zip(named.values(), kept, strict=True))
    assert notes == ("renamed from LeViT's names to timm's, and left out attention_bias_idxs",)
    assert levit((), named) == (named, ())
    assert levit(source, source) == (source, ())  # a network that has the authors' names
    others = {"patch_embed.4.bn.running_var": "stem.conv3.bn.running_var", "head.l.bias": "head.linear.bias"}
    for name, place in others.items():
        assert place in levit((), {"patch_embed.0.c.weight": torch.ones(1), name: torch.ones(1)})[0]


def test_layer_scale_under_the_names_of_deit_and_back():
    theirs = vit(init_values=0.1).state_dict()
    named = deit_names(theirs)
    assert {name.rpartition(".")[2] for name in named.keys() - theirs.keys()} == {"gamma_1", "gamma_2"}
    back, _ = layer_scale(theirs, named)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)
