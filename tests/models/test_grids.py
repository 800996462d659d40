"""Images of several sizes in one model and one step: positions follow the grid of the input."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed

from fastdeit.kernels import to_patches
from fastdeit.models import vit as vit_module
from fastdeit.models.positions import interpolated
from fastdeit.models.vit import VisionTransformer, ViTConfig
from fastdeit.models.weights import load_weights

SMALL = ViTConfig(image_size=(32, 48), patch_size=8, dim=32, depth=2, heads=2, num_classes=5, distilled=True)
OTHERS = [(16, 24), (64, 48), (8, 8), (48, 32)]


def model(**options):
    torch.manual_seed(0)
    built = VisionTransformer(ViTConfig(**(vars(SMALL) | options)))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return built.eval()


def images(size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def by_torch(positions, old, new):
    """What `interpolated` computes, by the function that DeiT's public code calls."""
    cells = positions.unflatten(1, old).permute(0, 3, 1, 2)
    return F.interpolate(cells, size=new, mode="bicubic", align_corners=False).flatten(2).mT


@pytest.mark.parametrize("new", [(2, 3), (8, 6), (1, 1), (6, 4), (5, 7)])
def test_positions_and_their_gradients_are_those_of_torch(new):
    positions = torch.randn(1, 24, 16, dtype=torch.float64, requires_grad=True)
    mine, theirs = interpolated(positions, (4, 6), new), by_torch(positions, (4, 6), new)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(mine)
    (my_grad,) = torch.autograd.grad(mine, positions, direction)
    (their_grad,) = torch.autograd.grad(theirs, positions, direction)
    torch.testing.assert_close(my_grad, their_grad, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda p: interpolated(p, (2, 3), (3, 2)), positions[:, :6].detach().requires_grad_()
    )


@pytest.mark.parametrize("new", [(2, 3), (8, 6)])
def test_positions_are_those_of_timm(new):
    positions = torch.randn(1, 24, 16)
    timms = resample_abs_pos_embed(positions, new_size=new, old_size=(4, 6), num_prefix_tokens=0, antialias=False)
    torch.testing.assert_close(interpolated(positions, (4, 6), new), timms, rtol=1e-5, atol=1e-5)


def test_autocast_does_not_round_positions():
    positions = torch.randn(1, 24, 16)
    with torch.autocast("cpu", torch.bfloat16):
        cast = interpolated(positions, (4, 6), (3, 3))
    assert torch.equal(cast, interpolated(positions.double(), (4, 6), (3, 3)).float())


@torch.no_grad()
@pytest.mark.parametrize("size", OTHERS)
def test_another_size_is_what_a_model_of_that_size_computes_from_these_weights(size):
    vit, other = model(), model(image_size=size)
    load_weights(other, vit.state_dict(), grid=vit.grid)
    x = images(size)
    for mine, theirs in zip((*vit(x), vit.tokens(x)), (*other(x), other.tokens(x)), strict=True):
        assert torch.equal(mine, theirs)
    keep = torch.zeros(2, 1, dtype=torch.int64)
    assert torch.equal(vit.tokens(x, keep=keep, stop=0), other.tokens(x, keep=keep, stop=0))


@torch.no_grad()
def test_the_models_own_grid_is_never_interpolated(monkeypatch):
    vit = model()
    monkeypatch.delattr(vit_module, "interpolated")
    positions = vit._positions(vit.grid)
    assert positions.data_ptr() == vit.pos_embed[:, vit.prefix_tokens :].data_ptr()
    vit(images((32, 48)))
    vit(to_patches(images((32, 48)), 8))
    with pytest.raises(NameError):
        vit(images((16, 24)))


@torch.no_grad()
def test_patches_say_how_they_lie():
    vit, x = model(), images((16, 48))
    patches = to_patches(x, 8)
    assert torch.equal(vit(patches, grid=(2, 6))[0], vit(x)[0])
    assert torch.equal(vit(x, grid=(2, 6))[0], vit(x)[0])
    assert torch.equal(vit.tokens(patches, grid=(2, 6)), vit.tokens(x))
    # As many patches in another shape, the model's own number of them among these.
    assert not torch.allclose(vit(patches, grid=(3, 4))[0], vit(x)[0], atol=1e-3)
    own = to_patches(images((32, 48)), 8)
    assert torch.equal(vit(own)[0], vit(own, grid=(4, 6))[0])
    assert not torch.allclose(vit(own)[0], vit(own, grid=(6, 4))[0], atol=1e-3)


def test_crops_of_two_sizes_train_in_one_step():
    """Two global and three local crops, as in DINO: one backward, the gradient of both sizes in the positions."""
    vit = model(drop_path=0.3).train().double()
    crops = [images(size).double() for size in [(32, 48)] * 2 + [(16, 16)] * 3]
    noise = torch.rand(2, 4, generator=torch.Generator().manual_seed(3))

    def gradients(chosen):
        vit.zero_grad()
        sum(sum(map(torch.sum, vit(x, noise))) for x in chosen).backward()
        return {name: parameter.grad.clone() for name, parameter in vit.named_parameters()}

    whole, parts = gradients(crops), [gradients([crop]) for crop in crops]
    for name, grad in whole.items():
        torch.testing.assert_close(grad, sum(part[name] for part in parts), rtol=1e-9, atol=1e-9)
        assert parts[-1][name].abs().max() > 0, name
    # A small crop teaches the positions of the patches, too, and not those of the prefix tokens alone.
    assert parts[-1]["pos_embed"][:, vit.prefix_tokens :].abs().max() > 0


@torch.no_grad()
def test_positions_are_never_stale():
    """Some ways to change a parameter leave its `_version` or its storage as they were."""
    vit, x = model(), images((16, 24))

    def fresh():
        return copy.deepcopy(vit)(x.to(vit.head.weight.dtype))[0]

    def fused_step():
        vit.pos_embed.grad = torch.randn_like(vit.pos_embed)
        torch.optim.AdamW([vit.pos_embed], lr=0.1, fused=True).step()

    def swap():
        vit.pos_embed.data = vit.pos_embed.data * 2

    changes = [
        fused_step,
        swap,
        lambda: vit.pos_embed.data.neg_(),
        lambda: vit.load_state_dict({name: -tensor for name, tensor in vit.state_dict().items()}),
        lambda: vit.double(),
    ]
    before = vit(x)[0]
    for change in changes:
        change()
        after = vit(x.to(vit.head.weight.dtype))[0]
        assert torch.equal(after, fresh())
        assert not torch.equal(after.float(), before.float())
        before = after


@pytest.mark.slow
def test_is_compiled_in_one_graph_for_each_grid():
    vit = model(drop_path=0.2, depth=1).train()
    compiled = torch.compile(vit, fullgraph=True, dynamic=False, backend="eager")
    noise = torch.rand(2, 2, generator=torch.Generator().manual_seed(3))
    for x, grid in [(images((32, 48)), None), (to_patches(images((16, 48)), 8), (2, 6))]:
        logits, expected = compiled(x, noise, grid=grid), vit(x, noise, grid=grid)
        for mine, theirs in zip(logits, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        grads = [torch.autograd.grad(out[0].sum(), vit.pos_embed)[0] for out in (logits, expected)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
