"""C = A·B by five loops around the microkernel, for one dtype and one configuration.

    for jc in n by NC            a panel of B for the L3 cache
      for pc in k by KC            packed once, by all threads                 loops.pack_part
        each thread, over its rows and columns of C:                           loops.multiply_part
          for ic in m by MC          a block of A for the L2 cache             loops.pack_a
            for jr in nc by NR         one column panel
              for ir in mc by MR         one register tile                     microkernel

The three products of a matmul and its gradients are this one function on other strides.
"""

from __future__ import annotations

from collections.abc import Callable

from numba.core import types

from . import job as words
from .config import CHAIN, DIRECT_PANELS, SUM_COLUMNS, BlockConfig, steps
from .job import ceil_div, job_words, plan_direct, plan_k, plan_parts, plan_threads
from .loops import make_multiply_part, make_pack_part, make_store_part, operand_of
from .memory import get, jit, put, symbol
from .microkernel import microkernel_ir, transposed_ir
from .pack import PACK_ROWS_SIGNATURE, PACK_STEPS_SIGNATURE, make_pack_rows, make_pack_steps
from .workspace import acquire, buffers, forked, give_back

parallel_for = types.ExternalFunction(
    "matmul_grad_parallel_for", types.int32(types.int64, types.int64, types.int64, types.int64, types.int64)
)
memset = types.ExternalFunction("memset", types.int64(types.int64, types.int32, types.int64))

GEMM_SIGNATURE = types.int64(*[types.int64] * 12)
TASK_SIGNATURE = types.void(types.int64, types.int64, types.int64)


def make_kernels(config: BlockConfig) -> dict[str, str | tuple[Callable, types.Type]]:
    """All that one configuration is compiled from: the driver, the task of its threads, packing, microkernels.

    They call each other by name, so that each is compiled once and not again inside every caller.
    """
    operand = operand_of(config)
    vector, chain = operand.vector, CHAIN[config.dtype]
    microkernel, transposed = f"{config.name}_microkernel", f"{config.name}_transposed"
    return {
        config.name: (make_gemm(config), GEMM_SIGNATURE),
        f"{config.name}_task": (make_task(config), TASK_SIGNATURE),
        f"{config.name}_pack_steps": (make_pack_steps(operand), PACK_STEPS_SIGNATURE),
        f"{config.name}_pack_rows": (make_pack_rows(operand), PACK_ROWS_SIGNATURE),
        microkernel: microkernel_ir(microkernel, vector, steps(config.mr), steps(config.vectors), chain),
        transposed: transposed_ir(transposed, vector, steps(config.mr), chain),
    }


def make_task(config: BlockConfig) -> Callable:
    """``task(begin, end, job)``: what a thread of the pool runs; parts begin … end of the job's phase."""
    pack_part, multiply_part = make_pack_part(config), make_multiply_part(config)
    store_part = make_store_part(config)
    narrow = operand_of(config).converts

    def task(begin, end, job):
        for part in range(begin, end):
            phase = get(job, words.PHASE)
            if phase == words.PACKING:
                pack_part(job, part)
            elif phase == words.MULTIPLYING:
                multiply_part(job, part)
            elif narrow:
                store_part(job, part)

    return task


def make_loops_5_to_4(config: BlockConfig) -> tuple[Callable, Callable]:
    """``(loops(job), run(job, phase))``."""
    kc_max, chain, nc_max = config.kc, config.chain, config.nc
    task_address = symbol(f"{config.name}_task")
    linked_task = types.ExternalFunction(f"{config.name}_task", TASK_SIGNATURE)

    @jit
    def run(job, phase):
        put(job, words.PHASE, phase)
        if get(job, words.PARTS) == 1:
            linked_task(0, 1, job)
        else:
            parallel_for(0, get(job, words.PARTS), 1, task_address(), job)

    @jit
    def loops_5_to_4(job):
        n, k = get(job, words.N), get(job, words.K)
        step = plan_k(k, kc_max, chain)
        for jc in range(0, n, nc_max):
            put(job, words.JC, jc)
            put(job, words.NC, min(nc_max, n - jc))
            for block in range(ceil_div(k, step)):
                pc = block * step
                put(job, words.PC, pc)
                put(job, words.KC, min(step, k - pc))
                run(job, words.PACKING)
                run(job, words.MULTIPLYING)

    return loops_5_to_4, run


