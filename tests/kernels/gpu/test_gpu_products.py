"""Products on a real GPU: exact bits in every tile, layout and dtype, epilogues, rounding, determinism."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import gpu_targets
import numpy as np
import pytest
import torch
from gpu_cases import DENSE, DTYPES, LAYOUTS, assert_same_bits, embed, embed_aligned, integers
from torch import Tensor
from torch_warnings import PROFILER

import matmul_grad
from matmul_grad.kernels.gpu import launch
from matmul_grad.kernels.gpu.choose import candidates
from matmul_grad.kernels.gpu.config import Problem, Target

pytestmark = pytest.mark.gpu

DTYPE_NAMES = {name: (getattr(torch, dtype), precision) for name, (dtype, precision) in gpu_targets.DTYPE_NAMES.items()}
SIZES = (
    (1, 1, 1), (1, 4096, 256), (257, 1, 129), (127, 128, 65), (128, 256, 64), (264, 136, 520), (257, 129, 513),
    (512, 512, 1024),
)  # fmt: skip


def normal(rows: int, cols: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_exact(m: int, n: int, k: int, dtype_name: str, layouts: str, device: torch.device, tile: Any = None) -> None:
    """Bits of the exact product, from operands in NaN canaries, into an output in NaN canaries as well.

    Where the sizes allow it also with all of them where TMA reads and writes them.
    """
    dtype, precision = DTYPE_NAMES[dtype_name]
    for place in (embed, embed_aligned) if set(layouts) <= set("NT") else (embed,):
        a = place(integers(m, k, dtype, 1, device), layouts[0])
        b = place(integers(k, n, dtype, 2, device), layouts[1])
        want = (a.double() @ b.double()).to(dtype)
        assert_same_bits(launch.mm(a, b, precision, config=tile), want)
        out = place(torch.full_like(want, float("nan")), "N")
        launch.mm(a, b, precision, config=tile, out=out)
        assert_same_bits(out, want)
        assert out._base is not None
        out.fill_(float("nan"))
        assert bool(out._base.isnan().all()), "written outside of out"


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("layouts", DENSE)
@pytest.mark.parametrize("dtype_name", DTYPE_NAMES)
def test_products_are_exact(dtype_name: str, layouts: str, size: tuple[int, int, int], device: torch.device) -> None:
    assert_exact(*size, dtype_name, layouts, device)


@pytest.mark.parametrize("layouts", [x + y for x, y in itertools.product(LAYOUTS, LAYOUTS) if x + y not in DENSE])
@pytest.mark.parametrize("dtype_name", DTYPE_NAMES)
def test_products_are_exact_for_every_stride(dtype_name: str, layouts: str, device: torch.device) -> None:
    # k is small enough for bfloat16 even where two expanded operands add one product k times.
    assert_exact(67, 131, 65, dtype_name, layouts, device)


def problem_of(a: Tensor, b: Tensor, precision: str) -> tuple[Problem, Target]:
    return launch.describe(a, b, a.new_empty(a.shape[0], b.shape[1]), precision), launch.target_of(a)


@pytest.mark.slow
@pytest.mark.parametrize(
    "size", [(272, 272, 144), (271, 273, 145), (8, 136, 4096), (1, 72, 1032), (72, 1, 1031)], ids=str
)
@pytest.mark.parametrize("layouts", DENSE)
@pytest.mark.parametrize("dtype_name", DTYPE_NAMES)
def test_products_are_exact_in_every_tile(
    dtype_name: str, layouts: str, size: tuple[int, int, int], device: torch.device
) -> None:
    """Whatever choose weighs for a product: every path, tile and number of parts gives its exact bits."""
    dtype, precision = DTYPE_NAMES[dtype_name]
    m, n, k = size
    # Of 1000 products and more few enough differ from 0 for their sums to be exact in bfloat16.
    sparse = torch.rand(k, generator=torch.Generator().manual_seed(0)).to(device) < min(1.0, 200 / k)
    a, b = integers(m, k, dtype, 1, device) * sparse, integers(k, n, dtype, 2, device)
    a, b = (x.t().contiguous().t() if letter == "T" else x for x, letter in zip((a, b), layouts, strict=True))
    want = (a.double() @ b.double()).to(dtype)
    tiles = candidates(*problem_of(a, b, precision))
    assert tiles
    for tile in tiles:
        assert_same_bits(launch.mm(a, b, precision, config=tile), want)


@pytest.mark.parametrize("layouts", DENSE)
@pytest.mark.parametrize("dtype_name", DTYPE_NAMES)
def test_batches_are_exact(dtype_name: str, layouts: str, device: torch.device) -> None:
    """Several products in one launch: of contiguous, sliced and expanded batches, into canaries too."""
    dtype, precision = DTYPE_NAMES[dtype_name]
    a = torch.stack([integers(72, 136, dtype, seed, device) for seed in (1, 2, 3)])
    b = torch.stack([integers(136, 80, dtype, seed, device) for seed in (4, 5, 6)])
    want = (a.double() @ b.double()).to(dtype)
    a, b = (x.mT.contiguous().mT if letter == "T" else x for x, letter in zip((a, b), layouts, strict=True))
    assert_same_bits(launch.bmm(a, b, precision), want)
    assert_same_bits(launch.bmm(a[::2], b[1:], precision), (a[::2].double() @ b[1:].double()).to(dtype))
    assert_same_bits(launch.bmm(a[:1].expand(3, -1, -1), b, precision), (a[:1].double() @ b.double()).to(dtype))
    out = torch.full((5, 75, 88), float("nan"), dtype=dtype, device=device)
    assert_same_bits(launch.bmm(a, b, precision, out=out[1:4, 2:74, :80]), want)
    out[1:4, 2:74, :80] = float("nan")
    assert bool(out.isnan().all()), "written outside of out"


@pytest.mark.parametrize("dtype_name", ["bf16", "fp32"])
def test_batches_of_more_than_65535_products_are_exact(dtype_name: str, device: torch.device) -> None:
    """More than a grid has along y, by pointers and where TMA reads them."""
    dtype, precision = DTYPE_NAMES[dtype_name]
    for n in (3, 8):
        a = integers(70_000 * n, n, dtype, 1, device).view(-1, n, n)
        b = integers(70_000 * n, n, dtype, 2, device).view(-1, n, n)
        assert_same_bits(launch.bmm(a, b, precision), (a.double() @ b.double()).to(dtype))


@pytest.mark.parametrize("layouts", ["NN", "TT", "SR"])
def test_large_unaligned_products_are_exact(layouts: str, device: torch.device) -> None:
    """Through padded copies, where the GPU has TMA."""
    m, n, k = 1031, 515, 1027
    a = embed(integers(m, k, torch.float16, 1, device), layouts[0])
    b = embed(integers(k, n, torch.float16, 2, device), layouts[1])
    assert_same_bits(launch.mm(a, b), (a.double() @ b.double()).half())
    kept = launch.launch_of(a, b)
    assert kept is not None
    assert kept.padded == ((True, True) if 90 <= launch.target_of(a).arch < 120 else (False, False))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("name", ["mm", "bmm", "addmm", "baddbmm", "matmul", "linear"])
def test_functions_and_their_gradients_are_exact(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Exact results and gradients of every function, with an out where torch has one, and strictly on these kernels."""
    rows, columns = integers(24, 40, dtype, 1, device), integers(40, 16, dtype, 2, device)
    a, b = torch.stack([rows, rows.roll(1)]), torch.stack([columns, columns.roll(1)])
    bias = integers(1, 16, dtype, 3, device)[0]
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


