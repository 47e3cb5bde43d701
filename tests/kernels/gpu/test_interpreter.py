"""Products by pointers under Triton's interpreter: exact bits, canaries, NaN and Inf, every layout; no GPU needed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from case_process import CaseProcess, assert_no_complaint
from gpu_cases import (
    DTYPES,
    LAYOUTS,
    assert_error_at_most_twice_that_of_torch,
    at_arch,
    check_exact,
    integers,
    rows_alike,
    serve_cases,
    tile,
    tma,
)
from products import assert_exact
from torch import Tensor

from matmul_grad.testing import assert_same_bits

# Around one and two 16-wide tiles, primes, and skinny each way.
SIZES = (
    (1, 1, 1), (15, 17, 16), (16, 16, 16), (17, 15, 33), (31, 37, 41), (1, 33, 19), (33, 1, 19), (33, 19, 1),
    (48, 16, 32), (67, 5, 7),
)  # fmt: skip
EMPTY = ((0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0))


def check_wide(layouts: str) -> None:
    """64-bit offsets inside a tile give the bits that 32-bit ones give."""
    from matmul_grad.kernels.gpu import plan

    with pytest.MonkeyPatch.context() as patch, at_arch(80):  # which keeps no launch of before, and leaves none
        patch.setattr(plan, "is_wide", lambda extents: True)
        check_exact(17, 15, 33, "fp32", layouts, tile)


def check_nan_and_inf(dtype: str) -> None:
    """NaN and Inf go where torch.mm puts them; 0 * Inf is not skipped."""
    from matmul_grad.kernels.gpu import launch

    inf, nan = float("inf"), float("nan")
    a, b = integers(19, 18, DTYPES[dtype], 3), integers(18, 17, DTYPES[dtype], 4)
    a[0, 0], a[1, 17], a[2, :], a[18, 3] = nan, inf, 0, -inf
    b[5, 0], b[6, 16], b[7, 2] = inf, nan, -inf
    with np.errstate(invalid="ignore"):
        got = launch.mm(a, b, config=tile())
    want = a.double() @ b.double()
    torch.testing.assert_close(got.double(), want, rtol=0, atol=0, equal_nan=True)


def check_rounding(dtype: str) -> None:
    """For two kinds of operands."""
    from matmul_grad.kernels.gpu import launch

    generator = torch.Generator().manual_seed(5)
    for make in (torch.rand, torch.randn):
        a, b = make(33, 131, generator=generator), make(131, 35, generator=generator)
        a, b = a.to(DTYPES[dtype]), b.to(DTYPES[dtype])
        assert_error_at_most_twice_that_of_torch(launch.mm(a, b), a, b)


def nearest_tf32(x: Tensor) -> Tensor:
    """Round to 10 mantissa bits, ties away from zero, by arithmetic in float64."""
    mantissa, exponent = torch.frexp(x.double())
    scaled = mantissa * 2**11
    return torch.ldexp(scaled.sign() * (scaled.abs() + 0.5).floor(), exponent - 11)


def check_tf32() -> None:
    """TF32 operands are rounded to nearest, so products of the rounded operands come out exactly."""
    from matmul_grad.kernels.gpu import launch

    generator = torch.Generator().manual_seed(6)
    a = torch.randn(33, 1, generator=generator)
    b = torch.randn(1, 19, generator=generator)
    a[0, 0], a[1, 0] = 1 + 2**-11, -(1 + 2**-11)
    b[0, 0] = 1.0
    assert_exact(launch.mm(a, b, "tf32").double(), nearest_tf32(a) @ nearest_tf32(b))
    assert_exact(launch.mm(a, b, "ieee"), (a.double() @ b.double()).float())
    special = torch.tensor([[float("inf")], [-float("inf")]])
    with np.errstate(invalid="ignore"):
        assert_exact(launch.mm(special, torch.ones(1, 1), "tf32"), special)
    payloads = torch.tensor([[0x7F800001], [0x7FFFFFFF], [-1]], dtype=torch.int32).view(torch.float32)
    assert bool(launch.mm(payloads, torch.ones(1, 1), "tf32").isnan().all())


def check_prefix(dtype: str) -> None:
    """In one tile shape, a row of C has the same bits whatever m is and wherever the row lies."""
    from matmul_grad.kernels.gpu import launch

    generator = torch.Generator().manual_seed(7)
    a = torch.randn(70, 131, generator=generator).to(DTYPES[dtype])
    b = torch.randn(131, 20, generator=generator).to(DTYPES[dtype])
    with rows_alike():
        whole = launch.mm(a, b, config=tile())
        for first, last in ((0, 1), (0, 16), (0, 65), (7, 70), (69, 70)):
            assert_same_bits(launch.mm(a[first:last], b, config=tile()), whole[first:last])


def check_empty(m: int, n: int, k: int, dtype: str) -> None:
    from matmul_grad.kernels.gpu import launch

    got = launch.mm(torch.ones(m, k, dtype=DTYPES[dtype]), torch.ones(k, n, dtype=DTYPES[dtype]))
    assert_exact(got, torch.zeros(m, n, dtype=DTYPES[dtype]))
    out = torch.full((m, n), float("nan"), dtype=DTYPES[dtype])
    launch.mm(torch.ones(m, k, dtype=out.dtype), torch.ones(k, n, dtype=out.dtype), out=out)
    assert_exact(out, torch.zeros_like(out))


def check_refusals() -> None:
    """Operands that cannot be multiplied raise ValueError and leave out unchanged."""
    from matmul_grad.kernels.gpu import launch
    from matmul_grad.kernels.gpu.config import TileConfig

    x, y, out = torch.ones(2, 3), torch.ones(3, 4), torch.full((2, 4), 7.0)
    for message, call in {
        "cannot multiply shapes (2, 3) and (2, 3)": lambda: launch.mm(x, x, out=out),
        "cannot multiply shapes (3,) and (3, 4)": lambda: launch.mm(x[0], y, out=out),
        "cannot multiply torch.float32 and torch.float64": lambda: launch.mm(x, y.double(), out=out),
        "cannot multiply torch.int64 and torch.int64": lambda: launch.mm(x.long(), y.long(), out=out),
        "cannot multiply on cpu and meta": lambda: launch.mm(x, y.to("meta"), out=out),
        "out must be (2, 4), torch.float32": lambda: launch.mm(x, y, out=out.t()),
        "is not valid for": lambda: launch.mm(x, y, config=TileConfig(8, 16, 16, 2, 4), out=out),
        "no tile for": lambda: launch.mm(x, y, "bf16x3", out=out),
    }.items():
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value)
    assert_exact(out, torch.full((2, 4), 7.0))


def check_batch(dtype: str, layouts: str, config: Any, arch: int = 80) -> None:
    """One launch for a batch: contiguous, expanded, sliced and transposed products, into canaries too.

    Of the tiles in both directions one is whole and one is not.
    """
    from matmul_grad.kernels.gpu import launch

    m, n = (72, 40) if config is tma else (24, 24)
    a = torch.stack([integers(m, 40, DTYPES[dtype], seed) for seed in (1, 2, 3)])
    b = torch.stack([integers(40, n, DTYPES[dtype], seed) for seed in (4, 5, 6)])
    want = (a.long() @ b.long()).to(a.dtype)
    a, b = (x.mT.contiguous().mT if letter == "T" else x for x, letter in zip((a, b), layouts, strict=True))
    with at_arch(arch):
        assert_exact(launch.bmm(a, b, config=config()), want)
        assert_exact(launch.bmm(a[::2], b[1:], config=config()), (a[::2].long() @ b[1:].long()).to(a.dtype))
        assert_exact(launch.bmm(a[:1].expand(3, -1, -1), b), (a[:1].long() @ b.long()).to(a.dtype))
        out = torch.full((5, m + 4, n + 8), float("nan"), dtype=a.dtype)
        launch.bmm(a, b, config=config(), out=out[1:4, 2:-2, :n])
    assert_exact(out[1:4, 2:-2, :n], want)
    out[1:4, 2:-2, :n] = float("nan")
    assert bool(out.isnan().all()), "written outside of out"


def check_vector(m: int, n: int, k: int, dtype: str, layouts: str, parts: int) -> None:
    """One row or one column, with k whole and cut."""
    from matmul_grad.kernels.gpu.config import TileConfig

    check_exact(m, n, k, dtype, layouts, lambda: TileConfig(32, 1, 64, 2, 4, split_k=parts, path="vector"))


CASES: dict[str, Callable[[], None]] = {
    **{
        f"batch-{dtype}-{layouts}-pointers": partial(check_batch, dtype, layouts, tile)
        for dtype, layouts in itertools.product(DTYPES, ("NN", "TT"))
    },
    **{f"batch-fp16-{layouts}-tma": partial(check_batch, "fp16", layouts, tma, 90) for layouts in ("NN", "NT", "TN")},
    **{
        f"vector-{dtype}-{layouts}-{m}x{n}x{k}-{parts}": partial(check_vector, m, n, k, dtype, layouts, parts)
        for (m, n), k, dtype, layouts, parts in itertools.product(
            ((1, 70), (70, 1), (1, 1)), (7, 530), ("fp32", "fp16", "fp64"), ("NN", "TT", "SS", "NT"), (1, 2)
        )
        if parts == 1 or k > 512
    },
    **{
        f"exact-{dtype}-{x}{y}-{m}x{n}x{k}": partial(check_exact, m, n, k, dtype, x + y, tile)
        for (index, (m, n, k)), dtype, x, y in itertools.product(
            enumerate(SIZES), ("fp32", "fp16", "bf16", "fp64"), LAYOUTS, LAYOUTS
        )
        # Every layout pair at two ragged sizes in fp32, and the four dense pairs everywhere.
        if (dtype == "fp32" and index in (3, 4)) or x + y in ("NN", "NT", "TN", "TT")
    },
    **{
        f"chosen-{dtype}-{x}{y}-{m}x{n}x{k}": partial(check_exact, m, n, k, dtype, x + y)
        for (m, n, k), dtype, x, y in itertools.product(((63, 65, 67), (128, 64, 80)), DTYPES, "NT", "NT")
    },
    **{
        f"empty-{dtype}-{m}x{n}x{k}": partial(check_empty, m, n, k, dtype)
        for (m, n, k), dtype in itertools.product(EMPTY, DTYPES)
    },
    **{f"wide-{x}{y}": partial(check_wide, x + y) for x, y in itertools.product("NTS", "NTS")},
    **{f"nan-{dtype}": partial(check_nan_and_inf, dtype) for dtype in DTYPES},
    **{f"rounding-{dtype}": partial(check_rounding, dtype) for dtype in DTYPES},
    **{f"prefix-{dtype}": partial(check_prefix, dtype) for dtype in DTYPES},
    "tf32": check_tf32,
    "refusals": check_refusals,
}


@pytest.mark.pairwise
@pytest.mark.parametrize("case", CASES)
def test_interpreted(case: str, interpreter: CaseProcess) -> None:
    assert_no_complaint(interpreter.complaint(case))


if __name__ == "__main__":
    serve_cases(CASES)
