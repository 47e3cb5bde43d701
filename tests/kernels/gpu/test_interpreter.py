"""The kernel under Triton's interpreter: exact results, canaries, NaN and Inf, every layout, no GPU needed.

Triton reads TRITON_INTERPRET when it is imported, so the cases run in a fresh process: this file as a program. It gets
one case at a time and answers with what is wrong, so each case fails by itself.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from case_process import CaseProcess, assert_no_complaint, serve
from limits import scaled
from torch import Tensor

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
# Contiguous rows, contiguous columns, every second row and column, stride 0 down or across.
LAYOUTS = ("N", "T", "S", "R", "C")
# Around one and two 16-wide tiles, primes, and skinny each way.
SIZES = (
    (1, 1, 1), (15, 17, 16), (16, 16, 16), (17, 15, 33), (31, 37, 41), (1, 33, 19), (33, 1, 19), (33, 19, 1),
    (48, 16, 32), (67, 5, 7),
)  # fmt: skip
EMPTY = ((0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0))


def embed(values: Tensor, layout: str) -> Tensor:
    """The values as a view in the middle of a buffer of NaN; "R" and "C" repeat the first row or column."""
    rows, cols = values.shape
    if layout == "R":
        return embed(values[:1], "N").expand(rows, cols)
    if layout == "C":
        return embed(values[:, :1], "T").expand(rows, cols)
    if layout == "T":
        return embed(values.t(), "N").t()
    step = 2 if layout == "S" else 1
    buffer = torch.full((rows * step + 6, cols * step + 10), float("nan"), dtype=values.dtype)
    view = buffer[3 : 3 + rows * step : step, 5 : 5 + cols * step : step]
    view.copy_(values)
    return view


def integers(rows: int, cols: int, dtype: torch.dtype, seed: int) -> Tensor:
    """-1, 0 and 1: sums of up to 256 products are exact in every dtype, bfloat16 included."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (rows, cols), generator=generator).to(dtype)


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    differ = (got != want).nonzero()
    assert len(differ) == 0, f"{len(differ)} elements differ, the first at {differ[0].tolist()}"


def tile(size: int = 16) -> Any:
    from matmul_grad.kernels.gpu.config import TileConfig

    return TileConfig(size, size, 16, stages=2, warps=4, group_m=2)


def check_exact(m: int, n: int, k: int, dtype: str, layouts: str, config: Any = None) -> None:
    """Bits of the exact product, from operands in NaN canaries into an output in NaN canaries."""
    from matmul_grad.kernels.gpu import launch

    a = embed(integers(m, k, DTYPES[dtype], 1), layouts[0])
    b = embed(integers(k, n, DTYPES[dtype], 2), layouts[1])
    want = (a.long() @ b.long()).to(DTYPES[dtype])
    fresh = launch.mm(a, b, config=config() if config else None)
    assert fresh.is_contiguous() and fresh.dtype == a.dtype
    assert_same_bits(fresh, want)

    for layout in "NTS" if dtype == "fp32" else "N":
        out = embed(torch.full((m, n), float("nan"), dtype=a.dtype), layout)
        buffer = out._base
        assert buffer is not None
        assert launch.mm(a, b, config=config() if config else None, out=out) is out
        assert_same_bits(out, want)
        out.fill_(float("nan"))
        assert bool(buffer.isnan().all()), "written outside of out"


def check_wide(layouts: str) -> None:
    """64-bit offsets inside a tile give the bits that 32-bit ones give."""
    from matmul_grad.kernels.gpu import launch, plan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "is_wide", lambda extents: True)
        launch.clear_cache()
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


def long(x: Tensor) -> np.ndarray:
    """The same values with a mantissa of 64 bits or more, so that float64 has an oracle too."""
    return x.double().numpy().astype(np.longdouble)


