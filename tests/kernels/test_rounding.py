"""Normal data: the worst error is at most twice that of torch and one rounding."""

import pytest
import torch
from dtypes import FLOATS

import matmul_grad
from matmul_grad.testing import (
    LAYOUTS,
    SHORT,
    Case,
    assert_same_bits,
    assert_within_budget,
    cases,
    normal,
    operands,
    worst_error,
)

pytestmark = pytest.mark.usefixtures("strict")

LONG = [(3, 5, 1000), (8, 8, 1000), (3, 5, 4096), (16, 16, 4096), (1, 1, 20000), (4, 6, 20000), (7, 3, 20000)]


def assert_product_within_budget(case: Case) -> None:
    """The product that ``case`` names, of normal operands, by autograd where it is a gradient."""
    a, b = operands(case)
    if case.product == "forward":
        assert_within_budget(matmul_grad.mm(a, b), a, b, case.id)
        return
    c = matmul_grad.mm(a.requires_grad_(), b.requires_grad_())
    grad = normal(*c.shape, case.dtype, seed=3)
    (actual,) = torch.autograd.grad(c, a if case.product == "dgrad" else b, grad)
    factors = (grad, b.detach().t()) if case.product == "dgrad" else (a.detach().t(), grad)
    assert_within_budget(actual, *factors, case.id)


@pytest.mark.pairwise
@pytest.mark.parametrize("case", [*cases(("f32", "f64"))], ids=lambda case: case.id)
def test_table(case: Case) -> None:
    assert_product_within_budget(case)


@pytest.mark.parametrize("case", [*cases(("f32", "f64"), shapes=LONG, products=("forward",))], ids=lambda case: case.id)
def test_long_sums(case: Case) -> None:
    assert_product_within_budget(case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("product", ["dgrad", "wgrad"])
def test_long_sums_in_gradients(product: str, dtype: torch.dtype, layout: str) -> None:
    """dgrad sums over n, wgrad over m."""
    m, n, k = (5, 20000, 3) if product == "dgrad" else (20000, 5, 3)
    assert_product_within_budget(Case(product, dtype, layout, m, n, k))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40], ids=["small", "large"])
def test_scaling_by_a_power_of_two_changes_no_digit(scale: float, dtype: torch.dtype) -> None:
    a, b = normal(13, 500, dtype, seed=1), normal(500, 70, dtype, seed=2)
    assert_same_bits(matmul_grad.mm(a * scale, b), matmul_grad.mm(a, b) * scale)


@pytest.mark.parametrize("dtype", FLOATS)
def test_cancellation_loses_no_more_than_the_sum_of_magnitudes_says(dtype: torch.dtype) -> None:
    """[x, -x] · [y, y]ᵀ is zero in truth; the error stays below k roundings of Σ|x·y|, each halved twice over."""
    x, y = normal(9, 300, dtype, seed=1), normal(300, 70, dtype, seed=2)
    a, b = torch.cat([x, -x], 1), torch.cat([y, y], 0)
    bound = 600 * torch.finfo(dtype).eps / 2 * float((a.abs() @ b.abs()).max())
    error = worst_error(matmul_grad.mm(a, b), a, b)
    assert error <= bound / 4, f"{SHORT[dtype]}: {error:.3e} > {bound / 4:.3e}"
