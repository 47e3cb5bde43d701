"""C row by row where the columns of B are adjacent: B is read in the order in which it lies in memory.

    for b in k by a chain
      for p in the chain by STEPS       so many rows of B side by side, from their first column to their last
        for j in n by vectors             sums[j] = fma(a[p], B[p, j], sums[j]), which stay in L1
      C += sums

A tile of the microkernel would hold a few vectors of C in registers and read pieces of rows of B that are pages apart,
which no prefetcher follows. Elements of 16 bits are converted as they are loaded, so that B is not packed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from llvmlite import ir

from .config import OUTER_BYTES, OUTER_STEPS
from .config_words import B_OFFSET, KC, LANE_BYTES, PACK_ROWS, PAIRS, ROW, ROW_COLUMNS, SIZE
from .gemm_args import A_CS, A_PATCHES, A_RS, ACCUMULATE, B_CS, B_RS, C_RS, A, B, C, K, M, N
from .memory import call_kernel, ceil_div, get, jit
from .microkernel import adds_to_c, chain_length, store_edge, store_full
from .operand import Operand
from .pack import PACK_ROWS_ARGUMENTS
from .schedule import CHAIN, lanes_along_k
from .simd import I64, function_ir, repeat

STEPS = 8  # steps of k (or pairs) at a time: a load and a store of the sums for so many multiply-adds
VECTORS = 4  # of C at a time: enough to hide the latency of multiply-adds
# The same where C has one step or two: a burst of four stores of 64 bytes wrote to memory at half the speed of one, two
# or eight (Zen 5, 16 MiB of float32, its two or more results beyond L3: 0.47 and 0.82 of the speed of torch.mm).
VECTORS_OF_FEW_STEPS = 2


class RowArguments(NamedTuple):
    """What ``row_ir`` is called with."""

    k: ir.Value
    a: ir.Value
    b: ir.Value
    b_rs: ir.Value
    c: ir.Value
    columns: ir.Value
    first: ir.Value
    chain: ir.Value
    sums: ir.Value


ROW_ARGUMENTS = len(RowArguments._fields)
call_row, call_pack_rows = call_kernel(ROW_ARGUMENTS), call_kernel(PACK_ROWS_ARGUMENTS)


@dataclass(frozen=True)
class _Steps:
    """A few steps of k: their elements of A, splat, and their rows of B.

    has_high: whether the second step of a pair exists, where it may not. begins, ends: whether they are the first and
    the last steps of a chain. adds: whether the chain is added to C, and not stored there.
    """

    x: list[ir.Value]
    rows: list[ir.Value]
    has_high: ir.Value | None
    begins: ir.Value
    ends: ir.Value
    adds: ir.Value


def row_ir(name: str, operand: Operand) -> str:
    """IR of ``void name(k, a, b, b_rs, c, columns, first, chain, sums)``, all int64.

    C[j] (+)= Σ_p a[p]·B[p, j] for j < columns, in the chains of ``microkernel_ir``, and so with the same bits. a and C
    hold lanes, B elements of ``operand``; k, b_rs and columns count elements, ``chain`` lanes. ``sums`` is room for
    ``columns`` lanes, in whole vectors.
    """

    def emit(builder: ir.IRBuilder, *values: ir.Value) -> None:
        _multiply_chains(builder, operand, RowArguments(*values))

    return function_ir(name, ROW_ARGUMENTS, emit)


def _multiply_chains(builder, operand, arguments):
    per_lane = I64(operand.k_per_lane)
    depth = builder.sdiv(builder.add(arguments.k, builder.sub(per_lane, I64(1))), per_lane)

    def one_chain(p: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        length = chain_length(builder, p, depth, arguments.chain)
        adds = adds_to_c(builder, p, arguments.first)

        def some_steps(count: int) -> Callable:
            def body(q: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
                begins = builder.icmp_signed("==", q, I64(0))
                ends = builder.icmp_signed("==", builder.add(q, I64(count)), length)
                at = [builder.add(builder.add(p, q), I64(step)) for step in range(count)]
                _add_steps(builder, operand, arguments, _locate(builder, operand, arguments, at, (begins, ends, adds)))
                return []

            return body

        whole = builder.sub(builder.sdiv(arguments.k, per_lane), p)  # all steps but that of half a pair
        whole = builder.select(builder.icmp_signed("<", whole, length), whole, length)
        q, _ = repeat(builder, I64(0), builder.and_(whole, I64(-STEPS)), STEPS, [], some_steps(STEPS))
        repeat(builder, q, length, 1, [], some_steps(1))
        return []

    repeat(builder, I64(0), depth, arguments.chain, [], one_chain)


def _locate(builder, operand, arguments, at, conditions):
    vector = operand.vector
    k = [builder.mul(step, I64(operand.k_per_lane)) for step in at]
    row_bytes = builder.mul(arguments.b_rs, I64(operand.size))
    x = [vector.broadcast(builder, vector.at(builder, arguments.a, step)) for step in at]
    rows = [builder.add(arguments.b, builder.mul(step, row_bytes)) for step in k]
    has_high = builder.icmp_signed("<", builder.add(k[0], I64(1)), arguments.k) if len(k) == 1 else None
    return _Steps(x, rows, has_high, *conditions)


def _add_steps(builder, operand, arguments, steps):
    """All columns: some vectors at a time, then one, then what is less than one."""
    lanes, columns = operand.vector.lanes, arguments.columns
    whole = builder.and_(columns, I64(-lanes))

    def vectors(count: int) -> Callable:
        def body(j: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            _add_to_vectors(builder, operand, arguments, steps, [builder.add(j, I64(v * lanes)) for v in range(count)])
            return []

        return body

    count = VECTORS if len(steps.x) == STEPS else VECTORS_OF_FEW_STEPS
    j, _ = repeat(builder, I64(0), builder.and_(columns, I64(-count * lanes)), count * lanes, [], vectors(count))
    repeat(builder, j, whole, lanes, [], vectors(1))
    with builder.if_then(builder.icmp_signed("<", whole, columns)):
        _add_to_vectors(builder, operand, arguments, steps, [whole], builder.sub(columns, whole))


def _add_to_vectors(builder, operand, arguments, steps, at, count=None):
    """The vectors that begin ``at`` these columns; of the last column on, ``count`` lanes exist."""
    vector = operand.vector
    places = [vector.at(builder, arguments.sums, j) for j in at]
    acc = [builder.select(steps.begins, vector.zero(), vector.load(builder, place)) for place in places]
    row_bytes = builder.mul(arguments.b_rs, I64(operand.size))
    for x, row in zip(steps.x, steps.rows, strict=True):
        for v, j in enumerate(at):
            source = builder.add(row, builder.mul(j, I64(operand.size)))
            if operand.k_per_lane == 1:
                value = operand.read(builder, source, count)
            else:
                value = operand.interleave(builder, source, builder.add(source, row_bytes), count, steps.has_high)
            acc[v] = vector.fma(builder, x, value, acc[v])
    with builder.if_else(steps.ends) as (end, more):
        with end:
            c = [vector.at(builder, arguments.c, at[0])]
            if count is None:
                store_full(builder, vector, [acc], c, steps.adds)
            else:
                store_edge(builder, vector, [acc], c, steps.adds, count)
        with more:
            for place, value in zip(places, acc, strict=True):
                vector.store(builder, value, place)


@jit
def has_few_steps(config, args):
    """Whether C is computed row by row since rows of B are too few to repay more reads of them than one."""
    lanes = (get(args, K) + get(config, PAIRS)) >> get(config, PAIRS)
    return lanes <= OUTER_STEPS and get(args, N) * get(config, SIZE) >= OUTER_BYTES and rows_are_in_order(args)


@jit
def rows_are_in_order(args):
    """Whether the elements of a row of B are adjacent, and A has strides."""
    return get(args, B_CS) == 1 and get(args, A_PATCHES) == 0


@jit
def multiply_rows(config, args, work):
    """``multiply`` row by row."""
    a, c = get(args, A), get(args, C)
    a_bytes, c_bytes = get(args, A_RS) * get(config, SIZE), get(args, C_RS) * get(config, LANE_BYTES)
    for i in range(get(args, M)):
        multiply_row(config, args, work, a + i * a_bytes, c + i * c_bytes)


@jit
def multiply_row(config, args, work, a_row, c_row):
    n, k, a_cs, b_rs = get(args, N), get(args, K), get(args, A_CS), get(args, B_RS)
    size, lane_bytes, columns_max = get(config, SIZE), get(config, LANE_BYTES), get(config, ROW_COLUMNS)
    sums = work + get(config, B_OFFSET)
    in_place = (a_cs == 1 or k == 1) and lanes_along_k(config, k, k, a_cs)  # one row has no stride
    step = k if in_place else get(config, KC)
    for block in range(ceil_div(k, step)):
        pc = block * step
        kc, a = min(step, k - pc), a_row + pc * a_cs * size
        if not in_place:
            call_pack_rows(get(config, PACK_ROWS), work, 1, 0, a, kc, a_cs, get(args, A_RS))
            a = work
        for piece in range(ceil_div(n, columns_max)):
            j = piece * columns_max
            b, c, columns = get(args, B) + (pc * b_rs + j) * size, c_row + j * lane_bytes, min(columns_max, n - j)
            first = 1 if pc == 0 and get(args, ACCUMULATE) == 0 else 0
            call_row(get(config, ROW), kc, a, b, b_rs, c, columns, first, get(args, CHAIN), sums)