def check_rounding(dtype: str) -> None:
    """Error against a wider product <= 2 * (torch's own + one rounding), for two kinds of operands."""
    from matmul_grad.kernels.gpu import launch

    generator = torch.Generator().manual_seed(5)
    for make in (torch.rand, torch.randn):
        a, b = make(33, 131, generator=generator), make(131, 35, generator=generator)
        a, b = a.to(DTYPES[dtype]), b.to(DTYPES[dtype])
        exact = long(a) @ long(b)
        one_rounding = torch.finfo(a.dtype).eps / 2 * abs(exact).max()
        allowed = 2 * (abs(long(a @ b) - exact).max() + one_rounding)
        worst = abs(long(launch.mm(a, b)) - exact).max()
        assert worst <= allowed, f"error {worst} > {allowed}"


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
    assert_same_bits(launch.mm(a, b, "tf32").double(), nearest_tf32(a) @ nearest_tf32(b))
    assert_same_bits(launch.mm(a, b, "ieee"), (a.double() @ b.double()).float())
    special = torch.tensor([[float("inf")], [-float("inf")]])
    with np.errstate(invalid="ignore"):
        assert_same_bits(launch.mm(special, torch.ones(1, 1), "tf32"), special)
    payloads = torch.tensor([[0x7F800001], [0x7FFFFFFF], [-1]], dtype=torch.int32).view(torch.float32)
    assert bool(launch.mm(payloads, torch.ones(1, 1), "tf32").isnan().all())


@contextlib.contextmanager
def rows_alike() -> Iterator[None]:
    """Blocks are multiplied without BLAS, whose bits depend on a row's place in the block on CPUs with AVX2 alone."""

    def matmul(a: np.ndarray, b: np.ndarray, dtype: Any) -> np.ndarray:
        return np.einsum("...ij,...jk->...ik", a.astype(dtype), b.astype(dtype))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "matmul", matmul)
        yield


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
    assert_same_bits(got, torch.zeros(m, n, dtype=DTYPES[dtype]))
    out = torch.full((m, n), float("nan"), dtype=DTYPES[dtype])
    launch.mm(torch.ones(m, k, dtype=out.dtype), torch.ones(k, n, dtype=out.dtype), out=out)
    assert_same_bits(out, torch.zeros_like(out))


def check_refusals() -> None:
    """What cannot be multiplied is a ValueError that says so, and leaves out as it was."""
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
    assert_same_bits(out, torch.full((2, 4), 7.0))


def check_batch(dtype: str, layouts: str, config: Any, arch: int = 80) -> None:
    """One launch for a batch: contiguous, expanded, sliced and transposed products, into canaries too."""
    from matmul_grad.kernels.gpu import launch

    a = torch.stack([integers(72, 40, DTYPES[dtype], seed) for seed in (1, 2, 3)])
    b = torch.stack([integers(40, 136, DTYPES[dtype], seed) for seed in (4, 5, 6)])
    want = (a.long() @ b.long()).to(a.dtype)
    a, b = (x.mT.contiguous().mT if letter == "T" else x for x, letter in zip((a, b), layouts, strict=True))
    with at_arch(arch):
        assert_same_bits(launch.bmm(a, b, config=config()), want)
        assert_same_bits(launch.bmm(a[::2], b[1:], config=config()), (a[::2].long() @ b[1:].long()).to(a.dtype))
        assert_same_bits(launch.bmm(a[:1].expand(3, -1, -1), b), (a[:1].long() @ b.long()).to(a.dtype))
        out = torch.full((5, 76, 144), float("nan"), dtype=a.dtype)
        launch.bmm(a, b, config=config(), out=out[1:4, 2:74, :136])
    assert_same_bits(out[1:4, 2:74, :136], want)
    out[1:4, 2:74, :136] = float("nan")
    assert bool(out.isnan().all()), "written outside of out"


def check_sums(dtype: str) -> None:
    """Of matrices and of batches, with what expands to them, scaled; into new memory, into out, into what is added."""
    from matmul_grad.kernels.gpu import launch

    a = torch.stack([integers(20, 24, DTYPES[dtype], seed) for seed in (1, 2)])
    b = torch.stack([integers(24, 18, DTYPES[dtype], seed) for seed in (3, 4)])
    for x, y, ranks in ((a, b, 3), (a[0], b[0], 2)):
        product = (x.long() @ y.long()).double()
        whole = torch.stack([integers(20, 18, DTYPES[dtype], seed) for seed in (5, 6)])
        whole = whole if ranks == 3 else whole[0]
        for source in (whole, whole.mT.contiguous().mT, whole[..., :1, :], whole[..., :1], whole.flatten()[0]):
            for beta, alpha in ((1, 1), (0, 1), (2, 1), (0.5, 2), (0, -1)):
                want = (alpha * product + beta * source.double()).to(x.dtype)
                assert_same_bits(launch.addmm(x, y, launch.Epilogue(alpha, beta, source)), want)
                out = torch.full_like(want.mT, float("nan")).mT
                assert launch.addmm(x, y, launch.Epilogue(alpha, beta, source), out) is out
                assert_same_bits(out, want)
        spoilt = torch.full_like(whole, float("nan"))
        assert_same_bits(launch.addmm(x, y, launch.Epilogue(1, 0, spoilt), spoilt), product.to(x.dtype))
        own = whole.clone()
        launch.addmm(x, y, launch.Epilogue(1, 2, own), own)
        assert_same_bits(own, (product + 2 * whole.double()).to(x.dtype))


