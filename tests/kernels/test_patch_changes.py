"""Whatever is done to a module before or after `accelerate`, it computes what timm's code would: every part, every
kind of change. Where the op can stand for that no more, timm's code runs, and says so."""

import warnings
from contextlib import contextmanager
from copy import deepcopy
from functools import cache

import pytest
import torch
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch.nn.utils import parametrize

from fastdeit.kernels import accelerate
from fastdeit.kernels.accelerate import modules
from fastdeit.kernels.accelerate.identity import difference
from tests.kernels.proof import normal

DIM = 24
SUBJECTS = {
    "block": lambda: Block(DIM, 3, mlp_ratio=2, qkv_bias=True, init_values=0.5, drop_path=0.3),
    "bias apart": lambda: EvaAttention(DIM, 3, qkv_bias_separate=True, scale_norm=False),
    "model": lambda: VisionTransformer(8, 4, embed_dim=DIM, depth=2, num_heads=3, mlp_ratio=2, num_classes=5),
}
PATHS = {
    "block": [
        *("", "norm1", "attn", "attn.qkv", "attn.q_norm", "attn.attn_drop", "attn.norm", "attn.proj"),
        *("attn.proj_drop", "ls1", "drop_path1", "norm2", "mlp", "mlp.fc1", "mlp.act", "mlp.drop1", "mlp.norm"),
        *("mlp.fc2", "mlp.drop2", "ls2", "drop_path2"),
    ],
    "bias apart": ["", "qkv", "proj", "q_norm"],
    "model": ["", "patch_embed", "norm_pre", "blocks", "blocks.0", "blocks.1", "norm", "fc_norm", "head"],
}
SIBLINGS = {
    "norm1": "norm2",
    "ls2": "ls1",
    "drop_path1": "drop_path2",
    "attn.q_norm": "attn.attn_drop",
    "mlp.drop1": "attn.attn_drop",
    "mlp.fc1": "attn.qkv",
    "blocks.0": "blocks.1",
    "blocks.1": "blocks.0",
    "norm": "blocks.1.norm1",
    "fc_norm": "norm",
}


@cache
def subject(name):
    """(accelerated, timm's), all values random; in float64, where a difference is no rounding."""
    torch.manual_seed(0)
    timms = SUBJECTS[name]().double()
    with torch.no_grad():
        for i, parameter in enumerate(timms.parameters()):
            parameter += 0.2 * normal(*parameter.shape, dtype=torch.float64, device="cpu", seed=i)
    accelerated = deepcopy(timms)
    assert accelerate(accelerated, strict=True)
    return accelerated, timms


def pair_of(name):
    return deepcopy(subject(name))


def input_of(name):
    shape = (4, 3, 8, 8) if name == "model" else (4, 5, DIM)
    return normal(*shape, dtype=torch.float64, device="cpu", seed=1)


# ---- what is changed -------------------------------------------------------------------------------------------------


def distorted(out):
    """Another result, in which tokens depend on each other; of a pair, the first is the result."""
    if isinstance(out, tuple):
        return distorted(out[0]), *out[1:]
    return 1.5 * out + (out.mean(1, keepdim=True) if out.dim() == 3 else 0)


def shape_of(out):
    return (out[0] if isinstance(out, tuple) else out).shape


