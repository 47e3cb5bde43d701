"""exp, tanh, erf and the normal distribution of whole vectors, within 2 units in the last place of the result.

    exp(x)   = 2ⁿ · (1 + r + r²·p(r))              n = x / ln 2 to the nearest integer, r = x - n · ln 2
    tanh(x)  = x + x³·p(x²)                        |x| < 0.625, else 1 - 2 / (exp(2x) + 1)
    erf(x)   = x + x·p(x²)                         |x| < 1, else 1 - erfc(x)
    erfc(x)  = exp(-x²) · s·p(s - 1/4)             x ≥ 0, s = 1 / (x + 2)

A lane has the same bits in vectors of any width, on all instruction sets with a fused multiply-add; where there is none
(generic) it is rounded twice, as in the products. NaN stays NaN, and the sign of 0 is kept. Results below the normal
numbers are rounded once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from llvmlite import ir

from .polynomials import POLYNOMIALS
from .simd import I32, I64, Vector

LN2 = Fraction("0.693147180559945309417232121458176568075500134360255254120680009493393622")
TANH_LIMIT, ERF_LIMIT = 0.625, 1.0  # below, tanh and erf are odd polynomials
INV_SQRT2, INV_SQRT_2PI = math.sqrt(0.5), 1 / math.sqrt(2 * math.pi)


@dataclass(frozen=True)
class Format:
    """Of a dtype: bits of the mantissa, bias of the exponent, the integer of its size, and where exp is 0 and ∞.

    ln2_bits: so many bits of ln 2 after the point make a first part whose product with n is exact.
    """

    mantissa: int
    bias: int
    integer: ir.IntType
    ln2_bits: int
    zero_below: float
    infinite_above: float


FORMATS = {
    "float32": Format(23, 127, I32, 16, -104.0, 89.0),
    "float64": Format(52, 1023, I64, 32, -746.0, 710.0),
}


@dataclass(frozen=True)
class Lanes:
    """The lanes of a vector as numbers: each operator is one instruction, rounded."""

    builder: ir.IRBuilder
    vector: Vector
    value: ir.Value

    def like(self, value: ir.Value) -> Lanes:
        return Lanes(self.builder, self.vector, value)

    def number(self, value: float) -> Lanes:
        return self.like(ir.Constant(self.vector.type, [self.vector.scalar(value)] * self.vector.lanes))

    def __add__(self, other: Lanes | float) -> Lanes:
        return self.like(self.builder.fadd(self.value, self._value(other)))

    def __sub__(self, other: Lanes | float) -> Lanes:
        return self.like(self.builder.fsub(self.value, self._value(other)))

    def __rsub__(self, other: float) -> Lanes:
        return self.number(other) - self

    def __mul__(self, other: Lanes | float) -> Lanes:
        return self.like(self.builder.fmul(self.value, self._value(other)))

    def __rtruediv__(self, other: float) -> Lanes:
        return self.number(other) / self

    def __truediv__(self, other: Lanes | float) -> Lanes:
        return self.like(self.builder.fdiv(self.value, self._value(other)))

    def times_plus(self, factor: Lanes | float, addend: Lanes | float) -> Lanes:
        """self · factor + addend, fused where the CPU does that."""
        return self.like(self.vector.fma(self.builder, self.value, self._value(factor), self._value(addend)))

    def _value(self, other: Lanes | float) -> ir.Value:
        return other.value if isinstance(other, Lanes) else self.number(other).value

    def compare(self, operator: str, other: Lanes | float) -> ir.Value:
        """False where either is NaN."""
        return self.builder.fcmp_ordered(operator, self.value, self._value(other))

    def where(self, condition: ir.Value, otherwise: Lanes | float) -> Lanes:
        return self.like(self.builder.select(condition, self.value, self._value(otherwise)))

    def clamped(self, low: float, high: float) -> Lanes:
        """NaN stays NaN."""
        raised = self.number(low).where(self.compare("<", low), self)
        return self.number(high).where(raised.compare(">", high), raised)

    def __abs__(self) -> Lanes:
        return self.from_bits(self.builder.and_(self.bits(), self.integer((1 << self.width - 1) - 1)))

    def with_sign_of(self, other: Lanes) -> Lanes:
        """Of a number that is not negative."""
        sign = self.builder.and_(other.bits(), self.integer(1 << self.width - 1))
        return self.from_bits(self.builder.or_(self.bits(), sign))

    @property
    def format(self) -> Format:
        return FORMATS[self.vector.dtype]

    @property
    def width(self) -> int:
        return self.format.integer.width

    def integer(self, value: int) -> ir.Constant:
        kind = self.format.integer
        return ir.Constant(ir.VectorType(kind, self.vector.lanes), [kind(value)] * self.vector.lanes)

    def bits(self) -> ir.Value:
        return self.builder.bitcast(self.value, ir.VectorType(self.format.integer, self.vector.lanes))

    def from_bits(self, bits: ir.Value) -> Lanes:
        return self.like(self.builder.bitcast(bits, self.vector.type))


def polynomial(name: str, x: Lanes) -> Lanes:
    *rest, result = (x.number(c) for c in POLYNOMIALS[x.vector.dtype][name])
    for coefficient in reversed(rest):
        result = result.times_plus(x, coefficient)
    return result


def exp(x: Lanes) -> Lanes:
    kind, builder = x.format, x.builder
    p, n = _exp_parts(x.clamped(kind.zero_below, kind.infinite_above))
    # 2ⁿ by two halves of n, since it may be below or above the normal numbers; n is made positive to be halved.
    half = builder.lshr(builder.add(n, x.integer(2 * kind.bias + 2)), x.integer(1))
    low = builder.sub(half, x.integer(1))
    rest = builder.add(builder.sub(n, half), x.integer(2 * kind.bias + 1))
    for exponent in (low, rest):
        p *= x.from_bits(builder.shl(exponent, x.integer(kind.mantissa)))
    return p


def exp_of_negative(x: Lanes) -> Lanes:
    """``exp`` of x ≤ 0, with its bits: 2ⁿ is 2ⁿ⁺⁶⁴, a normal number, times 2⁻⁶⁴."""
    kind, builder = x.format, x.builder
    p, n = _exp_parts(x.number(kind.zero_below).where(x.compare("<", kind.zero_below), x))
    exponent = builder.add(n, x.integer(kind.bias + 64))
    return p * x.from_bits(builder.shl(exponent, x.integer(kind.mantissa))) * 2.0**-64


def _exp_parts(x: Lanes) -> tuple[Lanes, ir.Value]:
    """exp(r) and the integer n of exp(x) = exp(r) · 2ⁿ."""
    kind, builder = x.format, x.builder
    shift = 1.5 * 2.0**kind.mantissa  # added to a number, it leaves the nearest integer in the lowest bits
    shifted = x.times_plus(1 / math.log(2), shift)
    n = shifted - shift
    high = Fraction(math.floor(LN2 * 2**kind.ln2_bits), 2**kind.ln2_bits)
    r = n.times_plus(-float(LN2 - high), n.times_plus(-float(high), x))
    p = (r * r).times_plus(polynomial("exp", r), r) + 1.0
    return p, builder.sub(shifted.bits(), x.number(shift).bits())


def tanh(x: Lanes) -> Lanes:
    a = abs(x)
    t = a * a
    small = a.times_plus(t * polynomial("tanh", t), a)
    large = 1.0 - 2.0 / (exp(a + a) + 1.0)
    return small.where(a.compare("<", TANH_LIMIT), large).with_sign_of(x)


def erf(x: Lanes) -> Lanes:
    a = abs(x)
    t = a * a
    small, large = a.times_plus(polynomial("erf", t), a), 1.0 - exp_of_negative(0.0 - t) * _erfc_scaled(a)
    return small.where(a.compare("<", ERF_LIMIT), large).with_sign_of(x)


def _erfc_scaled(x: Lanes) -> Lanes:
    """exp(x²) · erfc(x) of x ≥ 0"""
    s = 1.0 / (x + 2.0)
    return s * polynomial("erfc", s - 0.25)


def normal(x: Lanes) -> tuple[Lanes, Lanes]:
    """The normal distribution, (1 + erf(x / √2)) / 2 without the cancellation where x is negative, and its density."""
    a, half_square = abs(x) * INV_SQRT2, x * x * 0.5
    e = exp_of_negative(0.0 - half_square)
    tail = e * _erfc_scaled(a) * 0.5
    return tail.where(x.compare("<", 0.0), 1.0 - tail), e * INV_SQRT_2PI


def sigmoids(x: Lanes) -> tuple[Lanes, Lanes]:
    """1 / (1 + exp(-x)) and 1 / (1 + exp(x)), which add up to 1."""
    e, negative = exp_of_negative(0.0 - abs(x)), x.compare("<", 0.0)
    one, whole = x.number(1.0), e + 1.0
    return e.where(negative, one) / whole, one.where(negative, e) / whole
