"""Products by all threads, for one dtype and one configuration: the plan, the parts, the only driver.

C is cut into rectangles, one or more a thread, and each is a product of its own (loops.py), so that threads share
nothing but the operands and wait for each other once. Where C is small and k is long, chunks of k are the parts.

The three products of a matmul and its gradients are this one function on other strides; a backward pass is two of
them in one call, and so is a batch.
"""

from __future__ import annotations

from collections.abc import Callable

from numba.core import types

from . import job as words
from .config import CHAIN, SHORT_CHAIN, SPLIT_BYTES, BlockConfig, steps
from .cores import clear_cores, leave_core, take_core
from .job import (
    ceil_div,
    copy,
    is_plain,
    job_words,
    parts_of,
    parts_of_one,
    product,
    product_words,
    restrict,
    restrict_k,
    restrict_to_one,
    share,
    sums_bytes,
)
from .loops import make_multiply
from .memory import get, jit, next_number, put, symbol
from .microkernel import microkernel_ir, transposed_ir
from .operand import operand_of
from .pack import PACK_ROWS_SIGNATURE, PACK_STEPS_SIGNATURE, make_pack_rows, make_pack_steps
from .sums import make_finish, make_multiply_by_sums
from .workspace import acquire, buffers, forked, give_back

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
        microkernel: microkernel_ir(microkernel, operand.vector, steps(config.mr), steps(config.vectors)),
        transposed: transposed_ir(transposed, operand, steps(config.mr)),
    }


