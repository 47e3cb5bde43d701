"""The Triton GEMM of pointers: every dtype, layout and product, reading operands through their strides."""

import triton
import triton.language as tl

from .epilogue import SCALES, tile_epilogue
from .tiles import round_to_tf32, scale_of, split_k_range, tile_coords


@triton.jit(repr=lambda specialization: specialization.constants["NAME"], do_not_specialize=SCALES)
def gemm(
    a_ptr, b_ptr, c_ptr, scale_a_ptr, scale_b_ptr,
    m, n, k,
    a_row, a_col, b_row, b_col, c_row, c_col,
    a_batch, b_batch, c_part,
    source_ptr, s_row, s_col, s_batch, alpha_low, alpha_high, beta_low, beta_high,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
    SCALED: tl.constexpr, IMPRECISE: tl.constexpr, NAME: tl.constexpr,
):  # fmt: skip
    """C[z, i, j] = sum over t < k of A[z, i, t] * B[z, t, j], one BLOCK_M x BLOCK_N tile of C a program.

    Shapes: A (m, k), B (k, n), C (m, n); m, n, k >= 1; several of each, a_batch, b_batch, c_part apart.
    Grid: (ceil(m / BLOCK_M) * ceil(n / BLOCK_N), SPLIT_K * products).
    Strides: any, in elements: row, column, sliced, expanded (0). Triton compiles a stride of 1, and sizes and
    strides divisible by 16, into vector loads. Tile origins are 64-bit; offsets inside a tile are 32-bit
    unless WIDE, which the launcher sets where a tile spans 2**31 elements or more.
    Dtypes: a, b and c alike: float16, bfloat16, float32 (accumulated in float32), float64 (in float64); or 8-bit a
    and b, IMPRECISE as in `accumulate_tile`. SCALED multiplies the sums by two float32 before they are rounded.
    PRECISION "tf32" rounds float32 operands first; "tf32x3" adds the products of their two halves but the least;
    "ieee" multiplies them whole.
    Sums: with alpha, C = alpha * S + beta * source, S the sums over t: alpha * S is rounded to the type of S, then
    one multiply-add. source_ptr None adds nothing; s_row, s_col None: one row or column serves all.
    Result: c_ptr; with SPLIT_K > 1 it is the workspace: SPLIT_K partial results a product, c_part apart, for
    `reduce`.
    Aliasing: c overlaps neither a nor b, and has no stride 0 but along a dimension of size 1. The source may be c:
    each element is read before it is written.
    Rounding: once, at the store.
    Edges: masks. Nothing outside the operands is read and nothing outside C is written; beyond k both
    operands are zero.
    Determinism: t runs upward in steps of BLOCK_K inside a part of k; parts are cut by k alone; no atomics.
    Source: the grouped tile order of Triton's matrix multiplication tutorial.

    UPCAST multiplies 16-bit operands as float32, for Triton's interpreter, whose bfloat16 dot is wrong.
    """
    tiles_m = 1 + (m - 1) // BLOCK_M
    tiles_n = 1 + (n - 1) // BLOCK_N
    row_tile, col_tile = tile_coords(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    row0 = tl.cast(row_tile, tl.int64) * BLOCK_M
    col0 = tl.cast(col_tile, tl.int64) * BLOCK_N
    part = tl.cast(tl.program_id(1), tl.int64)
    first, last = split_k_range(tl.program_id(1) % SPLIT_K, k, BLOCK_K, SPLIT_K)

    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    row = tl.arange(0, BLOCK_M).to(OFFSET)
    col = tl.arange(0, BLOCK_N).to(OFFSET)
    depth = tl.arange(0, BLOCK_K).to(OFFSET)
    in_rows = (row < m - row0)[:, None]
    in_cols = (col < n - col0)[None, :]

    # A moving scalar base and fixed offsets: a tensor of moving 64-bit pointers would fill the registers.
    a_step = tl.cast(a_col, tl.int64) * BLOCK_K
    b_step = tl.cast(b_row, tl.int64) * BLOCK_K
    a_base = a_ptr + part // SPLIT_K * a_batch + row0 * a_row + first * a_step
    b_base = b_ptr + part // SPLIT_K * b_batch + col0 * b_col + first * b_step
    a_offset = row[:, None] * a_row + depth[None, :] * a_col
    b_offset = depth[:, None] * b_row + col[None, :] * b_col

    ACC: tl.constexpr = tl.float64 if a_ptr.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for step in range(first, last):
        in_depth = depth < k - step * BLOCK_K
        a = tl.load(a_base + a_offset, mask=in_rows & in_depth[None, :], other=0.0)
        b = tl.load(b_base + b_offset, mask=in_depth[:, None] & in_cols, other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        if PRECISION == "tf32":
            a = round_to_tf32(a)
            b = round_to_tf32(b)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, max_num_imprecise_acc=IMPRECISE, out_dtype=ACC)
        a_base += a_step
        b_base += b_step

    if SCALED:
        acc *= scale_of(scale_a_ptr, scale_b_ptr)
    source = None if source_ptr is None else source_ptr + part * s_batch
    scales = (alpha_low, alpha_high, beta_low, beta_high)
    acc = tile_epilogue(acc, source, s_row, s_col, row0, col0, m, n, scales, BLOCK_M, BLOCK_N)
    c_base = c_ptr + part * c_part + row0 * c_row + col0 * c_col
    c_offset = row[:, None] * c_row + col[None, :] * c_col
    tl.store(c_base + c_offset, acc.to(c_ptr.dtype.element_ty), mask=in_rows & in_cols)
