"""Products by all threads: the plan, the blocks, the driver, which is compiled once and serves all dtypes.

C is cut into rectangles, one or more a thread, and each is a product of its own (loops.py), so that threads share
nothing but the operands and wait for each other once. Where C is small and k is long, the blocks are chunks of k.

The three products of a matmul and its gradients are this one function on other strides; a backward pass is two of
them in one call, with the sums of a bias three, and so is a batch.
"""

from __future__ import annotations

from collections.abc import Callable

from numba.core import types

from .affinity import claim_core, clear_cores, move_to_free_core
from .config import SPLIT_BYTES
from .config_words import CHUNK, CONVERTS, LANE_BYTES, LANES, LONG, MR, NR, SHORT, SIZE, THREAD_BYTES
from .epilogue import multiply_with_epilogue, reduce_chunks
from .gemm_args import ACCUMULATE, BATCH, C_CS, C_RS, C_RUNS, GEMM_ARGS, GROUPS, WIDE, C, K, M, N
from .groups import plan_groups, select_group
from .loops import multiply
from .memory import ceil_div, copy_words, fetch_increment, floor_div, get, jit, put, symbol
from .schedule import (
    BLOCKS,
    CHAIN,
    COLUMN_BLOCKS,
    CONFIG,
    HEADER,
    K_CHUNKS,
    MULTIPLY_SIGNATURE,
    NEXT,
    PARTIALS,
    PARTIALS_RS,
    PLANNED_ARGS,
    ROW_BLOCKS,
    WORK,
    args_words,
    block_count,
    blocks_per_item,
    linked_multiply,
    parallel_for,
    partial_bytes,
    plan_accumulation,
    plan_blocks,
    plan_chain,
    plan_grain_tiles,
    plan_split_k,
    plan_threads,
    plan_threads_per_product,
    plan_transposed_c,
    restrict,
    restrict_k,
    round_lanes,
    schedule_words,
    select_item,
    split_range,
    stores_directly,
    swap_operands,
)
from .workspace import acquire_slot, first_page, forked, release_slot

memset = types.ExternalFunction("memset", types.int64(types.int64, types.int32, types.int64))

GEMM_SIGNATURE = types.int64(types.int64, types.int64, types.int64, types.int64)
TASK_SIGNATURE = types.void(types.int64, types.int64, types.int64)
task_address = symbol("matmul_grad_task")
linked_task = types.ExternalFunction("matmul_grad_task", TASK_SIGNATURE)


@jit
def one_rectangle(config, block, index, work):
    m, n, columns = get(block, M), get(block, N), get(block, COLUMN_BLOCKS)
    if columns * get(block, ROW_BLOCKS) > 1:
        mr, nr, row = get(config, MR), get(config, NR), floor_div(index, columns)
        first, last = split_range(ceil_div(m, mr), get(block, ROW_BLOCKS), row)
        left, right = split_range(ceil_div(n, nr), columns, index - row * columns)
        i, j = first * mr, left * nr
        restrict(block, i, min(m, last * mr) - i, j, min(n, right * nr) - j, get(config, SIZE))
    are_lanes = get(config, CONVERTS) == 0 or get(block, WIDE) != 0
    if not are_lanes or get(block, K) > get(config, CHUNK) or not stores_directly(block):
        multiply_with_epilogue(config, block, work)
    else:
        linked_multiply(config, block, work)


@jit
def one_chunk(config, block, index, work):
    k, chunk, row_lanes = get(block, K), get(config, CHUNK), get(block, PARTIALS_RS)
    restrict_k(block, index * chunk, min(chunk, k - index * chunk), get(config, SIZE))
    put(block, C, get(block, PARTIALS) + index * get(block, M) * row_lanes * get(config, LANE_BYTES))
    put(block, C_RS, row_lanes)
    linked_multiply(config, block, work)


def task(begin, end, schedule):
    """One thread of the pool, which computes blocks of the call until none is left."""
    if begin > 0 and not claim_core(schedule):
        move_to_free_core(schedule)
    block, config = args_words(), get(schedule, CONFIG)
    work = get(schedule, WORK) + begin * get(config, THREAD_BYTES)
    index = fetch_increment(schedule, NEXT)
    while index < get(schedule, BLOCKS):
        args = schedule + 8 * HEADER
        while index >= block_count(args):
            index, args = index - block_count(args), args + 8 * PLANNED_ARGS
        copy_words(block, args, PLANNED_ARGS)
        blocks, item = blocks_per_item(block), index
        if blocks > 1:
            item = floor_div(index, blocks)
            index -= item * blocks
        else:
            index = 0
        select_item(block, item, get(config, SIZE), get(config, LANE_BYTES))
        if get(block, GROUPS) != 0:
            index = select_group(config, block, index)
        if get(block, K_CHUNKS) > 1:
            one_chunk(config, block, index, work)
        else:
            one_rectangle(config, block, index, work)
        index = fetch_increment(schedule, NEXT)