def make_task(config: BlockConfig) -> Callable:
    """``task(begin, end, job)``: one thread of the pool, which takes parts of the job until there are none."""
    size, chunk, narrow = operand_of(config).size, config.chunk, config.narrow
    mr, nr, lane_bytes, thread_bytes = config.mr, config.nr, config.lane_bytes, config.thread_bytes
    multiply = types.ExternalFunction(f"{config.name}_multiply", MULTIPLY_SIGNATURE)
    multiply_by_sums = make_multiply_by_sums(config, multiply)

    @jit
    def one_rectangle(part, index, work):
        m, n, columns = get(part, words.M), get(part, words.N), get(part, words.COLUMN_PARTS)
        first, last = share(ceil_div(m, mr), get(part, words.ROW_PARTS), index // columns)
        left, right = share(ceil_div(n, nr), columns, index % columns)
        i, j = first * mr, left * nr
        restrict(part, i, min(m, last * mr) - i, j, min(n, right * nr) - j, size)
        if narrow or get(part, words.K) > chunk or not is_plain(part):
            multiply_by_sums(part, work)
        else:
            multiply(part, work)

    @jit
    def one_chunk(part, index, work):
        k = get(part, words.K)
        restrict_k(part, index * chunk, min(chunk, k - index * chunk), size)
        wide = get(part, words.SUMS_RS)
        put(part, words.C, get(part, words.SUMS) + index * get(part, words.M) * wide * lane_bytes)
        put(part, words.C_RS, wide)
        multiply(part, work)

    def task(begin, end, job):
        if begin > 0 and not take_core(job):
            leave_core(job)
        part = product_words()
        work = get(job, words.WORK) + begin * thread_bytes
        index = next_number(job, words.NEXT)
        while index < get(job, words.PARTS):
            chosen = 0
            if index >= parts_of(product(job, 0)):
                index, chosen = index - parts_of(product(job, 0)), 1
            copy(part, product(job, chosen), words.WORDS)
            parts = parts_of_one(part)
            restrict_to_one(part, index // parts, size, lane_bytes)
            index = index % parts
            if get(part, words.CHUNK_PARTS) > 1:
                one_chunk(part, index, work)
            else:
                one_rectangle(part, index, work)
            index = next_number(job, words.NEXT)

    return task


def make_plan(config: BlockConfig) -> Callable:
    """``plan(part, threads)`` → bytes of sums that the product needs beside what threads have; fills in its plan."""
    dtype, fold, mr, nr, lanes = config.dtype, config.fold, config.mr, config.nr, config.lanes
    short, long, chunk, lane_bytes = SHORT_CHAIN[dtype], CHAIN[dtype], config.chunk, config.lane_bytes
    size = operand_of(config).size

    @jit
    def plan(part, threads):
        m, n, k, batch = get(part, words.M), get(part, words.N), get(part, words.K), get(part, words.BATCH)
        put(part, words.CHUNK_PARTS, 1)
        put(part, words.ROW_PARTS, 0)
        put(part, words.COLUMN_PARTS, 0)
        if m == 0 or n == 0 or batch == 0:
            return 0
        if k == 0:
            for i in range(m):
                memset(get(part, words.C) + i * get(part, words.C_RS) * size, 0, n * size)
            return 0
        if words.plan_turn(m, n, get(part, words.C_RS), get(part, words.C_CS), lanes):
            words.turn(part)
            m, n = n, m
        put(part, words.CHAIN, words.plan_chain(k, short, long) if fold == 1 else long)
        row_tiles, panels, chunks = ceil_div(m, mr), ceil_div(n, nr), ceil_div(k, chunk)
        if chunks > 1 and batch * row_tiles * panels < 2 * threads:
            put(part, words.SUMS_RS, ceil_div(n, lanes) * lanes)
            put(part, words.CHUNK_PARTS, chunks)
            if batch * sums_bytes(part, lane_bytes) <= SPLIT_BYTES:
                put(part, words.ROW_PARTS, 1)
                put(part, words.COLUMN_PARTS, 1)
                return batch * sums_bytes(part, lane_bytes)
            put(part, words.CHUNK_PARTS, 1)
        rows, columns = words.plan_parts(row_tiles, panels, words.plan_threads_of_one(batch, threads))
        put(part, words.ROW_PARTS, rows)
        put(part, words.COLUMN_PARTS, columns)
        return 0

    return plan


def make_gemm(config: BlockConfig) -> Callable:
    """gemm(products, count, threads) → 0, or 1 when memory ran out

    C = alpha · (A · B) + beta · input      for each of one or two products, or of a batch; words as in job.py

    shapes      a (m, k), b (k, n), c and input (m, n); every size ≥ 0, and k > 0 unless c is ``single``
    strides     elements, any for a, b, input (0 and overlapping too), any for c that keep its elements apart
    dtypes      config.dtype for all four; addresses are int64, alpha and beta float64
    aliasing    c must not overlap a or b; input may be c itself; else c is written in full and never read before
    rounding    chains of fused multiply-adds, added in order (see ``config.CHAIN``), in chunks of k, added in
                order; then one product with alpha and one multiply-add of beta and input; 16-bit results are
                rounded once, at the end
    edges       packing pads partial tiles; the microkernel writes no element outside c
    determinism same bits for any m, n, strides, threads
    source      five loops after Goto and van de Geijn (2008), doi 10.1145/1356052.1356053, and BLIS (2015)
    """
    plan, finish, thread_bytes = make_plan(config), make_finish(config), config.thread_bytes
    task_address = symbol(f"{config.name}_task")
    linked_task = types.ExternalFunction(f"{config.name}_task", TASK_SIGNATURE)

    def gemm(products, count, threads):
        job = job_words()
        work, sums, parts = 0.0, 0, 0
        for index in range(count):
            source, part = products + 8 * index * words.PRODUCT, product(job, index)
            copy(part, source, words.PRODUCT)
            work += float(get(part, words.M)) * get(part, words.N) * get(part, words.K) * get(part, words.BATCH)
        threads = 1 if forked() else words.plan_threads(work, threads)
        for index in range(count):
            part = product(job, index)
            put(part, words.SUMS, sums)
            sums += plan(part, threads)
            parts += parts_of(part)
        if parts == 0:
            return 0
        slot = acquire(threads * thread_bytes + sums)
        if slot == 0:
            return 1
        put(job, words.NEXT, 0)
        put(job, words.PARTS, parts)
        put(job, words.WORK, buffers(slot))
        for index in range(count):
            part = product(job, index)
            put(part, words.SUMS, get(part, words.SUMS) + buffers(slot) + threads * thread_bytes)
        if threads == 1 or parts == 1:
            linked_task(0, 1, job)
        else:
            clear_cores(job)
            take_core(job)
            parallel_for(0, threads, 1, task_address(), job)
        for index in range(count):
            if get(product(job, index), words.CHUNK_PARTS) > 1:
                finish(product(job, index))
        give_back(slot)
        return 0

    return gemm
