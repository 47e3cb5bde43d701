"""torch's products while the switch is on: exact integers, every form, dtype and layout, NaN around the results."""

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from dtypes import EVERY
from products import SCALES, assert_exact, batch_of, exact, places
from switch import accelerated
from torch import Tensor

import matmul_grad
from matmul_grad.testing import STRIDINGS, assert_same_bits, assert_within_budget, integers, lay_out, normal

SHAPES = ((1, 1, 1), (1, 64, 5), (5, 1, 9), (7, 65, 9), (13, 33, 17), (2, 257, 3), (64, 64, 64), (3, 5, 1031))
BATCHES = ((1, 7, 5, 3), (4, 6, 9, 8), (3, 1, 70, 40), (2, 33, 1, 20), (9, 8, 8, 8))


@pytest.fixture(autouse=True)
def switched_on() -> Iterator[None]:
    with matmul_grad.enabled(), matmul_grad.strict():
        yield


def assert_counted(operator: str, before: Counter[str], calls: int) -> None:
    assert accelerated()[operator] - before[operator] == calls


def assert_written(out: Tensor, whole: Tensor, expected: Tensor, what: str) -> None:
    assert_exact(out, expected, what)
    assert int((~whole.isnan()).sum()) == out.numel(), f"{what}: written outside of the result"


@pytest.mark.parametrize("dtype", EVERY)
def test_mm(dtype: torch.dtype) -> None:
    before, calls = accelerated(), 0
    for m, n, k in SHAPES:
        for one, other in itertools.product(STRIDINGS, STRIDINGS):
            a, b = lay_out(integers(m, k, dtype, seed=1), one), lay_out(integers(k, n, dtype, seed=2), other)
            c, what = torch.mm(a, b), f"{m}x{n}x{k} {one} {other}"
            assert_same_bits(c, exact(a, b), what)
            assert c.is_contiguous()
            calls += 1
        for name, out, whole in places((m, n), dtype):
            assert torch.mm(a, b, out=out) is out
            assert_written(out, whole, exact(a, b), f"{m}x{n}x{k}, out by {name}")
            calls += 1
    assert_counted("mm", before, calls)


