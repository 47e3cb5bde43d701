"""What the threads of one call share: int64 words on the caller's stack, and how the work is cut into parts.

A call is one product, a batch of them, or the two of a backward pass. Its words are a header and a block for each
product. A part is a rectangle of one C, or all of it over one chunk of k: a smaller product, with words of its own.
"""

from __future__ import annotations

from .config import chain_lanes, k_block, split_parts, threads_of_one, useful_threads, worth_turning
from .memory import get, jit, put, stack_words
from .product import (
    A_BS,
    A_CS,
    A_RS,
    ALPHA,
    B_BS,
    B_CS,
    B_RS,
    BATCH,
    C_BS,
    C_CS,
    C_RS,
    I_BS,
    I_CS,
    I_RS,
    INPUT,
    ONE,
    PRODUCT,
    A,
    B,
    C,
    K,
    M,
    N,
)

# Beside the words of a product, what the driver plans for it.
CHAIN = PRODUCT  # lanes along k in one chain
ROW_PARTS, COLUMN_PARTS, CHUNK_PARTS = range(PRODUCT + 1, PRODUCT + 4)
SUMS, SUMS_RS = PRODUCT + 4, PRODUCT + 5  # where the chunks of k go that threads share, one C after the other
WORDS = PRODUCT + 6

# The header: how many; the part to take next, of how many; packing buffers; a bit for each core that a thread is on.
PRODUCTS, NEXT, PARTS, WORK, CORES = range(5)
CORE_WORDS = 16
HEADER = CORES + CORE_WORDS
MOST = 2  # products in one call

PACKED, BY_ROWS, BY_COLUMNS = range(3)  # how an operand is read

job_words = stack_words(HEADER + MOST * WORDS)
product_words = stack_words(WORDS)
plan_k = jit(k_block)
plan_chain = jit(chain_lanes)
plan_parts = jit(split_parts)
plan_threads = jit(useful_threads)
plan_threads_of_one = jit(threads_of_one)
plan_turn = jit(worth_turning)


@jit
def product(job, index):
    """The words of one product of a call."""
    return job + 8 * (HEADER + index * WORDS)


@jit
def parts_of_one(words):
    """Parts of one product of a batch."""
    return get(words, ROW_PARTS) * get(words, COLUMN_PARTS) * get(words, CHUNK_PARTS)


@jit
def parts_of(words):
    return get(words, BATCH) * parts_of_one(words)


@jit
def single(words, c_rs):
    """One product, written as it is to a C with its columns together."""
    put(words, C_RS, c_rs)
    put(words, C_CS, 1)
    put(words, BATCH, 1)
    put(words, INPUT, 0)
    put(words, ALPHA, ONE)


@jit
def is_plain(words):
    """Whether the sums of a product are the elements of a C that vectors can be stored to."""
    stored = get(words, C_CS) == 1 or get(words, N) == 1
    return stored and get(words, INPUT) == 0 and get(words, ALPHA) == ONE


@jit
def copy(target, source, count):
    for index in range(count):
        put(target, index, get(source, index))


@jit
def exchange(words, one, other):
    kept = get(words, one)
    put(words, one, get(words, other))
    put(words, other, kept)


@jit
def turn(words):
    """C = A·B becomes Cᵀ = Bᵀ·Aᵀ: the same products in the same order, so the same bits."""
    exchange(words, M, N)
    exchange(words, A, B)
    exchange(words, A_BS, B_BS)
    exchange(words, A_RS, B_CS)
    exchange(words, A_CS, B_RS)
    exchange(words, C_RS, C_CS)
    exchange(words, I_RS, I_CS)


@jit
def restrict(words, i, rows, j, columns, size):
    """Make the product one of ``rows`` and ``columns`` of itself from (i, j) on."""
    put(words, A, get(words, A) + i * get(words, A_RS) * size)
    put(words, B, get(words, B) + j * get(words, B_CS) * size)
    put(words, C, get(words, C) + (i * get(words, C_RS) + j * get(words, C_CS)) * size)
    if get(words, INPUT) != 0:
        put(words, INPUT, get(words, INPUT) + (i * get(words, I_RS) + j * get(words, I_CS)) * size)
    put(words, M, rows)
    put(words, N, columns)


@jit
def restrict_to_one(words, item, size, lane_bytes):
    """Make a batch its product ``item``."""
    if get(words, BATCH) == 1:
        return
    put(words, A, get(words, A) + item * get(words, A_BS) * size)
    put(words, B, get(words, B) + item * get(words, B_BS) * size)
    put(words, C, get(words, C) + item * get(words, C_BS) * size)
    if get(words, INPUT) != 0:
        put(words, INPUT, get(words, INPUT) + item * get(words, I_BS) * size)
    if get(words, CHUNK_PARTS) > 1:
        put(words, SUMS, get(words, SUMS) + item * sums_bytes(words, lane_bytes))


@jit
def sums_bytes(words, lane_bytes):
    """What the shared chunks of k of one product take."""
    return get(words, CHUNK_PARTS) * get(words, M) * get(words, SUMS_RS) * lane_bytes


@jit
def restrict_k(words, p, steps, size):
    """Make the product one of ``steps`` of k from p on."""
    put(words, A, get(words, A) + p * get(words, A_CS) * size)
    put(words, B, get(words, B) + p * get(words, B_RS) * size)
    put(words, K, steps)


@jit
def ceil_div(value, step):
    return (value + step - 1) // step


@jit
def share(total, parts, part):
    """``[begin, end)`` of one of ``parts`` nearly equal shares of ``total``."""
    return total * part // parts, total * (part + 1) // parts


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
