"""TMA, split k, both gradients in one launch and 8-bit operands under Triton's interpreter: exact bits, canaries."""

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
    assert_error_at_most_twice_that_of_torch,
    at_arch,
    check_exact,
    embed,
    embed_aligned,
    integers,
    pointers,
    rows_alike,
    serve_cases,
    tma,
)
from products import assert_exact
from torch import Tensor

from matmul_grad.testing import assert_same_bits


def check_tma(m: int, n: int, k: int, dtype: str, layouts: str, config: Any) -> None:
    """The TMA path: exact, whether C can be stored through TMA or not, and only where operands fit it."""
    from matmul_grad.kernels.gpu import launch

    a, b = integers(m, k, DTYPES[dtype], 1), integers(k, n, DTYPES[dtype], 2)
    want = (a.long() @ b.long()).to(a.dtype)
    a, b = embed_aligned(a, layouts[0]), embed_aligned(b, layouts[1])
    assert launch.fits_tma(a) and launch.fits_tma(b)
    with at_arch(90):
        assert_exact(launch.mm(a, b, config=config), want)
        out = torch.full((m + 2, n + 8), float("nan"), dtype=a.dtype)
        launch.mm(a, b, config=config, out=out[1:-1, :n])
        assert_exact(out[1:-1, :n], want)
        out[1:-1, :n] = float("nan")
        assert bool(out.isnan().all()), "written outside of out"
        with pytest.raises(ValueError, match="is not valid for"):
            launch.mm(a.contiguous()[:, 1:], b[1:], config=config)


def check_nan_and_inf(dtype: str, parts: int) -> None:
    """NaN and Inf go where torch.mm puts them; zeros that TMA reads beyond the edges multiply none of them."""
    from matmul_grad.kernels.gpu import launch

    inf, nan = float("inf"), float("nan")
    a, b = integers(72, 136, DTYPES[dtype], 3), integers(136, 72, DTYPES[dtype], 4)
    a[0, 0], a[1, 135], a[2, :], a[71, 3] = nan, inf, 0, -inf
    b[5, 0], b[6, 71], b[7, 2] = inf, nan, -inf
    with at_arch(90), np.errstate(invalid="ignore"):
        got = launch.mm(embed_aligned(a, "N"), embed_aligned(b, "T"), config=tma(parts))
    torch.testing.assert_close(got.double(), a.double() @ b.double(), rtol=0, atol=0, equal_nan=True)


def check_rounding(dtype: str) -> None:
    from matmul_grad.kernels.gpu import launch

    generator = torch.Generator().manual_seed(5)
    for make in (torch.rand, torch.randn):
        a, b = make(40, 136, generator=generator), make(136, 40, generator=generator)
        a, b = embed_aligned(a.to(DTYPES[dtype]), "N"), embed_aligned(b.to(DTYPES[dtype]), "T")
        with at_arch(90):
            assert_error_at_most_twice_that_of_torch(launch.mm(a, b, config=tma()), a, b)


def full_of_nan(x: Tensor, size: Any, **more: Any) -> Tensor:
    """Stands for `new_empty`."""
    return x.new_full(size if isinstance(size, tuple) else (size,), float("nan"), **more)


def check_padded(m: int, n: int, k: int, dtype: str, layouts: str) -> None:
    """Operands that TMA cannot read, through padded copies: exact whatever memory held, into canaries, added to."""
    from matmul_grad.kernels.gpu import launch

    embeds = {"N": embed, "T": embed, "S": embed, "R": embed, "A": lambda x, _: embed_aligned(x, "N")}
    values = integers(m, k, DTYPES[dtype], 1), integers(k, n, DTYPES[dtype], 2)
    a, b = (embeds[letter](x, letter) for x, letter in zip(values, layouts, strict=True))
    want, source = (a.long() @ b.long()).to(a.dtype), integers(1, n, a.dtype, 3)
    with at_arch(90), pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "choose_padded", lambda *asked: tma(subtiles=2))
        patch.setattr(torch.Tensor, "new_empty", full_of_nan)
        assert_exact(launch.mm(a, b), want)
        (kept,) = launch._launches.values()
        assert kept.padded == tuple(letter != "A" for letter in layouts)
        out = embed(torch.full_like(want, float("nan")), "N")
        assert_exact(launch.addmm(a, b, launch.Epilogue(2, -1, source), out), 2 * want - source)
        assert out._base is not None
        out.fill_(float("nan"))
        assert bool(out._base.isnan().all()), "written outside of out"
        batches = torch.stack([a, -a]), torch.stack([b, b])
        assert_exact(launch.bmm(*batches), torch.stack([want, -want]))


def check_split(dtype: str, layouts: str, path: str) -> None:
    """k split: exact for integers, and the partial results are added in order, whatever m and n are."""
    from matmul_grad.kernels.gpu import launch

    config = {"tma": tma, "pointers": pointers}[path](3)
    check = check_tma if path == "tma" else check_split_pointers
    check(72, 40, 232, dtype, layouts, config)
    a, b = torch.randn(64, 232).to(DTYPES[dtype]), torch.randn(232, 72).to(DTYPES[dtype])
    with at_arch(90), rows_alike():
        whole = launch.mm(a, b, config=config)
        assert_same_bits(launch.mm(a[:8], b, config=config), whole[:8])
        parts = [
            launch.mm(a[:, i:j].float(), b[i:j].float(), config=pointers()) for i, j in ((0, 80), (80, 160), (160, 232))
        ]
    assert_same_bits(whole, (parts[0] + parts[1] + parts[2]).to(a.dtype))