def added(m: int, n: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Whatever expands to (m, n)."""
    for striding in STRIDINGS:
        yield lay_out(integers(m, n, dtype, seed=3), striding)
    yield from (integers(1, n, dtype, seed=4)[0], integers(m, 1, dtype, seed=5), integers(1, 1, dtype, seed=6)[0, 0])
    yield integers(1, n, dtype, seed=7)


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize("scales", SCALES, ids=str)
def test_addmm(dtype: torch.dtype, scales: dict[str, Any]) -> None:
    before, calls = accelerated(), 0
    for m, n, k in SHAPES:
        layouts = itertools.cycle(itertools.product(STRIDINGS, STRIDINGS))
        for source in added(m, n, dtype):
            one, other = next(layouts)
            a, b = lay_out(integers(m, k, dtype, seed=1), one), lay_out(integers(k, n, dtype, seed=2), other)
            c, expected, what = torch.addmm(source, a, b, **scales), exact(a, b, source, **scales), f"{m}x{n}x{k} {one}"
            assert_exact(c, expected, what)
            assert c.is_contiguous()
            for name, out, whole in places((m, n), dtype):
                assert torch.addmm(source, a, b, out=out, **scales) is out
                assert_written(out, whole, expected, f"{what}, out by {name}")
                out.copy_(source)
                assert out.addmm_(a, b, **scales) is out
                assert_written(out, whole, expected, f"{what}, in place by {name}")
                out.copy_(source)
                torch.addmm(out, a, b, out=out, **scales)
                assert_written(out, whole, expected, f"{what}, out is input by {name}")
                calls += 3
            calls += 1
    assert_counted("addmm", before, calls)


ORDERS = {"rows": (0, 1, 2), "columns": (0, 2, 1), "batch-within": (1, 0, 2), "batch-last": (1, 2, 0)}


def in_order(values: Tensor, order: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The same batch with its dimensions in that order of memory and NaN around; the buffer."""
    sizes = [values.shape[dim] for dim in order]
    whole = values.new_full([size + 3 for size in sizes], float("nan"))
    view = whole[tuple(slice(1, 1 + size) for size in sizes)].permute([order.index(dim) for dim in range(3)])
    view.copy_(values)
    return view, whole


@pytest.mark.parametrize("dtype", EVERY)
def test_bmm(dtype: torch.dtype) -> None:
    before, calls = accelerated(), 0
    for batch, m, n, k in BATCHES:
        for one, other, third in itertools.product(ORDERS, ORDERS, ORDERS):
            a, _ = in_order(batch_of(integers, batch, m, k, dtype, 1), ORDERS[one])
            b, _ = in_order(batch_of(integers, batch, k, n, dtype, 2), ORDERS[other])
            c, what = torch.bmm(a, b), f"{batch}x{m}x{n}x{k} {one} {other} {third}"
            assert_same_bits(c, exact(a, b), what)
            assert c.is_contiguous()
            out, whole = in_order(torch.zeros(batch, m, n, dtype=dtype), ORDERS[third])
            assert torch.bmm(a, b, out=out) is out
            assert_written(out, whole, exact(a, b), f"{what}, out")
            calls += 2
        a = a[:1].expand(batch, m, k)
        assert_same_bits(torch.bmm(a, b), exact(a, b), f"{what}, one for all")
        calls += 1
    assert_counted("bmm", before, calls)


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize("scales", SCALES, ids=str)
def test_baddbmm(dtype: torch.dtype, scales: dict[str, Any]) -> None:
    before, calls = accelerated(), 0
    for batch, m, n, k in BATCHES:
        a, b = batch_of(integers, batch, m, k, dtype, 1), batch_of(integers, batch, k, n, dtype, 2).mT
        b = b.contiguous().mT
        sources = [in_order(batch_of(integers, batch, m, n, dtype, 3), order)[0] for order in ORDERS.values()]
        sources += [part for part in added(m, n, dtype)]
        sources += [batch_of(integers, batch, 1, 1, dtype, 4), batch_of(integers, 1, m, n, dtype, 5)]
        for source, order in zip(sources, itertools.cycle(ORDERS)):
            expected, what = exact(a, b, source, **scales), f"{batch}x{m}x{n}x{k} {tuple(source.shape)} {order}"
            assert_exact(torch.baddbmm(source, a, b, **scales), expected, what)
            out, whole = in_order(torch.zeros(batch, m, n, dtype=dtype), ORDERS[order])
            assert torch.baddbmm(source, a, b, out=out, **scales) is out
            assert_written(out, whole, expected, f"{what}, out")
            out.copy_(source)
            assert out.baddbmm_(a, b, **scales) is out
            assert_written(out, whole, expected, f"{what}, in place")
            calls += 3
    assert_counted("baddbmm", before, calls)


# --- what is not multiplied ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", EVERY)
def test_beta_of_zero_ignores_what_is_added(dtype: torch.dtype) -> None:
    a, b, nan = integers(4, 5, dtype, 1), integers(5, 3, dtype, 2), torch.full((4, 3), float("nan"), dtype=dtype)
    assert_same_bits(torch.addmm(nan, a, b, beta=0), exact(a, b))
    assert_same_bits(nan.clone().addmm_(a, b, beta=0.0), exact(a, b))
    assert_same_bits(torch.baddbmm(nan, a[None], b[None], beta=0)[0], exact(a, b))


@pytest.mark.parametrize("dtype", EVERY)
def test_nan_and_infinity_propagate(dtype: torch.dtype) -> None:
    a, b, ones = torch.ones(3, 4, dtype=dtype), torch.ones(4, 2, dtype=dtype), torch.ones(3, 2, dtype=dtype)
    a[1, 2], b[0, 1] = float("nan"), float("inf")
    a[2, 0] = 0  # times infinity
    for c in (torch.mm(a, b), torch.addmm(ones, a, b), torch.bmm(a[None], b[None])[0]):
        assert c.isnan().tolist() == [[False, False], [True, True], [False, True]]
        assert c[0, 1] == float("inf")
    ones[0, 0] = float("nan")
    assert torch.addmm(ones, a, b, beta=2).isnan().tolist() == [[True, False], [True, True], [False, True]]


@pytest.mark.parametrize("dtype", EVERY)
def test_empty_sizes_match_torch(dtype: torch.dtype) -> None:
    """Nothing is multiplied, so strict() has nothing to say."""
    for m, n, k in ((0, 3, 2), (3, 0, 2), (3, 2, 0), (0, 0, 0)):
        a, b, source = (torch.ones(size, dtype=dtype) for size in ((m, k), (k, n), (m, n)))
        assert_same_bits(torch.mm(a, b), torch.zeros(m, n, dtype=dtype))
        assert_same_bits(torch.addmm(source, a, b, beta=3), torch.full((m, n), 3, dtype=dtype))
        assert_same_bits(torch.mm(a, b, out=torch.ones(m, n, dtype=dtype)), torch.zeros(m, n, dtype=dtype))
        assert_same_bits(source.clone().addmm_(a, b, beta=3), torch.full((m, n), 3, dtype=dtype))
        for batch in (0, 2):
            c = torch.baddbmm(source, a.expand(batch, m, k), b.expand(batch, k, n), beta=3)
            assert_same_bits(c, torch.full((batch, m, n), 3, dtype=dtype))
            assert_same_bits(torch.bmm(a.expand(batch, m, k), b.expand(batch, k, n)), torch.zeros_like(c))


# --- the same bits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize("shape", [(13, 65, 1031), (64, 64, 64), (40, 3, 70), (19, 7, 17000)], ids=str)
def test_same_bits_in_every_form(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """An element does not know the form, the batch, the layout, its neighbours or the threads."""
    m, n, k = shape
    a, b, source = normal(m, k, dtype, 1), normal(k, n, dtype, 2), normal(m, n, dtype, 3)
    threads = torch.get_num_threads()
    whole, sum_of_both = matmul_grad.mm(a, b), torch.addmm(source, a, b, beta=0.3, alpha=0.7)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_same_bits(torch.mm(a, b), whole)
            assert_same_bits(torch.mm(a[: m // 2], b), whole[: m // 2])
            assert_same_bits(torch.mm(b.t(), a.t()).t(), whole)
            assert_same_bits(torch.mm(a, b, out=torch.empty(n, m, dtype=dtype).t()), whole)
            assert_same_bits(torch.addmm(source, a, b, beta=0), whole)
            assert_same_bits(torch.bmm(a.expand(3, m, k), b.expand(3, k, n))[1], whole)
            assert_same_bits(torch.bmm(b.t().expand(2, n, k), a.t().expand(2, k, m))[1].t(), whole)
            for c in (
                torch.addmm(source, a, b, beta=0.3, alpha=0.7),
                torch.addmm(source.t(), b.t(), a.t(), beta=0.3, alpha=0.7).t(),
                source.clone().addmm_(a, b, beta=0.3, alpha=0.7),
                torch.baddbmm(source, a.expand(3, m, k), b.expand(3, k, n), beta=0.3, alpha=0.7)[2],
            ):
                assert_same_bits(c, sum_of_both)
            part = torch.addmm(source[:, 1:], a, b[:, 1:], beta=0.3, alpha=0.7)
            assert_same_bits(part, sum_of_both[:, 1:])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize("shape", [(13, 65, 103), (64, 64, 64), (3, 5, 1031)], ids=str)
def test_rounding(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """16-bit results are rounded once, after the addition; torch's are no better."""
    m, n, k = shape
    a, b, source = normal(m, k, dtype, 1), normal(k, n, dtype, 2), normal(m, n, dtype, 3)
    c = torch.addmm(source, a, b)
    matmul_grad.disable()
    truth = source.double() + a.double() @ b.double()
    error, theirs = (float((x.double() - truth).abs().max()) for x in (c, torch.addmm(source, a, b)))
    budget = 2 * (theirs + torch.finfo(dtype).eps / 2 * float(truth.abs().max()))
    assert error <= budget
    assert_within_budget(matmul_grad.mm(a, b), a, b)
