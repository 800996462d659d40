"""The GELU of `gelu.py` for CuTe DSL: activations that QuACK's products take into their epilogues.

The arithmetic is written once, for whatever has +, * and a way to cut to a range: numbers of CuTe DSL here, tensors in
the tests. In 16 bit its error is that of `gelu.py`, at half the instructions of an erf (docs/log.md).
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

_POLYNOMIAL = (
    3.733903283510943e-11,
    -3.902406134727658e-09,
    1.7968836266570816e-07,
    -4.8397320720282976e-06,
    8.567648957943049e-05,
    -0.0010648837710383252,
    0.009683261288078357,
    -0.06615927179832615,
    0.3988250001453334,
)
"""As in `gelu.normal_distribution`, the highest power first; the tests hold one against the other."""
NAME = f"fastdeit_gelu_{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]}"
"""What QuACK knows it as. Its cache on disk goes by names where a package is installed: other code has another one."""
_END = 4.4
_DENSITY, _EXPONENT = 0.3989422804014327, -0.7213475204444817


def distribution(x: Any, cut: Callable[[Any, float], Any]) -> Any:
    """Phi(x); `cut(x, end)` is x cut to [-end, end]."""
    c = cut(x, _END)
    u = c * c
    p = u * _POLYNOMIAL[0] + _POLYNOMIAL[1]
    for coefficient in _POLYNOMIAL[2:]:
        p = p * u + coefficient
    return c * p + 0.5


def value_and_gradient(x: Any, dout: Any, cut: Callable[[Any, float], Any], exp2: Callable[[Any], Any]) -> Any:
    """(dout * gelu'(x), gelu(x))"""
    phi = distribution(x, cut)
    density = exp2(x * x * _EXPONENT) * _DENSITY
    return dout * (x * density + phi), x * phi


def register(activation: Any) -> None:
    """Enter both as `NAME` in the tables of QuACK's module `activation`. It gives them one number, or two neighbouring
    ones."""
    import cutlass.cute as cute
    from cutlass.cutlass_dsl import dsl_user_op

    def cut(x: Any, end: float) -> Any:
        return cute.arch.fmin(cute.arch.fmax(x, -end), end)

    def exp2(x: Any) -> Any:
        return cute.math.exp2(x, fastmath=True)

    @dsl_user_op
    def gelu(x: Any, *, loc: Any = None, ip: Any = None) -> Any:
        if isinstance(x, tuple):
            return tuple(part * distribution(part, cut) for part in x)
        return x * distribution(x, cut)

    @dsl_user_op
    def gelu_gradient(x: Any, dout: Any, *, loc: Any = None, ip: Any = None) -> Any:
        if isinstance(x, tuple):
            pairs = [value_and_gradient(*parts, cut, exp2) for parts in zip(x, dout, strict=True)]
            return tuple(zip(*pairs, strict=True))
        return value_and_gradient(x, dout, cut, exp2)

    activation.act_fn_map[NAME], activation.dact_fn_map[NAME] = gelu, gelu_gradient
