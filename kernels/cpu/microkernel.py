"""The microkernels: a tile of C held in vector registers through one k-loop, in a few sizes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from llvmlite import ir

from .config import L1_WAY, L1_WAYS
from .operand import Operand
from .simd import I64, Vector, function_ir, repeat

UNROLL = 4  # k-steps an iteration: enough to hide the loop's own instructions, few enough for the op cache
# One row of C waits for the latency of its multiply-adds, so two groups of columns alternate: of so many lanes, since
# wider ones are limited by their shuffles, and where the columns read side by side do not share one set of L1.
PAIRED_LANES = 8
WIDE = 4  # a tile of one row has so many times the vectors, to read B in place in longer pieces


class TileArguments(NamedTuple):
    """What a tile of ``microkernel_ir`` is called with."""

    kc: ir.Value
    a: ir.Value
    a_rs: ir.Value
    a_ks: ir.Value
    b: ir.Value
    b_ks: ir.Value
    c: ir.Value
    c_rs: ir.Value
    cols: ir.Value
    first: ir.Value
    chain: ir.Value
    b_copy: ir.Value


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


ARGUMENTS = 1 + len(TileArguments._fields)  # and the number of the tile
TRANSPOSED_ARGUMENTS = 1 + len(TransposedArguments._fields)


def tiles(rows: tuple[int, ...], vectors: tuple[int, ...]) -> list[tuple[int, int, bool]]:
    """(rows, vectors, whether it copies) of every tile, by number: all plain ones, the one that copies, the wide row.

    >>> tiles((2, 1), (4,))
    [(2, 4, False), (1, 4, False), (2, 4, True), (1, 16, False)]
    """
    plain = [(mr, nv, False) for mr, nv in itertools.product(rows, vectors)]
    return [*plain, (rows[0], vectors[0], True), (1, WIDE * vectors[0], False)]


def microkernel_ir(name: str, vector: Vector, rows: tuple[int, ...], vectors: tuple[int, ...]) -> str:
    """IR of ``void name(tile, kc, a, a_rs, a_ks, b, b_ks, c, c_rs, cols, first, chain, b_copy)``.

    C[i, j] (+)= Σ_p A[i, p]·B[p, j]   for i < mr, j < cols ≤ nv·lanes, (mr, nv, …) = tiles(rows, vectors)[tile]

    All int64; strides count elements. Every ``chain`` steps of p make one chain of fused multiply-adds from 0, in
    whichever tile an element lies; the ``first`` is stored, the others are added to C with one more rounding each.
    nv·lanes columns of B must be readable (packed panels are); A and C are touched inside mr × kc and mr × cols alone.

              B[p]   |  v0 lanes  |  v1 lanes  |         per k-step: nv loads, mr broadcasts,
        A[0, p] ──▶  |  acc[0,0]  |  acc[0,1]  |         mr·nv fused multiply-adds
        A[1, p] ──▶  |  acc[1,0]  |  acc[1,1]  |

    The copying tile reads rows of B in place and stores them packed at ``b_copy``, nv·lanes apart: the vectors are
    loaded anyway, and the stores cost nothing. A function rather than an intrinsic, so that LLVM compiles it once and
    profilers show its name.
    """

    def choose_tile(builder: ir.IRBuilder, tile, *arguments) -> tuple[ir.Value, list]:
        def emit(size):
            return lambda builder: _tile(builder, vector, size, TileArguments(*arguments))

        return tile, [emit(size) for size in tiles(rows, vectors)]

    return _switch_ir(name, ARGUMENTS, choose_tile)


def transposed_ir(name: str, operand: Operand, rows: tuple[int, ...]) -> str:
    """IR of ``void name(tile, columns, kc, a, a_rs, a_ks, b, b_cs, c, c_rs, first, chain, b_copy)``, all int64.

    As ``microkernel_ir`` where the k-steps of B are adjacent and its columns are not, B[p, j] = b[p + j·b_cs]: lanes ×
    lanes blocks of B are transposed in registers, for products of too few rows to repay packing, and by the copying
    tile, the last one, for the tiles after it: it packs the ``columns`` at ``b_copy``. Between multiply-adds the
    shuffles cost nothing. A and C hold lanes, B elements of ``operand``; kc and b_cs count elements. ``columns`` is a
    multiple of the lanes. The chains, and so the bits, are the same.
    """

    def choose_tile(builder: ir.IRBuilder, tile, *arguments) -> tuple[ir.Value, list]:
        def emit(mr, copies):
            return lambda builder: _transposed(builder, operand, mr, copies, TransposedArguments(*arguments))

        return tile, [*(emit(mr, False) for mr in rows), emit(rows[0], True)]

    return _switch_ir(name, TRANSPOSED_ARGUMENTS, choose_tile)


def _switch_ir(name: str, arguments: int, choose_tile: Callable) -> str:
    """A function that runs one of the tiles that ``choose_tile(builder, *arguments)`` offers."""

    def emit_switch(builder: ir.IRBuilder, *values: ir.Value) -> None:
        tile, emitters = choose_tile(builder, *values)
        done = builder.append_basic_block("done")
        choice = builder.switch(tile, done)
        for index, emit in enumerate(emitters):
            block = builder.append_basic_block(f"tile.{index}")
            choice.add_case(I64(index), block)
            builder.position_at_end(block)
            emit(builder)
            builder.branch(done)
        builder.position_at_end(done)

    return function_ir(name, arguments, emit_switch)


@dataclass(frozen=True)
class _Strides:
    """Of the operands of a k-loop: offsets of the rows of A, and the steps along k."""

    vector: Vector
    row_offsets: list[ir.Value]
    a_ks: ir.Value
    b_ks: ir.Value


def _tile(builder, vector, size, arguments):
    kc, a, a_rs, a_ks, b, b_ks, c, c_rs, cols, first, chain, b_copy = arguments
    mr, nv, copies = size
    c_rows = [vector.at(builder, c, builder.mul(c_rs, I64(i))) for i in range(mr)]
    for row in c_rows:
        for v in range(nv):
            vector.prefetch(builder, vector.at(builder, row, v * vector.lanes))
    full = builder.icmp_signed("==", cols, I64(nv * vector.lanes))
    row_offsets = [builder.mul(a_rs, I64(i)) for i in range(mr)]
    strides = _Strides(vector, row_offsets, a_ks, b_ks)

    def one_chain(p: ir.Value, pointers: list[ir.Value]) -> list[ir.Value]:
        acc = [[vector.zero()] * nv for _ in range(mr)]
        pointers, acc = _k_loop(builder, strides, chain_length(builder, p, kc, chain), pointers, acc)
        adds = adds_to_c(builder, p, first)
        with builder.if_else(full, likely=True) as (whole, edge):
            with whole:
                store_full(builder, vector, acc, c_rows, adds)
            with edge:
                store_edge(builder, vector, acc, c_rows, adds, cols)
        return pointers

    pointers = [vector.at(builder, address) for address in ((a, b, b_copy) if copies else (a, b))]
    repeat(builder, I64(0), kc, chain, pointers, one_chain)


def chain_length(builder: ir.IRBuilder, p: ir.Value, kc: ir.Value, chain: ir.Value) -> ir.Value:
    left = builder.sub(kc, p)
    return builder.select(builder.icmp_signed("<", left, chain), left, chain)


def adds_to_c(builder: ir.IRBuilder, p: ir.Value, first: ir.Value) -> ir.Value:
    """Whether the chain from p on is added to C: all but the first of the first panel are."""
    return builder.or_(builder.icmp_signed("!=", p, I64(0)), builder.icmp_signed("==", first, I64(0)))


def _k_loop(builder, strides, kc, pointers, acc):
    """(``pointers``, ``acc``) after kc steps: UNROLL an iteration, then one an iteration.

    pointers: a, b, and where b is copied to, if it is.
    """
    nv, count = len(acc[0]), len(pointers)

    def iteration(steps: int) -> Callable:
        def body(p: ir.Value, state: list[ir.Value]) -> list[ir.Value]:
            for _ in range(steps):
                state = _k_step(builder, strides, nv, state[:count], state[count:])
            return state

        return body

    state = [*pointers, *itertools.chain.from_iterable(acc)]
    p, state = repeat(builder, I64(0), builder.and_(kc, I64(-UNROLL)), UNROLL, state, iteration(UNROLL))
    _, state = repeat(builder, p, kc, 1, state, iteration(1))
    flat = state[count:]
    return state[:count], [flat[i : i + nv] for i in range(0, len(flat), nv)]


def _k_step(builder, strides, nv, pointers, acc):
    """The state after one step of k."""
    vector, (a, b, *copies) = strides.vector, pointers
    columns = [vector.load(builder, vector.at(builder, b, v * vector.lanes)) for v in range(nv)]
    for copy in copies:
        for v, column in enumerate(columns):
            vector.store(builder, column, vector.at(builder, copy, v * vector.lanes))
    copies = [vector.at(builder, copy, nv * vector.lanes) for copy in copies]
    for i, offset in enumerate(strides.row_offsets):
        x = vector.broadcast(builder, vector.at(builder, a, offset))
        for v, column in enumerate(columns):
            acc[i * nv + v] = vector.fma(builder, x, column, acc[i * nv + v])
    return [vector.at(builder, a, strides.a_ks), vector.at(builder, b, strides.b_ks), *copies, *acc]


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
    tail = builder.alloca(vector.type, lanes)
    column_bytes = builder.mul(b_cs, I64(operand.size))
    depth = builder.sdiv(builder.add(kc, I64(k_per_lane - 1)), I64(k_per_lane))
    row_offsets = [builder.mul(a_rs, I64(i)) for i in range(mr)]

    def column_groups(groups: int) -> Callable:
        tile = _Columns(operand, mr, groups, copies, row_offsets, a_ks, column_bytes, columns, tail)

        def body(j: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            starts = [builder.add(j, I64(g * lanes)) for g in range(groups)]
            offsets = [builder.add(start, builder.mul(c_rs, I64(i))) for start in starts for i in range(mr)]
            c_rows = [vector.at(builder, c, offset) for offset in offsets]

            def one_chain(p: ir.Value, state: list[ir.Value]) -> list[ir.Value]:
                # Of whole pairs alone: the last may be half of one, and what follows it is not of this column.
                pairs = chain_length(builder, p, builder.sdiv(kc, I64(k_per_lane)), chain)
                whole = builder.and_(pairs, I64(-lanes))
                start = [*state, *[vector.zero()] * mr * groups]
                _, state = repeat(builder, I64(0), whole, lanes, start, lambda _, state: _k_block(builder, tile, state))
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


def _k_block(builder, tile, state):
    """The state (a, b, where b is copied to if it is, accumulators) after a block of lanes steps of k."""
    vector, operand = tile.operand.vector, tile.operand
    a, b, *more = state
    copy, acc = more[: tile.copies], more[tile.copies :]
    for group in range(tile.groups):
        if group:  # both blocks at once would not fit into the registers
            builder.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], True)
        a_step, rows = a, tile.rows_of(group)
        columns = _read_columns(builder, operand, tile.at_group(builder, b, group), tile.column_bytes)
        for step in vector.transpose(builder, columns):
            for place in copy:
                vector.store(builder, step, place)
            copy = [vector.at(builder, place, tile.width) for place in copy]
            x = [vector.broadcast(builder, vector.at(builder, a_step, offset)) for offset in tile.row_offsets]
            acc[rows] = [vector.fma(builder, x_i, step, total) for x_i, total in zip(x, acc[rows], strict=True)]
            a_step = vector.at(builder, a_step, tile.a_ks)
    return [a_step, builder.add(b, I64(vector.lanes * operand.k_per_lane * operand.size)), *copy, *acc]


def _k_rest(builder, tile, rest, left, state):
    """a behind the last ``rest`` steps of a chain, fewer than lanes, and the rows of sums; B has ``left`` elements."""
    vector = tile.operand.vector
    a, b, *more = state
    copy, acc = more[: tile.copies], more[tile.copies :]
    strides = _Strides(vector, tile.row_offsets, tile.a_ks, I64(vector.lanes))
    a_next, totals = a, []
    for group in range(tile.groups):
        with builder.if_then(builder.icmp_signed("!=", rest, I64(0))):
            columns = _read_columns(builder, tile.operand, tile.at_group(builder, b, group), tile.column_bytes, left)
            for step, value in enumerate(vector.transpose(builder, columns)):
                vector.store(builder, value, vector.at(builder, tile.tail, step * vector.lanes))
                for place in copy:
                    vector.store(builder, value, vector.at(builder, place, builder.mul(tile.width, I64(step))))
        mine = [[total] for total in acc[tile.rows_of(group)]]
        (a_next, _), mine = _k_loop(builder, strides, rest, [a, tile.tail], mine)
        totals += mine
    return a_next, totals


def _read_columns(builder, operand, address, stride, count=None):
    """``lanes`` vectors, stride bytes apart; in fours from one base, so that few addresses are kept."""
    vectors = []
    four = builder.mul(stride, I64(4))
    for j in range(operand.vector.lanes):
        if j and j % 4 == 0:
            address = builder.add(address, four)
        vectors.append(operand.read(builder, builder.add(address, builder.mul(stride, I64(j % 4))), count))
    return vectors


def store_full(builder, vector, acc, c_rows, adds):
    with builder.if_else(adds) as (add, store):
        with add:
            for row, pointer in zip(acc, c_rows):
                for v, value in enumerate(row):
                    at = vector.at(builder, pointer, v * vector.lanes)
                    vector.store(builder, builder.fadd(vector.load(builder, at), value), at)
        with store:
            for row, pointer in zip(acc, c_rows):
                for v, value in enumerate(row):
                    vector.store(builder, value, vector.at(builder, pointer, v * vector.lanes))


def store_edge(builder, vector, acc, c_rows, adds, cols):
    masks = [vector.mask(builder, cols, v * vector.lanes) for v in range(len(acc[0]))]
    for row, pointer in zip(acc, c_rows, strict=True):
        for v, value in enumerate(row):
            at = vector.at(builder, pointer, v * vector.lanes)
            old = vector.masked_load(builder, at, masks[v])
            value = builder.select(adds, builder.fadd(old, value), value)
            vector.masked_store(builder, value, at, masks[v])