def distorting(forward, seen):
    def other(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        seen.append(shape_of(out))
        return distorted(out)

    return other


def class_of(module):
    return module.original if isinstance(module, modules.Accelerated) else type(module)


@contextmanager
def class_patch(modules_, path, seen):
    """The forward of the class itself: it is timm's own, and one for all instances."""
    cls = class_of(modules_[-1].get_submodule(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cls, "forward", distorting(cls.forward, seen))
        yield


def each(change):
    """A change that is made to each module apart."""

    @contextmanager
    def made(modules_, path, seen):
        for module in modules_:
            change(module, path, seen)
        yield

    return made


def put(root, path, module):
    parent, _, name = path.rpartition(".")
    root.get_submodule(parent)._modules[name] = module


def subclass(root, path, seen):
    module = root.get_submodule(path)
    cls = type(module)
    module.__class__ = type("Sub", (cls,), {"forward": distorting(cls.forward, seen)})


def same_name(root, path, seen):
    module = root.get_submodule(path)
    cls = class_of(module)
    module.__class__ = type(cls.__name__, (cls,), {"forward": distorting(cls.forward, seen)})


def own_forward(root, path, seen):
    module = root.get_submodule(path)
    module.forward = distorting(type(module).forward, seen).__get__(module)


def hook(root, path, seen):
    root.get_submodule(path).register_forward_hook(lambda m, args, out: seen.append(shape_of(out)) or distorted(out))


def pre_hook(root, path, seen):
    root.get_submodule(path).register_forward_pre_hook(lambda m, args: seen.append(args[0].shape) or (2 * args[0],))


def backward_hook(root, path, seen):
    root.get_submodule(path).register_full_backward_hook(lambda m, given, out: seen.append(out[0].shape))


def shared(root, path, seen):
    put(root, path, root.get_submodule(SIBLINGS[path]))


class Halved(nn.Module):
    def forward(self, x):
        return x / 2


def parametrised(root, path, seen):
    module = root.get_submodule(path)
    parametrize.register_parametrization(module, next(iter(module._parameters)), Halved())


class Wrapper(nn.Module):
    """What torch.compile puts in the place of a module, as far as a look at it can tell."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module

    def forward(self, *args, **kwargs):
        return distorted(self._orig_mod(*args, **kwargs))


def wrapper(root, path, seen):
    put(root, path, Wrapper(root.get_submodule(path)))


def attribute(key):
    def change(root, path, seen):
        module = root.get_submodule(path)
        value = getattr(module, key)
        other = not value if isinstance(value, bool) else 2 * value if value else 1
        setattr(module, key, other)

    return change


CHANGES = {
    "class patch": class_patch,
    **{
        change.__name__: each(change)
        for change in (
            *(subclass, same_name, own_forward, hook, pre_hook, backward_hook, shared, parametrised, wrapper),
        )
    },
}


def attributes_of(name, path):
    state = vars(subject(name)[1].get_submodule(path))
    return sorted(key for key, value in state.items() if type(value) in (bool, int, float) and key != "training")


def possible(change, name, path):
    module = subject(name)[1].get_submodule(path)
    if change in ("wrapper", "shared") and not path:
        return False
    if change == "wrapper" and path == "blocks":
        return False  # timm's head asks for its length
    if change == "shared":
        return path in SIBLINGS
    return change != "parametrised" or len(module._parameters) > 0


CASES = [
    (name, path, change)
    for name, paths in PATHS.items()
    for path in paths
    for change in CHANGES
    if possible(change, name, path)
]
SETTINGS = [(name, path, key) for name, paths in PATHS.items() for path in paths for key in attributes_of(name, path)]


# ---- what has to be equal --------------------------------------------------------------------------------------------


def outcome(module, x):
    """Result and all gradients, or the error, in training; then the result in eval mode."""
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    try:
        out = module.train()(x)
        free = [x, *module.parameters()]
        grads = torch.autograd.grad(distorted(out).square().sum(), free, materialize_grads=True)
        return out.detach(), *grads, module.eval()(x).detach()
    except Exception as error:
        return type(error)


def assert_equal(mine, theirs):
    if isinstance(theirs, type):
        assert isinstance(mine, type)
    else:
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def assert_alike(accelerated, timms, name, change, path):
    """Same values, and the same seen by who wanted to see."""
    x, seen = input_of(name), []
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with change([accelerated, timms], path, seen):
            for module in (accelerated, timms):
                seen.clear()
                found.append((outcome(module, x), sorted(seen)))
    assert_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("name", SUBJECTS)
def test_without_a_change_the_ops_run(name):
    accelerated, timms = pair_of(name)
    for part in accelerated.modules():
        if isinstance(part, modules.Accelerated):
            assert difference(part) is None
    assert_equal(outcome(accelerated, input_of(name)), outcome(timms, input_of(name)))


def shortened(cases, kept):
    """All cases, of which `pytest` without an option runs those with the last argument in `kept`."""
    return [pytest.param(*case, marks=() if case[-1] in kept else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(("name", "path", "change"), shortened(CASES, {"class patch", "same_name", "hook", "shared"}))
def test_changes_after_accelerating(name, path, change):
    accelerated, timms = pair_of(name)
    assert_alike(accelerated, timms, name, CHANGES[change], path)


@pytest.mark.parametrize(("name", "path", "key"), shortened(SETTINGS, {"scale", "fused_attn", "p", "global_pool"}))
def test_attributes_that_change_after_accelerating(name, path, key):
    accelerated, timms = pair_of(name)
    assert_alike(accelerated, timms, name, each(attribute(key)), path)


# ---- changes that are there before -----------------------------------------------------------------------------------


@contextmanager
def accelerated_inside(change, pair, path, seen):
    with change(pair, path, seen):
        report = accelerate(pair[0])
        assert all(row.op or row.reason for row in report.rows)
        yield


def assert_alike_if_before(name, change, path):
    _, timms = pair_of(name)

    def made(pair, path, seen):
        return accelerated_inside(change, pair, path, seen)

    assert_alike(deepcopy(timms), timms, name, made, path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "path", "change"), CASES)
def test_changes_before_accelerating(name, path, change):
    assert_alike_if_before(name, CHANGES[change], path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "path", "key"), SETTINGS)
def test_attributes_that_change_before_accelerating(name, path, key):
    assert_alike_if_before(name, each(attribute(key)), path)
