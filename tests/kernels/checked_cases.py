"""Calls that run every kernel in the checked interpreter: each example of each op at sizes of a few elements, and what
these do not reach, such as a loop that goes round more than once.

Coverage is measured over these cases (`test_kernel_coverage.py`), and faults are planted under them (`mutants.py`).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastdeit.kernels._example import FEW, Example, Maker, Sizes
from fastdeit.kernels._op import OPS, Backend, Op, Unsupported
from fastdeit.kernels.fp8.cast import LARGEST
from fastdeit.kernels.lint.cases import backends
from tests.kernels.checked import checked
from tests.kernels.proof import assert_as_good

Outcome = dict[str, Tensor]
_KERNELS = "fastdeit.kernels"
_SCALAR = 16
"""Units in the last place of 1 that a loss or a norm may be off: it is a sum of numbers of either sign."""
_CASTS = "fp8_rows", "fp8_columns"
"""Ops whose results are exactly those of their formula."""
_EQUAL: dict[str, Any] = {"rtol": 0, "atol": 0, "equal_nan": True}


@dataclass(frozen=True)
class CheckedCase:
    """A call of a backend of an op, forward and backward.

    small     constants of modules that are smaller than they are, by their full names: (dotted module, name) -> value
    change    changes the arguments before the call
    judged    whether the reference can run on the arguments, so that errors can be judged
    """

    op: Op
    backend: Backend
    example: Example
    sizes: Sizes
    dtype: torch.dtype
    small: tuple[tuple[str, Any], ...] = ()
    change: Callable[[list[Any]], None] | None = None
    judged: bool = True

    @property
    def name(self) -> str:
        """For test ids and the table of mutants."""
        parts = self.op.name, self.backend.name, self.example.name, self.sizes.name, str(self.dtype).split(".")[-1]
        small = (name.rpartition(".")[2] for name, _ in self.small)
        return "-".join(filter(None, (*parts, *small, self.change and self.change.__name__)))

    def arguments(self) -> list[Any]:
        """The same at every call, but for the memory they are in."""
        torch.manual_seed(0)
        args = self.example.build(Maker(self.sizes, self.dtype, torch.device("cpu")))
        for arg in args:
            if isinstance(arg, Tensor) and arg.dim() == 0 and 0 < arg < 1e-6:
                arg.fill_(0.01)  # a learning rate: with that of the examples nothing would change
        if self.change is not None:
            self.change(args)
        return args

    def run(self, order: str | None, seed: int = 0, within: Callable[..., AbstractContextManager] = checked) -> Outcome:
        """Results, gradients and changed arguments, by our kernels in the checked interpreter, or `within` what runs
        them instead; without an order in the plain one. Empty where the backend refuses the arguments."""
        with self.smaller(), within(order, seed) if order else nullcontext():
            try:
                return _outcome(self.op, self.backend, self.arguments())
            except Unsupported:
                return {}

    def reference(self, double: bool) -> Outcome:
        """The same by the reference, in float64 if `double`."""
        args = self.arguments()
        with self.smaller():
            return _outcome(self.op, self.op.backends[-1], _as_double(args) if double else args)

    @contextmanager
    def smaller(self) -> Iterator[None]:
        """Inside, constants are as small as the case wants them."""
        with ExitStack() as stack:
            for name, value in self.small:
                stack.enter_context(mock.patch(f"{_KERNELS}.{name}", value))
            yield

    def judge(self, outcome: Outcome) -> None:
        """AssertionError unless the outcome is as good as the reference's: by the rule of `proof.py`, but for single
        numbers, whose error is a matter of chance, products, which are rounded once, and casts, which are exact."""
        if not self.judged:
            return
        same, exact = self.reference(False), self.reference(True)
        assert outcome.keys() <= same.keys()
        if self.op.name in _CASTS:
            torch.testing.assert_close(*({n: t.float() for n, t in of.items()} for of in (outcome, same)), **_EQUAL)
        for name, mine in outcome.items():
            title = f"{self.name}: {name}"
            if mine.dim() == 0:
                bound = _SCALAR * torch.finfo(torch.float32).eps * (1 + exact[name].abs())
                assert (mine - exact[name]).abs() <= bound, f"{title} is {mine:.9g}, but should be {exact[name]:.9g}"
            elif mine.dtype == torch.float32 and self.dtype == torch.float16 and self.op.name == "attention":
                # Sums over what the tensor cores take in 16 bits: as exact as these.
                assert_as_good(mine.half(), same[name].half(), exact[name], title)
            else:
                assert_as_good(mine, same[name], exact[name], title)
        if self.op.name == "mlp" and self.backend.name == "epilogue" and outcome:
            _rounded_once(outcome["result 1"], exact["result 1"])


def same_bits(one: Outcome, other: Outcome) -> bool:
    """Whether two outcomes are equal, NaN included."""
    return one.keys() == other.keys() and all(torch.equal(_bits(one[name]), _bits(other[name])) for name in one)


def _bits(values: Tensor) -> Tensor:
    return values.detach().contiguous().flatten().view(torch.uint8)


def _rounded_once(product: Tensor, exact: Tensor) -> None:
    """AssertionError unless every element of a 16-bit product of the size of 1 is the exact one, rounded: at most half
    a unit in the last place off, and what sums in float32 lose. Sums in float16 lose fifty times that."""
    kind = torch.finfo(product.dtype)
    unit = kind.eps * 2.0 ** exact.abs().clamp(min=kind.smallest_normal).log2().floor()
    lost = ((product.double() - exact).abs() - 0.5 * unit).max()
    assert lost <= 1e-5, f"an element of a product lost {lost:.3g} before it was rounded"


def _as_double(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_double(item) for item in value]
    if isinstance(value, torch.dtype):
        return torch.float64
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def _outcome(op: Op, backend: Backend, args: list[Any]) -> Outcome:
    results = op.run_on(backend, *args)
    results = results if isinstance(results, tuple) else (results,)
    outcome = {f"result {i}": result.detach() for i, result in enumerate(results) if isinstance(result, Tensor)}
    ends = [result for result in results if isinstance(result, Tensor) and result.requires_grad]
    if ends:
        generator = torch.Generator().manual_seed(1)
        incoming = [torch.randn(end.shape, generator=generator).half().to(end.dtype) for end in ends]
        torch.autograd.backward(ends, incoming)
        outcome |= {f"gradient of argument {i}": arg.grad for i, arg in enumerate(args) if _has_gradient(arg)}
    for i, arg in enumerate(args):
        if isinstance(arg, list) or (isinstance(arg, Tensor) and arg.dim() == 0):  # what updates change
            tensors = arg if isinstance(arg, list) else [arg]
            outcome |= {f"argument {i}.{j}": t for j, t in enumerate(tensors) if isinstance(t, Tensor)}
    return outcome


def _has_gradient(arg: Any) -> bool:
    return isinstance(arg, Tensor) and arg.grad is not None


# ---- what the examples at a few elements do not reach ----------------------------------------------------------------


def _skipping(args: list[Any]) -> None:
    """The step is skipped."""
    scalars = [arg for arg in args if isinstance(arg, Tensor) and arg.dim() == 0]
    scalars[-1].fill_(1.0)  # found_inf, the last of them


def _skewed(args: list[Any]) -> None:
    """Tensors that begin one element after an address for 128 bits."""
    for arg in args:
        if isinstance(arg, list):
            arg[:] = [torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape) for t in arg]


def _no_such_label(args: list[Any]) -> None:
    labels = [arg for arg in args if isinstance(arg, Tensor) and arg.dtype == torch.int64]
    labels[0][1], labels[1][2] = -1, 1_000_000


def _no_gradients(args: list[Any]) -> None:
    """No backward will follow."""
    args[-1] = False
    for i, arg in enumerate(args):
        if isinstance(arg, Tensor) and arg.requires_grad:
            args[i] = arg.detach()


def _not_finite(args: list[Any]) -> None:
    """A row and a column of zeros, one with an Inf and one with a NaN."""
    first = args[0]
    first[0], first[:, 0], first[1, 1], first[2, 2] = 0, 0, torch.inf, torch.nan


def _largest(args: list[Any]) -> None:
    """A row and a column whose largest element is that of e4m3."""
    args[0][0, 0] = LARGEST


def _boxes_across_tiles(args: list[Any]) -> None:
    """Boxes to mix, then boxes to erase, that begin and end inside tiles and runs of pixels, or cover everything."""
    height, width = args[0].shape[1:3]
    everything, inside = [0, 0, height, width], [1, 3, height - 2, width - 5]
    across = [height // 4, 0, height - 4, width]
    mixed, *erased = (arg for arg in args if isinstance(arg, Tensor) and arg.shape[1:] == (4,))
    mixed[:] = torch.tensor([inside, across, everything])
    for boxes in erased:
        boxes[:] = torch.tensor([across, everything, inside])


_THREE_CHUNKS = replace(FEW, name="198 tokens", tokens=198, dim=24)
_TWO_CHUNKS = replace(FEW, name="65 tokens", tokens=65, dim=32, batch=2)
_ONLINE = replace(FEW, name="300 tokens", tokens=300, dim=24, batch=1)
_LOOPS = replace(FEW, name="21 rows", tokens=7, dim=300, hidden=600)
_DEEP = {
    depth: replace(FEW, name=f"depth {depth}", batch=1, tokens=130, dim=depth, hidden=136) for depth in (65, 72, 768)
}
_MANY_ROWS = replace(FEW, name="1160 rows", batch=8, tokens=145, dim=65, hidden=140)
_CLASSES = replace(FEW, name="8200 classes", classes=8200)
_MANY_SAMPLES = replace(FEW, name="11 samples", batch=11)
_PICTURES = replace(FEW, name="32 x 48", image=(32, 48), patch=16)
_TINY_PATCHES = replace(FEW, name="30 x 42", image=(30, 42), patch=6)
_CHUNKS = replace(FEW, name="aligned chunks", dim=40, hidden=208)
_ODD_CHUNKS = replace(FEW, name="odd chunks", dim=41, hidden=203)
_FP32, _FP16 = torch.float32, torch.float16
_BOTH = _FP32, _FP16

_MORE: tuple[tuple[str, Sizes, tuple[torch.dtype, ...], dict[str, Any]], ...] = (
    # op or op/backend, sizes, dtypes, what else the case has
    ("attention", _THREE_CHUNKS, (_FP16,), {}),
    ("attention", _TWO_CHUNKS, _BOTH, {}),
    ("attention/triton", _ONLINE, (_FP16,), {}),
    ("query_attention", _THREE_CHUNKS, _BOTH, {}),
    ("query_attention", _ONLINE, (_FP16,), {}),
    ("add_layer_norm", _LOOPS, _BOTH, {"small": (("layer_norm.fused._PROGRAMS", 2),)}),
    ("layer_norm", _LOOPS, _BOTH, {"small": (("layer_norm.fused._PROGRAMS", 2),)}),
    ("add_rms_norm", _LOOPS, _BOTH, {"small": (("rms_norm._PROGRAMS", 2),)}),
    ("rms_norm", _LOOPS, _BOTH, {"small": (("rms_norm._PROGRAMS", 2),)}),
    ("qk_norm_rope", _LOOPS, _BOTH, {"small": (("qk_norm_rope._PROGRAMS", 2), ("_rows.ELEMENTS", 1024))}),
    ("swiglu", _LOOPS, _BOTH, {}),
    ("mlp", _LOOPS, _BOTH, {"small": (("mlp.gelu._PROGRAMS", 2),)}),
    *((op, _LOOPS, _BOTH, {}) for op in (*_CASTS, "fp8_gelu")),
    ("fp8_gelu_gradient", _LOOPS, _BOTH, {"small": (("fp8.gelu._PROGRAMS", 2),)}),
    *((op, FEW, _BOTH, {"change": _not_finite}) for op in (*_CASTS, "fp8_gelu", "fp8_gelu_gradient")),
    *((op, FEW, _BOTH, {"change": _largest}) for op in _CASTS),
    ("layer_norm_mlp/triton", _LOOPS, (_FP32,), {"small": (("layer_norm.fused._PROGRAMS", 2),)}),
    *(("mlp/epilogue", sizes, (_FP16,), {}) for sizes in (*_DEEP.values(), _MANY_ROWS)),
    ("distillation_loss", _CLASSES, _BOTH, {}),
    ("distillation_loss", _MANY_SAMPLES, (_FP32,), {"small": (("_loss._ELEMENTS", 4),)}),
    ("distillation_loss", FEW, (_FP32,), {"change": _no_such_label, "judged": False}),
    ("distillation_loss", FEW, (_FP32,), {"change": _no_gradients}),
    ("cosub_loss", _CLASSES, _BOTH, {}),
    ("cosub_loss", _MANY_SAMPLES, (_FP32,), {"small": (("_loss._ELEMENTS", 4),)}),
    ("cosub_loss", FEW, (_FP32,), {"change": _no_such_label, "judged": False}),
    ("cosub_loss", FEW, (_FP32,), {"change": _no_gradients}),
    *((op, sizes, _BOTH, {}) for op in ("pixels", "patchify") for sizes in (_PICTURES, _TINY_PATCHES)),
    ("pixels", _PICTURES, (_FP16,), {"change": _boxes_across_tiles}),
    ("patchify", _PICTURES, (_FP16,), {"change": _boxes_across_tiles}),
    *(
        (op, sizes, (_FP16,), {"small": (("optimizer.lamb._ADDED", 1),)})
        for op in ("fused_adamw", "fused_lamb", "fused_sgd")
        for sizes in (_CHUNKS, _ODD_CHUNKS)
    ),
    *((op, FEW, (_FP16,), {"change": _skewed}) for op in ("fused_adamw", "fused_lamb", "fused_sgd")),
    *((op, FEW, (_FP16,), {"change": _skipping}) for op in ("fused_adamw", "fused_lamb", "fused_sgd")),
    *(
        (op, FEW, (_FP32,), {"small": (("optimizer._update.host_may_look", lambda flag: False),)})
        for op in ("fused_adamw", "fused_lamb", "fused_sgd")
    ),
    *(("global_norm", sizes, _BOTH, {"small": (("optimizer.norm._ADDED", 2),)}) for sizes in (_CHUNKS, _ODD_CHUNKS)),
)


def _applies(case: CheckedCase) -> bool:
    """Whether the example has what the case would change."""
    args = replace(case, change=None).arguments()
    if case.change is _boxes_across_tiles:
        return any(isinstance(arg, Tensor) and arg.shape[1:] == (4,) for arg in args)
    return case.change is not _skipping or args[-4] is not None  # found_inf


@cache
def every_case() -> dict[str, CheckedCase]:
    """All cases by name."""
    found = {}
    for name, backend in backends():
        op = OPS[name]
        forms = [(FEW, dtype, {}) for dtype in _BOTH]
        forms += [
            (sizes, dtype, others)
            for wanted, sizes, dtypes, others in _MORE
            if wanted in (name, f"{name}/{backend.name}")
            for dtype in dtypes
        ]
        for sizes, dtype, others in forms:
            for example in op.examples:
                case = CheckedCase(op, backend, example, sizes, dtype, **others)
                if _applies(case):
                    found[case.name] = case
    return found


@cache
def quick_cases() -> dict[str, CheckedCase]:
    """The first example of every backend, at a few elements, in the first dtype that it takes."""
    chosen = {}
    for case in every_case().values():
        halves = case.backend.name in ("epilogue", "fused_backward")
        if case.sizes is FEW and case.change is None and not case.small and halves == (case.dtype == torch.float16):
            chosen.setdefault((case.op.name, case.backend.name), case)
    return {case.name: case for case in chosen.values()}
