"""The launcher on a real GPU: exact products, rounding, settings, threads, streams, offsets past 32 bits."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from limits import scaled
from torch import Tensor

import matmul_grad
from matmul_grad.kernels.gpu import launch
from matmul_grad.kernels.gpu.choose import TMA_TILES, candidates, is_valid_backward
from matmul_grad.kernels.gpu.config import Problem, Target

pytestmark = pytest.mark.gpu

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
NUMBERS = {
    **{name: (dtype, "ieee") for name, dtype in DTYPES.items()},
    "tf32": (torch.float32, "tf32"),
    "tf32x3": (torch.float32, "tf32x3"),
}
DENSE = ("NN", "NT", "TN", "TT")
# Contiguous rows, contiguous columns, every second row and column, stride 0 down or across.
LAYOUTS = ("N", "T", "S", "R", "C")
SIZES = (
    (1, 1, 1), (1, 4096, 256), (257, 1, 129), (127, 128, 65), (128, 256, 64), (257, 129, 513),
    (512, 512, 1024),
)  # fmt: skip


@pytest.fixture
def device() -> torch.device:
    """The GPU; without one a skip, or a failure where MATMUL_GRAD_REQUIRE_GPU=1 says that there is one."""
    if not torch.cuda.is_available():
        if os.environ.get("MATMUL_GRAD_REQUIRE_GPU") == "1":
            pytest.fail("MATMUL_GRAD_REQUIRE_GPU=1, and torch sees no GPU")
        pytest.skip("needs a GPU")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def matmul_setting() -> Iterator[Any]:
    """torch's settings for CUDA products, put back afterwards."""
    setting: Any = torch.backends.cuda.matmul
    before = setting.fp32_precision
    yield setting
    setting.fp32_precision = before


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
    buffer = values.new_full((rows * step + 6, cols * step + 10), float("nan"))
    view = buffer[3 : 3 + rows * step : step, 5 : 5 + cols * step : step]
    view.copy_(values)
    return view


