"""The state that the threads of one call share: int64 on the caller's stack. How the work is cut into blocks.

A call is one product, a batch of them, or those of a backward pass: a header, and then the arguments and the plan of
each product. A block is a rectangle of one C, or all of it over one chunk of k: a smaller product, with arguments of
its own.
"""

from __future__ import annotations

from numba.core import types

from .config import (
    chain_lanes,
    grain_tiles,
    k_block,
    prefer_split_k,
    prefer_transposed_c,
    split_c,
    threads_per_product,
    useful_threads,
)
from .config_words import CHUNK, CONVERTS, LANES, PAIRS
from .gemm_args import (
    A_BS,
    A_CS,
    A_PATCHES,
    A_RS,
    ACCUMULATE,
    ACTIVATION,
    ALPHA,
    B_BS,
    B_CS,
    B_PATCHES,
    B_RS,
    BATCH,
    C_BS,
    C_COLUMN,
    C_CS,
    C_ROW,
    C_ROWS,
    C_RS,
    C_RUNS,
    GATE,
    GEMM_ARGS,
    GROUPS,
    ONE,
    PRE,
    S_BS,
    S_CS,
    S_RS,
    SOURCE,
    WIDE,
    A,
    B,
    C,
    K,
    M,
    N,
)
from .memory import floor_div, get, jit, put, stack_words, swap

# Behind the arguments of a product, the driver's plan for it.
CHAIN = GEMM_ARGS  # lanes along k in one chain
ROW_BLOCKS, COLUMN_BLOCKS, K_CHUNKS = range(GEMM_ARGS + 1, GEMM_ARGS + 4)
PARTIALS, PARTIALS_RS = GEMM_ARGS + 4, GEMM_ARGS + 5  # partial results of chunks of k, one C after the other
PLANNED_ARGS = GEMM_ARGS + 6

# The header: the next block, of how many; packing buffers; the configuration; a bit for each core in use.
NEXT, BLOCKS, WORK, CONFIG, CORES = range(5)
CORE_WORDS = 16
HEADER = CORES + CORE_WORDS
MAX_PRODUCTS = 3  # in one call

PACKED, BY_ROWS, BY_COLUMNS = range(3)  # how an operand is read

MULTIPLY_SIGNATURE = types.void(types.int64, types.int64, types.int64)
linked_multiply = types.ExternalFunction("matmul_grad_multiply", MULTIPLY_SIGNATURE)  # of loops.py

parallel_for = types.ExternalFunction(
    "matmul_grad_parallel_for", types.int32(types.int64, types.int64, types.int64, types.int64, types.int64)
)

schedule_words = stack_words(HEADER + MAX_PRODUCTS * PLANNED_ARGS)
args_words = stack_words(PLANNED_ARGS)
plan_k = jit(k_block)
plan_chain = jit(chain_lanes)
plan_blocks = jit(split_c)
plan_split_k = jit(prefer_split_k)
plan_grain_tiles = jit(grain_tiles)
plan_threads = jit(useful_threads)
plan_threads_per_product = jit(threads_per_product)
plan_transposed_c = jit(prefer_transposed_c)


@jit
def blocks_per_item(args):
    """Blocks of one product of a batch."""
    return get(args, ROW_BLOCKS) * get(args, COLUMN_BLOCKS) * get(args, K_CHUNKS)


@jit
def block_count(args):
    return get(args, BATCH) * blocks_per_item(args)


@jit
def set_plain_store(args):
    """Operands and a result with two strides each, of one dtype, no activation, and no groups."""
    put(args, A_PATCHES, 0)
    put(args, B_PATCHES, 0)
    put(args, C_RUNS, 0)
    put(args, C_COLUMN, 0)
    put(args, ACCUMULATE, 0)
    put(args, C_ROWS, 0)
    put(args, C_ROW, 0)
    put(args, ACTIVATION, 0)
    put(args, PRE, 0)
    put(args, GATE, 0)
    put(args, WIDE, 0)
    put(args, GROUPS, 0)


@jit
def set_dense_c(args, c_rs):
    """One product without an epilogue, into a C whose columns are adjacent."""
    put(args, C_RS, c_rs)
    put(args, C_CS, 1)
    put(args, BATCH, 1)
    put(args, SOURCE, 0)
    put(args, ALPHA, ONE)
    set_plain_store(args)


