"""The epilogue: what happens to a sum over k when it is stored.

    C[i, j] = round(activation(t))                 t = alpha · S + beta · source[i, j]
    C[i, j] = round(activation(gate[i, j]) · t)    S = S₀ + S₁ + …, S_c = the sum over chunk c of k

Where it is more than a store, the sums are kept in lanes, chunk of k by chunk, then rounded and stored once: for 16-bit
results, which are rounded once; for more than one chunk of k; where something is added or scaled, or there is an
activation; and for a C whose columns are not adjacent, a transpose among them, whose elements are stored one by one.
t can be stored beside the result, for backward.
"""

from __future__ import annotations

from .config import OUTER_LANES, PARTIAL_COLUMNS
from .config_words import ADD, CHUNK, LANE_BYTES, LANES, MR, PARTIAL_LANES, SIZE, STORE, STORE_WIDE, THREAD_BYTES
from .epilogue_ir import ADD_ARGUMENTS, STORE_ARGUMENTS
from .gemm_args import (
    ACTIVATION,
    ALPHA,
    BATCH,
    BETA,
    C_COLUMN,
    C_CS,
    C_ROW,
    C_ROWS,
    C_RS,
    C_RUNS,
    GATE,
    PRE,
    S_CS,
    S_RS,
    SOURCE,
    WIDE,
    C,
    K,
    M,
    N,
)
from .memory import call_kernel, ceil_div, copy_words, floor_div, get, jit, put
from .patches_args import RUN_EXTENT, RUN_OUTER, RUN_SOURCE, RUN_STRIDE
from .row import has_few_steps
from .schedule import (
    K_CHUNKS,
    PARTIALS,
    PARTIALS_RS,
    PLANNED_ARGS,
    args_words,
    linked_multiply,
    restrict,
    restrict_k,
    round_lanes,
    select_item,
)

call_add, call_store = call_kernel(ADD_ARGUMENTS), call_kernel(STORE_ARGUMENTS)


@jit
def multiply_with_epilogue(config, args, work):
    """Any k, on this thread, by blocks whose sums fit beside the packing."""
    block, mr = args_words(), get(config, MR)
    m, n, room = get(args, M), get(args, N), get(config, PARTIAL_LANES)
    lanes_here = room if get(args, K) > get(config, CHUNK) else 2 * room
    if has_few_steps(config, args):
        lanes_here = min(lanes_here, OUTER_LANES)
    row_lanes = min(round_lanes(config, n), PARTIAL_COLUMNS, floor_div(lanes_here, mr) & -get(config, LANES))
    tall = floor_div(floor_div(lanes_here, row_lanes), mr) * mr
    for row in range(ceil_div(m, tall)):
        for column in range(ceil_div(n, row_lanes)):
            copy_words(block, args, PLANNED_ARGS)
            i, j = row * tall, column * row_lanes
            restrict(block, i, min(tall, m - i), j, min(row_lanes, n - j), get(config, SIZE))
            one_block(config, block, work)


@jit
def one_block(config, args, work):
    block, lane_bytes, chunk = args_words(), get(config, LANE_BYTES), get(config, CHUNK)
    rows, k, room = get(args, M), get(args, K), get(config, PARTIAL_LANES)
    partials = work + get(config, THREAD_BYTES) - 2 * room * lane_bytes
    row_lanes = round_lanes(config, get(args, N))
    for index in range(ceil_div(k, chunk)):
        copy_words(block, args, PLANNED_ARGS)
        restrict_k(block, index * chunk, min(chunk, k - index * chunk), get(config, SIZE))
        put(block, C, partials if index == 0 else partials + room * lane_bytes)
        put(block, C_RS, row_lanes)
        linked_multiply(config, block, work)
        if index > 0:
            call_add(get(config, ADD), partials, partials + room * lane_bytes, rows * row_lanes)
    store(config, args, partials, row_lanes)


