"""What one thread does in one phase of a job: pack panels of B, multiply its part of C, round and store rows."""

from __future__ import annotations

from collections.abc import Callable

from numba.core import types
from numba.extending import intrinsic

from .config import PAD, BlockConfig, steps
from .job import (
    A_CS,
    A_DIRECT,
    A_RS,
    B_CS,
    B_DIRECT,
    B_RS,
    BY_COLUMNS,
    C_RS,
    COLUMN_PARTS,
    JC,
    KC,
    NC,
    OUT,
    OUT_RS,
    PACKED,
    PARTS,
    PC,
    ROW_PARTS,
    WORK_A,
    WORK_B,
    A,
    B,
    C,
    M,
    N,
    ceil_div,
    largest,
    share,
    smallest,
)
from .memory import get, jit
from .microkernel import ARGUMENTS
from .operand import Operand
from .pack import PACK_ROWS_SIGNATURE, PACK_STEPS_SIGNATURE
from .simd import Vector


def operand_of(config: BlockConfig) -> Operand:
    vector = Vector(config.accumulator, config.lanes, config.fused, config.pairs)
    return Operand(vector, config.dtype)


def make_pack_part(config: BlockConfig) -> Callable:
    """``pack_part(job, part)``: this thread's column panels of B, each kc × nr, one after the other."""
    operand, nr = operand_of(config), config.nr
    size, lane_bytes, fold = operand.size, config.lane_bytes, operand.fold
    pack_steps = types.ExternalFunction(f"{config.name}_pack_steps", PACK_STEPS_SIGNATURE)

    @jit
    def pack_part(job, part):
        nc, kc = get(job, NC), get(job, KC)
        b_rs, b_cs = get(job, B_RS), get(job, B_CS)
        first, last = share(ceil_div(nc, nr), get(job, PARTS), part)
        for panel in range(first, last):
            j = panel * nr
            if get(job, B_DIRECT) == PACKED or j + nr > nc:
                source = get(job, B) + (get(job, PC) * b_rs + (get(job, JC) + j) * b_cs) * size
                target = get(job, WORK_B) + j * ceil_div(kc, fold) * lane_bytes
                pack_steps(target, nr, nr, source, kc, b_rs, b_cs, nc - j)

    return pack_part


def make_pack_a(config: BlockConfig) -> Callable:
    """``pack_a(job, target, i, rows)`` → (row stride, k stride) in lanes.

    A is only ever broadcast from, so it is copied along the dimension that it has contiguous and never transposed.
    """
    operand = operand_of(config)
    size, fold, lanes = operand.size, operand.fold, config.lanes
    pack_steps = types.ExternalFunction(f"{config.name}_pack_steps", PACK_STEPS_SIGNATURE)
    pack_rows = types.ExternalFunction(f"{config.name}_pack_rows", PACK_ROWS_SIGNATURE)

    @jit
    def pack_a(job, target, i, rows):
        a_rs, a_cs, kc = get(job, A_RS), get(job, A_CS), get(job, KC)
        source = get(job, A) + (i * a_rs + get(job, PC) * a_cs) * size
        if a_rs == 1 and a_cs != 1:
            wide = ceil_div(rows, lanes) * lanes
            pack_steps(target, wide, wide + PAD, source, kc, a_cs, a_rs, rows)
            return 1, wide + PAD
        stride = ceil_div(kc, fold * lanes) * lanes + PAD
        pack_rows(target, rows, stride, source, kc, a_cs, a_rs)
        return stride, 1

    return pack_a


def make_loops_2_to_1(config: BlockConfig) -> Callable:
    """``loops(job, i, rows, a, a_rs, a_ks, first_panel, last_panel)``: rows of C from i on, by the tiles that fit."""
    operand, nr, lanes = operand_of(config), config.nr, config.lanes
    size, lane_bytes, fold = operand.size, config.lane_bytes, operand.fold
    row_steps, vector_steps = steps(config.mr), steps(config.vectors)
    signature = types.void(*[types.int64] * ARGUMENTS)
    microkernel = types.ExternalFunction(f"{config.name}_microkernel", signature)
    transposed = types.ExternalFunction(f"{config.name}_transposed", signature)

    @jit
    def loops_2_to_1(job, i, rows, a, a_rs, a_ks, first_panel, last_panel):
        nc, depth, b_rs, b_cs = get(job, NC), ceil_div(get(job, KC), fold), get(job, B_RS), get(job, B_CS)
        c_rs, first = get(job, C_RS), get(job, PC) == 0
        for panel in range(first_panel, last_panel):
            j = panel * nr
            columns = min(nr, nc - j)
            direct = get(job, B_DIRECT) if columns == nr else PACKED
            b, b_ks = get(job, WORK_B) + j * depth * lane_bytes, nr
            if direct != PACKED:
                b = get(job, B) + (get(job, PC) * b_rs + (get(job, JC) + j) * b_cs) * size
                b_ks = b_rs
            c = get(job, C) + (i * c_rs + get(job, JC) + j) * lane_bytes
            vector_step = smallest(vector_steps, ceil_div(columns, lanes))
            ir = 0
            while ir < rows:
                step = largest(row_steps, rows - ir)
                a_tile, c_tile = a + ir * a_rs * lane_bytes, c + ir * c_rs * lane_bytes
                if direct == BY_COLUMNS:
                    transposed(step, nr, depth, a_tile, a_rs, a_ks, b, b_cs, c_tile, c_rs, 0, first)
                else:
                    microkernel(step, vector_step, depth, a_tile, a_rs, a_ks, b, b_ks, c_tile, c_rs, columns, first)
                ir += row_steps[step]

    return loops_2_to_1


def make_multiply_part(config: BlockConfig) -> Callable:
    """``multiply_part(job, part)``: loops 3 to 1 over this thread's rows and columns of C."""
    mr, nr, mc_max, size = config.mr, config.nr, config.mc, operand_of(config).size
    a_bytes = config.a_bytes
    pack_a, loops_2_to_1 = make_pack_a(config), make_loops_2_to_1(config)

    @jit
    def multiply_part(job, part):
        m, columns = get(job, M), get(job, COLUMN_PARTS)
        first_tile, last_tile = share(ceil_div(m, mr), get(job, ROW_PARTS), part // columns)
        first_panel, last_panel = share(ceil_div(get(job, NC), nr), columns, part % columns)
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


def make_store_part(config: BlockConfig) -> Callable:
    """``store_part(job, part)``: this thread's rows of float32 sums, rounded once into the 16-bit result."""
    operand, lanes, lane_bytes = operand_of(config), config.lanes, config.lane_bytes
    vector, size = operand.vector, operand.size

    @intrinsic
    def write(typingctx, target, source, count):
        def codegen(context, builder, signature, args):
            target, source, count = args
            value = vector.load(builder, vector.at(builder, source))
            operand.write(builder, value, target, count)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), codegen

    @jit
    def store_part(job, part):
        n = get(job, N)
        first, last = share(get(job, M), get(job, PARTS), part)
        for i in range(first, last):
            to, at = get(job, OUT) + i * get(job, OUT_RS) * size, get(job, C) + i * get(job, C_RS) * lane_bytes
            for j in range(0, n, lanes):
                write(to + j * size, at + j * lane_bytes, n - j)

    return store_part
