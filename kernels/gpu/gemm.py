"""The Triton GEMM: one kernel for every dtype, layout and product, reading operands through their strides."""

from typing import Any

import triton
import triton.language as tl

from .config import Problem, TileConfig, kernel_name


@triton.jit
def round_to_tf32(x):
    """Nearest TF32 (10 mantissa bits) of float32, ties away from zero; Inf stays, NaN becomes the quiet NaN.

    Matrix units drop the low 13 bits instead, which biases each product towards zero and makes Inf of a NaN
    whose payload lies there.
    """
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, float("nan"))


@triton.jit(repr=lambda specialization: specialization.constants["NAME"])
def gemm(
    a_ptr, b_ptr, c_ptr,
    m, n, k,
    a_row, a_col, b_row, b_col, c_row, c_col,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr, NAME: tl.constexpr,
):  # fmt: skip
    """C[i, j] = sum over t < k of A[i, t] * B[t, j], one BLOCK_M x BLOCK_N tile of C a program.

    Shapes: A (m, k), B (k, n), C (m, n); m, n, k >= 1. Grid: ceil(m / BLOCK_M) * ceil(n / BLOCK_N) programs.
    Strides: any, in elements: row, column, sliced, expanded (0). Triton compiles a stride of 1, and sizes and
    strides divisible by 16, into vector loads. Tile origins are 64-bit; offsets inside a tile are 32-bit
    unless WIDE, which the launcher sets where a tile spans 2**31 elements or more.
    Dtypes: a, b and c alike: float16, bfloat16, float32 (accumulated in float32), float64 (in float64).
    PRECISION "tf32" rounds float32 operands first; "ieee" multiplies them whole.
    Aliasing: c overlaps neither a nor b, and has no stride 0 but along a dimension of size 1.
    Rounding: once, at the store.
    Edges: masks. Nothing outside the operands is read and nothing outside C is written; beyond k both
    operands are zero.
    Determinism: t runs upward in steps of BLOCK_K; no atomics. A row of C has the same bits whatever m is.
    Source: the grouped tile order of Triton's matrix multiplication tutorial.

    UPCAST multiplies 16-bit operands as float32, for Triton's interpreter, whose bfloat16 dot is wrong.
    """
    tile = tl.program_id(0)
    tiles_m = 1 + (m - 1) // BLOCK_M
    tiles_n = 1 + (n - 1) // BLOCK_N
    group = tile // (GROUP_M * tiles_n)
    in_group = tile % (GROUP_M * tiles_n)
    rows_in_group = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    row0 = tl.cast(group * GROUP_M + in_group % rows_in_group, tl.int64) * BLOCK_M
    col0 = tl.cast(in_group // rows_in_group, tl.int64) * BLOCK_N

    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    row = tl.arange(0, BLOCK_M).to(OFFSET)
    col = tl.arange(0, BLOCK_N).to(OFFSET)
    depth = tl.arange(0, BLOCK_K).to(OFFSET)
    in_rows = (row < m - row0)[:, None]
    in_cols = (col < n - col0)[None, :]

    # A moving scalar base and fixed offsets: a tensor of moving 64-bit pointers would fill the registers.
    a_base = a_ptr + row0 * a_row
    b_base = b_ptr + col0 * b_col
    a_offset = row[:, None] * a_row + depth[None, :] * a_col
    b_offset = depth[:, None] * b_row + col[None, :] * b_col
    a_step = tl.cast(a_col, tl.int64) * BLOCK_K
    b_step = tl.cast(b_row, tl.int64) * BLOCK_K

    SUM: tl.constexpr = tl.float64 if c_ptr.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=SUM)
    for step in range(0, 1 + (k - 1) // BLOCK_K):
        in_depth = depth < k - step * BLOCK_K
        a = tl.load(a_base + a_offset, mask=in_rows & in_depth[None, :], other=0.0)
        b = tl.load(b_base + b_offset, mask=in_depth[:, None] & in_cols, other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        if PRECISION == "tf32":
            a = round_to_tf32(a)
            b = round_to_tf32(b)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=SUM)
        a_base += a_step
        b_base += b_step

    c_base = c_ptr + row0 * c_row + col0 * c_col
    c_offset = row[:, None] * c_row + col[None, :] * c_col
    tl.store(c_base + c_offset, acc.to(c_ptr.dtype.element_ty), mask=in_rows & in_cols)


def constants(problem: Problem, config: TileConfig, *, wide: bool = False, upcast: bool = False) -> dict[str, Any]:
    """The kernel's compile-time arguments: the same for a launch and for ahead-of-time compilation."""
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "PRECISION": problem.precision,
        "WIDE": wide,
        "UPCAST": upcast,
        "NAME": kernel_name(problem, config),
    }


def options(config: TileConfig) -> dict[str, Any]:
    """The compiler's options. Fused multiply-add is named because its default differs between versions."""
    # Left to itself, ptxas spills a few registers to fit one more block on a multiprocessor.
    return {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True, "maxnreg": 255}