@jit
def reduce_chunks(config, args):
    """Add the partial results of all chunks of k, in order, and store them."""
    block, lane_bytes = args_words(), get(config, LANE_BYTES)
    for item in range(get(args, BATCH)):
        copy_words(block, args, PLANNED_ARGS)
        select_item(block, item, get(config, SIZE), lane_bytes)
        partials, row_lanes = get(block, PARTIALS), get(block, PARTIALS_RS)
        count = get(block, M) * row_lanes
        for index in range(1, get(block, K_CHUNKS)):
            call_add(get(config, ADD), partials, partials + index * count * lane_bytes, count)
        store(config, block, partials, row_lanes)


@jit
def store(config, args, partials, row_lanes):
    """The epilogue of sums whose rows are ``row_lanes`` apart, into C."""
    if get(args, C_ROWS) == 0:
        store_rows(config, args, partials, row_lanes)
        return
    block, runs, row, left = args_words(), get(args, C_ROWS), get(args, C_ROW), get(args, M)
    size = get(config, SIZE) << get(args, WIDE)
    copy_words(block, args, PLANNED_ARGS)
    put(block, C_RS, get(runs, RUN_STRIDE + 2))
    while left > 0:
        at, rest, _ = locate_run(runs, row)
        count = min(left, rest)
        put(block, C, get(args, C) + at * size)
        put(block, M, count)
        store_rows(config, block, partials, row_lanes)
        partials += count * row_lanes * get(config, LANE_BYTES)
        if get(args, SOURCE) != 0:
            put(block, SOURCE, get(block, SOURCE) + count * get(args, S_RS) * size)
        row, left = row + count, left - count


@jit
def store_rows(config, args, partials, row_lanes):
    """``store`` for rows of C at one distance."""
    if get(args, C_RUNS) == 0:
        store_columns(config, args, partials, row_lanes)
        return
    block, runs, column, left = args_words(), get(args, C_RUNS), get(args, C_COLUMN), get(args, N)
    size = get(config, SIZE) << get(args, WIDE)
    copy_words(block, args, PLANNED_ARGS)
    put(block, C_CS, get(runs, RUN_STRIDE + 2))
    put(block, S_CS, 0)
    while left > 0:
        at, rest, outer = locate_run(runs, column)
        count = min(left, rest)
        put(block, C, get(args, C) + at * size)
        put(block, N, count)
        if get(args, SOURCE) != 0:
            put(block, SOURCE, get(args, SOURCE) + outer * get(runs, RUN_SOURCE) * size)
        store_columns(config, block, partials, row_lanes)
        partials += count * get(config, LANE_BYTES)
        column, left = column + count, left - count


@jit
def locate_run(runs, index):
    """Where a row or a column that is found by digits is in C, how many are left of its run, and its outer digit."""
    extent, row = get(runs, RUN_EXTENT + 2), floor_div(index, get(runs, RUN_EXTENT + 2))
    x, plane = index - row * extent, floor_div(row, get(runs, RUN_EXTENT + 1))
    y, outer = row - plane * get(runs, RUN_EXTENT + 1), floor_div(plane, get(runs, RUN_EXTENT))
    z = plane - outer * get(runs, RUN_EXTENT)
    at = outer * get(runs, RUN_OUTER) + z * get(runs, RUN_STRIDE) + y * get(runs, RUN_STRIDE + 1)
    return at + x * get(runs, RUN_STRIDE + 2), extent - x, outer


@jit
def store_columns(config, args, partials, row_lanes):
    """``store`` for columns of C at one distance."""
    m, n, c, c_rs, c_cs = get(args, M), get(args, N), get(args, C), get(args, C_RS), get(args, C_CS)
    source, s_rs, s_cs = get(args, SOURCE), get(args, S_RS), get(args, S_CS)
    alpha, beta, activation = get(args, ALPHA), get(args, BETA), get(args, ACTIVATION)
    pre, gate = get(args, PRE), get(args, GATE)
    function = get(config, STORE) if get(args, WIDE) == 0 else get(config, STORE_WIDE)
    call_store(
        function, m, n, partials, row_lanes, c, c_rs, c_cs, alpha, source, s_rs, s_cs, beta, activation, pre, gate
    )
