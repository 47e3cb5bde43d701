"""Products whose sums cannot go straight to C: kept in lanes, chunk of k by chunk, then rounded and stored once.

    C[i, j] = round(S₀ + S₁ + …)      S_c = the sum over chunk c of k

That is so for 16-bit results, which are rounded once; for more than one chunk of k; and for a C that is computed as
its transpose, which turns on the way out.
"""

from __future__ import annotations

from collections.abc import Callable

from numba.core import types
from numba.extending import intrinsic

from .config import SUM_COLUMNS, BlockConfig
from .job import (
    C_RS,
    CHUNK_PARTS,
    SUMS,
    SUMS_RS,
    TURNED,
    WORDS,
    C,
    K,
    M,
    N,
    ceil_div,
    copy,
    product_words,
    restrict,
    restrict_k,
)
from .memory import get, jit, put, stack_words
from .operand import operand_of
from .pack import element_copier


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
                restrict(part, i, min(tall, m - i), j, min(wide, n - j), size, size)
                one_block(part, work)

    return multiply_by_sums


def make_finish(config: BlockConfig) -> Callable:
    """``finish(words)``: add up the chunks that threads have shared, in order, and store."""
    lane_bytes = config.lane_bytes
    add, store = make_add(config), make_store(config)

    @jit
    def finish(words):
        sums, wide = get(words, SUMS), get(words, SUMS_RS)
        count = get(words, M) * wide
        for block in range(1, get(words, CHUNK_PARTS)):
            add(sums, sums + block * count * lane_bytes, count)
        store(words, sums, wide)

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
    """``store(words, sums, wide)``: round rows of sums, ``wide`` apart, into C, or into Cᵀ."""
    operand, lanes, lane_bytes = operand_of(config), config.lanes, config.lane_bytes
    vector, size = operand.vector, operand.size
    copy_element, scratch = element_copier(size), stack_words(lanes * lane_bytes // 8)

    @intrinsic
    def write(typingctx, target, source, count):
        def codegen(context, builder, signature, args):
            target, source, count = args
            value = vector.load(builder, vector.at(builder, source))
            operand.write(builder, value, target, count)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), codegen

    @jit
    def store(words, sums, wide):
        m, n, c, c_rs, buffer = get(words, M), get(words, N), get(words, C), get(words, C_RS), scratch()
        for i in range(m):
            for j in range(0, n, lanes):
                at = sums + (i * wide + j) * lane_bytes
                if get(words, TURNED) == 0:
                    write(c + (i * c_rs + j) * size, at, n - j)
                else:
                    write(buffer, at, lanes)
                    for lane in range(lanes):
                        if j + lane < n:
                            copy_element(c + ((j + lane) * c_rs + i) * size, buffer + lane * size, True)

    return store
