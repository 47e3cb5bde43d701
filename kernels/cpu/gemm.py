"""C = A·B by five loops around the microkernel, for one dtype and one configuration.

    for jc in n by NC            a panel of B for the L3 cache
      for pc in k by KC            packed once, by all threads                 pack_b
        each thread, over its rows and columns of C:
          for ic in m by MC          a block of A for the L2 cache             pack_a
            for jr in nc by NR         one column panel
              for ir in mc by MR         one register tile                     microkernel

The three products of a matmul and its gradients are this one function on other strides.
"""

from __future__ import annotations

from collections.abc import Callable

from numba.core import types

from .config import (
    DIRECT_PANELS,
    DIRECT_ROWS,
    PAD,
    TRANSPOSED_ROWS,
    BlockConfig,
    k_block,
    split_threads,
    steps,
    useful_threads,
)
from .memory import get, jit, put, stack_words, symbol
from .microkernel import ARGUMENTS, microkernel_ir, transposed_ir
from .pack import make_pack
from .simd import Vector
from .workspace import acquire, buffers, forked, give_back

# The words of a job: what the threads of one call share.
M, N, K, A, A_RS, A_CS, B, B_RS, B_CS, C, C_RS = range(11)
JC, NC, PC, KC = range(11, 15)  # the panel of B at hand
PHASE, PARTS, ROW_PARTS, COLUMN_PARTS, A_DIRECT, B_DIRECT, WORK_A, WORK_B = range(15, 23)
WORDS = 23
PACKING, MULTIPLYING = 0, 1
PACKED, BY_ROWS, BY_COLUMNS = 0, 1, 2  # B_DIRECT

parallel_for = types.ExternalFunction(
    "matmul_grad_parallel_for", types.int32(types.int64, types.int64, types.int64, types.int64, types.int64)
)
memset = types.ExternalFunction("memset", types.int64(types.int64, types.int32, types.int64))

plan_k = jit(k_block)
plan_parts = jit(split_threads)
plan_threads = jit(useful_threads)

GEMM_SIGNATURE = types.int64(*[types.int64] * 12)
TASK_SIGNATURE = types.void(types.int64, types.int64, types.int64)


def make_kernels(config: BlockConfig) -> dict[str, str | tuple[Callable, types.Type]]:
    """All that one configuration is compiled from: the driver, the task of its threads, the microkernels."""
    vector = Vector(config.dtype, config.lanes, config.fused)
    gemm, task = make_gemm(config)
    microkernel = f"{config.name}_microkernel"
    return {
        config.name: (gemm, GEMM_SIGNATURE),
        f"{config.name}_task": (task, TASK_SIGNATURE),
        microkernel: microkernel_ir(microkernel, vector, steps(config.mr), steps(config.vectors)),
        f"{config.name}_transposed": transposed_ir(f"{config.name}_transposed", vector, steps(config.mr)),
    }


