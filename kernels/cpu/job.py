"""What the threads of one call share: int64 words on the caller's stack, and how the work is cut into parts.

A call is one product, or the two of a backward pass. Its words are a header and a block for each product. A part is
a rectangle of C, or all of C over one chunk of k: a smaller product, with a block of words of its own.
"""

from __future__ import annotations

from .config import chain_lanes, k_block, split_parts, useful_threads
from .memory import get, jit, put, stack_words

# A product: sizes, addresses, strides in elements; C has its columns together, or is TURNED and has its rows so.
M, N, K, A, A_RS, A_CS, B, B_RS, B_CS, C, C_RS = range(11)
PRODUCT = 11
TURNED, CHAIN = 11, 12  # lanes along k in one chain
ROW_PARTS, COLUMN_PARTS, CHUNK_PARTS = range(13, 16)
SUMS, SUMS_RS = 16, 17  # where the chunks of k go that threads share, one C after the other
WORDS = 18

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


@jit
def product(job, index):
    """The words of one product of a call."""
    return job + 8 * (HEADER + index * WORDS)


@jit
def parts_of(words):
    return get(words, ROW_PARTS) * get(words, COLUMN_PARTS) * get(words, CHUNK_PARTS)


@jit
def copy(target, source, count):
    for index in range(count):
        put(target, index, get(source, index))


@jit
def turn(words):
    """C = A·B becomes Cᵀ = Bᵀ·Aᵀ: the same products in the same order, so the same bits."""
    m, a, a_rs, a_cs = get(words, M), get(words, A), get(words, A_RS), get(words, A_CS)
    put(words, M, get(words, N))
    put(words, A, get(words, B))
    put(words, A_RS, get(words, B_CS))
    put(words, A_CS, get(words, B_RS))
    put(words, N, m)
    put(words, B, a)
    put(words, B_RS, a_cs)
    put(words, B_CS, a_rs)


@jit
def restrict(words, i, rows, j, columns, size, lane_bytes):
    """Make the product one of ``rows`` and ``columns`` of itself from (i, j) on; C has elements of lane_bytes."""
    put(words, A, get(words, A) + i * get(words, A_RS) * size)
    put(words, B, get(words, B) + j * get(words, B_CS) * size)
    row, column = (1, get(words, C_RS)) if get(words, TURNED) else (get(words, C_RS), 1)
    put(words, C, get(words, C) + (i * row + j * column) * lane_bytes)
    put(words, M, rows)
    put(words, N, columns)


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