def integers(rows: int, cols: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """-1, 0 and 1: the products' partial sums are exact in every dtype, bfloat16 included."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (rows, cols), generator=generator).to(device, dtype)


def normal(rows: int, cols: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    differ = (got != want).nonzero()
    assert len(differ) == 0, f"{len(differ)} elements differ, the first at {differ[0].tolist()}"


def assert_exact(m: int, n: int, k: int, number: str, layouts: str, device: torch.device, tile: Any = None) -> None:
    """Bits of the exact product, from operands in NaN canaries, into an output in NaN canaries as well."""
    dtype, precision = NUMBERS[number]
    a = embed(integers(m, k, dtype, device, 1), layouts[0])
    b = embed(integers(k, n, dtype, device, 2), layouts[1])
    want = (a.double() @ b.double()).to(dtype)
    assert_same_bits(launch.mm(a, b, precision, config=tile), want)
    out = embed(torch.full_like(want, float("nan")), "N")
    launch.mm(a, b, precision, config=tile, out=out)
    assert_same_bits(out, want)
    assert out._base is not None
    out.fill_(float("nan"))
    assert bool(out._base.isnan().all()), "written outside of out"


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("layouts", DENSE)
@pytest.mark.parametrize("number", NUMBERS)
def test_exact(number: str, layouts: str, size: tuple[int, int, int], device: torch.device) -> None:
    assert_exact(*size, number, layouts, device)


@pytest.mark.parametrize("layouts", [x + y for x, y in itertools.product(LAYOUTS, LAYOUTS) if x + y not in DENSE])
@pytest.mark.parametrize("number", NUMBERS)
def test_exact_in_every_stride(number: str, layouts: str, device: torch.device) -> None:
    # k is small enough for bfloat16 even where two expanded operands add one product k times.
    assert_exact(67, 131, 65, number, layouts, device)


def problem_of(a: Tensor, b: Tensor, precision: str) -> tuple[Problem, Target]:
    return launch.describe(a, b, a.new_empty(a.shape[0], b.shape[1]), precision), launch.target_of(a)


@pytest.mark.parametrize(
    "size", [(272, 272, 144), (271, 273, 145), (8, 136, 4096), (1, 72, 1032), (72, 1, 1031)], ids=str
)
@pytest.mark.parametrize("layouts", DENSE)
@pytest.mark.parametrize("number", NUMBERS)
def test_exact_in_every_tile(number: str, layouts: str, size: tuple[int, int, int], device: torch.device) -> None:
    """Whatever choose weighs for a product: every path, tile and number of parts gives its exact bits."""
    dtype, precision = NUMBERS[number]
    m, n, k = size
    # Of 1000 products and more few enough differ from 0 for their sums to be exact in bfloat16.
    sparse = torch.rand(k, generator=torch.Generator().manual_seed(0)).to(device) < min(1.0, 200 / k)
    a, b = integers(m, k, dtype, device, 1) * sparse, integers(k, n, dtype, device, 2)
    a, b = (x.t().contiguous().t() if letter == "T" else x for x, letter in zip((a, b), layouts, strict=True))
    want = (a.double() @ b.double()).to(dtype)
    tiles = candidates(*problem_of(a, b, precision))
    assert tiles
    for tile in tiles:
        assert_same_bits(launch.mm(a, b, precision, config=tile), want)


@pytest.mark.parametrize("layouts", DENSE)
@pytest.mark.parametrize("number", NUMBERS)
def test_batches(number: str, layouts: str, device: torch.device) -> None:
    """Several products in one launch: of contiguous, sliced and expanded batches, into canaries too."""
    dtype, precision = NUMBERS[number]
    a = torch.stack([integers(72, 136, dtype, device, seed) for seed in (1, 2, 3)])
    b = torch.stack([integers(136, 80, dtype, device, seed) for seed in (4, 5, 6)])
    want = (a.double() @ b.double()).to(dtype)
    a, b = (x.mT.contiguous().mT if letter == "T" else x for x, letter in zip((a, b), layouts, strict=True))
    assert_same_bits(launch.bmm(a, b, precision), want)
    assert_same_bits(launch.bmm(a[::2], b[1:], precision), (a[::2].double() @ b[1:].double()).to(dtype))
    assert_same_bits(launch.bmm(a[:1].expand(3, -1, -1), b, precision), (a[:1].double() @ b.double()).to(dtype))
    out = torch.full((5, 75, 88), float("nan"), dtype=dtype, device=device)
    assert_same_bits(launch.bmm(a, b, precision, out=out[1:4, 2:74, :80]), want)
    out[1:4, 2:74, :80] = float("nan")
    assert bool(out.isnan().all()), "written outside of out"


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("name", ["mm", "bmm", "addmm", "baddbmm", "matmul", "linear"])
def test_functions(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Exact results and gradients of every function, with an out where torch has one, and strictly on these kernels."""
    rows, columns = integers(24, 40, dtype, device, 1), integers(40, 16, dtype, device, 2)
    a, b = torch.stack([rows, rows.roll(1)]), torch.stack([columns, columns.roll(1)])
    bias = integers(1, 16, dtype, device, 3)[0]
    found = {"mm": (rows, columns), "bmm": (a, b), "addmm": (bias, rows, columns), "baddbmm": (bias, a, b),
             "matmul": (a[:, None], b), "linear": (a, columns.mT, bias)}[name]  # fmt: skip
    ours, torchs = getattr(matmul_grad, name), torch.nn.functional.linear if name == "linear" else getattr(torch, name)
    results = []
    for call, kind in ((ours, dtype), (torchs, torch.float64)):
        operands = [x.to(kind).requires_grad_() for x in found]
        with matmul_grad.strict():
            c = call(*operands)
            c.sum().backward()
        results.append([c.detach().to(dtype), *(x.grad.to(dtype) for x in operands)])
    for got, want in zip(*results, strict=True):
        assert_same_bits(got, want)
    if name != "linear":
        out = torch.empty_like(results[0][0])
        with matmul_grad.strict():
            assert_same_bits(ours(*found, out=out), results[0][0])


@pytest.mark.parametrize("size", [(272, 272, 144), (271, 273, 145), (8, 136, 4096), (1, 72, 1032), (72, 1, 1031)])
@pytest.mark.parametrize("number", NUMBERS)
def test_sums_in_every_tile(number: str, size: tuple[int, int, int], device: torch.device) -> None:
    """Every path, tile and number of parts adds exactly what expands to the result, and the result itself."""
    dtype, precision = NUMBERS[number]
    m, n, k = size
    sparse = torch.rand(k, generator=torch.Generator().manual_seed(0)).to(device) < min(1.0, 60 / k)
    a, b = integers(m, k, dtype, device, 1) * sparse, integers(k, n, dtype, device, 2)
    whole, exact = integers(m, n, dtype, device, 3), a.double() @ b.double()
    for tile in candidates(*problem_of(a, b, precision)):
        for source in (whole, whole.t().contiguous().t(), whole[:1], whole[:, :1], whole[0, 0]):
            for beta, alpha in ((1, 1), (-2, 0.5)):
                want = (alpha * exact + beta * source.double()).to(dtype)
                own = source.expand(m, n).clone()
                for added, out in ((source, None), (own, own)):
                    epilogue = launch.Epilogue(alpha, beta, added)
                    assert_same_bits(launch.addmm(a, b, epilogue, out, precision, config=tile), want)
        unread = launch.Epilogue(2, 0, torch.full_like(whole, float("nan")))
        assert_same_bits(launch.addmm(a, b, unread, None, precision, config=tile), (2 * exact).to(dtype))


def test_scales_of_sums_keep_their_precision(device: torch.device) -> None:
    """In float64 all of it; elsewhere float32's. A sum is one multiply-add after alpha times the product."""
    for dtype in DTYPES.values():
        kind = torch.promote_types(dtype, torch.float32)
        a, b = integers(64, 32, dtype, device, 1), integers(32, 48, dtype, device, 2)
        source = integers(64, 48, dtype, device, 3) * 3
        for value in (1 / 3, -0.1, float("inf"), 1 + 2**-30):
            scale = torch.tensor(value, dtype=kind, device=device)
            got = launch.addmm(a, b, launch.Epilogue(value, 0, source))
            want = (scale * (a.to(kind) @ b.to(kind))).to(dtype)
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
            got = launch.addmm(torch.zeros_like(a), b, launch.Epilogue(1, value, source))
            torch.testing.assert_close(got, (scale * source.to(kind)).to(dtype), rtol=0, atol=0, equal_nan=True)
    a, b = torch.zeros(2, 16, 16, dtype=torch.bfloat16, device=device)
    a[:, 0], a[:, 1], b[:2] = 256, 1, 1
    assert bool((launch.addmm(a, b, launch.Epilogue(source=b[0])) == 258).all())  # 257 is no bfloat16


def test_linear_with_a_bias_is_one_launch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = integers(64, 128, torch.bfloat16, device, 1), integers(96, 128, torch.bfloat16, device, 2)
    bias = integers(1, 96, torch.bfloat16, device, 3)[0]
    want = (x.double() @ weight.double().t() + bias.double()).bfloat16()
    runs: list[int] = []
    real = launch._run
    monkeypatch.setattr(launch, "_run", lambda runners, *more: runs.append(len(runners)) or real(runners, *more))
    assert_same_bits(matmul_grad.linear(x, weight, bias), want)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        assert_same_bits(matmul_grad.linear(x, weight, bias), want)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.name.endswith("_addmm")]
    assert runs == [1, 1] and len(names) == 1, names