@contextlib.contextmanager
def at_arch(arch: int) -> Iterator[None]:
    """As if on a GPU of three multiprocessors, so that programs have several tiles each."""
    from matmul_grad.kernels.gpu import launch
    from matmul_grad.kernels.gpu.config import Target

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "INTERPRETER", Target(arch, 3, 227 << 10))
        launch.clear_cache()
        yield
    launch.clear_cache()


def tma(parts: int = 1, subtiles: int = 1) -> Any:
    from matmul_grad.kernels.gpu.config import TileConfig

    return TileConfig(64, 32, 16, stages=2, warps=4, group_m=2, split_k=parts, path="tma", subtiles=subtiles)


def pointers(parts: int = 1) -> Any:
    from matmul_grad.kernels.gpu.config import TileConfig

    return TileConfig(64, 16, 16, stages=2, warps=4, group_m=2, split_k=parts)


def check_tma(m: int, n: int, k: int, dtype: str, layouts: str, config: Any) -> None:
    """The copy engine's path: exact, whether C can be stored through it or not, and only where the rule allows."""
    from matmul_grad.kernels.gpu import launch

    a, b = integers(m, k, DTYPES[dtype], 1), integers(k, n, DTYPES[dtype], 2)
    want = (a.long() @ b.long()).to(a.dtype)
    a, b = (x.t().contiguous().t() if letter == "T" else x for x, letter in zip((a, b), layouts, strict=True))
    assert launch.fits_tma(a) and launch.fits_tma(b)
    with at_arch(90):
        assert_same_bits(launch.mm(a, b, config=config), want)
        out = torch.full((m + 2, n + 8), float("nan"), dtype=a.dtype)
        launch.mm(a, b, config=config, out=out[1:-1, :n])
        assert_same_bits(out[1:-1, :n], want)
        out[1:-1, :n] = float("nan")
        assert bool(out.isnan().all()), "written outside of out"
        with pytest.raises(ValueError, match="is not valid for"):
            launch.mm(a.contiguous()[:, 1:], b[1:], config=config)


def check_split(dtype: str, layouts: str, path: str) -> None:
    """k cut in parts: exact where sums are, and the parts are added in order, whatever m and n are."""
    from matmul_grad.kernels.gpu import launch

    config = {"tma": tma, "pointers": pointers}[path](3)
    check = check_tma if path == "tma" else check_cut
    check(72, 40, 232, dtype, layouts, config)
    a, b = torch.randn(64, 232).to(DTYPES[dtype]), torch.randn(232, 72).to(DTYPES[dtype])
    with at_arch(90), rows_alike():
        whole = launch.mm(a, b, config=config)
        assert_same_bits(launch.mm(a[:8], b, config=config), whole[:8])
        parts = [
            launch.mm(a[:, i:j].float(), b[i:j].float(), config=pointers()) for i, j in ((0, 80), (80, 160), (160, 232))
        ]
    assert_same_bits(whole, (parts[0] + parts[1] + parts[2]).to(a.dtype))


def check_cut(m: int, n: int, k: int, dtype: str, layouts: str, config: Any) -> None:
    with at_arch(90):
        check_exact(m, n, k, dtype, layouts, lambda: config)


