"""The kernel of grouped products through TMA: 16-bit operands by descriptors of whole operands, results by rows."""

import triton
import triton.language as tl

from .arguments import Matrix
from .groups import row_tile_ends, tile_of_rows, tile_of_steps, tiles_of_rows
from .tiles import load_left, load_right, multiply_add, store_rows


@triton.jit(repr=lambda specialization: specialization.constants["NAME"])
def gemm_groups_tma(
    a_desc, b_desc, c, offs, groups, m, n, k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr, BY_STEPS: tl.constexpr, BATCHED: tl.constexpr,
    NUMBERS: tl.constexpr, UPCAST: tl.constexpr, NAME: tl.constexpr,
):  # fmt: skip
    """`gemm_groups` of operands that TMA can read: one descriptor of each. No adjacent dimension is cut.

    c: `Matrix`, whose columns are adjacent; a store through TMA would reach into the next group. BATCHED: b_desc is
    that of a batch. Blocks of rows that end in the next group are loaded with its rows, which are not stored; of steps
    that do so the rest is set to zero in both operands, since Inf and NaN times zero are not. All else as `gemm_groups`
    and `gemm_tma`.
    """
    tiles_n = 1 + (n - 1) // BLOCK_N
    tiles_m = 1 + (m - 1) // BLOCK_M
    if BY_STEPS:
        items = groups * tiles_m * tiles_n
    else:
        ends = row_tile_ends(offs, groups, m, BLOCK_M, NUMBERS)
        items = tiles_of_rows(ends, groups, m, tiles_n, BLOCK_M)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        if BY_STEPS:
            group, depth, length, row, col = tile_of_steps(item, offs, groups, k, tiles_m, tiles_n, GROUP_M)
            batch, rows, steps = 0, m, length // BLOCK_K
            row0 = row * BLOCK_M
            a_row = row0
            c_group = Matrix(c.ptr + group.to(tl.int64) * c.batch, c.row, c.col, c.batch)
        else:
            group, begin, rows, row, col = tile_of_rows(item, ends, offs, groups, m, tiles_n, BLOCK_M, GROUP_M)
            batch, depth, steps = group, 0, tl.where(group < groups, 1 + (k - 1) // BLOCK_K, 0)
            row0 = row * BLOCK_M
            a_row = begin + row0
            c_group = Matrix(c.ptr + begin.to(tl.int64) * c.row, c.row, c.col, c.batch)
        col0 = col * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(0, steps):
            at = depth + step * BLOCK_K
            a = load_left(a_desc, 0, a_row, at, BLOCK_M, BLOCK_K, A_TRANSPOSED, False)
            b = load_right(b_desc, batch, at, col0, BLOCK_K, BLOCK_N, B_TRANSPOSED, BATCHED)
            acc = multiply_add(a, b, acc, "ieee", UPCAST)
        if BY_STEPS:
            rest = length % BLOCK_K
            if rest > 0:
                at = depth + steps * BLOCK_K
                inside = tl.arange(0, BLOCK_K) < rest
                a = load_left(a_desc, 0, a_row, at, BLOCK_M, BLOCK_K, A_TRANSPOSED, False)
                b = load_right(b_desc, batch, at, col0, BLOCK_K, BLOCK_N, B_TRANSPOSED, BATCHED)
                a = tl.where(inside[None, :], a, 0.0).to(a_desc.dtype)
                b = tl.where(inside[:, None], b, 0.0).to(b_desc.dtype)
                acc = multiply_add(a, b, acc, "ieee", UPCAST)
        store_rows(acc, c_group, row0, col0, rows, n)
