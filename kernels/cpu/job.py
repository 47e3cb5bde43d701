"""What the threads of one call share: a block of int64 words on the caller's stack, and how work is cut into parts."""

from __future__ import annotations

from .config import DIRECT_ROWS, TRANSPOSED_ROWS, k_block, split_threads, useful_threads
from .memory import jit, stack_words

M, N, K, A, A_RS, A_CS, B, B_RS, B_CS, C, C_RS = range(11)  # the product: sizes, addresses, strides in elements
JC, NC, PC, KC = range(11, 15)  # the panel of B at hand
PHASE, PARTS, ROW_PARTS, COLUMN_PARTS = range(15, 19)  # what to do; parts that C is cut into
A_DIRECT, B_DIRECT = range(19, 21)  # operands read in place
WORK_A, WORK_B, OUT, OUT_RS = range(21, 25)  # packing buffers; where 16-bit results go
WORDS = 25

PACKING, MULTIPLYING, STORING = range(3)  # PHASE
PACKED, BY_ROWS, BY_COLUMNS = range(3)  # B_DIRECT

job_words = stack_words(WORDS)
plan_k = jit(k_block)
plan_parts = jit(split_threads)
plan_threads = jit(useful_threads)


@jit
def plan_direct(row_tiles, m, b_rs, b_cs):
    """How whole panels of B are read: packed, or in place where too few rows share them."""
    if b_cs == 1 and row_tiles <= DIRECT_ROWS:
        return BY_ROWS
    if b_rs == 1 and m <= TRANSPOSED_ROWS:
        return BY_COLUMNS
    return PACKED


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
