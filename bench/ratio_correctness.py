"""A product is right before it is timed: every bit on integers, and some elements' errors on normal values.

`baseline.assert_correct` judges all elements of three products in float64, which takes longer than timing a large one.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import reference, testing
from . import baseline

ROWS, COLUMNS = 8, 64  # of a result on normal values are judged, spread over all of it

# The three layouts of a shape have the same values, and all dtypes the same integers.
normal = functools.lru_cache(maxsize=2)(testing.normal)
integers = functools.lru_cache(maxsize=2)(testing.integers)


def assert_product(mm: baseline.Mm, case: testing.Case) -> tuple[Tensor, Tensor]:
    """``mm`` multiplies as it should in this dtype, shape and layout; the normal operands that it was tried on."""
    x, y = testing.operands(case, integers)
    expected = whole_product(case.m, case.n, case.k).to(case.dtype)
    testing.assert_same_bits(mm(x, y), expected, f"{case.id}, integers")
    x, y = testing.operands(case, normal)
    assert_spread(mm(x, y), x, y, case.id)
    return x, y


@functools.lru_cache(maxsize=1)
def whole_product(m: int, n: int, k: int) -> Tensor:
    case = testing.Case("forward", torch.float64, "NN", m, n, k)
    return reference.forward(*testing.operands(case, testing.integers))


def assert_spread(result: Tensor, x: Tensor, y: Tensor, what: str) -> None:
    """The errors of up to ROWS × COLUMNS elements, corners among them."""
    rows = torch.linspace(0, len(x) - 1, min(ROWS, len(x))).long()
    columns = torch.linspace(0, y.shape[1] - 1, min(COLUMNS, y.shape[1])).long()
    baseline.assert_small_error(result[rows][:, columns], x[rows], y[:, columns], what)


def assert_step(mm: baseline.Mm, case: testing.Case) -> None:
    """Both gradients through autograd, every bit on integers."""
    whole = baseline.draw(case.m, case.n, case.k, case.dtype, values="integers")
    got = torch.autograd.grad(mm(*(x.requires_grad_() for x in whole[:2])), whole[:2], whole.grad)
    for name, gradient, expected in zip("ab", got, reference.gradients(*whole), strict=True):
        testing.assert_same_bits(gradient, expected.to(case.dtype), f"{case.id}, gradient of {name}, integers")
