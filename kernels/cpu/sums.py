"""Products whose sums cannot go straight to C: kept in lanes, chunk of k by chunk, then rounded and stored once.

    C[i, j] = round(alpha · S + beta · input[i, j])      S = S₀ + S₁ + …, S_c = the sum over chunk c of k

That is so for 16-bit results, which are rounded once; for more than one chunk of k; where something is added, or the
sum is scaled; and for a C whose columns do not lie together, a transpose among them, which is scattered on the way out.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .config import SUM_COLUMNS, BlockConfig
from .job import CHUNK_PARTS, SUMS, SUMS_RS, WORDS, ceil_div, copy, product_words, restrict, restrict_k, restrict_to_one
from .memory import get, jit, put, stack_words
from .operand import Operand, operand_of
from .pack import element_copier
from .product import ALPHA, BATCH, BETA, C_CS, C_RS, I_CS, I_RS, INPUT, C, K, M, N
from .simd import I32, Vector


def make_multiply_by_sums(config: BlockConfig, multiply: Callable) -> Callable:
    """``multiply_by_sums(words, work)``: C = A·B on this thread, any k, by blocks whose sums fit beside the packing."""
    size, lanes, lane_bytes, mr = operand_of(config).size, config.lanes, config.lane_bytes, config.mr
    room, chunk = config.sums, config.chunk
    offset = config.thread_bytes - 2 * room * lane_bytes
    add, store = make_add(config), make_store(config)

    @jit
    def one_block(words, work):
        part = product_words()
        rows, k, sums = get(words, M), get(words, K), work + offset
        wide = ceil_div(get(words, N), lanes) * lanes
        for block in range(ceil_div(k, chunk)):
            copy(part, words, WORDS)
            restrict_k(part, block * chunk, min(chunk, k - block * chunk), size)
            put(part, C, sums if block == 0 else sums + room * lane_bytes)
            put(part, C_RS, wide)
            multiply(part, work)
            if block > 0:
                add(sums, sums + room * lane_bytes, rows * wide)
        store(words, sums, wide)

    @jit
    def multiply_by_sums(words, work):
        part = product_words()
        m, n = get(words, M), get(words, N)
        lanes_here = room if get(words, K) > chunk else 2 * room
        wide = min(ceil_div(n, lanes) * lanes, SUM_COLUMNS, lanes_here // mr // lanes * lanes)
        tall = lanes_here // wide // mr * mr
        for row in range(ceil_div(m, tall)):
            for column in range(ceil_div(n, wide)):
                copy(part, words, WORDS)
                i, j = row * tall, column * wide
                restrict(part, i, min(tall, m - i), j, min(wide, n - j), size)
                one_block(part, work)

    return multiply_by_sums


def make_finish(config: BlockConfig) -> Callable:
    """``finish(words)``: add up the chunks that threads have shared, in order, and store."""
    size, lane_bytes = operand_of(config).size, config.lane_bytes
    add, store = make_add(config), make_store(config)

    @jit
    def finish(words):
        part = product_words()
        for item in range(get(words, BATCH)):
            copy(part, words, WORDS)
            restrict_to_one(part, item, size, lane_bytes)
            sums, wide = get(part, SUMS), get(part, SUMS_RS)
            count = get(part, M) * wide
            for block in range(1, get(part, CHUNK_PARTS)):
                add(sums, sums + block * count * lane_bytes, count)
            store(part, sums, wide)

    return finish


def make_add(config: BlockConfig) -> Callable:
    """``add(target, source, count)``: lanes, a multiple of a vector of them."""
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
    """``store(words, sums, wide)``: scale rows of sums, ``wide`` apart, add the input, and round them into C."""
    operand, lanes, lane_bytes = operand_of(config), config.lanes, config.lane_bytes
    size, copy_element, write = operand.size, element_copier(operand.size), make_write(config)
    scratch, taken = stack_words(lanes * lane_bytes // 8), stack_words(lanes * lane_bytes // 8)

    @jit
    def gather(target, source, step, count):
        for lane in range(lanes):
            copy_element(target + lane * size, source + lane * step * size, lane < count)

    @jit
    def store(words, sums, wide):
        m, n, c, c_rs, c_cs = get(words, M), get(words, N), get(words, C), get(words, C_RS), get(words, C_CS)
        start, i_rs, i_cs = get(words, INPUT), get(words, I_RS), get(words, I_CS)
        alpha, beta, buffer, added = get(words, ALPHA), get(words, BETA), scratch(), taken()
        for i in range(m):
            for j in range(0, n, lanes):
                target, at = c + (i * c_rs + j * c_cs) * size, sums + (i * wide + j) * lane_bytes
                source = start
                if start != 0:
                    source = start + (i * i_rs + j * i_cs) * size
                    if i_cs != 1:
                        gather(added, source, i_cs, n - j)
                        source = added
                if c_cs == 1:
                    write(target, at, n - j, alpha, source, beta)
                else:
                    write(buffer, at, min(lanes, n - j), alpha, source, beta)
                    for lane in range(lanes):
                        if j + lane < n:
                            copy_element(target + lane * c_cs * size, buffer + lane * size, True)

    return store


def make_write(config: BlockConfig) -> Callable:
    """``write(target, sums, count, alpha, source, beta)``: one vector of C; source is 0 where nothing is added."""
    operand, lanes = operand_of(config), config.lanes
    plain = Operand(Vector(config.accumulator, lanes, config.fused), config.dtype)  # an element a lane
    vector = plain.vector

    def every(builder, bits):
        """A vector of one number, from the bits of a float64."""
        number = builder.bitcast(bits, ir.DoubleType())
        if vector.scalar != number.type:
            number = builder.fptrunc(number, vector.scalar)
        first = builder.insert_element(ir.Constant(vector.type, ir.Undefined), number, I32(0))
        lane = ir.Constant(ir.VectorType(I32, lanes), [I32(0)] * lanes)
        return builder.shuffle_vector(first, ir.Constant(vector.type, ir.Undefined), lane)

    @intrinsic
    def scale(typingctx, target, sums, count, alpha):
        def codegen(context, builder, signature, args):
            target, sums, count, alpha = args
            value = builder.fmul(vector.load(builder, vector.at(builder, sums)), every(builder, alpha))
            operand.write(builder, value, target, count)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), codegen

    @intrinsic
    def scale_and_add(typingctx, target, sums, count, alpha, source, beta):
        def codegen(context, builder, signature, args):
            target, sums, count, alpha, source, beta = args
            value = builder.fmul(vector.load(builder, vector.at(builder, sums)), every(builder, alpha))
            value = vector.fma(builder, every(builder, beta), plain.read(builder, source, count), value)
            operand.write(builder, value, target, count)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    @jit
    def write(target, sums, count, alpha, source, beta):
        if source == 0:
            scale(target, sums, count, alpha)
        else:
            scale_and_add(target, sums, count, alpha, source, beta)

    return write
