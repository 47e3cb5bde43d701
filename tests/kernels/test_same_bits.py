"""The contract on CPU: an element's bits depend on its row of A, its column of B and k alone."""

from fractions import Fraction

import pytest
import torch
from dtypes import EVERY, FLOATS
from torch import Tensor

import matmul_grad
from matmul_grad.kernels.cpu import host
from matmul_grad.kernels.cpu.config import CHAIN, KC, SHORT_CHAIN, k_block
from matmul_grad.testing import LAYOUTS, assert_same_bits, lay_out, normal

pytestmark = pytest.mark.usefixtures("strict_on_two_threads")

# Edge and whole tiles, operands read in place and packed, one block of k and several, more rows than a block of A, a
# product computed as its transpose, chunks of k.
SHAPES = (
    (13, 65, 1031),
    (31, 37, 41),
    (97, 101, 103),
    (64, 64, 64),
    (257, 129, 513),
    (430, 20, 390),
    (40, 3, 70),
    (19, 7, 17000),
)
THREADS = (1, 2, 3, 5)
CUTS = (1, 2, 5, 6, 7, 12, 13, 16, 63, 64, 65, 100, 128)


@pytest.fixture(params=SHAPES, ids=lambda shape: "{}x{}x{}".format(*shape))
def shape(request: pytest.FixtureRequest) -> tuple[int, int, int]:
    return request.param


@pytest.fixture(params=EVERY)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def pair(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    m, n, k = shape
    return normal(m, k, dtype, seed=1), normal(k, n, dtype, seed=2)


def cuts(size: int) -> list[int]:
    return [cut for cut in (*CUTS, size - 1) if 0 < cut < size]


def test_rows_alone(pair: tuple[Tensor, Tensor]) -> None:
    a, b = pair
    c = matmul_grad.mm(a, b)
    for rows in cuts(len(a)):
        assert_same_bits(matmul_grad.mm(a[:rows], b), c[:rows], f"first {rows} rows")
        assert_same_bits(matmul_grad.mm(a[rows:], b), c[rows:], f"rows from {rows}")
    for i in {0, 1, 5, 6, len(a) // 2, len(a) - 1}:
        assert_same_bits(matmul_grad.mm(a[i : i + 1], b), c[i : i + 1], f"row {i} alone")
    assert_same_bits(matmul_grad.mm(a[1::3], b), c[1::3], "every third row")


def test_columns_alone(pair: tuple[Tensor, Tensor]) -> None:
    a, b = pair
    c, n = matmul_grad.mm(a, b), b.shape[1]
    for columns in cuts(n):
        assert_same_bits(matmul_grad.mm(a, b[:, :columns]), c[:, :columns], f"first {columns} columns")
        assert_same_bits(matmul_grad.mm(a, b[:, columns:]), c[:, columns:], f"columns from {columns}")
    for j in {0, 1, n // 2, n - 1}:
        assert_same_bits(matmul_grad.mm(a, b[:, j : j + 1]), c[:, j : j + 1], f"column {j} alone")
    assert_same_bits(matmul_grad.mm(a, b[:, 1::3]), c[:, 1::3], "every third column")
    assert_same_bits(matmul_grad.mm(a[2:3], b[:, 3:4]), c[2:3, 3:4], "one element alone")


def test_rows_and_columns_in_another_order(pair: tuple[Tensor, Tensor]) -> None:
    a, b = pair
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randperm(size, generator=generator) for size in (len(a), b.shape[1]))
    c = matmul_grad.mm(a, b)
    assert_same_bits(matmul_grad.mm(a[rows], b[:, columns]), c[rows][:, columns])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(pair: tuple[Tensor, Tensor], layout: str) -> None:
    a, b = pair
    c = matmul_grad.mm(a, b)
    striding = {"N": ("row", "sliced", "narrow"), "T": ("column",)}
    for a_striding in striding[layout[0]]:
        for b_striding in striding[layout[1]]:
            laid = lay_out(a, a_striding), lay_out(b, b_striding)
            assert_same_bits(matmul_grad.mm(*laid), c, f"{a_striding} · {b_striding}")


def test_product_of_transposes_is_the_transposed_product(pair: tuple[Tensor, Tensor]) -> None:
    a, b = pair
    assert_same_bits(matmul_grad.mm(b.t(), a.t()), matmul_grad.mm(a, b).t())


def test_threads_and_repeats(pair: tuple[Tensor, Tensor]) -> None:
    a, b = pair
    c = matmul_grad.mm(a, b)
    for threads in THREADS:
        torch.set_num_threads(threads)
        for turn in range(2):
            assert_same_bits(matmul_grad.mm(a, b), c, f"{threads} threads, turn {turn}")
            assert_same_bits(matmul_grad.mm(b.t(), a.t()).t(), c, f"transposed, {threads} threads")


def test_gradients_by_row_and_column(pair: tuple[Tensor, Tensor]) -> None:
    """dA = dC · Bᵀ has the rows of dC and A; dB = Aᵀ · dC the columns of dC and B."""
    a, b = pair
    grad = normal(len(a), b.shape[1], a.dtype, seed=3)
    da, db = matmul_grad.mm_backward(grad, a, b)
    for rows in cuts(len(a)):
        part, _ = matmul_grad.mm_backward(grad[:rows], a[:rows], b, (True, False))
        assert_same_bits(part, da[:rows], f"dgrad of the first {rows} rows")
    for columns in cuts(b.shape[1]):
        _, part = matmul_grad.mm_backward(grad[:, :columns], a, b[:, :columns], (False, True))
        assert_same_bits(part, db[:, :columns], f"wgrad of the first {columns} columns")
    for threads in THREADS:
        torch.set_num_threads(threads)
        again = matmul_grad.mm_backward(lay_out(grad, "column"), a, b)
        assert_same_bits(again[0], da, f"dgrad, {threads} threads")
        assert_same_bits(again[1], db, f"wgrad, {threads} threads")


def test_the_three_products_are_one(pair: tuple[Tensor, Tensor]) -> None:
    """Autograd, mm_backward and mm on transposed views are the same computation."""
    a, b = (x.clone().requires_grad_() for x in pair)
    c = matmul_grad.mm(a, b)
    grad = normal(*c.shape, c.dtype, seed=3)
    da, db = torch.autograd.grad(c, (a, b), grad)
    a, b = pair
    assert_same_bits(c.detach(), matmul_grad.mm(a, b), "forward with and without a graph")
    for name, by_hand in (("mm_backward", matmul_grad.mm_backward(grad, a, b)),
                          ("mm", (matmul_grad.mm(grad, b.t()), matmul_grad.mm(a.t(), grad)))):  # fmt: skip
        assert_same_bits(da, by_hand[0], f"dgrad by {name}")
        assert_same_bits(db, by_hand[1], f"wgrad by {name}")


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0), (2, 1)], ids=str)
def test_batch_items(in_dims: tuple[int | None, int | None], dtype: torch.dtype) -> None:
    """A batch of one, of two or of seven gives each item the bits that it has alone."""
    items = [(normal(13, 70, dtype, seed=i), normal(70, 33, dtype, seed=100 + i)) for i in range(7)]
    for size in (1, 2, 7):
        batch = [
            torch.stack(side[:size], dim) if dim is not None else side[0]
            for dim, side in zip(in_dims, map(list, zip(*items, strict=True)), strict=True)
        ]
        products = torch.func.vmap(matmul_grad.mm, in_dims)(*batch)
        for i, product in enumerate(products):
            a, b = (items[i if dim is not None else 0][side] for side, dim in enumerate(in_dims))
            assert_same_bits(product, matmul_grad.mm(a, b), f"item {i} of {size}")