def test_autocast(device: torch.device) -> None:
    a, w = torch.ones(3, 4, device=device), torch.ones(2, 4, device=device, requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        c = matmul_grad.linear(a, w)
    c.sum().backward()
    assert (c.dtype, w.grad.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("layouts", ["NNN", "NNT", "NTN", "NTT", "TNN", "TTT"])
@pytest.mark.parametrize("size", [(256, 512, 384), (264, 136, 520), (255, 136, 520)], ids=str)
def test_both_gradients_at_once(
    size: tuple[int, int, int], layouts: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One launch in every tile that it may have, and the two that stand in for it, give the exact gradients."""
    m, n, k = size
    grad, a, b = (integers(*shape, torch.bfloat16, device, seed) for seed, shape in enumerate(((m, n), (m, k), (k, n))))
    wants = [(x.double() @ y.double()).bfloat16() for x, y in ((grad, b.t()), (a.t(), grad))]
    grad, a, b = (
        x.t().contiguous().t() if letter == "T" else x for x, letter in zip((grad, a, b), layouts, strict=True)
    )
    for got, want in zip(launch.mm_backward(grad, a, b), wants, strict=True):
        assert_same_bits(got, want)
    problem, target = problem_of(a, b, "ieee")
    for tile in TMA_TILES:
        if launch.fits_tma(grad) and is_valid_backward(tile, problem, layouts[0], target):
            monkeypatch.setattr(launch, "choose_backward", lambda *asked, tile=tile: tile)
            launch.clear_cache()
            both = launch.backward_in_one(grad, a, b)
            assert both is not None
            for got, want in zip(both, wants, strict=True):
                assert_same_bits(got, want)
    launch.clear_cache()


def test_autograd_takes_one_launch_for_both_gradients(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    a = integers(256, 512, torch.bfloat16, device, 1).requires_grad_()
    b = integers(512, 256, torch.bfloat16, device, 2).requires_grad_()
    calls: list[int] = []
    real = launch.backward_in_one
    monkeypatch.setattr(launch, "backward_in_one", lambda *args: calls.append(1) or real(*args))
    grad = integers(256, 256, torch.bfloat16, device, 3)
    matmul_grad.mm(a, b).backward(grad)
    assert calls == [1] and a.grad is not None and b.grad is not None
    assert_same_bits(a.grad, (grad.double() @ b.detach().double().t()).bfloat16())
    assert_same_bits(b.grad, (a.detach().double().t() @ grad.double()).bfloat16())


def test_a_captured_graph_replays_with_new_values(device: torch.device) -> None:
    a, b = integers(256, 8192, torch.bfloat16, device, 1), integers(8192, 64, torch.bfloat16, device, 2)
    grad = integers(256, 64, torch.bfloat16, device, 3)
    work = [lambda: launch.mm(a, b), lambda: launch.mm(a[:1], b), lambda: launch.mm_backward(grad, a, b)]
    for call in work:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = [call() for call in work]
    a.copy_(integers(256, 8192, torch.bfloat16, device, 4) * (torch.rand(8192, device=device) < 0.02))
    graph.replay()
    torch.cuda.synchronize()
    want = (a.double() @ b.double()).bfloat16()
    assert_same_bits(got[0], want)
    assert_same_bits(got[1], want[:1])
    assert_same_bits(got[2][1], (a.t().double() @ grad.double()).bfloat16())


@pytest.mark.parametrize("size", [(272, 256, 144), (16, 80, 8192), (1, 16, 32), (1000, 2048, 4096)], ids=str)
def test_scaled_products_of_8_bits(size: tuple[int, int, int], device: torch.device) -> None:
    """Exact sums of every candidate, scaled and rounded once, beside torch's."""
    if launch.target_of(torch.empty(0, device=device)).arch < 89:
        pytest.skip("no 8-bit matrix unit")
    m, n, k = size
    a = integers(m, k, torch.float32, device, 1).to(torch.float8_e4m3fn)
    b = integers(n, k, torch.float32, device, 2).to(torch.float8_e4m3fn).t()
    scales = torch.tensor(0.5, device=device), torch.tensor(4.0, device=device)
    want = (2 * (a.double() @ b.double())).bfloat16()
    assert_same_bits(matmul_grad.scaled_mm(a, b, *scales, torch.bfloat16), want)
    problem, target = problem_of(a, b, "ieee")
    for tile in candidates(replace(problem, result="bfloat16"), target):
        assert_same_bits(launch.scaled_mm(a, b, *scales, torch.bfloat16, config=tile), want)


def test_three_tf32_products_are_nearly_float32(device: torch.device) -> None:
    a, b = normal(300, 1024, torch.float32, device, 1), normal(1024, 200, torch.float32, device, 2)
    exact = a.double() @ b.double()
    errors = {name: (launch.mm(a, b, name).double() - exact).abs().max() for name in ("ieee", "tf32x3", "tf32")}
    assert errors["tf32x3"] < 8 * errors["ieee"] < errors["tf32"]
    with matmul_grad.float32_products("tf32x3"):
        assert_same_bits(matmul_grad.mm(a, b), launch.mm(a, b, "tf32x3"))


@pytest.mark.parametrize("layouts", DENSE)
@pytest.mark.parametrize("number", ["fp16", "bf16", "fp32", "tf32"])
def test_rounding(number: str, layouts: str, device: torch.device, matmul_setting: Any) -> None:
    """Error against float64 <= 2 * (torch's own + one rounding), positive operands and normal ones."""
    dtype, precision = NUMBERS[number]
    matmul_setting.fp32_precision = precision
    for sign in (torch.abs, torch.clone):
        a = embed(sign(normal(300, 1111, dtype, device, 3)), layouts[0])
        b = embed(sign(normal(1111, 210, dtype, device, 4)), layouts[1])
        exact = a.double() @ b.double()
        error = (launch.mm(a, b).double() - exact).abs()
        one_rounding = torch.finfo(dtype).eps / 2 * exact.abs().max()
        allowed = 2 * ((torch.mm(a, b).double() - exact).abs().max() + one_rounding)
        worst = int(error.argmax())
        assert bool(error.max() <= allowed), f"error {error.max()} > {allowed} at {divmod(worst, error.shape[1])}"


def test_rounding_fp64(device: torch.device) -> None:
    a, b = normal(65, 515, torch.float64, device, 3), normal(515, 67, torch.float64, device, 4)
    wide = [x.cpu().numpy().astype(np.longdouble) for x in (a, b, torch.mm(a, b), launch.mm(a, b))]
    exact = wide[0] @ wide[1]
    one_rounding = np.finfo(np.float64).eps / 2 * abs(exact).max()
    assert abs(wide[3] - exact).max() <= 2 * (abs(wide[2] - exact).max() + one_rounding)


def test_float32_follows_torchs_setting(device: torch.device, matmul_setting: Any) -> None:
    a = torch.tensor([[1 + 2**-11], [1 + 2**-12]], device=device)
    b = torch.ones(1, 1, device=device)
    matmul_setting.fp32_precision = "ieee"
    assert_same_bits(launch.mm(a, b), a)
    matmul_setting.fp32_precision = "tf32"
    assert_same_bits(launch.mm(a, b), torch.tensor([[1 + 2**-10], [1.0]], device=device))
    assert_same_bits(launch.mm(a, b, "ieee"), a)
    matmul_setting.fp32_precision = "ieee"
    assert_same_bits(launch.mm(a, b), a)


@pytest.mark.parametrize("number", NUMBERS)
def test_nan_and_inf_go_where_torch_puts_them(number: str, device: torch.device) -> None:
    dtype, precision = NUMBERS[number]
    inf, nan = float("inf"), float("nan")
    a, b = integers(70, 66, dtype, device, 5), integers(66, 67, dtype, device, 6)
    a[0, 0], a[1, 65], a[2, :], a[69, 3] = nan, inf, 0, -inf
    b[5, 0], b[6, 66], b[7, 2] = inf, nan, -inf
    want = a.double() @ b.double()
    got = launch.mm(a, b, precision).double()
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("number", NUMBERS)
def test_bits_do_not_depend_on_the_run_and_where_asked_not_on_m(number: str, device: torch.device) -> None:
    dtype, precision = NUMBERS[number]
    for k in (1024, 16384):
        a, b = normal(1000, k, dtype, device, 7), normal(k, 512, dtype, device, 8)
        for rows in (1, 16, 1000):
            assert_same_bits(launch.mm(a[:rows], b, precision), launch.mm(a[:rows], b, precision))
        with matmul_grad.deterministic(batch_invariant=True):
            assert_rows_same(a, b, precision)


def assert_rows_same(a: Tensor, b: Tensor, precision: str) -> None:
    whole = launch.mm(a, b, precision)
    for rows in (1, 16, 65, 128, 999, 1000):
        assert_same_bits(launch.mm(a[:rows], b, precision), whole[:rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty(dtype: str, device: torch.device) -> None:
    for m, n, k in ((0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)):
        a, b = (torch.ones(shape, dtype=DTYPES[dtype], device=device) for shape in ((m, k), (k, n)))
        assert_same_bits(launch.mm(a, b), torch.zeros(m, n, dtype=a.dtype, device=device))


def assert_enough_memory(gib: int) -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < gib << 30:
        pytest.skip(f"needs {gib} GiB of free GPU memory")


@pytest.mark.parametrize("layouts", DENSE)
def test_strides_beyond_32_bits(layouts: str, device: torch.device) -> None:
    """Rows 2**30 elements apart: the third one of a tile lies beyond 2**31."""
    assert_enough_memory(6)
    buffer = torch.empty(2**31 + 4096, dtype=torch.float16, device=device)
    far = buffer.as_strided((3, 40), (2**30, 1))
    a = far if layouts[0] == "N" else far.t()
    a.copy_(integers(a.shape[0], a.shape[1], torch.float16, device, 9))
    b = embed(integers(a.shape[1], 33, torch.float16, device, 10), layouts[1])
    assert_same_bits(launch.mm(a, b), (a.double() @ b.double()).half())
    left = integers(17, a.shape[0], torch.float16, device, 11)
    assert_same_bits(launch.mm(left, a), (left.double() @ a.double()).half())


def test_more_elements_than_32_bits_count(device: torch.device) -> None:
    assert_enough_memory(10)
    m, n = 2**20 + 3, 2049
    a, b = integers(m, 2, torch.float16, device, 12), integers(2, n, torch.float16, device, 13)
    got = launch.mm(a, b)
    for rows in (slice(0, 300), slice(2**19, 2**19 + 300), slice(m - 300, m)):
        assert_same_bits(got[rows], (a[rows].double() @ b.double()).half())


class Product(torch.autograd.Function):
    """mm with both gradients as mm of views: what autograd's own threads run."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return launch.mm(a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        ctx.thread = threading.get_ident()
        return launch.mm(grad, b.t()), launch.mm(a.t(), grad)


def test_backward_runs_in_autograds_thread_on_the_operands_device(device: torch.device) -> None:
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    a = integers(67, 65, torch.float32, last, 14).requires_grad_()
    b = integers(65, 33, torch.float32, last, 15).requires_grad_()
    product = Product.apply(a, b)
    # sum() sends back an expanded gradient, stride 0 both ways.
    product.sum().backward()
    ones = torch.ones(67, 33, device=last)
    assert torch.cuda.current_device() == device.index
    assert a.grad is not None and b.grad is not None and a.grad.device == last
    assert_same_bits(a.grad, ones @ b.detach().t())
    assert_same_bits(b.grad, a.detach().t() @ ones)


def test_four_threads_at_once(device: torch.device) -> None:
    a, b = integers(300, 200, torch.bfloat16, device, 16), integers(200, 100, torch.bfloat16, device, 17)
    want, got = (a.double() @ b.double()).bfloat16(), [torch.empty(0)] * 4

    def work(index: int) -> None:
        for _ in range(20):
            got[index] = launch.mm(a, b)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for result in got:
        assert_same_bits(result, want)


def test_the_current_stream_is_used(device: torch.device) -> None:
    """A product queued behind a slow stream sees what that stream wrote before it."""
    stream = torch.cuda.Stream(device)
    a, b = torch.zeros(64, 64, device=device), torch.eye(64, device=device)
    launch.mm(a, b, "ieee")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        a.fill_(3.0)
        got = launch.mm(a, b, "ieee")
    stream.synchronize()
    assert_same_bits(got, torch.full_like(got, 3.0))


NATIVE = """
import threading
import torch, matmul_grad
from matmul_grad import cuda
from matmul_grad.kernels.native import launch_table as table
from matmul_grad.kernels.gpu import launch

def draw(rows, cols, dtype, letter):
    x = torch.randint(-1, 2, (rows, cols), device="cuda").to(dtype)
    return x.t().contiguous().t() if letter == "T" else x

def check(a, b):
    want = launch.mm(a, b)
    for _ in range(3):
        assert torch.equal(matmul_grad.mm(a, b), want), (a.shape, b.shape, a.dtype)

sizes = (1, 512, 256), (512, 1, 256), (8, 128, 4096), (256, 384, 512), (257, 129, 513), (64, 64, 65536)
for dtype in (torch.bfloat16, torch.float16, torch.float64):
    for m, n, k in sizes:
        for letters in ("NN", "NT", "TN", "TT"):
            check(draw(m, k, dtype, letters[0]), draw(k, n, dtype, letters[1]))
assert cuda.status() == "", cuda.status()
made, refused = table.counts()
assert made >= 60 and refused == 0, (made, refused)
a, b = draw(256, 512, torch.bfloat16, "N"), draw(512, 384, torch.bfloat16, "N")
check(a, b)
side = torch.cuda.Stream()
with torch.cuda.stream(side):
    check(a, b)
side.synchronize()
thread = threading.Thread(target=check, args=(a, b))
thread.start()
thread.join()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    got = matmul_grad.mm(a, b)
a.copy_(draw(256, 512, torch.bfloat16, "N"))
graph.replay()
torch.cuda.synchronize()
assert torch.equal(got, launch.mm(a, b))
x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
matmul_grad.mm(x, y).sum().backward()
assert torch.equal(x.grad, launch.mm(torch.ones_like(got), b.t()))
assert table.counts()[1] == 0
"""


def test_the_native_entry(device: torch.device) -> None:
    """Every path and layout through the compiled entry, on side streams, other threads, in a graph, under autograd."""
    environment = os.environ | {"MATMUL_GRAD_NATIVE_CUDA": "1"}
    done = subprocess.run(
        [sys.executable, "-c", NATIVE], env=environment, capture_output=True, text=True, timeout=scaled(600)
    )
    assert done.returncode == 0, done.stderr[-3000:]