def make_gemm(config: BlockConfig) -> tuple[Callable, Callable]:
    """``(gemm, task)``: the driver, and what each thread of the pool runs.

    gemm(m, n, k, a, a_rs, a_cs, b, b_rs, b_cs, c, c_rs, threads) → 0, or 1 when memory ran out

    C = A · B

    shapes      a (m, k), b (k, n), c (m, n); every size ≥ 0
    strides     elements, any for a and b (0 and overlapping too); c has rows c_rs apart, columns together
    dtypes      config.dtype for all three; addresses are int64
    aliasing    c must not overlap a or b; c is written in full and never read before
    rounding    a chain of fused multiply-adds a k-block, k-blocks added in order (see ``config.KC``)
    edges       packing pads partial tiles; the microkernel writes no element outside c
    determinism same bits for any m, n, strides, threads
    source      five loops after Goto and van de Geijn (2008), doi 10.1145/1356052.1356053, and BLIS (2015)
    """
    vector = Vector(config.dtype, config.lanes, config.fused)
    pack_part = make_pack_part(config, vector)
    multiply_part = make_multiply_part(config, vector)
    job_words, task_address = stack_words(WORDS), symbol(f"{config.name}_task")
    mr, nr, kc_max, nc_max, size = config.mr, config.nr, config.kc, config.nc, vector.size
    a_bytes, b_bytes = config.a_bytes, config.b_bytes

    def task(begin, end, job):
        for part in range(begin, end):
            if get(job, PHASE) == PACKING:
                pack_part(job, part)
            else:
                multiply_part(job, part)

    # By name, so that the loops below are compiled once: in the task that the pool's threads call too.
    linked_task = types.ExternalFunction(f"{config.name}_task", TASK_SIGNATURE)

    @jit
    def run(job, phase):
        put(job, PHASE, phase)
        if get(job, PARTS) == 1:
            linked_task(0, 1, job)
        else:
            parallel_for(0, get(job, PARTS), 1, task_address(), job)

    @jit
    def loops_5_to_4(job):
        n, k = get(job, N), get(job, K)
        step = plan_k(k, kc_max)
        for jc in range(0, n, nc_max):
            put(job, JC, jc)
            put(job, NC, min(nc_max, n - jc))
            for block in range((k + step - 1) // step):
                pc = block * step
                put(job, PC, pc)
                put(job, KC, min(step, k - pc))
                run(job, PACKING)
                run(job, MULTIPLYING)

    def gemm(m, n, k, a, a_rs, a_cs, b, b_rs, b_cs, c, c_rs, threads):
        if m == 0 or n == 0:
            return 0
        if k == 0:
            for i in range(m):
                memset(c + i * c_rs * size, 0, n * size)
            return 0
        threads = 1 if forked() else plan_threads(m, n, k, threads)
        slot = acquire(threads * a_bytes + b_bytes)
        if slot == 0:
            return 1
        row_tiles, panels = (m + mr - 1) // mr, (min(n, nc_max) + nr - 1) // nr
        rows, columns = plan_parts(row_tiles, panels, threads)
        job = job_words()
        put(job, M, m)
        put(job, N, n)
        put(job, K, k)
        put(job, A, a)
        put(job, A_RS, a_rs)
        put(job, A_CS, a_cs)
        put(job, B, b)
        put(job, B_RS, b_rs)
        put(job, B_CS, b_cs)
        put(job, C, c)
        put(job, C_RS, c_rs)
        put(job, PARTS, rows * columns)
        put(job, ROW_PARTS, rows)
        put(job, COLUMN_PARTS, columns)
        put(job, A_DIRECT, panels <= DIRECT_PANELS)
        put(job, B_DIRECT, plan_direct(row_tiles, m, b_rs, b_cs))
        put(job, WORK_B, buffers(slot))
        put(job, WORK_A, buffers(slot) + b_bytes)
        loops_5_to_4(job)
        give_back(slot)
        return 0

    return gemm, task


@jit
def plan_direct(row_tiles, m, b_rs, b_cs):
    """How whole panels of B are read: packed, or in place where too few rows share them."""
    if b_cs == 1 and row_tiles <= DIRECT_ROWS:
        return BY_ROWS
    if b_rs == 1 and m <= TRANSPOSED_ROWS:
        return BY_COLUMNS
    return PACKED


@jit
def largest(choices, room):
    """Index of the largest of ``choices`` (descending to 1) that fits in ``room``."""
    for index in range(len(choices)):
        if choices[index] <= room:
            return index
    return len(choices) - 1


@jit
def smallest(choices, need):
    """Index of the smallest of ``choices`` (descending) that holds ``need``."""
    for index in range(len(choices) - 1, 0, -1):
        if choices[index] >= need:
            return index
    return 0


@jit
def share(total, parts, part):
    """``[begin, end)`` of one of ``parts`` nearly equal shares of ``total``."""
    return total * part // parts, total * (part + 1) // parts


def make_pack_part(config: BlockConfig, vector: Vector) -> Callable:
    """``pack_part(job, part)``: this thread's column panels of B, each kc × nr, one after the other."""
    nr, size = config.nr, vector.size
    pack = make_pack(vector)

    @jit
    def pack_part(job, part):
        nc, kc = get(job, NC), get(job, KC)
        b_rs, b_cs = get(job, B_RS), get(job, B_CS)
        first, last = share((nc + nr - 1) // nr, get(job, PARTS), part)
        for panel in range(first, last):
            j = panel * nr
            if not (get(job, B_DIRECT) and j + nr <= nc):
                source = get(job, B) + (get(job, PC) * b_rs + (get(job, JC) + j) * b_cs) * size
                pack(get(job, WORK_B) + j * kc * size, kc, nr, nr, source, b_rs, b_cs, nc - j)

    return pack_part


def make_multiply_part(config: BlockConfig, vector: Vector) -> Callable:
    """``multiply_part(job, part)``: loops 3 to 1 over this thread's rows and columns of C."""
    mr, nr, mc_max, lanes, size = config.mr, config.nr, config.mc, config.lanes, vector.size
    a_bytes = config.a_bytes
    pack = make_pack(vector)
    row_steps, vector_steps = steps(config.mr), steps(config.vectors)
    signature = types.void(*[types.int64] * ARGUMENTS)
    microkernel = types.ExternalFunction(f"{config.name}_microkernel", signature)
    transposed = types.ExternalFunction(f"{config.name}_transposed", signature)

    @jit
    def pack_a(job, target, i, rows):
        """Rows i … i+rows of A, contiguous along the dimension that A has contiguous: (row stride, k stride)."""
        a_rs, a_cs, kc = get(job, A_RS), get(job, A_CS), get(job, KC)
        source = get(job, A) + (i * a_rs + get(job, PC) * a_cs) * size
        if a_rs == 1 and a_cs != 1:
            wide = (rows + lanes - 1) // lanes * lanes
            stride = wide + PAD
            pack(target, kc, wide, stride, source, a_cs, a_rs, rows)
            return 1, stride
        wide = (kc + lanes - 1) // lanes * lanes
        stride = wide + PAD
        pack(target, rows, wide, stride, source, a_rs, a_cs, kc)
        return stride, 1

    @jit
    def loops_2_to_1(job, i, rows, a, a_rs, a_ks, first_panel, last_panel):
        nc, kc, b_rs, b_cs = get(job, NC), get(job, KC), get(job, B_RS), get(job, B_CS)
        c_rs, first = get(job, C_RS), get(job, PC) == 0
        for panel in range(first_panel, last_panel):
            j = panel * nr
            columns = min(nr, nc - j)
            direct = get(job, B_DIRECT) if columns == nr else PACKED
            b, b_ks = get(job, WORK_B) + j * kc * size, nr
            if direct != PACKED:
                b = get(job, B) + (get(job, PC) * b_rs + (get(job, JC) + j) * b_cs) * size
                b_ks = b_rs
            c = get(job, C) + (i * c_rs + get(job, JC) + j) * size
            vector_step = smallest(vector_steps, (columns + lanes - 1) // lanes)
            ir = 0
            while direct == BY_COLUMNS and ir < rows:
                row_step = largest(row_steps, rows - ir)
                transposed(
                    row_step, nr, kc, a + ir * a_rs * size, a_rs, a_ks, b, b_cs,
                    c + ir * c_rs * size, c_rs, 0, first,
                )  # fmt: skip
                ir += row_steps[row_step]
            while ir < rows:
                row_step = largest(row_steps, rows - ir)
                microkernel(
                    row_step, vector_step, kc, a + ir * a_rs * size, a_rs, a_ks, b, b_ks,
                    c + ir * c_rs * size, c_rs, columns, first,
                )  # fmt: skip
                ir += row_steps[row_step]

    @jit
    def multiply_part(job, part):
        m, columns = get(job, M), get(job, COLUMN_PARTS)
        first_tile, last_tile = share((m + mr - 1) // mr, get(job, ROW_PARTS), part // columns)
        first_panel, last_panel = share((get(job, NC) + nr - 1) // nr, columns, part % columns)
        begin, end = first_tile * mr, min(m, last_tile * mr)
        target = get(job, WORK_A) + part * a_bytes
        a_rs, a_cs = get(job, A_RS), get(job, A_CS)
        if get(job, A_DIRECT):
            a = get(job, A) + (begin * a_rs + get(job, PC) * a_cs) * size
            loops_2_to_1(job, begin, end - begin, a, a_rs, a_cs, first_panel, last_panel)
        else:
            for i in range(begin, end, mc_max):
                rows = min(mc_max, end - i)
                row_stride, k_stride = pack_a(job, target, i, rows)
                loops_2_to_1(job, i, rows, target, row_stride, k_stride, first_panel, last_panel)

    return multiply_part
