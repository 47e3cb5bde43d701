"""The transposing microkernel: tiles for a B whose columns lie together, transposed in registers on the way in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from llvmlite import ir

from .config import L1_WAY, L1_WAYS
from .microkernel import Strides, adds_to_c, chain_length, k_loop, row_offsets, store_full, switch_ir
from .operand import Operand
from .simd import I64, POINTER, opaque, repeat

# One row of C waits for the latency of its multiply-adds, so two groups of columns alternate: of so many lanes, since
# wider ones are limited by their shuffles, and where the columns read side by side do not share one set of L1.
PAIRED_LANES = 8
# Bytes of a column of 16-bit elements of B up to which one row of C fetches the next columns ahead (Zen 3, from memory:
# 1.3 to 1.9 times the speed at 1536 bytes, 0.9 from 3072 bytes on, and in float32).
SHORT_COLUMN = 2560
LINE = 64  # bytes of a cache line


class TransposedArguments(NamedTuple):
    """What a tile of ``transposed_ir`` is called with."""

    columns: ir.Value
    kc: ir.Value
    a: ir.Value
    a_rs: ir.Value
    a_ks: ir.Value
    b: ir.Value
    b_cs: ir.Value
    c: ir.Value
    c_rs: ir.Value
    first: ir.Value
    chain: ir.Value
    b_copy: ir.Value


TRANSPOSED_ARGUMENTS = 1 + len(TransposedArguments._fields)


def transposed_ir(name: str, operand: Operand, rows: tuple[int, ...]) -> str:
    """IR of ``void name(tile, columns, kc, a, a_rs, a_ks, b, b_cs, c, c_rs, first, chain, b_copy)``, all int64.

    As ``microkernel_ir`` where the k-steps of B are adjacent and its columns are not, B[p, j] = b[p + j·b_cs]: blocks
    of B, lanes columns of ``block_steps``, are transposed in registers, for products of too few rows to repay packing,
    and by the copying tile, the last one, for the tiles after it: it packs the ``columns`` at ``b_copy``. Between
    multiply-adds the shuffles cost nothing. A and C hold lanes, B elements of ``operand``; kc and b_cs count elements.
    ``columns`` is a multiple of the lanes. The chains, and so the bits, are the same.
    """

    def choose_tile(builder: ir.IRBuilder, tile, *arguments) -> tuple[ir.Value, list]:
        def emit(mr, copies):
            return lambda builder: _transposed(builder, operand, mr, copies, TransposedArguments(*arguments))

        return tile, [*(emit(mr, False) for mr in rows), emit(rows[0], True)]

    return switch_ir(name, TRANSPOSED_ARGUMENTS, choose_tile)


@dataclass(frozen=True)
class _Columns:
    """Of a transposing tile: its rows, the groups of lanes columns that alternate, and what its loops do not change."""

    operand: Operand
    mr: int
    groups: int
    copies: bool
    row_offsets: list[ir.Value]
    a_ks: ir.Value
    column_bytes: ir.Value
    width: ir.Value
    tail: ir.Value

    def rows_of(self, group: int) -> slice:
        """The accumulators of one group."""
        return slice(group * self.mr, (group + 1) * self.mr)

    def at_group(self, builder: ir.IRBuilder, address: ir.Value, group: int) -> ir.Value:
        return builder.add(address, builder.mul(self.column_bytes, I64(group * self.operand.vector.lanes)))


def _transposed(builder, operand, mr, copies, arguments):
    columns, kc, a, a_rs, a_ks, b, b_cs, c, c_rs, first, chain, b_copy = arguments
    vector, k_per_lane, lanes = operand.vector, operand.k_per_lane, operand.vector.lanes
    steps, tail = operand.block_steps, builder.alloca(vector.type, operand.block_steps)
    column_bytes, offsets = builder.mul(b_cs, I64(operand.size)), row_offsets(builder, a_rs, mr)
    depth = builder.sdiv(builder.add(kc, I64(k_per_lane - 1)), I64(k_per_lane))

    def column_groups(groups: int) -> Callable:
        tile = _Columns(operand, mr, groups, copies, offsets, a_ks, column_bytes, columns, tail)

        def body(j: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            starts = [builder.add(j, I64(g * lanes)) for g in range(groups)]
            offsets = [builder.add(start, builder.mul(c_rs, I64(i))) for start in starts for i in range(mr)]
            c_rows = [vector.at(builder, c, offset) for offset in offsets]

            def one_chain(p: ir.Value, state: list[ir.Value]) -> list[ir.Value]:
                # Of whole pairs alone: the last may be half of one, and what follows it is not of this column.
                pairs = chain_length(builder, p, builder.sdiv(kc, I64(k_per_lane)), chain)
                whole = builder.and_(pairs, I64(-steps))
                start = [*state, *[vector.zero()] * mr * groups]
                _, state = repeat(
                    builder, I64(0), whole, steps, start, lambda _, state: _k_block(builder, tile, state, b_group)
                )
                rest = builder.sub(chain_length(builder, p, depth, chain), whole)
                left = builder.sub(kc, builder.mul(builder.add(p, whole), I64(k_per_lane)))
                a_next, acc = _k_rest(builder, tile, rest, left, state)
                store_full(builder, vector, acc, c_rows, adds_to_c(builder, p, first))
                return [a_next, *state[1 : 2 + copies]]

            b_group = builder.add(b, builder.mul(j, column_bytes))
            copy = [vector.at(builder, b_copy, j)] if copies else []
            repeat(builder, I64(0), depth, chain, [vector.at(builder, a), b_group, *copy], one_chain)
            return []

        return body

    j = I64(0)
    if mr == 1 and lanes <= PAIRED_LANES:
        end = builder.sub(columns, I64(2 * lanes - 1))
        if 2 * lanes > L1_WAYS:
            aligned = builder.icmp_signed("==", builder.and_(column_bytes, I64(L1_WAY - 1)), I64(0))
            end = builder.select(aligned, I64(0), end)
        j, _ = repeat(builder, j, end, 2 * lanes, [], column_groups(2))
    repeat(builder, j, columns, lanes, [], column_groups(1))


def _k_block(builder, tile, state, b_group):
    """The state (a, b, where b is copied to if it is, accumulators) after a block of steps of k."""
    vector, operand = tile.operand.vector, tile.operand
    a, b, *more = state
    copy, acc = more[: tile.copies], more[tile.copies :]
    if operand.converts and tile.mr == 1 and not tile.copies:
        _prefetch_next_groups(builder, tile, b, b_group)
    for group in range(tile.groups):
        if group:  # both blocks at once would not fit into the registers
            builder.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], True)
        a_step, rows = a, tile.rows_of(group)
        columns = _read_columns(builder, operand, tile.at_group(builder, b, group), tile.column_bytes)
        for step in operand.steps_of_block(builder, columns):
            for place in copy:
                vector.store(builder, step, place)
            copy = [vector.at(builder, place, tile.width) for place in copy]
            x = [vector.broadcast(builder, vector.at(builder, a_step, offset)) for offset in tile.row_offsets]
            acc[rows] = [vector.fma(builder, x_i, step, total) for x_i, total in zip(x, acc[rows], strict=True)]
            a_step = vector.at(builder, a_step, tile.a_ks)
            if tile.mr > 1:  # as in ``row_offsets``; one row has none, and would be 1/8 slower
                a_step = opaque(builder, a_step)
    return [a_step, builder.add(b, I64(operand.block_steps * operand.k_per_lane * operand.size)), *copy, *acc]


def _prefetch_next_groups(builder, tile, b, b_group):
    """Where columns are short, fetch what follows these in memory, in its order: hardware follows longer ones."""
    operand, columns = tile.operand, tile.operand.vector.lanes * tile.groups
    bytes_here = columns * operand.block_steps * operand.k_per_lane * operand.size
    distance = builder.mul(builder.add(tile.column_bytes, builder.sub(b, b_group)), I64(columns))
    is_short = builder.icmp_unsigned("<", tile.column_bytes, I64(SHORT_COLUMN))
    ahead = builder.add(b_group, builder.select(is_short, distance, builder.sub(b, b_group)))
    for line in range(0, bytes_here, LINE):
        operand.vector.prefetch(builder, builder.inttoptr(builder.add(ahead, I64(line)), POINTER), level=2)


def _k_rest(builder, tile, rest, left, state):
    """a behind the last ``rest`` steps of a chain, less than a block, and the rows of sums; B has ``left`` elements."""
    vector = tile.operand.vector
    a, b, *more = state
    copy, acc = more[: tile.copies], more[tile.copies :]
    strides = Strides(vector, tile.row_offsets, tile.a_ks, I64(vector.lanes))
    a_next, totals = a, []
    for group in range(tile.groups):
        with builder.if_then(builder.icmp_signed("!=", rest, I64(0))):
            columns = _read_columns(builder, tile.operand, tile.at_group(builder, b, group), tile.column_bytes, left)
            for step, value in enumerate(tile.operand.steps_of_block(builder, columns)):
                vector.store(builder, value, vector.at(builder, tile.tail, step * vector.lanes))
                for place in copy:
                    vector.store(builder, value, vector.at(builder, place, builder.mul(tile.width, I64(step))))
        mine = [[total] for total in acc[tile.rows_of(group)]]
        (a_next, _), mine = k_loop(builder, strides, rest, [a, tile.tail], mine)
        totals += mine
    return a_next, totals


def _read_columns(builder, operand, address, stride, count=None):
    """``lanes`` vectors, stride bytes apart; in fours from one base, so that few addresses are kept."""
    vectors = []
    four = builder.mul(stride, I64(4))
    for j in range(operand.vector.lanes):
        if j and j % 4 == 0:
            address = builder.add(address, four)
        vectors.append(operand.read_block(builder, builder.add(address, builder.mul(stride, I64(j % 4))), count))
    return vectors
