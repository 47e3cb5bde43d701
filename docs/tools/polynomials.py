"""The coefficients in kernels/cpu/polynomials.py, fitted with 60 digits: `python docs/tools/polynomials.py` prints.

Each is a polynomial through the Chebyshev nodes of its interval, of which the error is within a small factor of the
least one, and the degree the lowest whose error is far below a rounding of the result.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import mpmath

DIGITS = 60
TERMS = {
    "float32": {"exp": 6, "tanh": 6, "erf": 7, "erfc": 12},
    "float64": {"exp": 10, "tanh": 12, "erf": 13, "erfc": 28},
}
TANH_LIMIT, ERF_LIMIT = "0.625", 1  # up to which tanh and erf are odd polynomials
ERFC_SHIFT = 2
LONGEST = 30  # exp(-a²) is 0 in float64 from a = 27.3 on


def exp_rest(r: Any) -> Any:
    """(exp(r) - 1 - r) / r²"""
    if abs(r) < mpmath.mpf(10) ** -12:
        return mpmath.mpf(1) / 2 + r / 6 + r * r / 24
    return (mpmath.expm1(r) - r) / r**2


def tanh_rest(t: Any) -> Any:
    """(tanh(x) / x - 1) / x² of t = x²"""
    x = mpmath.sqrt(t)
    return -mpmath.mpf(1) / 3 if t < mpmath.mpf(10) ** -25 else (mpmath.tanh(x) / x - 1) / t


def erf_rest(t: Any) -> Any:
    """erf(x) / x - 1 of t = x²"""
    x = mpmath.sqrt(t)
    return 2 / mpmath.sqrt(mpmath.pi) - 1 if t == 0 else mpmath.erf(x) / x - 1


def erfc_scaled(v: Any) -> Any:
    """exp(a²) · erfc(a) / s of v = s - 1/4, s = 1 / (a + 2)"""
    s = v + mpmath.mpf(1) / 4
    a = 1 / s - ERFC_SHIFT
    return mpmath.exp(a * a) * mpmath.erfc(a) / s


def intervals() -> dict[str, tuple[Callable[[Any], Any], Any, Any]]:
    half_ln2, quarter = mpmath.log(2) / 2, mpmath.mpf(1) / 4
    return {
        "exp": (exp_rest, -half_ln2, half_ln2),
        "tanh": (tanh_rest, mpmath.mpf(0), mpmath.mpf(TANH_LIMIT) ** 2),
        "erf": (erf_rest, mpmath.mpf(0), mpmath.mpf(ERF_LIMIT)),
        "erfc": (erfc_scaled, mpmath.mpf(1) / LONGEST - quarter, mpmath.mpf(1) / ERFC_SHIFT - quarter),
    }


def coefficients(dtype: str, name: str) -> tuple[float, ...]:
    """From the constant one up, each the nearest number of ``dtype``."""
    with mpmath.workdps(DIGITS):
        function, low, high = intervals()[name]
        numbers = [float(x) for x in reversed(mpmath.chebyfit(function, [low, high], TERMS[dtype][name]))]
    if dtype == "float32":
        kind = f"{len(numbers)}f"
        numbers = [float(f"{x:.9g}") for x in struct.unpack(kind, struct.pack(kind, *numbers))]
    return tuple(numbers)


def main() -> None:
    for dtype in TERMS:
        print(f'    "{dtype}": {{')
        for name in TERMS[dtype]:
            print(f'        "{name}": (')
            for x in coefficients(dtype, name):
                print(f"            {x!r},")
            print("        ),")
        print("    },")


if __name__ == "__main__":
    main()