def check_vector(m: int, n: int, k: int, dtype: str, layouts: str, parts: int) -> None:
    """One row or one column, with k whole and cut."""
    from matmul_grad.kernels.gpu.config import TileConfig

    check_exact(m, n, k, dtype, layouts, lambda: TileConfig(32, 1, 64, 2, 4, split_k=parts, path="vector"))


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
            assert_same_bits(got, want)
        expanded = grad[:1].expand(m, n)
        assert launch.backward_in_one(expanded, a, b) is None
        da, db = launch.mm_backward(expanded, a, b)
        assert da is not None and db is not None
        assert_same_bits(da, (expanded.long() @ b.long().t()).half())
        assert_same_bits(db, (a.long().t() @ expanded.long()).half())
        da, db = launch.mm_backward(grad, a, b, (True, False))
        assert db is None and da is not None
        assert_same_bits(da, wants[0])


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
            assert_same_bits(launch.scaled_mm(a, b, *scales, dtype, config=config), want.to(dtype))
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
    # Neither n nor the result's rows are whole chunks of 16 bytes: C is stored by pointers.
    "tma-fp16-NT-odd": partial(check_tma, 71, 39, 72, "fp16", "NT", tma()),
    **{
        f"batch-{dtype}-{layouts}-pointers": partial(check_batch, dtype, layouts, tile)
        for dtype, layouts in itertools.product(DTYPES, ("NN", "TT"))
    },
    **{f"batch-fp16-{layouts}-tma": partial(check_batch, "fp16", layouts, tma, 90) for layouts in ("NN", "NT", "TN")},
    **{
        f"split-{dtype}-{layouts}-{path}": partial(check_split, dtype, layouts, path)
        for path, dtype, layouts in (
            *itertools.product(("tma",), ("fp16",), ("NN", "NT", "TN", "TT")),
            *itertools.product(("pointers",), ("fp32", "fp16"), ("NN", "NT", "TN", "TT")),
        )
    },
    **{
        f"vector-{dtype}-{layouts}-{m}x{n}x{k}-{parts}": partial(check_vector, m, n, k, dtype, layouts, parts)
        for (m, n), k, dtype, layouts, parts in itertools.product(
            ((1, 70), (70, 1), (1, 1)), (7, 530), ("fp32", "fp16", "fp64"), ("NN", "TT", "SS", "NT"), (1, 2)
        )
        if parts == 1 or k > 512
    },
    **{
        f"backward-{layouts}-{m}x{n}x{k}": partial(check_backward, m, n, k, layouts)
        for (m, n, k), layouts in itertools.product(((72, 40, 104), (16, 136, 64)), ("NNN", "NNT", "NTN", "TNN", "TTT"))
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
    **{f"sums-{dtype}": partial(check_sums, dtype) for dtype in DTYPES},
    "tf32": check_tf32,
    "refusals": check_refusals,
}


@pytest.fixture(scope="module")
def interpreter() -> Iterator[CaseProcess]:
    """A process of its own for the cases of this module; one that ends is followed by another."""
    process = CaseProcess.interpreted(__file__)
    yield process
    process.close()


# Each line is a setting, and what a float32 product on a GPU is then; old and new ways of setting mix.
PRECISION_NOW = """
import torch
from matmul_grad.kernels.gpu.launch import precision_now
assert precision_now() == "ieee"
torch.set_float32_matmul_precision("high"); assert precision_now() == "tf32"
torch.set_float32_matmul_precision("highest"); assert precision_now() == "ieee"
torch.backends.cuda.matmul.allow_tf32 = True; assert precision_now() == "tf32"
torch.backends.cuda.matmul.allow_tf32 = False; assert precision_now() == "ieee"
torch.backends.cuda.matmul.fp32_precision = "tf32"; assert precision_now() == "tf32"
torch.backends.cuda.matmul.fp32_precision = "ieee"; assert precision_now() == "ieee"
"""


def test_precision_now_follows_every_setting_without_a_warning() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"}
    command = [sys.executable, "-W", "error", "-c", PRECISION_NOW]
    child = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=scaled(600))
    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")


def test_without_the_interpreter_cpu_tensors_are_refused() -> None:
    from matmul_grad.kernels.gpu import launch

    if launch.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set for the whole session")
    x = torch.ones(2, 2)
    assert not launch.supports(x)
    with pytest.raises(ValueError, match="both operands must be on one GPU"):
        launch.mm(x, x)


@pytest.mark.parametrize("case", CASES)
def test_interpreted(case: str, interpreter: CaseProcess) -> None:
    assert_no_complaint(interpreter.complaint(case))


if __name__ == "__main__":
    # The interpreter of triton 3.6, on numpy before 2.4, where it is an error.
    warnings.filterwarnings("ignore", message="Conversion of an array with ndim > 0")
    serve(lambda case: CASES[case]())
