"""Groups: one product whose rows of A, columns of B or steps of k are cut into ranges, each a product of its own.

    rows       C[r, :]    = A[r, :] · B[g]          r in group g; B is a batch
    columns    C[:, r]    = A[g] · B[:, r]          A is a batch
    steps      C[g]       = A[:, r] · B[r, :]       C is a batch

M, N and K are the whole sizes, BATCH is 1, and the distances of a batch are those from group to group, 0 for an operand
that is no batch. GROUPS is the address of a table, int64, which the driver completes: HEADER words, and GROUP_WORDS for
each group.

    COUNT · DIMENSION · END₀ FIRST₀ ROWS₀ COLUMNS₀ · END₁ FIRST₁ …

The caller writes COUNT, DIMENSION and the ends, which do not decrease; a group begins where the one before it ends, the
first one at 0. The driver writes the number of a group's first block, and how many it has by rows and by columns. A
group is cut as its share of the work requires, so that threads stay busy where most of it is in one group.

An empty group has no block: where the steps are cut, its C is left as it is, and so is C outside of all groups.
"""

from __future__ import annotations

from .config_words import LONG, MR, NR, SHORT, SIZE
from .gemm_args import A_BS, B_BS, C_BS, GROUPS, WIDE, A, B, C, K, M, N
from .memory import ceil_div, floor_div, get, jit, put
from .schedule import (
    CHAIN,
    COLUMN_BLOCKS,
    K_CHUNKS,
    ROW_BLOCKS,
    plan_blocks,
    plan_chain,
    plan_grain_tiles,
    restrict,
    restrict_k,
)

COUNT, DIMENSION, HEADER = range(3)
END, FIRST, ROWS, COLUMNS, GROUP_WORDS = range(5)
BY_ROWS, BY_COLUMNS, BY_STEPS = range(3)
BLOCKS_PER_THREAD = 4  # of equal groups: the last block that a thread computes alone is at most so small a share


@jit
def plan_groups(config, args, threads):
    """Cut every group into blocks, and plan all of them as the blocks of one product."""
    table, m, n, k = get(args, GROUPS), get(args, M), get(args, N), get(args, K)
    dimension, blocks, begin = get(table, DIMENSION), 0, 0
    whole, group = m if dimension == BY_ROWS else n if dimension == BY_COLUMNS else k, table + 8 * HEADER
    for _ in range(get(table, COUNT)):
        size, rows, columns = get(group, END) - begin, 0, 0
        if size > 0 and m > 0 and n > 0 and k > 0:
            tall, wide = size if dimension == BY_ROWS else m, size if dimension == BY_COLUMNS else n
            work = float(m) * n * k * size / whole
            row_tiles, panels = ceil_div(tall, get(config, MR)), ceil_div(wide, get(config, NR))
            parts = 1
            if threads > 1:
                parts = ceil_div(BLOCKS_PER_THREAD * threads * size, whole)
            rows, columns = plan_blocks(row_tiles, panels, parts, plan_grain_tiles(work, row_tiles * panels))
        put(group, FIRST, blocks)
        put(group, ROWS, rows)
        put(group, COLUMNS, columns)
        blocks += rows * columns
        begin, group = get(group, END), group + 8 * GROUP_WORDS
    put(args, CHAIN, plan_chain(k, get(config, SHORT), get(config, LONG)))
    put(args, K_CHUNKS, 1)
    put(args, ROW_BLOCKS, blocks)
    put(args, COLUMN_BLOCKS, 1)
    return 0


@jit
def select_group(config, args, index):
    """Restrict the product to the group of block ``index``; the number of that block in the group."""
    table, size = get(args, GROUPS), get(config, SIZE)
    number, end = 0, get(table, COUNT)
    while end - number > 1:  # the last group whose first block is not behind this one; empty ones come before it
        middle = floor_div(number + end, 2)
        if get(table, HEADER + middle * GROUP_WORDS + FIRST) <= index:
            number = middle
        else:
            end = middle
    group = table + 8 * (HEADER + number * GROUP_WORDS)
    begin = get(group, END - GROUP_WORDS) if number > 0 else 0
    length, dimension = get(group, END) - begin, get(table, DIMENSION)
    put(args, A, get(args, A) + number * get(args, A_BS) * size)
    put(args, B, get(args, B) + number * get(args, B_BS) * size)
    put(args, C, get(args, C) + number * get(args, C_BS) * (size << get(args, WIDE)))
    put(args, ROW_BLOCKS, get(group, ROWS))
    put(args, COLUMN_BLOCKS, get(group, COLUMNS))
    if dimension == BY_ROWS:
        restrict(args, begin, length, 0, get(args, N), size)
    elif dimension == BY_COLUMNS:
        restrict(args, 0, get(args, M), begin, length, size)
    else:
        restrict_k(args, begin, length, size)
        put(args, CHAIN, plan_chain(length, get(config, SHORT), get(config, LONG)))
    return index - get(group, FIRST)
