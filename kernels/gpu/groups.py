"""The Triton kernel of grouped products: one walk of all programs over the tiles of all groups."""

import triton
import triton.language as tl

from .tiles import multiply_add, tile_coords


@triton.jit
def group_range(offs, group, groups, whole):
    """Begin and end of groups; that of number `groups` is what lies behind the last one.

    offs: the end of each, int32. Whatever they are, the range lies in [0, whole].
    """
    begin = tl.load(offs + group - 1, mask=(group > 0) & (group <= groups), other=0)
    end = tl.load(offs + group, mask=group < groups, other=whole)
    begin = tl.minimum(tl.maximum(begin, 0), whole)
    return begin, tl.minimum(tl.maximum(end, begin), whole)


@triton.jit
def blocks_of(size, BLOCK: tl.constexpr):
    """How many blocks cover a size, which may be 0."""
    return size // BLOCK + (size % BLOCK != 0).to(tl.int32)


@triton.jit
def row_tile_ends(offs, groups, m, BLOCK_M: tl.constexpr, NUMBERS: tl.constexpr):
    """The number behind the last row of tiles of each group, and of the rows behind them; a row belongs to one group.

    The rest of the NUMBERS repeat the last one.
    """
    number = tl.arange(0, NUMBERS)
    begin, end = group_range(offs, number, groups, m)
    return tl.cumsum(tl.where(number <= groups, blocks_of(end - begin, BLOCK_M), 0), 0)


@triton.jit
def tiles_of_rows(ends, groups, m, tiles_n, BLOCK_M: tl.constexpr):
    """The number of tiles; no more than there are where the offs ascend, so that 32 bits count them."""
    return tl.minimum(tl.max(ends, 0), groups + 1 + (m - 1) // BLOCK_M) * tiles_n


@triton.jit
def tile_of_rows(item, ends, offs, groups, m, tiles_n, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr):
    """The group of a tile, the first row and the number of rows of that group, row and column of the tile in it."""
    before = ends <= item // tiles_n
    group = tl.sum(before.to(tl.int32), 0)
    begin, end = group_range(offs, group, groups, m)
    first = tl.max(tl.where(before, ends, 0), 0)
    row, col = tile_coords(item - first * tiles_n, blocks_of(end - begin, BLOCK_M), tiles_n, GROUP_M)
    return group, begin, end - begin, row, col


@triton.jit
def tile_of_steps(item, offs, groups, k, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """The group of a tile, the first step and the number of steps of that group, row and column of the tile in C."""
    group = item // (tiles_m * tiles_n)
    begin, end = group_range(offs, group, groups, k)
    row, col = tile_coords(item % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
    return group, begin, end - begin, row, col


@triton.jit(repr=lambda specialization: specialization.constants["NAME"])
def gemm_groups(
    ptrs, offs, groups, m, n, k, strides,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    BY_STEPS: tl.constexpr, NUMBERS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    UPCAST: tl.constexpr, NAME: tl.constexpr,
):  # fmt: skip
    """The programs divide the tiles of the products of all groups; group g is the range [offs[g - 1], offs[g]).

    by rows     C[r, j]    = sum over t < k of A[r, t] * B[g, t, j]         r in group g; 0 behind the last group
    BY_STEPS    C[g, i, j] = sum over t in group g of A[i, t] * B[t, j]     0 where that is empty

    Shapes: A (m, k), B (groups, k, n), C (m, n), or A (m, k), B (k, n), C (groups, m, n); m, n, k, groups >= 1.
    ptrs, strides: `Operands`. offs: int32, adjacent; NUMBERS: a power of 2 above groups.
    Grid: any number of programs, which take tiles in turn: how many there are is found on the device.
    Strides: any, as `gemm`, but what lies along a cut dimension begins at any element: it is loaded and stored one
    by one where its elements are adjacent.
    Dtypes, PRECISION, UPCAST, WIDE, aliasing, rounding: as `gemm`.
    Edges: masks. Nothing outside of the operands is read, nothing outside of C written. Every element of C is written
    once where the offs ascend to the size that they cut at most; else some may be twice, or never.
    Determinism: t runs upward in steps of BLOCK_K from the first of a group; no atomics. What other groups hold, or
    how long they are, changes no bit.
    """
    tiles_n = 1 + (n - 1) // BLOCK_N
    tiles_m = 1 + (m - 1) // BLOCK_M
    if BY_STEPS:
        items = groups * tiles_m * tiles_n
    else:
        ends = row_tile_ends(offs, groups, m, BLOCK_M, NUMBERS)
        items = tiles_of_rows(ends, groups, m, tiles_n, BLOCK_M)

    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    row = tl.arange(0, BLOCK_M).to(OFFSET)
    col = tl.arange(0, BLOCK_N).to(OFFSET)
    depth = tl.arange(0, BLOCK_K).to(OFFSET)
    a_offset = row[:, None] * strides.a.row + depth[None, :] * strides.a.col
    b_offset = depth[:, None] * strides.b.row + col[None, :] * strides.b.col
    a_step = tl.cast(strides.a.col, tl.int64) * BLOCK_K
    b_step = tl.cast(strides.b.row, tl.int64) * BLOCK_K
    ACC: tl.constexpr = tl.float64 if ptrs.a.dtype.element_ty == tl.float64 else tl.float32

    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        if BY_STEPS:
            group, begin, length, row_tile, col_tile = tile_of_steps(item, offs, groups, k, tiles_m, tiles_n, GROUP_M)
            rows = m
            first_row, first_step = tl.cast(0, tl.int64), tl.cast(begin, tl.int64)
            steps = blocks_of(length, BLOCK_K)
        else:
            group, begin, rows, row_tile, col_tile = tile_of_rows(
                item, ends, offs, groups, m, tiles_n, BLOCK_M, GROUP_M
            )  # fmt: skip
            length = k
            first_row, first_step = tl.cast(begin, tl.int64), tl.cast(0, tl.int64)
            steps = tl.where(group < groups, 1 + (k - 1) // BLOCK_K, 0)
        row0 = tl.cast(row_tile, tl.int64) * BLOCK_M
        col0 = tl.cast(col_tile, tl.int64) * BLOCK_N
        in_rows = (row < rows - row0)[:, None]
        in_cols = (col < n - col0)[None, :]

        a_base = ptrs.a + (first_row + row0) * strides.a.row + first_step * strides.a.col
        b_base = ptrs.b + tl.cast(group, tl.int64) * strides.b.batch + first_step * strides.b.row + col0 * strides.b.col
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
        for step in range(0, steps):
            in_depth = depth < length - step * BLOCK_K
            a = tl.load(a_base + a_offset, mask=in_rows & in_depth[None, :], other=0.0)
            b = tl.load(b_base + b_offset, mask=in_depth[:, None] & in_cols, other=0.0)
            acc = multiply_add(a, b, acc, PRECISION, UPCAST)
            a_base += a_step
            b_base += b_step

        # Offsets that do not depend on the tile would be computed before the walk, and take registers all the time.
        c_offset = row[:, None] * strides.c.row + (tl.cast(col0, OFFSET) + col)[None, :] * strides.c.col
        c_at = ptrs.c + tl.cast(group, tl.int64) * strides.c.batch + (first_row + row0) * strides.c.row + c_offset
        tl.store(c_at, acc.to(ptrs.c.dtype.element_ty), mask=in_rows & in_cols)
