"""Products by all threads, for one dtype and one configuration: the plan, the blocks, the driver.

C is cut into rectangles, one or more a thread, and each is a product of its own (loops.py), so that threads share
nothing but the operands and wait for each other once. Where C is small and k is long, the blocks are chunks of k.

The three products of a matmul and its gradients are this one function on other strides; a backward pass is two of
them in one call, and so is a batch.
"""

from __future__ import annotations

from collections.abc import Callable

from numba.core import types

from .affinity import claim_core, clear_cores, move_to_free_core
from .config import CHAIN as LONG_CHAIN
from .config import SHORT_CHAIN, SPLIT_BYTES, BlockConfig, tile_sizes
from .epilogue import make_multiply_with_epilogue, make_reduce_chunks
from .gemm_args import BATCH, C_CS, C_RS, GEMM_ARGS, C, K, M, N
from .loops import make_multiply
from .memory import fetch_increment, get, jit, put, symbol
from .microkernel import microkernel_ir, transposed_ir
from .operand import operand_of
from .pack import PACK_ROWS_SIGNATURE, PACK_STEPS_SIGNATURE, make_pack_rows, make_pack_steps
from .row import row_ir
from .schedule import (
    BLOCKS,
    CHAIN,
    COLUMN_BLOCKS,
    K_CHUNKS,
    NEXT,
    PARTIALS,
    PARTIALS_RS,
    PLANNED_ARGS,
    ROW_BLOCKS,
    WORK,
    args_of,
    args_words,
    block_count,
    blocks_per_item,
    ceil_div,
    copy_words,
    partial_bytes,
    plan_blocks,
    plan_chain,
    plan_grain_tiles,
    plan_split_k,
    plan_threads,
    plan_threads_per_product,
    plan_transposed_c,
    restrict,
    restrict_k,
    schedule_words,
    select_item,
    split_range,
    stores_directly,
    swap_operands,
)
from .workspace import acquire_slot, first_page, forked, release_slot

parallel_for = types.ExternalFunction(
    "matmul_grad_parallel_for", types.int32(types.int64, types.int64, types.int64, types.int64, types.int64)
)
memset = types.ExternalFunction("memset", types.int64(types.int64, types.int32, types.int64))

GEMM_SIGNATURE = types.int64(types.int64, types.int64, types.int64)
MULTIPLY_SIGNATURE = types.void(types.int64, types.int64)
TASK_SIGNATURE = types.void(types.int64, types.int64, types.int64)


def make_kernels(config: BlockConfig) -> dict[str, str | tuple[Callable, types.Type]]:
    """All that one configuration is compiled from: the driver, the task of its threads, packing, microkernels.

    They call each other by name, so that each is compiled once and not again inside every caller.
    """
    operand = operand_of(config)
    microkernel, transposed = f"{config.name}_microkernel", f"{config.name}_transposed"
    return {
        config.name: (make_gemm(config), GEMM_SIGNATURE),
        f"{config.name}_task": (make_task(config), TASK_SIGNATURE),
        f"{config.name}_multiply": (make_multiply(config), MULTIPLY_SIGNATURE),
        f"{config.name}_pack_steps": (make_pack_steps(operand), PACK_STEPS_SIGNATURE),
        f"{config.name}_pack_rows": (make_pack_rows(operand), PACK_ROWS_SIGNATURE),
        microkernel: microkernel_ir(microkernel, operand.vector, tile_sizes(config.mr), tile_sizes(config.vectors)),
        f"{config.name}_row": row_ir(f"{config.name}_row", operand),
        transposed: transposed_ir(transposed, operand, tile_sizes(config.mr)),
    }


