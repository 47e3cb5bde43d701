"""The Triton kernel of a gated product: two products that read one A, multiplied where they are stored."""

import triton
import triton.language as tl

from .activation import activate
from .arguments import Matrix
from .epilogue import load_source
from .tiles import halves, multiply_add, store_strided, tile_coords

# So many columns are stored at a time, a sector of 32 bytes of 16 bits: beside two tiles of sums, more spill registers.
COLUMNS = tl.constexpr(16)


@triton.jit
def add_to_tile(acc, source, row0, col0, rows, cols):
    """acc + source; acc where that has no address."""
    if source.ptr is not None:
        row = row0.to(tl.int64) + tl.arange(0, acc.shape[0])[:, None]
        col = col0.to(tl.int64) + tl.arange(0, acc.shape[1])[None, :]
        acc += load_source(source, row, col, row < rows, col < cols).to(acc.dtype)
    return acc


@triton.jit
def gate_and_store(value, gate, sources, c, kept, row0, col0, rows, cols, ACTIVATION: tl.constexpr):
    """activation(P) * S into c, of two tiles of sums, some columns at a time: what is stored frees its registers.

    P = gate + sources[1], rounded as it is kept; S = value + sources[0]. c: `Matrix`. kept: addresses of P and S, with
    the strides of c, or None for both.
    """
    if value.shape[1] > COLUMNS:
        left, right = halves(value)
        gate_left, gate_right = halves(gate)
        half = col0 + value.shape[1] // 2
        gate_and_store(left, gate_left, sources, c, kept, row0, col0, rows, cols, ACTIVATION)
        gate_and_store(right, gate_right, sources, c, kept, row0, half, rows, cols, ACTIVATION)
    else:
        gate = add_to_tile(gate, sources[1], row0, col0, rows, cols)
        value = add_to_tile(value, sources[0], row0, col0, rows, cols)
        gate = gate.to(c.ptr.dtype.element_ty).to(value.dtype)
        if kept[0] is not None:
            store_strided(gate, Matrix(kept[0], c.row, c.col, c.batch), row0, col0, rows, cols)
            store_strided(value, Matrix(kept[1], c.row, c.col, c.batch), row0, col0, rows, cols)
        store_strided(activate(gate, ACTIVATION) * value, c, row0, col0, rows, cols)


@triton.jit(repr=lambda specialization: specialization.constants["NAME"])
def gemm_gated(
    a, b, gate, c, pre, value, source, gate_source, m, n, k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr, ACTIVATION: tl.constexpr, NAME: tl.constexpr,
):  # fmt: skip
    """C = activation(P) * S, P = A * G + gate_source, S = A * B + source; a BLOCK_M x BLOCK_N tile of C a program.

    Shapes: A (m, k), B and G (k, n), C, P and S (m, n); m, n, k >= 1. a, b, gate, c: `Matrix`.
    pre, value: addresses of P and S, with the strides of C, or None for both.
    source, gate_source: `Matrix`; without an address it adds nothing, without a row or column stride it repeats.
    Grid: ceil(m / BLOCK_M) * ceil(n / BLOCK_N).
    Strides, dtypes, PRECISION, UPCAST, WIDE, edges: as `gemm`. Aliasing: C, P and S overlap nothing.
    Rounding: P once, before the activation; S and C once, at the store.
    Determinism: t runs upward in steps of BLOCK_K; no atomics.
    Source: the grouped tile order of Triton's matrix multiplication tutorial.
    """
    tiles_m = 1 + (m - 1) // BLOCK_M
    tiles_n = 1 + (n - 1) // BLOCK_N
    row_tile, col_tile = tile_coords(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    row0 = tl.cast(row_tile, tl.int64) * BLOCK_M
    col0 = tl.cast(col_tile, tl.int64) * BLOCK_N

    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    row = tl.arange(0, BLOCK_M).to(OFFSET)
    col = tl.arange(0, BLOCK_N).to(OFFSET)
    depth = tl.arange(0, BLOCK_K).to(OFFSET)
    in_rows = (row < m - row0)[:, None]
    in_cols = (col < n - col0)[None, :]
    a_step = tl.cast(a.col, tl.int64) * BLOCK_K
    b_step = tl.cast(b.row, tl.int64) * BLOCK_K
    gate_step = tl.cast(gate.row, tl.int64) * BLOCK_K
    a_base = a.ptr + row0 * a.row
    b_base = b.ptr + col0 * b.col
    gate_base = gate.ptr + col0 * gate.col
    a_offset = row[:, None] * a.row + depth[None, :] * a.col
    b_offset = depth[:, None] * b.row + col[None, :] * b.col
    gate_offset = depth[:, None] * gate.row + col[None, :] * gate.col

    ACC: tl.constexpr = tl.float64 if a.ptr.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    gate_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for step in range(0, 1 + (k - 1) // BLOCK_K):
        in_depth = depth < k - step * BLOCK_K
        left = tl.load(a_base + a_offset, mask=in_rows & in_depth[None, :], other=0.0)
        right = tl.load(b_base + b_offset, mask=in_depth[:, None] & in_cols, other=0.0)
        gate_right = tl.load(gate_base + gate_offset, mask=in_depth[:, None] & in_cols, other=0.0)
        acc = multiply_add(left, right, acc, PRECISION, UPCAST)
        gate_acc = multiply_add(left, gate_right, gate_acc, PRECISION, UPCAST)
        a_base += a_step
        b_base += b_step
        gate_base += gate_step
    gate_and_store(acc, gate_acc, (source, gate_source), c, (pre, value), row0, col0, m, n, ACTIVATION)
