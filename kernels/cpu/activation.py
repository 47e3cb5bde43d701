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
from typing import Any

from llvmlite import ir

from .elementary import Lanes, normal, sigmoids, tanh
from .gemm_args import ACTIVATIONS
from .simd import I64, Vector

SLOPE = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715 * SLOPE
SATURATED = 100.0  # σ(w(x)) is 0 or 1 from here on, and w'(x) still finite


Both = tuple[Lanes, Lanes]  # an activation and its derivative, of the argument


def _relu(x: Lanes) -> Lanes:
    return x.number(0.0).where(x.compare("<=", 0.0), x)


def _gelu(x: Lanes) -> Both:
    distribution, density = normal(x)
    return x * distribution, x.times_plus(density, distribution)


def _gelu_tanh(x: Lanes) -> Both:
    near = x.clamped(-SATURATED, SATURATED)
    square = near * near
    this, other = sigmoids(near * square.times_plus(CUBIC, SLOPE))
    return x * this, x.times_plus(this * other * square.times_plus(3 * CUBIC, SLOPE), this)


def _silu(x: Lanes) -> Both:
    this, other = sigmoids(x)
    return x * this, x.times_plus(this * other, this)


def _tanh(x: Lanes) -> Both:
    y = tanh(x)
    return y, _tanh_derivative(y)


def _tanh_derivative(y: Lanes) -> Lanes:
    return 1.0 - y * y


def _relu_gradient(grad: Lanes, y: Lanes) -> Lanes:
    """Selected, and so 0 for y ≤ 0 where grad is NaN or infinite too."""
    return y.number(0.0).where(y.compare("<=", 0.0), grad)


def _value(both: Callable[[Lanes], Both]) -> Callable[[Lanes], Lanes]:
    return lambda x: both(x)[0]


def _times(both: Callable[[Lanes], Both]) -> Callable[..., tuple[Lanes]]:
    return lambda grad, x: (grad * both(x)[1],)


def _gated(both: Callable[[Lanes], Both]) -> Callable[..., Both]:
    def gradients(grad: Lanes, gate: Lanes, value: Lanes) -> Both:
        activated, derivative = both(gate)
        return grad * value * derivative, grad * activated

    return gradients


def _gated_relu(grad: Lanes, gate: Lanes, value: Lanes) -> Both:
    return _relu_gradient(grad * value, gate), grad * _relu(gate)


FORWARD: dict[str, Callable[..., Lanes]] = {
    "relu": _relu, "gelu": _value(_gelu), "gelu_tanh": _value(_gelu_tanh), "silu": _value(_silu), "tanh": tanh,
}  # fmt: skip
# Of the gradient of the result, and of the argument, or of the result for those of BY_RESULT.
GRADIENT: dict[str, Callable[..., tuple[Lanes, ...]]] = {
    "relu": lambda grad, y: (_relu_gradient(grad, y),), "gelu": _times(_gelu), "gelu_tanh": _times(_gelu_tanh),
    "silu": _times(_silu), "tanh": lambda grad, y: (grad * _tanh_derivative(y),),
}  # fmt: skip
# Of the gradient of activation(gate) · value, of gate and of value: the gradients of both.
GATED_GRADIENT: dict[str, Callable[..., tuple[Lanes, ...]]] = {
    "relu": _gated_relu, "gelu": _gated(_gelu), "gelu_tanh": _gated(_gelu_tanh), "silu": _gated(_silu),
    "tanh": _gated(_tanh),
}  # fmt: skip


def by_name(
    builder: ir.IRBuilder,
    vector: Vector,
    activation: ir.Value,
    functions: dict[str, Callable[..., tuple[Lanes, ...]]],
    *values: ir.Value,
) -> list[ir.Value]:
    """What the function that an index of ACTIVATIONS names makes of ``values``; the first value for any other index."""
    operands = [Lanes(builder, vector, value) for value in values]
    before, results = builder.block, []

    def one(function: Callable[..., tuple[Lanes, ...]]) -> None:
        results.append(([made.value for made in function(*operands)], builder.block))

    cases(builder, activation, functions, one)
    found = []
    for index in range(len(results[0][0])):
        result = builder.phi(vector.type)
        for made, block in [([values[0]] * (index + 1), before), *results]:
            result.add_incoming(made[index], block)
        found.append(result)
    return found


def cases(
    builder: ir.IRBuilder,
    activation: ir.Value,
    functions: dict[str, Callable[..., Any]],
    emit: Callable[[Callable[..., Any]], None],
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
