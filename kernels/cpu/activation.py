"""Activations and their derivatives, of whole vectors.

| name      | y           | derivative, of the argument x or of y |
|-----------|-------------|---------------------------------------|
| relu      | max(x, 0)   | 1 where y > 0, else 0                 |
| gelu      | x · Φ(x)    | Φ(x) + x · φ(x)                       |
| gelu_tanh | x · σ(w(x)) | σ(w) + x · (σ(w) · σ(-w) · w'(x))     |
| silu      | x · σ(x)    | σ(x) + x · (σ(x) · σ(-x))             |
| tanh      | tanh(x)     | 1 - y²                                |

Φ and φ are the normal distribution and its density, w(x) = 2·√(2/π) · (x + 0.044715·x³), and σ(w) = 1 / (1 + exp(-w)) =
(1 + tanh(w / 2)) / 2. NaN stays NaN; of ±∞ the values are torch's, NaN among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from llvmlite import ir

from .elementary import Lanes, normal, sigmoids, tanh
from .gemm_args import ACTIVATIONS
from .simd import I64, Vector

SLOPE = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715 * SLOPE
SATURATED = 100.0  # σ(w(x)) is 0 or 1 from here on, and w'(x) still finite


def _relu(x: Lanes) -> Lanes:
    return x.number(0.0).where(x.compare("<=", 0.0), x)


def _gelu(x: Lanes) -> Lanes:
    return x * normal(x)[0]


def _gelu_tanh(x: Lanes) -> Lanes:
    return x * sigmoids(_cubic(x.clamped(-SATURATED, SATURATED)))[0]


def _cubic(x: Lanes) -> Lanes:
    return x * (x * x).times_plus(CUBIC, SLOPE)


def _silu(x: Lanes) -> Lanes:
    return x * sigmoids(x)[0]


def _relu_gradient(grad: Lanes, y: Lanes) -> Lanes:
    """Selected, and so 0 for y ≤ 0 where grad is NaN or infinite too."""
    return y.number(0.0).where(y.compare("<=", 0.0), grad)


def _gelu_derivative(x: Lanes) -> Lanes:
    distribution, density = normal(x)
    return x.times_plus(density, distribution)


def _gelu_tanh_derivative(x: Lanes) -> Lanes:
    near = x.clamped(-SATURATED, SATURATED)
    this, other = sigmoids(_cubic(near))
    return x.times_plus(this * other * (near * near).times_plus(3 * CUBIC, SLOPE), this)


def _silu_derivative(x: Lanes) -> Lanes:
    this, other = sigmoids(x)
    return x.times_plus(this * other, this)


def _tanh_derivative(y: Lanes) -> Lanes:
    return 1.0 - y * y


def _times(derivative: Callable[[Lanes], Lanes]) -> Callable[[Lanes, Lanes], Lanes]:
    return lambda grad, known: grad * derivative(known)


FORWARD: dict[str, Callable[..., Lanes]] = {
    "relu": _relu, "gelu": _gelu, "gelu_tanh": _gelu_tanh, "silu": _silu, "tanh": tanh,
}  # fmt: skip
# Of the gradient of the result, and of the argument, or of the result for those of BY_RESULT.
GRADIENT: dict[str, Callable[..., Lanes]] = {
    "relu": _relu_gradient, "gelu": _times(_gelu_derivative), "gelu_tanh": _times(_gelu_tanh_derivative),
    "silu": _times(_silu_derivative), "tanh": _times(_tanh_derivative),
}  # fmt: skip


def by_name(
    builder: ir.IRBuilder, vector: Vector, activation: ir.Value, functions: dict[str, Callable[..., Lanes]], *values
) -> ir.Value:
    """The function of ``values`` that an index of ACTIVATIONS names; the first value for any other index."""
    operands, results = [Lanes(builder, vector, value) for value in values], [(values[0], builder.block)]

    def one(function: Callable[..., Lanes]) -> None:
        value = function(*operands).value
        results.append((value, builder.block))

    cases(builder, activation, functions, one)
    result = builder.phi(vector.type)
    for value, block in results:
        result.add_incoming(value, block)
    return result


def cases(
    builder: ir.IRBuilder,
    activation: ir.Value,
    functions: dict[str, Callable[..., Lanes]],
    emit: Callable[[Callable[..., Lanes]], None],
) -> None:
    """``emit`` for the function that an index of ACTIVATIONS names; nothing for any other index."""
    done = builder.append_basic_block("done")
    choice = builder.switch(activation, done)
    for name, function in functions.items():
        block = builder.append_basic_block(name)
        choice.add_case(I64(ACTIVATIONS.index(name)), block)
        builder.position_at_end(block)
        emit(function)
        builder.branch(done)
    builder.position_at_end(done)