def check_split_pointers(m: int, n: int, k: int, dtype: str, layouts: str, config: Any) -> None:
    with at_arch(90):
        check_exact(m, n, k, dtype, layouts, lambda: config)


def check_backward(m: int, n: int, k: int, layouts: str) -> None:
    """Both gradients from one launch, for a gradient of any layout that TMA reads; one gradient is one product."""
    from matmul_grad.kernels.gpu import launch

    grad, a, b = (integers(x, y, torch.float16, seed) for seed, (x, y) in enumerate(((m, n), (m, k), (k, n))))
    wants = [(x.long() @ y.long()).half() for x, y in ((grad, b.t()), (a.t(), grad))]
    grad, a, b = (
        x.t().contiguous().t() if letter == "T" else x for x, letter in zip((grad, a, b), layouts, strict=True)
    )
    with at_arch(90), pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "choose_backward", lambda *asked: tma(subtiles=2))
        both = launch.backward_in_one(grad, a, b)
        assert both is not None
        for got, want in zip(both, wants, strict=True):
            assert_exact(got, want)
        expanded = grad[:1].expand(m, n)
        assert launch.backward_in_one(expanded, a, b) is None
        da, db = launch.mm_backward(expanded, a, b)
        assert da is not None and db is not None
        assert_exact(da, (expanded.long() @ b.long().t()).half())
        assert_exact(db, (a.long().t() @ expanded.long()).half())
        da, db = launch.mm_backward(grad, a, b, (True, False))
        assert db is None and da is not None
        assert_exact(da, wants[0])


def check_scaled(m: int, n: int, k: int, left: str, right: str, path: str, parts: int) -> None:
    """8-bit operands of two kinds, two scales: exact sums, scaled and rounded once."""
    from matmul_grad.kernels.gpu import launch
    from matmul_grad.kernels.gpu.config import TileConfig

    a = integers(m, k, getattr(torch, left), 1)
    b = integers(n, k, getattr(torch, right), 2).t()
    scales = torch.tensor([0.5]), torch.tensor(8.0)
    want = 4 * (a.float() @ b.float())
    config = TileConfig(64, 16, 32, stages=2, warps=4, group_m=2, split_k=parts, path=path)
    with at_arch(90):
        for dtype in (torch.float32, torch.float16):
            assert launch.supports_scaled(a, b, *scales, dtype)
            assert_exact(launch.scaled_mm(a, b, *scales, dtype, config=config), want.to(dtype))
        assert not launch.supports_scaled(a, b.contiguous(), *scales, dtype)
        assert not launch.supports_scaled(a, b, scales[0], torch.ones(m), dtype)
        assert not launch.supports_scaled(a, b, *scales, a.dtype)
    with at_arch(80):
        assert not launch.supports_scaled(a, b, *scales, dtype)


CASES: dict[str, Callable[[], None]] = {
    **{
        f"scaled-{left}-{right}-{path}-{parts}": partial(check_scaled, 72, 48, 288, left, right, path, parts)
        for (left, right), path, parts in itertools.product(
            (("float8_e4m3fn", "float8_e4m3fn"), ("float8_e5m2", "float8_e4m3fn")), ("tma", "pointers"), (1, 2)
        )
    },
    "scaled-odd": partial(check_scaled, 71, 37, 48, "float8_e4m3fn", "float8_e5m2", "tma", 1),
    **{
        f"tma-{dtype}-{layouts}-{m}x{n}x{k}": partial(check_tma, m, n, k, dtype, layouts, tma(subtiles=subtiles))
        for (m, n, k, subtiles), dtype, layouts in itertools.product(
            ((64, 32, 16, 1), (200, 136, 72, 2), (8, 72, 40, 1)), ("fp16", "bf16"), ("NN", "NT", "TN", "TT")
        )
    },
    **{f"nan-{dtype}-{parts}": partial(check_nan_and_inf, dtype, parts) for dtype, parts in (("fp16", 1), ("bf16", 2))},
    **{f"rounding-{dtype}": partial(check_rounding, dtype) for dtype in ("fp16", "bf16")},
    **{
        f"padded-{dtype}-{layouts}": partial(check_padded, 71, 39, 73, dtype, layouts)
        for dtype, layouts in (("fp16", "NN"), ("fp16", "TT"), ("bf16", "NT"), ("fp16", "SR"))
    },
    # One operand is read where it is.
    "padded-fp16-AN": partial(check_padded, 71, 39, 72, "fp16", "AN"),
    # Neither n nor the result's rows are whole chunks of 16 bytes: C is stored by pointers.
    "tma-fp16-NT-odd": partial(check_tma, 71, 39, 72, "fp16", "NT", tma()),
    **{
        f"split-{dtype}-{layouts}-{path}": partial(check_split, dtype, layouts, path)
        for path, dtype, layouts in (
            *itertools.product(("tma",), ("fp16",), ("NN", "NT", "TN", "TT")),
            *itertools.product(("pointers",), ("fp32", "fp16"), ("NN", "NT", "TN", "TT")),
        )
    },
    **{
        f"backward-{layouts}-{m}x{n}x{k}": partial(check_backward, m, n, k, layouts)
        for (m, n, k), layouts in itertools.product(((72, 40, 104), (16, 136, 64)), ("NNN", "NNT", "NTN", "TNN", "TTT"))
    },
}


@pytest.mark.pairwise
@pytest.mark.parametrize("case", CASES)
def test_interpreted(case: str, interpreter: CaseProcess) -> None:
    assert_no_complaint(interpreter.complaint(case))


if __name__ == "__main__":
    serve_cases(CASES)