@jit
def stores_directly(args):
    """Whether the accumulators are the elements of C, and can be stored there as vectors."""
    stored = (get(args, C_CS) == 1 or get(args, N) == 1) and get(args, C_RUNS) == 0
    return stored and get(args, SOURCE) == 0 and get(args, ALPHA) == ONE and get(args, ACTIVATION) == 0


@jit
def plan_accumulation(config, args):
    """Whether chains are added where they are stored, if C holds what the accumulators do; else by the epilogue."""
    source, holds_lanes = get(args, SOURCE), get(config, CONVERTS) == 0 or get(args, WIDE) != 0
    put(args, SOURCE, 0)
    if not holds_lanes or get(args, K) > get(config, CHUNK) or not stores_directly(args):
        put(args, SOURCE, source)
        put(args, ACCUMULATE, 0)


@jit
def swap_operands(args):
    """C = A·B becomes Cᵀ = Bᵀ·Aᵀ: the same products in the same order, so the same bits."""
    swap(args, M, N)
    swap(args, A, B)
    swap(args, A_PATCHES, B_PATCHES)
    swap(args, A_BS, B_BS)
    swap(args, A_RS, B_CS)
    swap(args, A_CS, B_RS)
    swap(args, C_RS, C_CS)
    swap(args, S_RS, S_CS)


@jit
def restrict(args, i, rows, j, columns, size):
    """Restrict a product to ``rows`` and ``columns`` of C from (i, j) on."""
    put(args, A, get(args, A) + i * get(args, A_RS) * size)
    put(args, B, get(args, B) + j * get(args, B_CS) * size)
    c_size = size << get(args, WIDE)
    offset = (i * get(args, C_RS) + j * get(args, C_CS)) * c_size
    put(args, C, get(args, C) + offset)
    if get(args, PRE) != 0:
        put(args, PRE, get(args, PRE) + offset)
    if get(args, GATE) != 0:
        put(args, GATE, get(args, GATE) + offset)
    if get(args, SOURCE) != 0:
        put(args, SOURCE, get(args, SOURCE) + (i * get(args, S_RS) + j * get(args, S_CS)) * c_size)
    put(args, C_COLUMN, get(args, C_COLUMN) + j)
    put(args, C_ROW, get(args, C_ROW) + i)
    put(args, M, rows)
    put(args, N, columns)


@jit
def select_item(args, item, size, lane_bytes):
    """Restrict a batch to its product ``item``."""
    if get(args, BATCH) == 1:
        return
    put(args, A, get(args, A) + item * get(args, A_BS) * size)
    put(args, B, get(args, B) + item * get(args, B_BS) * size)
    c_size = size << get(args, WIDE)
    put(args, C, get(args, C) + item * get(args, C_BS) * c_size)
    if get(args, PRE) != 0:
        put(args, PRE, get(args, PRE) + item * get(args, C_BS) * c_size)
    if get(args, GATE) != 0:
        put(args, GATE, get(args, GATE) + item * get(args, C_BS) * c_size)
    if get(args, SOURCE) != 0:
        put(args, SOURCE, get(args, SOURCE) + item * get(args, S_BS) * c_size)
    if get(args, K_CHUNKS) > 1:
        put(args, PARTIALS, get(args, PARTIALS) + item * partial_bytes(args, lane_bytes))


@jit
def partial_bytes(args, lane_bytes):
    """Bytes of the partial results of one product, for chunks of k that threads share."""
    return get(args, K_CHUNKS) * get(args, M) * get(args, PARTIALS_RS) * lane_bytes


@jit
def restrict_k(args, p, steps, size):
    """Restrict a product to ``steps`` of k from p on."""
    put(args, A, get(args, A) + p * get(args, A_CS) * size)
    put(args, B, get(args, B) + p * get(args, B_RS) * size)
    put(args, K, steps)


@jit
def split_range(total, count, index):
    """``[begin, end)`` of one of ``count`` nearly equal ranges of ``total``."""
    begin, end = 0, total
    if count > 1:
        begin, end = floor_div(total * index, count), floor_div(total * (index + 1), count)
    return begin, end


@jit
def round_lanes(config, count):
    """``count`` lanes rounded up to whole vectors."""
    return (count + get(config, LANES) - 1) & -get(config, LANES)


@jit
def lanes_along_k(config, k, stride, k_stride):
    """Whether adjacent steps of k are in memory what they are in lanes."""
    if get(config, CONVERTS) == 0:
        return True
    return get(config, PAIRS) == 1 and k_stride == 1 and (k | stride) & 1 == 0
