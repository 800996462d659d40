"""`model.freeze`: what each word means, what freezing does to gradients and statistics, and words that mean nothing."""

import copy
import re

import pytest
import torch
from torch import nn

from fastdeit import models
from fastdeit.models.freeze import freeze_parts

HEADS = {"head", "head_dist"}


def distilled(**options):
    torch.manual_seed(0)
    return models.build("deit_digits_distilled_patch8_32", depth=3, **options)


def parts_of(model, trained):
    """Names of the parameters that are, or are not, trained, without `.weight` and `.bias`."""
    ends = (".weight", ".bias")
    names = (name for name, p in model.named_parameters() if p.requires_grad is trained)
    return {name.rpartition(".")[0] if name.endswith(ends) else name for name in names}


def inside(block, *parts):
    return {f"blocks.{block}.{part}" for part in parts}


LINEAR = "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"
WHOLE = "norm1", *LINEAR[:2], "norm2", *LINEAR[2:]
FROZEN = {
    (): set(),
    ("patch_embed",): {"patch_embed.proj"},
    ("pos_embed", "cls_token"): {"pos_embed", "cls_token"},
    ("blocks.1",): inside(1, *WHOLE),
    ("blocks.0-1",): inside(0, *WHOLE) | inside(1, *WHOLE),
    ("blocks.1-1", "blocks.1"): inside(1, *WHOLE),
    ("blocks",): inside(0, *WHOLE) | inside(1, *WHOLE) | inside(2, *WHOLE),
    ("blocks.*.mlp.fc1",): {f"blocks.{block}.mlp.fc1" for block in range(3)},
    ("blocks.1-2.*.fc1",): {f"blocks.{block}.mlp.fc1" for block in (1, 2)},
    ("embedding",): {"cls_token", "dist_token", "pos_embed", "patch_embed.proj"},
    ("attention",): {f"blocks.{block}.{part}" for block in range(3) for part in LINEAR[:2]},
    ("embedding", "blocks.0-2", "norm"): {"cls_token", "dist_token", "pos_embed", "patch_embed.proj", "norm"}
    | inside(0, *WHOLE)
    | inside(1, *WHOLE)
    | inside(2, *WHOLE),
    ("head_dist",): {"head_dist"},
}
TRAINED = {
    ("all_but_head",): HEADS,
    ("all_but_attention",): {f"blocks.{b}.{part}" for b in range(3) for part in LINEAR[:2]} | HEADS | {"pos_embed"},
    ("all_but_attention", "head_dist"): {f"blocks.{b}.{part}" for b in range(3) for part in LINEAR[:2]}
    | {"head", "pos_embed"},
}


@pytest.mark.parametrize("words", [*FROZEN, *TRAINED], ids=" ".join)
def test_what_the_words_mean(words):
    model = distilled()
    freeze_parts(model, words)
    if words in FROZEN:
        assert parts_of(model, trained=False) == FROZEN[words]
    else:
        assert parts_of(model, trained=True) == TRAINED[words]


@pytest.mark.parametrize("words", [words for words in (*FROZEN, *TRAINED) if words], ids=" ".join)
def test_the_others_get_the_gradients_that_they_had(words):
    """Frozen parts take part in the forward as before, and what is trained does not notice."""
    whole, part = distilled(), distilled()
    freeze_parts(part, words)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for model in (whole, part):
        sum(logits.square().sum() for logits in model(x)).backward()
    for (name, expected), p in zip(whole.named_parameters(), part.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected.grad, msg=name)
        else:
            assert p.grad is None, name


@pytest.mark.parametrize(
    ("name", "words", "trained"),
    [
        ("test_resnet", ["all_but_head"], {"fc"}),
        ("test_vit", ["embedding", "attention"], {"blocks", "norm", "fc_norm", "head"}),
        ("test_vit", ["all_but_attention"], {"blocks", "pos_embed", "head"}),
    ],
)
def test_timms_models(name, words, trained):
    model = models.build_timm(name, num_classes=5)
    freeze_parts(model, words)
    assert {part.split(".")[0] for part in parts_of(model, trained=True)} <= trained
    assert parts_of(model, trained=True)


def test_a_tied_parameter_is_frozen_under_any_of_its_names():
    model = nn.ModuleDict({"first": nn.Linear(2, 2), "last": nn.Linear(2, 2)})
    model["last"].weight = model["first"].weight
    freeze_parts(model, ["last"])
    assert parts_of(model, trained=True) == {"first"}
    assert model["first"].bias.requires_grad
    assert not model["first"].weight.requires_grad


class Normed(nn.Module):
    head_names = ("head",)

    def __init__(self, affine=True):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=affine))
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


@pytest.mark.parametrize("affine", [True, False])
def test_statistics_of_a_frozen_batch_norm_stand_still(affine):
    """It normalises as in eval mode, in copies of the model, too; that of a trained part goes on."""
    model = Normed(affine)
    freeze_parts(model, ["stem"])
    for trained in (model, copy.deepcopy(model)):
        before = copy.deepcopy(trained.state_dict())
        trained.eval()
        trained.train()
        x = torch.randn(8, 3, 2, 2)
        torch.testing.assert_close(trained.stem(x), copy.deepcopy(trained).eval().stem(x), rtol=0, atol=0)
        trained(x)
        after = trained.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("stem"))
        assert not torch.equal(after["body.1.running_mean"], before["body.1.running_mean"])
    assert [type(norm).__name__ for norm in (model.stem[1], model.body[1])] == ["BatchNorm2d"] * 2
    assert isinstance(model.stem[1], nn.BatchNorm2d)


def test_a_batch_norm_whose_bias_is_trained_goes_on():
    model = Normed()
    freeze_parts(model, ["stem.*.weight"])
    model.train()
    assert model.stem[1].training


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("blokcs", "'blokcs': the model has no 'blokcs'; did you mean blocks?"),
        ("atention", "'atention': the model has no 'atention'; did you mean attention"),
        ("blocks.3", "'blocks.3': blocks has no '3'; there are 0 to 2"),
        ("blocks.0-3", "'blocks.0-3': blocks has no '0-3'; there are 0 to 2"),
        ("blocks.2-1", "'blocks.2-1': blocks has no '2-1'; there are 0 to 2"),
        ("blocks.0-99999999999999999999", "blocks has no '0-99999999999999999999'"),
        ("blocks.0.atn", "'blocks.0.atn': blocks.0 has no 'atn'; did you mean attn?"),
        ("blocks.*.gamma", "'blocks.*.gamma': blocks.* has no 'gamma'; there are norm1, attn, norm2, mlp"),
        ("head.weight.x", "'head.weight.x': head.weight has no 'x'"),
        ("blocks.", "'blocks.': blocks has no ''"),
        ("model.head", "'model.head': the model has no 'model'"),
    ],
)
def test_words_that_mean_nothing(word, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        freeze_parts(distilled(), [word])


@pytest.mark.parametrize("word", ["attention", "all_but_attention"])
def test_attention_where_there_is_none(word):
    with pytest.raises(ValueError, match="ConvNet has no attention"):
        freeze_parts(models.build("convnet_digits"), [word])
