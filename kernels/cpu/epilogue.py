"""The epilogue: what happens to a sum over k when it is stored.

    C[i, j] = round(alpha · S + beta · source[i, j])      S = S₀ + S₁ + …, S_c = the sum over chunk c of k

Where it is more than a store, the sums are kept in lanes, chunk of k by chunk, then rounded and stored once: for 16-bit
results, which are rounded once; for more than one chunk of k; where something is added or scaled; and for a C whose
columns are not adjacent, a transpose among them, whose elements are stored one by one.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .config import PARTIAL_COLUMNS, BlockConfig
from .config_words import PARTIAL_LANES, THREAD_BYTES
from .gemm_args import ALPHA, BATCH, BETA, C_CS, C_RS, S_CS, S_RS, SOURCE, C, K, M, N
from .memory import compiled_config, get, jit, put, stack_words
from .operand import Operand, operand_of
from .pack import element_copier
from .schedule import (
    K_CHUNKS,
    PARTIALS,
    PARTIALS_RS,
    PLANNED_ARGS,
    args_words,
    ceil_div,
    copy_words,
    restrict,
    restrict_k,
    select_item,
)
from .simd import Vector, splat


def make_multiply_with_epilogue(config: BlockConfig, multiply: Callable) -> Callable:
    """``multiply_with_epilogue(args, work)``: any k, on this thread, by blocks whose sums fit beside the packing."""
    size, lanes, lane_bytes, mr = operand_of(config).size, config.lanes, config.lane_bytes, config.mr
    chunk = config.chunk
    add, store = make_add(config), make_store(config)

    @jit
    def one_block(args, work):
        block = args_words()
        rows, k, room = get(args, M), get(args, K), get(compiled_config(), PARTIAL_LANES)
        partials = work + get(compiled_config(), THREAD_BYTES) - 2 * room * lane_bytes
        row_lanes = ceil_div(get(args, N), lanes) * lanes
        for index in range(ceil_div(k, chunk)):
            copy_words(block, args, PLANNED_ARGS)
            restrict_k(block, index * chunk, min(chunk, k - index * chunk), size)
            put(block, C, partials if index == 0 else partials + room * lane_bytes)
            put(block, C_RS, row_lanes)
            multiply(block, work)
            if index > 0:
                add(partials, partials + room * lane_bytes, rows * row_lanes)
        store(args, partials, row_lanes)

    @jit
    def multiply_with_epilogue(args, work):
        block = args_words()
        m, n, room = get(args, M), get(args, N), get(compiled_config(), PARTIAL_LANES)
        lanes_here = room if get(args, K) > chunk else 2 * room
        row_lanes = min(ceil_div(n, lanes) * lanes, PARTIAL_COLUMNS, lanes_here // mr // lanes * lanes)
        tall = lanes_here // row_lanes // mr * mr
        for row in range(ceil_div(m, tall)):
            for column in range(ceil_div(n, row_lanes)):
                copy_words(block, args, PLANNED_ARGS)
                i, j = row * tall, column * row_lanes
                restrict(block, i, min(tall, m - i), j, min(row_lanes, n - j), size)
                one_block(block, work)

    return multiply_with_epilogue


def make_reduce_chunks(config: BlockConfig) -> Callable:
    """``reduce_chunks(args)``: add the partial results of all chunks of k, in order, and store them."""
    size, lane_bytes = operand_of(config).size, config.lane_bytes
    add, store = make_add(config), make_store(config)

    @jit
    def reduce_chunks(args):
        block = args_words()
        for item in range(get(args, BATCH)):
            copy_words(block, args, PLANNED_ARGS)
            select_item(block, item, size, lane_bytes)
            partials, row_lanes = get(block, PARTIALS), get(block, PARTIALS_RS)
            count = get(block, M) * row_lanes
            for index in range(1, get(block, K_CHUNKS)):
                add(partials, partials + index * count * lane_bytes, count)
            store(block, partials, row_lanes)

    return reduce_chunks


def make_add(config: BlockConfig) -> Callable:
    """``add(target, source, count)``: target += source, ``count`` lanes, whole vectors."""
    vector, lanes, lane_bytes = operand_of(config).vector, config.lanes, config.lane_bytes

    @intrinsic
    def add_vector(typingctx, target, source):
        def codegen(context, builder, signature, args):
            target, source = (vector.at(builder, address) for address in args)
            total = builder.fadd(vector.load(builder, target), vector.load(builder, source))
            vector.store(builder, total, target)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    @jit
    def add(target, source, count):
        for index in range(0, count, lanes):
            add_vector(target + index * lane_bytes, source + index * lane_bytes)

    return add


def make_store(config: BlockConfig) -> Callable:
    """``store(args, partials, row_lanes)``: the epilogue of sums whose rows are ``row_lanes`` apart, into C."""
    operand, lanes, lane_bytes = operand_of(config), config.lanes, config.lane_bytes
    size, copy_element, write = operand.size, element_copier(operand.size), make_write(config)
    scratch, gather_scratch = stack_words(lanes * lane_bytes // 8), stack_words(lanes * lane_bytes // 8)

    @jit
    def gather(target, source, step, count):
        for lane in range(lanes):
            copy_element(target + lane * size, source + lane * step * size, lane < count)

    @jit
    def store(args, partials, row_lanes):
        m, n, c, c_rs, c_cs = get(args, M), get(args, N), get(args, C), get(args, C_RS), get(args, C_CS)
        start, s_rs, s_cs = get(args, SOURCE), get(args, S_RS), get(args, S_CS)
        alpha, beta, buffer, gathered = get(args, ALPHA), get(args, BETA), scratch(), gather_scratch()
        for i in range(m):
            for j in range(0, n, lanes):
                target, at = c + (i * c_rs + j * c_cs) * size, partials + (i * row_lanes + j) * lane_bytes
                source = start
                if start != 0:
                    source = start + (i * s_rs + j * s_cs) * size
                    if s_cs != 1:
                        gather(gathered, source, s_cs, n - j)
                        source = gathered
                if c_cs == 1:
                    write(target, at, n - j, alpha, source, beta)
                else:
                    write(buffer, at, min(lanes, n - j), alpha, source, beta)
                    for lane in range(lanes):
                        if j + lane < n:
                            copy_element(target + lane * c_cs * size, buffer + lane * size, True)

    return store


def make_write(config: BlockConfig) -> Callable:
    """``write(target, partials, count, alpha, source, beta)``: one vector of C; source is 0 where nothing is added."""
    operand, lanes = operand_of(config), config.lanes
    plain = Operand(Vector(config.accumulator, lanes, config.fused), config.dtype)  # an element a lane
    vector = plain.vector

    def splat_bits(builder, bits):
        """A vector of one number, from the bits of a float64."""
        number = builder.bitcast(bits, ir.DoubleType())
        if vector.scalar != number.type:
            number = builder.fptrunc(number, vector.scalar)
        return splat(builder, number, lanes)

    @intrinsic
    def scale(typingctx, target, partials, count, alpha):
        def codegen(context, builder, signature, args):
            target, partials, count, alpha = args
            value = builder.fmul(vector.load(builder, vector.at(builder, partials)), splat_bits(builder, alpha))
            operand.write(builder, value, target, count)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), codegen

    @intrinsic
    def scale_and_add(typingctx, target, partials, count, alpha, source, beta):
        def codegen(context, builder, signature, args):
            target, partials, count, alpha, source, beta = args
            value = builder.fmul(vector.load(builder, vector.at(builder, partials)), splat_bits(builder, alpha))
            value = vector.fma(builder, splat_bits(builder, beta), plain.read(builder, source, count), value)
            operand.write(builder, value, target, count)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    @jit
    def write(target, partials, count, alpha, source, beta):
        if source == 0:
            scale(target, partials, count, alpha)
        else:
            scale_and_add(target, partials, count, alpha, source, beta)

    return write
