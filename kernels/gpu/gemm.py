"""The Triton GEMM of pointers: every dtype, layout and product, reading operands through their strides."""

import triton
import triton.language as tl

from .arguments import Matrix
from .epilogue import SCALARS, activate_and_store, tile_epilogue
from .tiles import IMPRECISE, multiply_add, scale_8_bits, split_k_range, tile_coords


@triton.jit(repr=lambda specialization: specialization.constants["NAME"], do_not_specialize=SCALARS)
def gemm(
    ptrs, scales, m, n, k, strides, pre, source, alpha_low, alpha_high, beta_low, beta_high,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
    ACTIVATION: tl.constexpr, NAME: tl.constexpr,
):  # fmt: skip
    """C[z, i, j] = sum over t < k of A[z, i, t] * B[z, t, j], one BLOCK_M x BLOCK_N tile of C a program.

    Shapes: A (m, k), B (k, n), C (m, n); m, n, k >= 1. ptrs, strides: `Operands`. scales: `ScalePtrs`.
    source: `Matrix`.
    Grid: ceil(m / BLOCK_M) * ceil(n / BLOCK_N) * SPLIT_K * batches, one dimension: the others end at 65,535.
    Strides: any, in elements: row, column, sliced, expanded (0). Triton compiles a stride of 1, and sizes and
    strides divisible by 16, into vector loads. Tile origins are 64-bit; offsets inside a tile are 32-bit
    unless WIDE, which the plan sets where a tile spans 2**31 elements or more.
    Dtypes: a, b and c alike: float16, bfloat16, float32 (accumulated in float32), float64 (in float64); c and source
    float32 where a and b have 16 bits; or 8-bit a and b, whose sums are multiplied by the two scales in float32 before
    they are rounded.
    PRECISION "tf32" rounds float32 operands first; "tf32x3" adds the products of their two halves but the least;
    "ieee" multiplies them whole.
    Epilogue: with alpha, C = alpha * S + beta * source, S the sums over t: alpha * S is rounded to the type of S, then
    one multiply-add. A source without address adds nothing; without a row or column stride, it repeats along it.
    Then the ACTIVATION of that name, if there is one; its argument is stored too where `pre` is an address, rounded,
    with the strides of C.
    Result: C; with SPLIT_K > 1 it is the workspace: SPLIT_K partial results of each product, strides.c.batch apart, for
    `reduce`.
    Aliasing: c overlaps neither a nor b, and has no stride 0 but along a dimension of size 1. The source may be c:
    each element is read before it is written.
    Rounding: once, at the store.
    Edges: masks. Nothing outside the operands is read and nothing outside C is written; beyond k both
    operands are zero.
    Determinism: t runs upward in steps of BLOCK_K inside a split of k; splits depend on k alone; no atomics.
    Source: the grouped tile order of Triton's matrix multiplication tutorial.

    UPCAST multiplies 16-bit operands as float32, for Triton's interpreter, whose bfloat16 dot is wrong.
    """
    tiles_m = 1 + (m - 1) // BLOCK_M
    tiles_n = 1 + (n - 1) // BLOCK_N
    tiles = tiles_m * tiles_n
    part = tl.program_id(0) // tiles
    row_tile, col_tile = tile_coords(tl.program_id(0) % tiles, tiles_m, tiles_n, GROUP_M)
    row0 = tl.cast(row_tile, tl.int64) * BLOCK_M
    col0 = tl.cast(col_tile, tl.int64) * BLOCK_N
    first, last = split_k_range(part % SPLIT_K, k, BLOCK_K, SPLIT_K)
    part = tl.cast(part, tl.int64)

    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    row = tl.arange(0, BLOCK_M).to(OFFSET)
    col = tl.arange(0, BLOCK_N).to(OFFSET)
    depth = tl.arange(0, BLOCK_K).to(OFFSET)
    in_rows = (row < m - row0)[:, None]
    in_cols = (col < n - col0)[None, :]

    # A moving scalar base and fixed offsets: a tensor of moving 64-bit pointers would fill the registers.
    a_step = tl.cast(strides.a.col, tl.int64) * BLOCK_K
    b_step = tl.cast(strides.b.row, tl.int64) * BLOCK_K
    a_base = ptrs.a + part // SPLIT_K * strides.a.batch + row0 * strides.a.row + first * a_step
    b_base = ptrs.b + part // SPLIT_K * strides.b.batch + col0 * strides.b.col + first * b_step
    a_offset = row[:, None] * strides.a.row + depth[None, :] * strides.a.col
    b_offset = depth[:, None] * strides.b.row + col[None, :] * strides.b.col

    ACC: tl.constexpr = tl.float64 if ptrs.a.dtype.element_ty == tl.float64 else tl.float32
    MAX_IMPRECISE: tl.constexpr = None if scales.a is None else IMPRECISE
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for step in range(first, last):
        in_depth = depth < k - step * BLOCK_K
        a = tl.load(a_base + a_offset, mask=in_rows & in_depth[None, :], other=0.0)
        b = tl.load(b_base + b_offset, mask=in_depth[:, None] & in_cols, other=0.0)
        acc = multiply_add(a, b, acc, PRECISION, UPCAST, MAX_IMPRECISE)
        a_base += a_step
        b_base += b_step

    acc = scale_8_bits(acc, scales)
    scalars = (alpha_low, alpha_high, beta_low, beta_high)
    if source.ptr is not None:  # no function: before Triton 3.7 one can return no tuple that holds None
        source = Matrix(source.ptr + part * source.batch, source.row, source.col, source.batch)
    if ACTIVATION is not None:
        pre_part = pre
        if pre is not None:
            pre_part = pre + part * strides.c.batch
        c = Matrix(ptrs.c + part * strides.c.batch, strides.c.row, strides.c.col, strides.c.batch)
        activate_and_store(acc, source, c, None, pre_part, part, row0, col0, m, n, scalars, ACTIVATION, False)
    else:
        acc = tile_epilogue(acc, source, row0, col0, m, n, scalars)
        c_base = ptrs.c + part * strides.c.batch + row0 * strides.c.row + col0 * strides.c.col
        c_offset = row[:, None] * strides.c.row + col[None, :] * strides.c.col
        tl.store(c_base + c_offset, acc.to(ptrs.c.dtype.element_ty), mask=in_rows & in_cols)