def make_plan(config: BlockConfig) -> Callable:
    """``plan(job, m, n, threads)``: sizes of the product at hand, its parts, and what is read in place."""
    mr, nr, nc_max = config.mr, config.nr, config.nc
    in_place = not operand_of(config).converts

    @jit
    def plan(job, m, n, threads):
        row_tiles, panels = ceil_div(m, mr), ceil_div(min(n, nc_max), nr)
        rows, columns = plan_parts(row_tiles, panels, threads)
        put(job, words.M, m)
        put(job, words.N, n)
        put(job, words.PARTS, rows * columns)
        put(job, words.ROW_PARTS, rows)
        put(job, words.COLUMN_PARTS, columns)
        put(job, words.A_DIRECT, in_place and panels <= DIRECT_PANELS)
        direct = plan_direct(row_tiles, m, get(job, words.B_RS), get(job, words.B_CS))
        put(job, words.B_DIRECT, direct if in_place else words.PACKED)

    return plan


def make_gemm(config: BlockConfig) -> Callable:
    """gemm(m, n, k, a, a_rs, a_cs, b, b_rs, b_cs, c, c_rs, threads) → 0, or 1 when memory ran out

    C = A · B

    shapes      a (m, k), b (k, n), c (m, n); every size ≥ 0
    strides     elements, any for a and b (0 and overlapping too); c has rows c_rs apart, columns together
    dtypes      config.dtype for all three; addresses are int64
    aliasing    c must not overlap a or b; c is written in full and never read before
    rounding    chains of fused multiply-adds, added in order (see ``config.CHAIN``); 16-bit
                results are rounded once, at the end
    edges       packing pads partial tiles; the microkernel writes no element outside c
    determinism same bits for any m, n, strides, threads
    source      five loops after Goto and van de Geijn (2008), doi 10.1145/1356052.1356053, and BLIS (2015)
    """
    loops_5_to_4, run = make_loops_5_to_4(config)
    plan = make_plan(config)
    size, a_bytes, b_bytes, c_bytes = operand_of(config).size, config.a_bytes, config.b_bytes, config.c_bytes
    narrow = operand_of(config).converts
    multiply_narrow = make_multiply_narrow(config, loops_5_to_4, run, plan)

    def gemm(m, n, k, a, a_rs, a_cs, b, b_rs, b_cs, c, c_rs, threads):
        if m == 0 or n == 0:
            return 0
        if k == 0:
            for i in range(m):
                memset(c + i * c_rs * size, 0, n * size)
            return 0
        threads = 1 if forked() else plan_threads(m, n, k, threads)
        slot = acquire(threads * (a_bytes + c_bytes) + b_bytes)
        if slot == 0:
            return 1
        job = job_words()
        put(job, words.K, k)
        put(job, words.A, a)
        put(job, words.A_RS, a_rs)
        put(job, words.A_CS, a_cs)
        put(job, words.B, b)
        put(job, words.B_RS, b_rs)
        put(job, words.B_CS, b_cs)
        put(job, words.C, c)
        put(job, words.C_RS, c_rs)
        put(job, words.WORK_B, buffers(slot))
        put(job, words.WORK_A, buffers(slot) + b_bytes)
        if narrow:
            multiply_narrow(job, m, n, threads)
        else:
            plan(job, m, n, threads)
            loops_5_to_4(job)
        give_back(slot)
        return 0

    return gemm


def make_multiply_narrow(config: BlockConfig, loops_5_to_4: Callable, run: Callable, plan: Callable) -> Callable:
    """``multiply_narrow(job, m, n, threads)``: chunks of C in a float32 buffer, over all of k, then rounded once."""
    size, lane_bytes, lanes, mr = operand_of(config).size, config.lane_bytes, config.lanes, config.mr
    a_bytes, c_bytes = config.a_bytes, config.c_bytes

    @jit
    def multiply_narrow(job, m, n, threads):
        a, b, out, out_rs = get(job, words.A), get(job, words.B), get(job, words.C), get(job, words.C_RS)
        wide = min(ceil_div(n, lanes) * lanes, SUM_COLUMNS)
        tall = max(threads * c_bytes // (wide * lane_bytes) // mr, 1) * mr
        put(job, words.C, get(job, words.WORK_A) + threads * a_bytes)
        put(job, words.C_RS, wide)
        put(job, words.OUT_RS, out_rs)
        for chunk in range(ceil_div(m, tall) * ceil_div(n, wide)):  # a step known only at run time could raise
            i, j = chunk // ceil_div(n, wide) * tall, chunk % ceil_div(n, wide) * wide
            put(job, words.A, a + i * get(job, words.A_RS) * size)
            put(job, words.B, b + j * get(job, words.B_CS) * size)
            put(job, words.OUT, out + (i * out_rs + j) * size)
            plan(job, min(tall, m - i), min(wide, n - j), threads)
            loops_5_to_4(job)
            run(job, words.STORING)

    return multiply_narrow
