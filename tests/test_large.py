"""Thousands of rows and columns: C·t against A·(B·t), in integers, where both are exact."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import matmul_grad
from matmul_grad.testing import DTYPES, Case, assert_same_bits, integers, normal, operands

FLOATS = [pytest.param(DTYPES[name], id=name) for name in ("f32", "f64")]
SIZES = (2003, 2501, 2203)


@pytest.fixture(autouse=True)
def strict_on_two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with matmul_grad.strict():
        yield
    torch.set_num_threads(before)


def assert_product(c: Tensor, a: Tensor, b: Tensor, what: str) -> None:
    """Each row of C·t is that of A·(B·t); a wrong element goes unseen with odds of one in 9^4."""
    assert c.shape == (a.shape[0], b.shape[1])
    a, b, c = (x.to(torch.float64) for x in (a, b, c))  # sums stay below 2^53: exact
    t = integers(b.shape[1], 4, torch.float64, seed=9)
    assert_same_bits(c @ t, a @ (b @ t), what)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", ["NN", "TT"])
def test_forward(layout: str, dtype: torch.dtype) -> None:
    a, b = operands(Case("forward", dtype, layout, *SIZES), integers)
    assert_product(matmul_grad.mm(a, b), a, b, layout)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients(dtype: torch.dtype) -> None:
    a, b = operands(Case("wgrad", dtype, "NN", *SIZES), integers)
    grad = integers(SIZES[0], SIZES[1], dtype, seed=3)
    c = matmul_grad.mm(a.requires_grad_(), b.requires_grad_())
    da, db = torch.autograd.grad(c, (a, b), grad)
    assert_product(c.detach(), a.detach(), b.detach(), "forward")
    assert_product(da, grad, b.detach().t(), "dgrad")
    assert_product(db, a.detach().t(), grad, "wgrad")


@pytest.mark.parametrize("dtype", FLOATS)
def test_normal_data(dtype: torch.dtype) -> None:
    """Not exact: within the error that k roundings of a row of |A| · |B| · |t| allow."""
    m, n, k = SIZES
    a, b, t = normal(m, k, dtype, seed=1), normal(k, n, dtype, seed=2), normal(n, 1, torch.float64, seed=9)
    wide_a, wide_b = a.to(torch.float64), b.to(torch.float64)
    difference = matmul_grad.mm(a, b).to(torch.float64) @ t - wide_a @ (wide_b @ t)
    allowed = torch.finfo(dtype).eps * k**0.5 * (wide_a.abs() @ (wide_b.abs() @ t.abs()))
    worst = float((difference.abs() / allowed).max())
    assert worst <= 1, f"{worst:.2f} of what is allowed"
