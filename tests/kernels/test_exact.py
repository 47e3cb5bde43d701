"""Small integers: every partial sum is exact, so each product must equal the exact one bit by bit."""

import itertools
import mmap
from collections.abc import Iterator

import pytest
import torch
from dtypes import ACCELERATED, EVERY, FLOATS
from torch import Tensor

import matmul_grad
from matmul_grad.testing import (
    SHAPES,
    STRIDINGS,
    Case,
    assert_same_bits,
    cases,
    exact_product,
    integers,
    lay_out,
    operands,
)

pytestmark = pytest.mark.usefixtures("strict")

NARROW = tuple(name for name in ("f16", "bf16") if name in ACCELERATED)
# Beyond the table: more than one block of rows, of columns and of k, and each way to split work between threads.
LARGER = ((700, 6, 400), (6, 700, 400), (415, 66, 769), (1, 7001, 3), (3, 7000, 2), (200, 200, 385))
STRIDED = ((1, 1, 1), (1, 5, 3), (7, 65, 9), (13, 33, 17), (5, 1, 9), (31, 130, 41), (70, 129, 65))
TABLE = [
    *cases(("f32", "f64")),
    *cases(("f32", "f64"), shapes=LARGER, layouts=("NN", "TT")),
    # 16 bits: the sums are exact in float32, and the one rounding at the store is that of the exact product.
    *cases(NARROW, shapes=(*SHAPES, *LARGER), layouts=("NN", "TT")),
]


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def product_of(case: Case) -> tuple[Tensor, Tensor]:
    """(what the package computes, what is exact) for the product that ``case`` names."""
    a, b = operands(case, integers)
    if case.product == "forward":
        return matmul_grad.mm(a, b), exact_product(a, b)
    c = matmul_grad.mm(a.requires_grad_(), b.requires_grad_())
    grad = integers(*c.shape, case.dtype, seed=3)
    wanted = a if case.product == "dgrad" else b
    (actual,) = torch.autograd.grad(c, wanted, grad)
    a, b = a.detach(), b.detach()
    return actual, exact_product(grad, b.t()) if case.product == "dgrad" else exact_product(a.t(), grad)


def assert_like_torch(a: Tensor, b: Tensor, what: str) -> None:
    """Equal to torch.mm where both are exact: the same numbers, the same infinities, NaN in the same places."""
    torch.testing.assert_close(
        matmul_grad.mm(a, b), torch.mm(a, b), rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


@pytest.mark.pairwise
@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.id)
def test_product_is_exact(case: Case, threads: int) -> None:
    actual, expected = product_of(case)
    assert actual.is_contiguous() or actual.t().is_contiguous()  # a gradient has its operand's order
    assert actual.is_contiguous() or case.product != "forward"
    assert_same_bits(actual, expected, f"{case.id}, {threads} threads")


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize("b_striding", STRIDINGS)
@pytest.mark.parametrize("a_striding", STRIDINGS)
def test_every_striding_is_read_as_it_is(a_striding: str, b_striding: str, dtype: torch.dtype, threads: int) -> None:
    for m, n, k in STRIDED:
        a = lay_out(integers(m, k, dtype, seed=1), a_striding)
        b = lay_out(integers(k, n, dtype, seed=2), b_striding)
        assert_same_bits(matmul_grad.mm(a, b), exact_product(a, b), f"{m}x{n}x{k}")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("striding", STRIDINGS)
def test_gradients_take_every_striding_of_the_incoming_gradient(striding: str, dtype: torch.dtype) -> None:
    for m, n, k in STRIDED:
        a, b = integers(m, k, dtype, seed=1), integers(k, n, dtype, seed=2)
        grad = lay_out(integers(m, n, dtype, seed=3), striding)
        da, db = matmul_grad.mm_backward(grad, a, b)
        assert_same_bits(da, exact_product(grad, b.t()), f"dgrad {m}x{n}x{k}")
        assert_same_bits(db, exact_product(a.t(), grad), f"wgrad {m}x{n}x{k}")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("m,n", [(0, 0), (1, 1), (3, 5), (70, 130), (0, 4), (4, 0)])
def test_empty_sum_is_positive_zero(m: int, n: int, dtype: torch.dtype, threads: int) -> None:
    del threads
    for dirty in range(4):
        torch.full((m, n), float("nan"), dtype=dtype)  # what the allocator may hand out again
        c = matmul_grad.mm(torch.empty(m, 0, dtype=dtype), torch.empty(0, n, dtype=dtype))
        assert_same_bits(c, torch.zeros(m, n, dtype=dtype), f"k = 0, call {dirty}")


def test_memory_behind_a_negation_is_read_negated() -> None:
    a = torch.complex(integers(7, 5, torch.float64, seed=1), integers(7, 5, torch.float64, seed=2)).conj().imag
    b = integers(5, 3, torch.float64, seed=3)
    assert a.is_neg()
    assert_same_bits(matmul_grad.mm(a, b), exact_product(a, b))
    assert_same_bits(matmul_grad.mm(b.t(), a.t()), exact_product(b.t(), a.t()))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("m,n,k", [(1, 1, 1), (3, 2, 4), (7, 65, 9), (13, 130, 33), (70, 70, 400)])