@pytest.mark.slow
@pytest.mark.parametrize("size", [(272, 272, 144), (271, 273, 145), (8, 136, 4096), (1, 72, 1032), (72, 1, 1031)])
@pytest.mark.parametrize("dtype_name", DTYPE_NAMES)
def test_addmm_is_exact_in_every_tile(dtype_name: str, size: tuple[int, int, int], device: torch.device) -> None:
    """Every path, tile and number of parts adds exactly what expands to the result, and the result itself."""
    dtype, precision = DTYPE_NAMES[dtype_name]
    m, n, k = size
    sparse = torch.rand(k, generator=torch.Generator().manual_seed(0)).to(device) < min(1.0, 60 / k)
    a, b = integers(m, k, dtype, 1, device) * sparse, integers(k, n, dtype, 2, device)
    whole, exact = integers(m, n, dtype, 3, device), a.double() @ b.double()
    for tile in candidates(*problem_of(a, b, precision)):
        for source in (whole, whole.t().contiguous().t(), whole[:1], whole[:, :1], whole[0, 0]):
            for beta, alpha in ((1, 1), (-2, 0.5)):
                want = (alpha * exact + beta * source.double()).to(dtype)
                # Row by row, or tiles that write C by rows are not valid for it.
                own = source.expand(m, n).clone(memory_format=torch.contiguous_format)
                for added, out in ((source, None), (own, own)):
                    epilogue = launch.Epilogue(alpha, beta, added)
                    assert_same_bits(launch.addmm(a, b, epilogue, out, precision, config=tile), want)
        unread = launch.Epilogue(2, 0, torch.full_like(whole, float("nan")))
        assert_same_bits(launch.addmm(a, b, unread, None, precision, config=tile), (2 * exact).to(dtype))


