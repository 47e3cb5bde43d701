"""Thousands of rows and columns, C·t against A·(B·t) in exact integers; and memory beyond 2^31 elements."""

import contextlib
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from dtypes import FLOATS
from torch import Tensor

import matmul_grad
from matmul_grad.testing import Case, assert_same_bits, integers, normal, operands

pytestmark = pytest.mark.usefixtures("strict_on_two_threads")

SIZES = (2003, 2501, 2203)


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


FAR = 2**31 + 16
# Operands in the order of each call, then the result.
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "mm": ((3, 5), (5, 4), (3, 4)),
    "addmm": ((3, 4), (3, 5), (5, 4), (3, 4)),
    "bmm": ((2, 3, 5), (2, 5, 4), (2, 3, 4)),
    "baddbmm": ((2, 3, 4), (2, 3, 5), (2, 5, 4), (2, 3, 4)),
    "matmul": ((2, 3, 5), (5, 4), (2, 3, 4)),
    "mv": ((3, 5), (5,), (3,)),
    "addmv": ((3,), (3, 5), (5,), (3,)),
    "dot": ((5,), (5,), ()),
}
CALLS: dict[str, tuple[Callable[..., Any], str]] = {
    **{f"function-{name}": (getattr(matmul_grad, name), name) for name in SHAPES if hasattr(matmul_grad, name)},
    **{f"switch-{name}": (getattr(torch, name), name) for name in SHAPES},
    **{
        f"switch-{name}_": (lambda x, *rest, name=name: getattr(x, f"{name}_")(*rest), name)
        for name in ("addmm", "baddbmm", "addmv")
    },
    **{
        f"operator-{name}": (getattr(torch.ops.matmul_grad, name).default, name)
        for name in ("mm", "addmm", "bmm", "baddbmm")
    },
}


@pytest.fixture(scope="module")
def space() -> Iterator[Tensor]:
    """Address space for six times 2^31 elements; a page of it takes memory once it is written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        memory = mmap.mmap(-1, 6 * FAR * 2, flags=flags)
    except (OSError, OverflowError, ValueError) as error:
        pytest.skip(f"so much address space is not to be had: {error}")
    yield torch.frombuffer(memory, dtype=torch.bfloat16)


def lay_far(space: Tensor, values: Tensor, place: int, written: bool = False) -> Tensor:
    """The values with the first dimension's elements 2^31 apart; what is written lies behind all that is read."""
    strides = [1] * values.dim()
    for i in range(values.dim() - 1, 0, -1):
        strides[i - 1] = strides[i] * values.shape[i]
    offset = (3 if written else 0) * FAR + FAR // 2 + 4096 * place
    if values.dim() > 0:
        strides[0] = FAR // max(1, values.shape[0] // 2)
    return space.as_strided(values.shape, strides, offset).copy_(values)


@pytest.mark.parametrize("call", CALLS)
def test_memory_beyond_two_to_the_31(call: str, space: Tensor) -> None:
    """Each operand, and out where there is one, lies so that its offsets need more than 32 bits."""
    run, name = CALLS[call]
    *shapes, of_result = SHAPES[name]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    flat = [integers(1, size, torch.bfloat16, seed) for seed, size in enumerate(sizes)]
    values = [x.view(shape) for x, shape in zip(flat, shapes, strict=True)]
    expected = getattr(torch, name)(*(x.double() for x in values)).to(torch.bfloat16)
    in_place = call.endswith("_")
    far = [lay_far(space, x, place, in_place and place == 0) for place, x in enumerate(values)]
    switch = matmul_grad.enabled() if call.startswith("switch") else contextlib.nullcontext()
    with switch:
        if not in_place and not call.startswith("operator"):
            out = lay_far(space, torch.zeros(of_result, dtype=torch.bfloat16), 0, True)
            assert run(*far, out=out) is out
            assert_same_bits(out, expected, "out")
        assert_same_bits(run(*far), expected, "all operands")


def test_gradients_beyond_two_to_the_31(space: Tensor) -> None:
    values = [integers(m, n, torch.bfloat16, seed) for seed, (m, n) in enumerate(((3, 4), (3, 5), (5, 4)))]
    grad, a, b = (lay_far(space, x, place) for place, x in enumerate(values))
    da, db = matmul_grad.mm_backward(grad, a, b)
    assert_same_bits(da, (values[0].double() @ values[2].double().t()).bfloat16(), "dgrad")
    assert_same_bits(db, (values[1].double().t() @ values[0].double()).bfloat16(), "wgrad")
    weight = b.t()
    got = matmul_grad.linear(a, weight, grad[0])
    assert_same_bits(got, (values[1].double() @ values[2].double() + values[0][0].double()).bfloat16(), "linear")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mm", "addmm", "bmm", "baddbmm"])
def test_result_of_more_than_two_to_the_31_elements(name: str) -> None:
    """4 GiB are written; the operands are one element for all, and the rows in the middle and at the end are read."""
    rows = FAR // 4
    a, b = torch.full((1, 1), 2, dtype=torch.bfloat16).expand(rows, 1), torch.arange(4).bfloat16().view(1, 4)
    added = torch.ones(4, dtype=torch.bfloat16)
    operands = (a, b) if name in ("mm", "bmm") else (added, a, b)
    if "bmm" in name:
        operands = tuple(x.unsqueeze(0) if x.dim() == 2 else x for x in operands)
    result = getattr(matmul_grad, name)(*operands).view(rows, 4)
    row = 2 * b[0] + (added if "add" in name else 0)
    assert result.numel() >= 2**31
    for at in (0, rows // 2, 2**29 - 1, rows - 1):
        assert torch.equal(result[at], row)
    assert int((result[:: 2**20] != row).sum()) == 0
