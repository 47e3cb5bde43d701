"""The activations of an epilogue, of sums in float32 or float64, applied before the one rounding.

| name      | result                                       |
|-----------|----------------------------------------------|
| relu      | max(x, 0)                                    |
| gelu      | x * P(x), P the normal distribution          |
| gelu_tanh | x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)) |
| silu      | x * sigmoid(x)                               |
| tanh      | tanh(x)                                      |

P(-a sqrt(2)) = exp(-a^2) s p(s - 1/4) / 2 with s = 1 / (a + 2), and P(x) = 1 - P(-x); tanh(x) = x + x^3 p(x^2) where
|x| < 0.625, else 1 - 2 / (exp(2 x) + 1). Of float64 P(x) is (1 + erf) / 2 of Triton's library, and tanh has the second
form alone: both cancel where the result is small. No library is called for float32, since a kernel that does flushes
denormals in its products too. NaN stays NaN.
"""

import math

import triton
import triton.language as tl

# exp(a^2) erfc(a) / s of s - 1/4, from the constant coefficient up: "erfc" of docs/tools/polynomials.py.
TAIL = tl.constexpr(
    (1.02158272, 2.74864292, 4.47155094, 2.33226204, -5.50605726, -6.63050318, 12.5980673, 13.5720301, -40.916378,
     -8.517272, 102.144524, -77.4045334)
)  # fmt: skip
TERMS = tl.constexpr(len(TAIL.value))
# (tanh(x) / x - 1) / x^2 of x^2, below TANH_LIMIT: "tanh" there.
TANH = tl.constexpr((-0.333333343, 0.133333042, -0.0539592579, 0.0217689183, -0.00834394526, 0.00229274482))
TANH_TERMS = tl.constexpr(len(TANH.value))
TANH_LIMIT = tl.constexpr(0.625)
HALF_SQRT2 = tl.constexpr(math.sqrt(0.5))
SLOPE = tl.constexpr(2 * math.sqrt(2 / math.pi))
CUBIC = tl.constexpr(0.044715 * 2 * math.sqrt(2 / math.pi))


@triton.jit
def normal_distribution(x):
    """P(x), without the cancellation that 1 + erf has where x is negative, but of float64."""
    if x.dtype == tl.float64:
        result = 0.5 + tl.erf(x * HALF_SQRT2) * 0.5
    else:
        s = 1 / (tl.abs(x) * HALF_SQRT2 + 2)
        v = s - 0.25
        p = v * TAIL[TERMS - 1] + TAIL[TERMS - 2]
        for index in tl.static_range(2, TERMS):
            p = p * v + TAIL[TERMS - 1 - index]
        tail = tl.exp(x * x * -0.5) * s * p * 0.5
        result = tl.where(x < 0, tail, 1 - tail)
    return result


@triton.jit
def tanh(x):
    result = 1 - 2 / (tl.exp(x + x) + 1)
    if x.dtype != tl.float64:
        square = x * x
        p = square * TANH[TANH_TERMS - 1] + TANH[TANH_TERMS - 2]
        for index in tl.static_range(2, TANH_TERMS):
            p = p * square + TANH[TANH_TERMS - 1 - index]
        result = tl.where(tl.abs(x) < TANH_LIMIT, x + x * square * p, result)
    return result


@triton.jit
def activate(x, NAME: tl.constexpr):
    """The activation of this name; x where it is None."""
    if NAME == "relu":
        x = tl.where(x <= 0, 0.0, x)
    elif NAME == "gelu":
        x = x * normal_distribution(x)
    elif NAME == "gelu_tanh":
        x = x * tl.sigmoid(x * (x * x * CUBIC + SLOPE))
    elif NAME == "silu":
        x = x * tl.sigmoid(x)
    elif NAME == "tanh":
        x = tanh(x)
    return x
