"""Calls of the ops' Triton backends at the shapes of DeiT, on tensors of the meta device: what the lint compiles.

Every backend that launches Triton kernels has cases here: all models in fp16 and bf16, all that it fuses at least once.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from fastdeit.kernels import _op, _triton

NARROW = {
    "_update._schedule_kernel": (32, 32),
    "gelu._column_sums_kernel": (128, 64),
    "input._render_kernel": (64, 128),
    "lamb._ratio_kernel": (32, 32),
    "norm._root_kernel": (32, 32),
    "norm._squares_kernel": (128, 32),
}
"""Bits of the widest loads and stores of kernels that need not have 128 and 128: they read or write a few numbers or
sums; and 8 pixels of 3 bytes are 3 words of 64 bits."""

_MODELS = {"deit_base": (768, 12), "deit_small": (384, 6), "deit_tiny": (192, 3)}
_BATCH, _TOKENS = 256, 198
_HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """A call of a backend of an op at real shapes.

    run       calls forward, and backward where there is one, on meta tensors
    needs     oldest architecture the backend runs on
    wgmma     kernels, as "module.function", that have to use the tensor cores of sm_90 by that card's own instructions
    odd       whether rows or tensors start at any element, so that wide loads and stores are impossible
    """

    op: str
    backend: str
    name: str
    run: Callable[[], None]
    needs: int
    wgmma: Collection[str] = ()
    odd: bool = False


def cases() -> dict[str, list[Case]]:
    """What the lint compiles, by op."""
    found: dict[str, list[Case]] = {}
    for case in (*_layer_norms(), *_mlps(), *_attentions(), *_losses(), *_optimizers(), *_inputs()):
        found.setdefault(case.op, []).append(case)
    return found


def backends() -> Iterable[tuple[str, _op.Backend]]:
    """(op, backend) of all backends that launch Triton kernels: their capability is that of Triton."""
    for op in _op.OPS.values():
        for backend in op.backends:
            if getattr(backend.capability, "func", backend.capability) is _triton.capability:
                yield op.name, backend


def _case(op: str, name: str, run: Callable[[_op.Backend], None], backend: str = "triton", **expectations: Any) -> Case:
    chosen = next(found for owner, found in backends() if (owner, found.name) == (op, backend))
    needs = signature(chosen.capability).parameters["needs"].default
    return Case(op, backend, name, lambda: run(chosen), needs, **expectations)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _models() -> Iterable[tuple[str, int, int, torch.dtype]]:
    """(name, width, heads, dtype) of every model in both 16-bit dtypes."""
    for model, (width, heads) in _MODELS.items():
        for name, dtype in _HALVES.items():
            yield f"{model} {name}", width, heads, dtype


def _layer_norms() -> Iterable[Case]:
    def added(width, dtype, stream=torch.float32, gamma=False, keep=False, bias=True, kept=_BATCH):
        def run(backend):
            vector = _meta(width)
            samples = None if kept == _BATCH else _meta(kept, dtype=torch.int64)
            residual, branch = (_meta(n, _TOKENS, width, dtype=d) for n, d in ((_BATCH, stream), (kept, dtype)))
            scales = vector if gamma else None, _meta(kept) if keep else None, vector if bias else None
            out = backend.forward(residual, branch, vector, vector, 1e-6, *scales, samples, samples, dtype)
            new_residual, normed, *statistics = out
            backend.backward(residual, normed, new_residual, branch, vector, *statistics, *scales, samples, samples)

        return run

    def plain(width, dtype):
        def run(backend):
            x, vector = _meta(_BATCH, _TOKENS, width), _meta(width)
            normed, *statistics = backend.forward(x, vector, vector, 1e-6, dtype)
            backend.backward(normed, x, vector, *statistics)

        return run

    for name, width, _, dtype in _models():
        yield _case("add_layer_norm", f"{name} drop_path", added(width, dtype, keep=True))
        yield _case("layer_norm", name, plain(width, dtype))
    half = torch.float16
    for name, run in {
        "no bias": added(768, half, bias=False),
        "bias": added(768, half),
        "layer_scale drop_path": added(768, half, gamma=True, keep=True),
        "layer_scale, skipped samples": added(768, half, gamma=True, kept=200),
        "16-bit stream": added(768, half, stream=half),
    }.items():
        yield _case("add_layer_norm", f"deit_base fp16 {name}", run)
    yield _case("add_layer_norm", "deit_base fp32", added(768, torch.float32))


def _mlps() -> Iterable[Case]:
    def weights(width, dtype):
        return [
            _meta(*shape, dtype=dtype) for shape in ((4 * width, width), (4 * width,), (width, 4 * width), (width,))
        ]

    def plain(width, dtype, recompute=True):
        def run(backend):
            x, (w1, b1, w2, b2) = _meta(_BATCH, _TOKENS, width, dtype=dtype), weights(width, dtype)
            out, pre, act = backend.forward(x, w1, b1, w2, b2, recompute)
            backend.backward(out, x, w1, w2, pre, None if recompute else act)

        return run

    def normed(width, dtype):
        def run(backend):
            x, vector, (w1, b1, w2, b2) = _meta(_BATCH, _TOKENS, width), _meta(width), weights(width, dtype)
            out, pre, _, *statistics = backend.forward(x, vector, vector, 1e-6, w1, b1, w2, b2, True)
            backend.backward(out, x, vector, vector, w1, w2, pre, None, *statistics)

        return run

    products = {"gelu_products._product_gelu_kernel", "gelu_products._product_gelu_backward_kernel"}
    for name, width, _, dtype in _models():
        for op, run in (("mlp", plain(width, dtype)), ("layer_norm_mlp", normed(width, dtype))):
            yield _case(op, name, run)
            yield _case(op, f"{name} epilogue", run, "epilogue", wgmma=products)
    kept = plain(768, torch.float16, recompute=False)
    yield _case("mlp", "deit_base fp16 act kept", kept)
    yield _case("mlp", "deit_base fp16 act kept, epilogue", kept, "epilogue", wgmma=products)
    yield _case("mlp", "deit_base fp32", plain(768, torch.float32))


def _attentions() -> Iterable[Case]:
    def packed(tokens, width, heads, dtype, with_bias):
        def run(backend):
            qkv = _meta(_BATCH, tokens, 3 * width, dtype=dtype)
            out, lse = backend.forward(qkv, heads, 0.125, _meta(3 * width, dtype=dtype) if with_bias else None)
            backend.backward(out, qkv, out, lse, heads, 0.125, with_bias)

        return run

    def queried(width, heads, dtype):
        def run(backend):
            q, kv = (_meta(_BATCH, n, k * width, dtype=dtype) for n, k in ((2, 1), (_TOKENS, 2)))
            out, lse = backend.forward(q, kv, heads, 0.125)
            backend.backward(out, q, kv, out, lse, heads, 0.125)

        return run

    products = {f"attention_forward.{name}_kernel" for name in ("_one_pass", "_online")}
    products |= {f"attention_backward.{name}_kernel" for name in ("_query_gradient", "_key_gradient")}
    products.add("attention_fused_backward._fused_kernel")
    for name, width, heads, dtype in _models():
        run = packed(_TOKENS, width, heads, dtype, True)
        yield _case("attention", name, run, wgmma=products)
        yield _case("attention", f"{name} fused", run, "fused_backward", wgmma=products)
        yield _case("query_attention", name, queried(width, heads, dtype), wgmma=products)
    half = torch.float16
    yield _case("attention", "deit_base fp16 197 tokens, no bias", packed(197, 768, 12, half, False), wgmma=products)
    for tokens, with_bias in ((65, True), (145, True), (197, False)):
        name = f"deit_base fp16 {tokens} tokens{'' if with_bias else ', no bias'}, fused"
        run = packed(tokens, 768, 12, half, with_bias)
        yield _case("attention", name, run, "fused_backward", wgmma=products)
    yield _case("attention", "deit_base fp16 384 pixels", packed(578, 768, 12, half, True), wgmma=products)
    yield _case("attention", "deit_base fp32", packed(_TOKENS, 768, 12, torch.float32, True))


def _losses() -> Iterable[Case]:
    def joint(classes, dtype, distillation, base="ce"):
        def run(backend):
            logits, labels = _meta(_BATCH, classes, dtype=dtype), _meta(_BATCH, dtype=torch.int64)
            other = None if distillation == "none" else logits
            targets, settings = (labels, labels, _meta(_BATCH)), (0.0, base, distillation, 0.5, 3.0, "numel")
            *_, dcls, ddist = backend.forward(logits, other, *targets, other, *settings, True)
            backend.backward(_meta(), dcls, ddist, dtype, dtype)

        return run

    def submodels(classes, dtype, binarise):
        def run(backend):
            logits, labels = _meta(2 * _BATCH, classes, dtype=dtype), _meta(_BATCH, dtype=torch.int64)
            unit = backend.forward(logits, labels, labels, _meta(_BATCH), 0.0, binarise, True)[1]
            backend.backward(_meta(), unit, dtype)

        return run

    for name, dtype in _HALVES.items():
        for distillation in ("none", "hard", "soft"):
            yield _case("distillation_loss", f"1000 classes {name} {distillation}", joint(1000, dtype, distillation))
        yield _case("cosub_loss", f"1000 classes {name}", submodels(1000, dtype, False))
    half = torch.float16
    yield _case("distillation_loss", "1000 classes fp16 bce", joint(1000, half, "none", "bce"))
    yield _case("distillation_loss", "21,841 classes fp16 soft", joint(21_841, half, "soft"), odd=True)
    yield _case("cosub_loss", "21,841 classes fp16 binarised", submodels(21_841, half, True), odd=True)


def _optimizers() -> Iterable[Case]:
    def weights(width):
        matrices = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
        return [*matrices * 12, (width, 768), (1000, width), (1000, width)]

    def vectors(width):
        return [*[(width,), (width,), (3 * width,), (width,), (width,), (width,), (4 * width,), (width,)] * 12, (1000,)]

    def norm(shapes, dtype):
        return lambda backend: backend.forward([_meta(*shape, dtype=dtype) for shape in shapes])

    def step(shapes, own, *, decay=0.05, grad=torch.float32, ema=True, copy=None, guarded=True):
        states, *numbers = own

        def run(backend):
            def tensors(dtype):
                return [] if dtype is None else [_meta(*shape, dtype=dtype) for shape in shapes]

            full = torch.float32
            lists = tensors(full), tensors(grad), *(tensors(full) for _ in range(states))
            guards = (_meta(), _meta()) if guarded else (None, None)
            follow = tensors(full if ema else None), 0.9999, tensors(copy)
            backend.forward(*lists, *numbers, decay, *guards, *follow)

        return run

    half = torch.float16
    for name, dtype in {"fp32": torch.float32, **_HALVES}.items():
        yield _case("global_norm", f"deit_base {name}", norm(weights(768), dtype))
    # The number of states, and what stands between the lists and the decay: step and lr, or lr, and numbers.
    adam = 2, _meta(), _meta(), 0.9, 0.999, 1e-8
    sgd = 1, _meta(), 0.9, True, False
    for op, own in (("fused_adamw", adam), ("fused_lamb", adam), ("fused_sgd", sgd)):
        for name, run in {
            "weights": step(weights(768), own),
            "vectors": step(vectors(768), own, decay=0.0),
            "weights, fp16 copy": step(weights(768), own, copy=half),
            "weights, bf16 gradients and copy": step(weights(768), own, grad=torch.bfloat16, copy=torch.bfloat16),
            "weights, nothing else": step(weights(768), own, ema=False, guarded=False),
        }.items():
            yield _case(op, f"deit_base {name}", run)
        yield _case(op, "one bias of 21,841 classes", step([(21_841,)], own, decay=0.0), odd=True)
    plain = 1, _meta(), 0.9, False, True
    yield _case("fused_sgd", "deit_base weights, decoupled, plain", step(weights(768), plain))


def _inputs() -> Iterable[Case]:
    def rendered(*patch_size, dtype=torch.float16, mixed=True, erased=False):
        def run(backend):
            images, boxes = _meta(_BATCH, 224, 224, 3, dtype=torch.uint8), _meta(_BATCH, 4, dtype=torch.int32)
            partner, keys = (_meta(_BATCH, dtype=torch.int64) for _ in range(2))
            mix = (partner, _meta(_BATCH), boxes) if mixed else (None, None, None)
            noise = (boxes, keys) if erased else (None, None)
            mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
            backend.forward(images, *patch_size, mean, std, *mix, *noise, dtype)

        return run

    for op, patch_size in (("patchify", (16,)), ("pixels", ())):
        for name, dtype in _HALVES.items():
            yield _case(op, f"224 pixels {name} mixed", rendered(*patch_size, dtype=dtype))
        yield _case(op, "224 pixels fp16", rendered(*patch_size, mixed=False))
        yield _case(op, "224 pixels fp16 mixed, erased", rendered(*patch_size, erased=True))
    yield _case("patchify", "224 pixels, patches of 14, fp16 mixed", rendered(14), odd=True)
