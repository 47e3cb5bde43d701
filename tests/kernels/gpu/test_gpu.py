"""The launcher on a real GPU: exact products, rounding, settings, threads, streams, offsets past 32 bits."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from matmul_grad.kernels.gpu import launch
from matmul_grad.kernels.gpu.config import TILES, is_valid, kind

pytestmark = pytest.mark.gpu

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
NUMBERS = {**{name: (dtype, "ieee") for name, dtype in DTYPES.items()}, "tf32": (torch.float32, "tf32")}
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


@pytest.mark.parametrize("number", NUMBERS)
def test_exact_in_every_tile(number: str, device: torch.device) -> None:
    dtype, precision = NUMBERS[number]
    x = torch.empty(1, 1, dtype=dtype, device=device)
    problem, target = launch.describe(x, x, x, precision), launch.target_of(x.device.index)
    for aligned in (True, False):
        for tile in TILES[kind(problem), aligned]:
            if is_valid(tile, problem, target):
                assert_exact(272, 272, 144, number, "NN", device, tile)
                assert_exact(271, 273, 145, number, "TT", device, tile)


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
def test_bits_do_not_depend_on_m_or_on_the_run(number: str, device: torch.device) -> None:
    dtype, precision = NUMBERS[number]
    a, b = normal(1000, 1024, dtype, device, 7), normal(1024, 512, dtype, device, 8)
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