def test_nan_and_infinity_propagate_as_in_torch(m: int, n: int, k: int, dtype: torch.dtype, threads: int) -> None:
    """In each corner and amid: a NaN or infinite element meets zeros too (0·Inf is NaN), and its row alone."""
    del threads
    a, b = integers(m, k, dtype, seed=1), integers(k, n, dtype, seed=2)
    clean = matmul_grad.mm(a, b)
    corners = itertools.product({0, m // 2, m - 1}, {0, k // 2, k - 1})
    for (i, p), value in itertools.product(corners, (float("nan"), float("inf"), -float("inf"))):
        touched = a.clone()
        touched[i, p] = value
        assert_like_torch(touched, b, f"a[{i}, {p}] = {value}")
        assert_like_torch(b.t(), touched.t(), f"b[{p}, {i}] = {value}")
        others = torch.arange(m) != i
        assert_same_bits(matmul_grad.mm(touched, b)[others], clean[others], f"rows beside a[{i}, {p}]")


@pytest.mark.parametrize("dtype", FLOATS)
def test_zero_times_infinity_is_not_skipped(dtype: torch.dtype) -> None:
    zeros, infinite = torch.zeros(5, 3, dtype=dtype), torch.full((3, 9), float("inf"), dtype=dtype)
    assert matmul_grad.mm(zeros, infinite).isnan().all()
    assert matmul_grad.mm(infinite.t(), zeros.t()).isnan().all()
    opposite = torch.tensor([[float("inf"), 1.0], [-float("inf"), 1.0]], dtype=dtype)
    assert matmul_grad.mm(torch.ones(1, 2, dtype=dtype), opposite).tolist()[0][1] == 2
    assert matmul_grad.mm(torch.ones(1, 2, dtype=dtype), opposite)[0, 0].isnan()


@pytest.mark.parametrize("dtype", FLOATS)
def test_products_beyond_the_largest_number_are_infinite(dtype: torch.dtype) -> None:
    largest = torch.full((2, 1), torch.finfo(dtype).max, dtype=dtype)
    assert matmul_grad.mm(largest, 2 * torch.ones(1, 70, dtype=dtype)).isposinf().all()
    assert matmul_grad.mm(largest, -2 * torch.ones(1, 70, dtype=dtype)).isneginf().all()


def sparse_memory(elements: int, dtype: torch.dtype) -> Tensor:
    """``elements`` zeros of address space; a page of it takes memory once it is written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        space = mmap.mmap(-1, elements * dtype.itemsize, flags=flags)
    except (OSError, OverflowError, ValueError) as error:
        pytest.skip(f"{elements} elements of address space are not to be had: {error}")
    return torch.frombuffer(space, dtype=dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows-far-apart", "columns-far-apart"])
@pytest.mark.parametrize("m,n,k", [(3, 5, 3), (3, 70, 3), (3, 3, 65)])
def test_strides_beyond_two_to_the_31(m: int, n: int, k: int, transposed: bool, dtype: torch.dtype) -> None:
    far = 2**31 + 16
    space = sparse_memory(2 * far + 4096, dtype)
    strides = (1, far) if transposed else (far, 1)

    def lay_far(values: Tensor) -> Tensor:
        shape = values.shape
        matrix = space.as_strided(shape, strides if min(shape) == shape[transposed] else strides[::-1])
        assert (matrix.shape[0] - 1) * matrix.stride(0) + (matrix.shape[1] - 1) * matrix.stride(1) > 2**32
        return matrix.copy_(values)

    a, b = integers(m, k, dtype, seed=1), integers(k, n, dtype, seed=2)
    expected = exact_product(a, b)
    assert_same_bits(matmul_grad.mm(lay_far(a), b), expected, "a")
    assert_same_bits(matmul_grad.mm(a, lay_far(b)), expected, "b")
    grad = integers(m, n, dtype, seed=3)
    far_grad = lay_far(grad)
    da, db = matmul_grad.mm_backward(far_grad, a, b)
    assert_same_bits(da, exact_product(grad, b.t()), "dgrad")
    assert_same_bits(db, exact_product(a.t(), grad), "wgrad")


@pytest.mark.parametrize("dtype", FLOATS)
def test_sizes_are_64_bits_wide(dtype: torch.dtype) -> None:
    many = 2**33 + 3
    wide, tall = torch.empty(0, many, dtype=dtype), torch.empty(many, 0, dtype=dtype)
    one = torch.ones(1, 1, dtype=dtype)
    assert matmul_grad.mm(tall, torch.empty(0, 0, dtype=dtype)).shape == (many, 0)
    assert matmul_grad.mm(one.expand(many, 1), torch.empty(1, 0, dtype=dtype)).shape == (many, 0)
    assert matmul_grad.mm(wide, one.expand(many, 3)).shape == (0, 3)
    with pytest.raises(RuntimeError, match=rf"shapes cannot be multiplied \(0x{many} and 5x2\)"):
        matmul_grad.mm(wide, torch.ones(5, 2, dtype=dtype))
