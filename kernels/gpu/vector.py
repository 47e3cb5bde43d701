"""The Triton kernel of matrix times vector: as fast as the matrix can be read."""

import triton
import triton.language as tl

from .activation import activate
from .epilogue import SCALARS, epilogue
from .tiles import split_k_range


@triton.jit(repr=lambda specialization: specialization.constants["NAME"], do_not_specialize=SCALARS)
def matvec(
    ptrs, rows, k, strides, pre, source, alpha_low, alpha_high, beta_low, beta_high,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, STAGES: tl.constexpr,
    WIDE: tl.constexpr, ACTIVATION: tl.constexpr, NAME: tl.constexpr,
):  # fmt: skip
    """y[i] = sum over t < k of A[i, t] * x[t], BLOCK_M rows and one split of k a program.

    Shapes: A (rows, k), x (k), y (rows). A row times a matrix is this with the matrix transposed. ptrs: `Operands`,
    A, x and y. strides: `MatvecStrides`. source: `Vector`. Grid: ceil(rows / BLOCK_M) * SPLIT_K.
    Strides: any, in elements; offsets inside a block are 32-bit unless WIDE. With SPLIT_K > 1 y is the workspace:
    partial results strides.split apart.
    Dtypes: float16, bfloat16, float32, float64; sums in float32 (float64 for float64), products unrounded.
    Epilogue: as `gemm`; the source may be y.
    Rounding: once, at the store. Edges: masks.
    Determinism: BLOCK_K sums run side by side over t, and are added in one fixed tree; no atomics.
    """
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    ACC: tl.constexpr = tl.float64 if ptrs.a.dtype.element_ty == tl.float64 else tl.float32
    blocks = 1 + (rows - 1) // BLOCK_M
    row0 = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_M
    part = tl.program_id(0) // blocks
    first, last = split_k_range(part, k, BLOCK_K, SPLIT_K)
    row = tl.arange(0, BLOCK_M).to(OFFSET)
    depth = tl.arange(0, BLOCK_K).to(OFFSET)
    in_rows = row < rows - row0
    a_base = ptrs.a + row0 * strides.row + first.to(tl.int64) * BLOCK_K * strides.col
    x_base = ptrs.b + first.to(tl.int64) * BLOCK_K * strides.x
    offset = row[:, None] * strides.row + depth[None, :] * strides.col
    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=ACC)
    for step in tl.range(first, last, num_stages=STAGES):  # the option alone pipelines loops that have a tl.dot
        in_depth = depth < k - step * BLOCK_K
        a = tl.load(a_base + offset, mask=in_rows[:, None] & in_depth[None, :], other=0.0).to(ACC)
        x = tl.load(x_base + depth * strides.x, mask=in_depth, other=0.0).to(ACC)
        acc = tl.fma(a, x[None, :].broadcast_to(a.shape), acc)
        a_base += tl.cast(strides.col, tl.int64) * BLOCK_K
        x_base += tl.cast(strides.x, tl.int64) * BLOCK_K
    at = ptrs.c + part.to(tl.int64) * strides.split + (row0 + row) * strides.y
    total = tl.sum(acc, axis=1)
    added = None
    if source.ptr is not None:
        added = tl.load(source.ptr + (row0 + row) * source.step, mask=in_rows, other=0.0)
    total = epilogue(total, added, (alpha_low, alpha_high, beta_low, beta_high))
    if pre is not None:
        tl.store(pre + (row0 + row) * strides.y, total.to(pre.dtype.element_ty), mask=in_rows)
    tl.store(at, activate(total, ACTIVATION).to(ptrs.c.dtype.element_ty), mask=in_rows)