def test_alpha_and_beta_keep_the_precision_of_the_accumulator(device: torch.device) -> None:
    """In float64 all of it; elsewhere float32's. A sum is one multiply-add after alpha times the product."""
    for dtype in DTYPES.values():
        kind = torch.promote_types(dtype, torch.float32)
        a, b = integers(64, 32, dtype, 1, device), integers(32, 48, dtype, 2, device)
        source = integers(64, 48, dtype, 3, device) * 3
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


@PROFILER
def test_linear_with_a_bias_is_one_launch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = integers(64, 128, torch.bfloat16, 1, device), integers(96, 128, torch.bfloat16, 2, device)
    bias = integers(1, 96, torch.bfloat16, 3, device)[0]
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


@pytest.mark.slow
@pytest.mark.parametrize("size", [(272, 256, 144), (16, 80, 8192), (1, 16, 32), (1000, 2048, 4096)], ids=str)
def test_8_bit_products_are_exact(size: tuple[int, int, int], device: torch.device) -> None:
    """Exact sums of every candidate, scaled and rounded once, beside torch's."""
    if launch.target_of(torch.empty(0, device=device)).arch < 89:
        pytest.skip("no 8-bit matrix unit")
    m, n, k = size
    a = integers(m, k, torch.float32, 1, device).to(torch.float8_e4m3fn)
    b = integers(n, k, torch.float32, 2, device).to(torch.float8_e4m3fn).t()
    scales = torch.tensor(0.5, device=device), torch.tensor(4.0, device=device)
    want = (2 * (a.double() @ b.double())).bfloat16()
    assert_same_bits(matmul_grad.scaled_mm(a, b, *scales, torch.bfloat16), want)
    problem, target = problem_of(a, b, "ieee")
    for tile in candidates(replace(problem, result="bfloat16"), target):
        assert_same_bits(launch.scaled_mm(a, b, *scales, torch.bfloat16, config=tile), want)


def test_tf32x3_is_nearly_as_exact_as_float32(device: torch.device) -> None:
    a, b = normal(300, 1024, torch.float32, device, 1), normal(1024, 200, torch.float32, device, 2)
    exact = a.double() @ b.double()
    errors = {name: (launch.mm(a, b, name).double() - exact).abs().max() for name in ("ieee", "tf32x3", "tf32")}
    assert errors["tf32x3"] < 8 * errors["ieee"] < errors["tf32"]
    with matmul_grad.float32_products("tf32x3"):
        assert_same_bits(matmul_grad.mm(a, b), launch.mm(a, b, "tf32x3"))


