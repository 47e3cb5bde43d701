"""What the tests of the GPU kernels share: operands in canaries, small tiles, a GPU that is not there.

Triton reads TRITON_INTERPRET when it is imported, so tests under its interpreter need another process: their file as a
program, which runs one case at a time, by its name. A case that fails is reported with its traceback by the test
that has its name.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from case_process import serve
from gpu_targets import DENSE as DENSE
from products import assert_exact
from torch import Tensor

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
# Contiguous rows, contiguous columns, every second row and column, stride 0 down or across.
LAYOUTS = ("N", "T", "S", "R", "C")


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


def embed_aligned(values: Tensor, layout: str) -> Tensor:
    """``embed`` at an address and with strides that TMA can read; the sizes are the caller's. layout: "N" or "T"."""
    if layout == "T":
        return embed_aligned(values.t(), "N").t()
    rows, cols = values.shape
    buffer = values.new_full((rows + 6, (cols + 16 + 15) // 16 * 16), float("nan"))
    view = buffer[3 : 3 + rows, 8 : 8 + cols]
    view.copy_(values)
    return view


def integers(rows: int, cols: int, dtype: torch.dtype, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """-1, 0 and 1: sums of up to 256 products are exact in every dtype, bfloat16 included."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (rows, cols), generator=generator).to(device, dtype)


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    differ = (got != want).nonzero()
    assert len(differ) == 0, f"{len(differ)} elements differ, the first at {differ[0].tolist()}"


def wide(x: Tensor) -> np.ndarray:
    """The same values with a mantissa of 64 bits or more, so that float64 has an oracle too."""
    return x.double().numpy().astype(np.longdouble)


def assert_error_at_most_twice_that_of_torch(got: Tensor, a: Tensor, b: Tensor) -> None:
    """Error against a wider product <= 2 * (torch's + one rounding)."""
    exact = wide(a) @ wide(b)
    one_rounding = torch.finfo(a.dtype).eps / 2 * abs(exact).max()
    allowed = 2 * (abs(wide(a @ b) - exact).max() + one_rounding)
    worst = abs(wide(got) - exact).max()
    assert worst <= allowed, f"error {worst} > {allowed}"


def tile(size: int = 16) -> Any:
    from matmul_grad.kernels.gpu.config import TileConfig

    return TileConfig(size, size, 16, stages=2, warps=4, group_m=2)


def tma(parts: int = 1, subtiles: int = 1) -> Any:
    from matmul_grad.kernels.gpu.config import TileConfig

    return TileConfig(64, 32, 16, stages=2, warps=4, group_m=2, split_k=parts, path="tma", subtiles=subtiles)


def pointers(parts: int = 1) -> Any:
    from matmul_grad.kernels.gpu.config import TileConfig

    return TileConfig(64, 16, 16, stages=2, warps=4, group_m=2, split_k=parts)


@contextlib.contextmanager
def at_arch(arch: int) -> Iterator[None]:
    """As if on a GPU of three multiprocessors, so that programs have several tiles each."""
    from matmul_grad.kernels.gpu import launch
    from matmul_grad.kernels.gpu.config import Target

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "INTERPRETER", Target(arch, 3, 227 << 10))
        launch.clear_cache()
        try:
            yield
        finally:
            launch.clear_cache()


@contextlib.contextmanager
def rows_alike() -> Iterator[None]:
    """Blocks are multiplied without BLAS, whose bits depend on a row's place in the block on CPUs with AVX2 alone."""

    def matmul(a: np.ndarray, b: np.ndarray, dtype: Any) -> np.ndarray:
        return np.einsum("...ij,...jk->...ik", a.astype(dtype), b.astype(dtype))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "matmul", matmul)
        yield


def check_exact(m: int, n: int, k: int, dtype: str, layouts: str, config: Any = None) -> None:
    """Bits of the exact product, from operands in NaN canaries into an output in NaN canaries."""
    from matmul_grad.kernels.gpu import launch

    a = embed(integers(m, k, DTYPES[dtype], 1), layouts[0])
    b = embed(integers(k, n, DTYPES[dtype], 2), layouts[1])
    want = (a.long() @ b.long()).to(DTYPES[dtype])
    fresh = launch.mm(a, b, config=config() if config else None)
    assert fresh.is_contiguous() and fresh.dtype == a.dtype
    assert_exact(fresh, want)

    for layout in "NTS" if dtype == "fp32" else "N":
        out = embed(torch.full((m, n), float("nan"), dtype=a.dtype), layout)
        buffer = out._base
        assert buffer is not None
        assert launch.mm(a, b, config=config() if config else None, out=out) is out
        assert_exact(out, want)
        out.fill_(float("nan"))
        assert bool(buffer.isnan().all()), "written outside of out"


def serve_cases(cases: Mapping[str, Callable[[], None]]) -> None:
    """The program of a file of cases."""
    # The interpreter of triton 3.6, on numpy before 2.4, where it is an error.
    warnings.filterwarnings("ignore", message="Conversion of an array with ndim > 0")
    serve(lambda case: cases[case]())
