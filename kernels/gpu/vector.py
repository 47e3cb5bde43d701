"""The Triton kernel of matrix times vector: as fast as the matrix can be read."""

import triton
import triton.language as tl

from .epilogue import SCALES, epilogue
from .tiles import split_k_range


@triton.jit(repr=lambda specialization: specialization.constants["NAME"], do_not_specialize=SCALES)
def matvec(
    a_ptr, x_ptr, y_ptr, rows, k, a_row, a_col, x_step, y_step, y_part,
    source_ptr, s_step, alpha_low, alpha_high, beta_low, beta_high,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, WIDE: tl.constexpr, NAME: tl.constexpr,
):  # fmt: skip
    """y[i] = sum over t < k of A[i, t] * x[t], BLOCK_M rows and one part of k a program.

    Shapes: A (rows, k), x (k), y (rows). A row times a matrix is this with the matrix transposed.
    Grid: (ceil(rows / BLOCK_M), SPLIT_K).
    Strides: any, in elements; offsets inside a block are 32-bit unless WIDE. With SPLIT_K > 1 y_ptr is the
    workspace: parts y_part apart.
    Dtypes: float16, bfloat16, float32, float64; sums in float32 (float64 for float64), products unrounded.
    Sums: as `gemm`, the source s_step apart; it may be y.
    Rounding: once, at the store. Edges: masks.
    Determinism: BLOCK_K sums run side by side over t, and are added in one fixed tree; no atomics.
    """
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    ACC: tl.constexpr = tl.float64 if a_ptr.dtype.element_ty == tl.float64 else tl.float32
    row0 = tl.program_id(0).to(tl.int64) * BLOCK_M
    part = tl.program_id(1)
    first, last = split_k_range(part, k, BLOCK_K, SPLIT_K)
    row = tl.arange(0, BLOCK_M).to(OFFSET)
    depth = tl.arange(0, BLOCK_K).to(OFFSET)
    in_rows = row < rows - row0
    a_base = a_ptr + row0 * a_row + first.to(tl.int64) * BLOCK_K * a_col
    x_base = x_ptr + first.to(tl.int64) * BLOCK_K * x_step
    offset = row[:, None] * a_row + depth[None, :] * a_col
    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=ACC)
    for step in range(first, last):
        in_depth = depth < k - step * BLOCK_K
        a = tl.load(a_base + offset, mask=in_rows[:, None] & in_depth[None, :], other=0.0).to(ACC)
        x = tl.load(x_base + depth * x_step, mask=in_depth, other=0.0).to(ACC)
        acc = tl.fma(a, x[None, :].broadcast_to(a.shape), acc)
        a_base += tl.cast(a_col, tl.int64) * BLOCK_K
        x_base += tl.cast(x_step, tl.int64) * BLOCK_K
    y = y_ptr + part.to(tl.int64) * y_part + (row0 + row) * y_step
    total = tl.sum(acc, axis=1)
    source = None
    if source_ptr is not None:
        source = tl.load(source_ptr + (row0 + row) * s_step, mask=in_rows, other=0.0)
    total = epilogue(total, source, (alpha_low, alpha_high, beta_low, beta_high))
    tl.store(y, total.to(y_ptr.dtype.element_ty), mask=in_rows)