@pytest.mark.parametrize("layouts", DENSE)
@pytest.mark.parametrize("dtype_name", ["fp16", "bf16", "fp32", "tf32"])
def test_error_is_at_most_twice_that_of_torch(
    dtype_name: str, layouts: str, device: torch.device, matmul_setting: Any
) -> None:
    """Error against float64 <= 2 * (torch's + one rounding), positive operands and normal ones."""
    dtype, precision = DTYPE_NAMES[dtype_name]
    matmul_setting.fp32_precision = precision
    for sign in (torch.abs, torch.clone):
        a, b = sign(normal(304, 1112, dtype, device, 3)), sign(normal(1112, 208, dtype, device, 4))
        assert_error_bound(embed_aligned(a, layouts[0]), embed_aligned(b, layouts[1]))
        assert_error_bound(embed(a[:-1, :-1], layouts[0]), embed(b[:-1, :-1], layouts[1]))


def assert_error_bound(a: Tensor, b: Tensor) -> None:
    exact = a.double() @ b.double()
    error = (launch.mm(a, b).double() - exact).abs()
    one_rounding = torch.finfo(a.dtype).eps / 2 * exact.abs().max()
    allowed = 2 * ((torch.mm(a, b).double() - exact).abs().max() + one_rounding)
    worst = int(error.argmax())
    assert bool(error.max() <= allowed), f"error {error.max()} > {allowed} at {divmod(worst, error.shape[1])}"


def test_error_of_float64_is_at_most_twice_that_of_torch(device: torch.device) -> None:
    a, b = normal(65, 515, torch.float64, device, 3), normal(515, 67, torch.float64, device, 4)
    wide = [x.cpu().numpy().astype(np.longdouble) for x in (a, b, torch.mm(a, b), launch.mm(a, b))]
    exact = wide[0] @ wide[1]
    one_rounding = np.finfo(np.float64).eps / 2 * abs(exact).max()
    assert abs(wide[3] - exact).max() <= 2 * (abs(wide[2] - exact).max() + one_rounding)


def test_float32_follows_torch_setting(device: torch.device, matmul_setting: Any) -> None:
    a = torch.tensor([[1 + 2**-11], [1 + 2**-12]], device=device)
    b = torch.ones(1, 1, device=device)
    matmul_setting.fp32_precision = "ieee"
    assert_same_bits(launch.mm(a, b), a)
    matmul_setting.fp32_precision = "tf32"
    assert_same_bits(launch.mm(a, b), torch.tensor([[1 + 2**-10], [1.0]], device=device))
    assert_same_bits(launch.mm(a, b, "ieee"), a)
    matmul_setting.fp32_precision = "ieee"
    assert_same_bits(launch.mm(a, b), a)


@pytest.mark.parametrize("dtype_name", DTYPE_NAMES)
def test_nan_and_inf_go_where_torch_puts_them(dtype_name: str, device: torch.device) -> None:
    dtype, precision = DTYPE_NAMES[dtype_name]
    inf, nan = float("inf"), float("nan")
    for m, n, k in ((70, 67, 66), (72, 80, 64)):
        a, b = integers(m, k, dtype, 5, device), integers(k, n, dtype, 6, device)
        a[0, 0], a[1, -1], a[2, :], a[-1, 3] = nan, inf, 0, -inf
        b[5, 0], b[6, -1], b[7, 2] = inf, nan, -inf
        want = a.double() @ b.double()
        for place in (embed, embed_aligned):
            got = launch.mm(place(a, "N"), place(b, "N"), precision).double()
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    if precision == "tf32x3":  # whose operands have rests
        a = torch.tensor([[inf, 1], [-inf, 1], [0, inf]], device=device)
        b = torch.tensor([[1 + 2**-15, -1 - 2**-15], [1 - 2**-15, 1]], device=device)
        assert_same_bits(launch.mm(a, b, precision).nan_to_num(7), (a.double() @ b.double()).float().nan_to_num(7))


@pytest.mark.parametrize("dtype_name", DTYPE_NAMES)
def test_bits_are_deterministic_and_where_asked_independent_of_m(dtype_name: str, device: torch.device) -> None:
    dtype, precision = DTYPE_NAMES[dtype_name]
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
def test_empty_products_are_zeros(dtype: str, device: torch.device) -> None:
    for m, n, k in ((0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)):
        a, b = (torch.ones(shape, dtype=DTYPES[dtype], device=device) for shape in ((m, k), (k, n)))
        assert_same_bits(launch.mm(a, b), torch.zeros(m, n, dtype=a.dtype, device=device))
