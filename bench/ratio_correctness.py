"""A result of `cpu-ratio` is checked before it is timed: every bit on integers, some errors on normal values.

`correctness.assert_correct` judges all elements of three products, which takes longer than timing a large one.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import reference, testing
from . import baseline, correctness

# The three layouts of a shape have the same values, and all dtypes the same integers.
normal = functools.lru_cache(maxsize=2)(testing.normal)
integers = functools.lru_cache(maxsize=2)(testing.integers)


def assert_product(mm: baseline.Mm, case: testing.Case) -> tuple[Tensor, Tensor]:
    """``mm`` multiplies as it should in this dtype, shape and layout; the normal operands that it was tried on."""
    x, y = testing.operands(case, integers)
    expected = whole_product(case.m, case.n, case.k).to(case.dtype)
    testing.assert_same_bits(mm(x, y), expected, f"{case.id}, integers")
    x, y = testing.operands(case, normal)
    correctness.assert_close(mm(x, y), x, y, case.id)
    return x, y


@functools.lru_cache(maxsize=1)
def whole_product(m: int, n: int, k: int) -> Tensor:
    case = testing.Case("forward", torch.float64, "NN", m, n, k)
    return reference.forward(*testing.operands(case, testing.integers))


def assert_step(mm: baseline.Mm, case: testing.Case) -> None:
    """Both gradients through autograd, every bit on integers."""
    whole = baseline.draw(case.m, case.n, case.k, case.dtype, values="integers")
    got = torch.autograd.grad(mm(*(x.requires_grad_() for x in whole[:2])), whole[:2], whole.grad)
    for name, gradient, expected in zip("ab", got, reference.gradients(*whole), strict=True):
        testing.assert_same_bits(gradient, expected.to(case.dtype), f"{case.id}, gradient of {name}, integers")
