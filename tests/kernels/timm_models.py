"""Small timm models, and what it means that an accelerated one computes what timm's code computes."""

from copy import deepcopy
from unittest import mock

import timm
import torch

from fastdeit.kernels import accelerate
from fastdeit.kernels.accelerate import modules
from tests.kernels.proof import assert_as_good, normal

TINY = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}


def model_of(name="deit_tiny_patch16_224", **options):
    """A small model whose parameters are all random: a fresh LayerScale would hide a wrong branch."""
    if "naflex" not in name:
        size = {"img_size": 56 if "patch14" in name else 48}
        options = size | options
    torch.manual_seed(0)
    model = timm.create_model(name, **{**TINY, **options})
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter += 0.2 * normal(*parameter.shape, dtype=torch.float32, device="cpu", seed=i)
    return model


def images_for(model, batch=3):
    height, width = getattr(getattr(model, "patch_embed", None), "img_size", None) or (48, 48)
    return normal(batch, 3, height, width, dtype=torch.float32, device="cpu", seed=5)


def outcome(model, images, seed=3):
    """Outputs and the gradients of all parameters."""
    torch.manual_seed(seed)
    out = model(images)
    outs = out if isinstance(out, tuple) else (out,)
    loss = sum((o * normal(*o.shape, dtype=o.dtype, device=o.device.type, seed=i)).sum() for i, o in enumerate(outs))
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return {f"output {i}": o.detach() for i, o in enumerate(outs)} | dict(zip(names, grads, strict=True))


def assert_same_as_timm(model, timms, images):
    """All gradients together, each in units of its own size: the rounding errors of one small tensor are a matter of
    luck. A gradient that is zero but for rounding, as of what a softmax cancels, has no such unit."""
    mine, same, exact = (
        outcome(model, images),
        outcome(timms, images),
        outcome(deepcopy(timms).double(), images.double()),
    )
    sizes = {name: value.square().mean().sqrt() for name, value in exact.items()}
    names = [name for name in exact if sizes[name] > 1e-12]
    assert_as_good(
        *(
            torch.cat([(o[name] / sizes[name].to(o[name].dtype)).flatten() for name in names])
            for o in (mine, same, exact)
        ),
        "all",
    )


def assert_close(mine, theirs):
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def fell_back(module, call):
    """Whether `call` reaches the original forward of `module`."""
    original, reached = module.original, []

    class Spy(original):
        def forward(self, *args, **kwargs):
            reached.append(self)
            return super().forward(*args, **kwargs)

    accelerated = type(module)
    module.__class__ = modules.accelerated(module.mixin, Spy, module.remembered._replace(forward=Spy.forward))
    call()
    module.__class__ = accelerated
    return bool(reached)


def queries(call):
    """Tokens of which `call` computes attention on keys and values of more: one number for each time."""
    with mock.patch.object(modules, "query_attention", wraps=modules.query_attention) as spy:
        call()
    return [used.args[0].shape[1] for used in spy.call_args_list]


def last_block_row(report):
    """What became of the last block of the one model in it."""
    (row,) = [row for row in report.rows if row.part == "last block"]
    return row


def all_tokens_as_timm(model, timms):
    """The model's forward computes all tokens of its last block, with timm's results."""
    images = images_for(model)
    assert queries(lambda: model(images)) == []
    assert_same_as_timm(model, timms, images)


def accelerated_pair():
    """(accelerated model, the same under timm's code)."""
    model = model_of(drop_path_rate=0.3)
    timms = deepcopy(model)
    accelerate(model, strict=True)
    return model, timms