def make_task(config: BlockConfig) -> Callable:
    """``task(begin, end, schedule)``: one thread of the pool, which computes blocks of the call until none is left."""
    size, chunk, accumulates_wider = operand_of(config).size, config.chunk, config.accumulates_wider
    mr, nr, lane_bytes, thread_bytes = config.mr, config.nr, config.lane_bytes, config.thread_bytes
    multiply = types.ExternalFunction(f"{config.name}_multiply", MULTIPLY_SIGNATURE)
    multiply_with_epilogue = make_multiply_with_epilogue(config, multiply)

    @jit
    def one_rectangle(block, index, work):
        m, n, columns = get(block, M), get(block, N), get(block, COLUMN_BLOCKS)
        first, last = split_range(ceil_div(m, mr), get(block, ROW_BLOCKS), index // columns)
        left, right = split_range(ceil_div(n, nr), columns, index % columns)
        i, j = first * mr, left * nr
        restrict(block, i, min(m, last * mr) - i, j, min(n, right * nr) - j, size)
        if accumulates_wider or get(block, K) > chunk or not stores_directly(block):
            multiply_with_epilogue(block, work)
        else:
            multiply(block, work)

    @jit
    def one_chunk(block, index, work):
        k = get(block, K)
        restrict_k(block, index * chunk, min(chunk, k - index * chunk), size)
        row_lanes = get(block, PARTIALS_RS)
        put(block, C, get(block, PARTIALS) + index * get(block, M) * row_lanes * lane_bytes)
        put(block, C_RS, row_lanes)
        multiply(block, work)

    def task(begin, end, schedule):
        if begin > 0 and not claim_core(schedule):
            move_to_free_core(schedule)
        block = args_words()
        work = get(schedule, WORK) + begin * thread_bytes
        index = fetch_increment(schedule, NEXT)
        while index < get(schedule, BLOCKS):
            chosen = 0
            if index >= block_count(args_of(schedule, 0)):
                index, chosen = index - block_count(args_of(schedule, 0)), 1
            copy_words(block, args_of(schedule, chosen), PLANNED_ARGS)
            blocks = blocks_per_item(block)
            select_item(block, index // blocks, size, lane_bytes)
            index = index % blocks
            if get(block, K_CHUNKS) > 1:
                one_chunk(block, index, work)
            else:
                one_rectangle(block, index, work)
            index = fetch_increment(schedule, NEXT)

    return task


def make_plan(config: BlockConfig) -> Callable:
    """``plan(args, threads)``: plan a product; returns the bytes of partial results that its threads share."""
    dtype, k_per_lane, mr, nr, lanes = config.dtype, config.k_per_lane, config.mr, config.nr, config.lanes
    short, long, chunk, lane_bytes = SHORT_CHAIN[dtype], LONG_CHAIN[dtype], config.chunk, config.lane_bytes
    size = operand_of(config).size

    @jit
    def plan(args, threads):
        m, n, k, batch = get(args, M), get(args, N), get(args, K), get(args, BATCH)
        put(args, K_CHUNKS, 1)
        put(args, ROW_BLOCKS, 0)
        put(args, COLUMN_BLOCKS, 0)
        if m == 0 or n == 0 or batch == 0:
            return 0
        if k == 0:
            for i in range(m):
                memset(get(args, C) + i * get(args, C_RS) * size, 0, n * size)
            return 0
        if plan_transposed_c(m, n, get(args, C_RS), get(args, C_CS), lanes):
            swap_operands(args)
            m, n = n, m
        put(args, CHAIN, plan_chain(k, short, long) if k_per_lane == 1 else long)
        row_tiles, panels, chunks = ceil_div(m, mr), ceil_div(n, nr), ceil_div(k, chunk)
        if chunks > 1 and plan_split_k(row_tiles, panels, chunks, batch, threads):
            put(args, PARTIALS_RS, ceil_div(n, lanes) * lanes)
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

    return plan


def make_gemm(config: BlockConfig) -> Callable:
    """gemm(products, count, threads) → 0, or 1 when memory ran out

    C = alpha · (A · B) + beta · source      for each of one or two products, or of a batch; see gemm_args.py

    shapes      a (m, k), b (k, n), c and source (m, n); every size ≥ 0, and k > 0 unless ``set_dense_c`` set c
    strides     elements, any for a, b, source (0 and overlapping too), any for c that keep its elements apart
    dtypes      config.dtype for all four; addresses are int64, alpha and beta float64
    aliasing    c must not overlap a or b; source may be c itself; else c is written in full and never read before
    rounding    chains of fused multiply-adds, added in order (see ``config.CHAIN``), in chunks of k, added in
                order; then a multiplication by alpha and a multiply-add of beta and source; 16-bit results are
                rounded once, at the end
    edges       packing pads partial tiles; the microkernel writes no element outside c
    determinism same bits for any m, n, strides, threads
    source      five loops after Goto and van de Geijn (2008), doi 10.1145/1356052.1356053, and BLIS (2015)
    """
    plan, reduce_chunks, thread_bytes = make_plan(config), make_reduce_chunks(config), config.thread_bytes
    task_address = symbol(f"{config.name}_task")
    linked_task = types.ExternalFunction(f"{config.name}_task", TASK_SIGNATURE)

    def gemm(products, count, threads):
        schedule = schedule_words()
        work, partials, blocks = 0.0, 0, 0
        for index in range(count):
            given, args = products + 8 * index * GEMM_ARGS, args_of(schedule, index)
            copy_words(args, given, GEMM_ARGS)
            work += float(get(args, M)) * get(args, N) * get(args, K) * get(args, BATCH)
        threads = 1 if forked() else plan_threads(work, threads)
        for index in range(count):
            args = args_of(schedule, index)
            put(args, PARTIALS, partials)
            partials += plan(args, threads)
            blocks += block_count(args)
        if blocks == 0:
            return 0
        threads = min(threads, blocks)
        slot = acquire_slot(threads * thread_bytes + partials)
        if slot == 0:
            return 1
        put(schedule, NEXT, 0)
        put(schedule, BLOCKS, blocks)
        put(schedule, WORK, first_page(slot))
        for index in range(count):
            args = args_of(schedule, index)
            put(args, PARTIALS, get(args, PARTIALS) + first_page(slot) + threads * thread_bytes)
        if threads == 1:
            linked_task(0, 1, schedule)
        else:
            clear_cores(schedule)
            claim_core(schedule)
            parallel_for(0, threads, 1, task_address(), schedule)
        for index in range(count):
            if get(args_of(schedule, index), K_CHUNKS) > 1:
                reduce_chunks(args_of(schedule, index))
        release_slot(slot)
        return 0

    return gemm