def rounded(value: Fraction, digits: int) -> Fraction:
    """The nearest number of ``digits`` binary digits, ties to even; exponents are taken for unlimited."""
    if value == 0:
        return value
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if Fraction(2) ** exponent > size:
        exponent -= 1
    unit = Fraction(2) ** (exponent + 1 - digits)
    return round(value / unit) * unit


def chain(row: list[float], column: list[float], dtype: torch.dtype) -> float:
    """One element as docs/kernels.md has it: chunks of k, in them chains of fused multiply-adds, added in order."""
    digits, fused = {torch.float32: 24, torch.float64: 53}[dtype], host.cpu().fused
    total: Fraction | None = None
    step = 32 if len(row) <= 128 else 128
    for begin in range(0, len(row), 8192):
        end, chunk = min(begin + 8192, len(row)), None
        for start in range(begin, end, step):
            part = Fraction(0)
            for p in range(start, min(start + step, end)):
                term = Fraction(row[p]) * Fraction(column[p])
                part = rounded(part + (term if fused else rounded(term, digits)), digits)
            chunk = part if chunk is None else rounded(chunk + part, digits)
        assert chunk is not None
        total = chunk if total is None else rounded(total + chunk, digits)
    assert total is not None
    return float(total)


@pytest.mark.parametrize(
    "value,digits,expected",
    [(5, 2, 4), (7, 2, 8), (6, 2, 6), (-5, 2, -4), (Fraction(1, 3), 53, Fraction(1 / 3)), (1 + 2**24, 24, 2**24)],
)
def test_rounding_of_the_emulation(value: Fraction, digits: int, expected: Fraction) -> None:
    assert rounded(Fraction(value), digits) == expected


@pytest.mark.parametrize("k", [1, 31, 32, 33, 63, 65, 128, 129, 511, 512, 517, 1027, 8192 + 9])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", ["NN", "TT"])
def test_element_is_the_documented_chain(layout: str, dtype: torch.dtype, k: int) -> None:
    """One chain, several, several packed panels of them, and chunks of k."""
    a, b = normal(2, k, dtype, seed=1), normal(k, 2, dtype, seed=2)
    expected = [[chain(row, column, dtype) for column in b.t().tolist()] for row in a.tolist()]
    laid = (a, b) if layout == "NN" else (lay_out(a, "column"), lay_out(b, "column"))
    assert_same_bits(matmul_grad.mm(*laid), torch.tensor(expected, dtype=dtype), f"k = {k}")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("m,n,k", SHAPES)
def test_elements_of_a_larger_product_are_the_documented_chain(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    a, b = normal(m, k, dtype, seed=1), normal(k, n, dtype, seed=2)
    c = matmul_grad.mm(a, b)
    for i, j in ((0, 0), (6, min(16, n - 1)), (m - 1, n - 1)):
        assert c[i, j].item() == chain(a[i].tolist(), b[:, j].tolist(), dtype), f"element ({i}, {j})"


@pytest.mark.parametrize("dtype", CHAIN)
def test_panels_of_k_are_whole_chains(dtype: str) -> None:
    """Where k is cut for packing cannot show in the bits: no chain is cut, no panel is longer than KC."""
    kc = KC[dtype]
    for length in (CHAIN[dtype], SHORT_CHAIN[dtype]):
        assert kc % length == 0
        for k in (1, 7, kc - 1, kc, kc + 1, 2 * kc, 2 * kc + 1, 20000):
            step = k_block(k, kc, length)
            assert 0 < step <= kc and step % length == 0
            assert -(-k // step) == -(-k // kc), f"k = {k}: as few panels as there can be"