@jit
def plan(config, args, threads):
    """Plan a product; returns the bytes of partial results that its threads share."""
    m, n, k, batch = get(args, M), get(args, N), get(args, K), get(args, BATCH)
    put(args, K_CHUNKS, 1)
    put(args, ROW_BLOCKS, 0)
    put(args, COLUMN_BLOCKS, 0)
    if get(args, GROUPS) != 0:
        return plan_groups(config, args, threads)
    if m == 0 or n == 0 or batch == 0:
        return 0
    if k == 0 and get(args, ACCUMULATE) != 0:
        return 0
    if k == 0:
        size = get(config, SIZE) << get(args, WIDE)
        for i in range(m):
            memset(get(args, C) + i * get(args, C_RS) * size, 0, n * size)
        return 0
    is_transposed = plan_transposed_c(m, n, get(args, C_RS), get(args, C_CS), get(config, LANES))
    if is_transposed and get(args, C_RUNS) == 0:
        swap_operands(args)
        m, n = n, m
    if get(args, ACCUMULATE) != 0:
        plan_accumulation(config, args)
    put(args, CHAIN, plan_chain(k, get(config, SHORT), get(config, LONG)))
    row_tiles, panels = ceil_div(m, get(config, MR)), ceil_div(n, get(config, NR))
    chunks, lane_bytes = ceil_div(k, get(config, CHUNK)), get(config, LANE_BYTES)
    if chunks > 1 and plan_split_k(row_tiles, panels, chunks, batch, threads):
        put(args, PARTIALS_RS, round_lanes(config, n))
        put(args, K_CHUNKS, chunks)
        if batch * partial_bytes(args, lane_bytes) <= SPLIT_BYTES:
            put(args, ROW_BLOCKS, 1)
            put(args, COLUMN_BLOCKS, 1)
            return batch * partial_bytes(args, lane_bytes)
        put(args, K_CHUNKS, 1)
    least = plan_grain_tiles(float(m) * n * k, row_tiles * panels)
    rows, columns = plan_blocks(row_tiles, panels, plan_threads_per_product(batch, threads), least)
    put(args, ROW_BLOCKS, rows)
    put(args, COLUMN_BLOCKS, columns)
    return 0


def gemm(config, products, count, threads):
    """0, or 1 when memory ran out.

    C = alpha · (A · B) + beta · source      for each of one to three products, a batch, or groups; see gemm_args.py

    shapes      a (m, k), b (k, n), c and source (m, n); every size ≥ 0, and k > 0 unless ``set_dense_c`` set c
    strides     elements, any for a, b, source (0 and overlapping too), any for c that keep its elements apart
    dtypes      one for all four, that of ``config`` (see config_words.py); addresses are int64, alpha and beta float64
    aliasing    c must not overlap a or b; source may be c itself; else c is written in full and never read before
    rounding    chains of fused multiply-adds, added in order (see ``config.CHAIN``), in chunks of k, added in
                order; then a multiplication by alpha and a multiply-add of beta and source; 16-bit results are
                rounded once, at the end. With ACCUMULATE the chains of one chunk are added to c, in order
    edges       packing pads partial tiles; the microkernel writes no element outside c
    determinism same bits for any m, n, strides, threads
    source      five loops after Goto and van de Geijn (2008), doi 10.1145/1356052.1356053, and BLIS (2015)
    """
    schedule, thread_bytes = schedule_words(), get(config, THREAD_BYTES)
    work, partials, blocks, args = 0.0, 0, 0, schedule + 8 * HEADER
    for index in range(count):
        copy_words(args, products + 8 * index * GEMM_ARGS, GEMM_ARGS)
        work += float(get(args, M)) * get(args, N) * get(args, K) * get(args, BATCH)
        args += 8 * PLANNED_ARGS
    threads = 1 if forked() else plan_threads(work, threads)
    args = schedule + 8 * HEADER
    for _ in range(count):
        put(args, PARTIALS, partials)
        partials += plan(config, args, threads)
        blocks += block_count(args)
        args += 8 * PLANNED_ARGS
    if blocks == 0:
        return 0
    threads = min(threads, blocks)
    slot = acquire_slot(threads * thread_bytes + partials)
    if slot == 0:
        return 1
    put(schedule, NEXT, 0)
    put(schedule, BLOCKS, blocks)
    put(schedule, WORK, first_page(slot))
    put(schedule, CONFIG, config)
    args = schedule + 8 * HEADER
    for _ in range(count):
        put(args, PARTIALS, get(args, PARTIALS) + first_page(slot) + threads * thread_bytes)
        args += 8 * PLANNED_ARGS
    if threads == 1:
        linked_task(0, 1, schedule)
    else:
        clear_cores(schedule)
        claim_core(schedule)
        parallel_for(0, threads, 1, task_address(), schedule)
    args = schedule + 8 * HEADER
    for _ in range(count):
        if get(args, K_CHUNKS) > 1:
            reduce_chunks(config, args)
        args += 8 * PLANNED_ARGS
    release_slot(slot)
    return 0


# What the driver is compiled from. The parts call each other by name, so that none is compiled into its callers.
KERNELS: dict[str, tuple[Callable, types.Type]] = {
    "matmul_grad_gemm": (gemm, GEMM_SIGNATURE),
    "matmul_grad_task": (task, TASK_SIGNATURE),
    "matmul_grad_multiply": (multiply, MULTIPLY_SIGNATURE),
}
