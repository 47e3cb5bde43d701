"""The microkernels: a tile of C held in vector registers through one k-loop, in a few sizes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from llvmlite import ir

from .simd import I64, Vector, choose, function_ir, opaque, repeat

UNROLL = 4  # k-steps an iteration: enough to hide the loop's own instructions, few enough for the op cache
WIDE = 4  # a tile of one row has so many times the vectors, to read B in place in longer pieces


class TileArguments(NamedTuple):
    """What tiles of ``microkernel_ir`` are called with."""

    count: ir.Value
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


ARGUMENTS = 1 + len(TileArguments._fields)  # and the number of the tile


def tiles(rows: tuple[int, ...], vectors: tuple[int, ...]) -> list[tuple[int, int, bool]]:
    """(rows, vectors, whether it copies) of every tile, by number: all plain ones, the one that copies, the wide row.

    >>> tiles((2, 1), (4,))
    [(2, 4, False), (1, 4, False), (2, 4, True), (1, 16, False)]
    """
    plain = [(mr, nv, False) for mr, nv in itertools.product(rows, vectors)]
    return [*plain, (rows[0], vectors[0], True), (1, WIDE * vectors[0], False)]


def microkernel_ir(name: str, vector: Vector, rows: tuple[int, ...], vectors: tuple[int, ...]) -> str:
    """IR of ``void name(tile, count, kc, a, a_rs, a_ks, b, b_ks, c, c_rs, cols, first, chain, b_copy)``.

    C[i, j] (+)= Σ_p A[i, p]·B[p, j]   for i < count·mr, j < cols ≤ nv·lanes, (mr, nv, …) = tiles(rows, vectors)[tile]

    where the count of a tile that copies, or has one row, is 1.

    All int64; strides count elements. Every ``chain`` steps of p make one chain of fused multiply-adds from 0, in
    whichever tile an element lies; the ``first`` is stored, the others are added to C with one more rounding each.
    nv·lanes columns of B must be readable (packed panels are); of A and C, count·mr rows, kc and cols are touched.

              B[p]   |  v0 lanes  |  v1 lanes  |         per k-step: nv loads, mr broadcasts,
        A[0, p] ──▶  |  acc[0,0]  |  acc[0,1]  |         mr·nv fused multiply-adds
        A[1, p] ──▶  |  acc[1,0]  |  acc[1,1]  |

    The copying tile reads rows of B in place and stores them packed at ``b_copy``, nv·lanes apart: the vectors are
    loaded anyway, and the stores cost nothing. A function rather than an intrinsic, so that LLVM compiles it once and
    profilers show its name.
    """

    def choose_tile(builder: ir.IRBuilder, tile, *arguments) -> tuple[ir.Value, list]:
        def emit(size):
            overlaps = size[:2] == (rows[0], vectors[0])
            return lambda builder: _tiles(builder, vector, size, overlaps, TileArguments(*arguments))

        return tile, [emit(size) for size in tiles(rows, vectors)]

    return switch_ir(name, ARGUMENTS, choose_tile)


def switch_ir(name: str, arguments: int, choose_tile: Callable) -> str:
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
class Strides:
    """Of the operands of a k-loop: offsets of the rows of A, and the steps along k."""

    vector: Vector
    row_offsets: list[ir.Value]
    a_ks: ir.Value
    b_ks: ir.Value


@dataclass(frozen=True)
class _CTile:
    """A tile of C: where its rows are, how many vectors they have, and how many columns of them exist."""

    vector: Vector
    rows: list[ir.Value]
    vectors: int
    cols: ir.Value
    full: ir.Value

    def prefetch(self, builder: ir.IRBuilder) -> None:
        for row, v in itertools.product(self.rows, range(self.vectors)):
            self.vector.prefetch(builder, self.at(builder, row, v))

    def at(self, builder: ir.IRBuilder, row: ir.Value, v: int) -> ir.Value:
        return self.vector.at(builder, row, v * self.vector.lanes)

    def in_rows(self, acc: list[ir.Value]) -> list[list[ir.Value]]:
        return [acc[i : i + self.vectors] for i in range(0, len(acc), self.vectors)]

    def end_chain(self, builder: ir.IRBuilder, acc: list[ir.Value], adds: ir.Value) -> None:
        """Store the sums of a chain, or add them to C."""
        with builder.if_else(self.full, likely=True) as (whole, edge):
            with whole:
                store_full(builder, self.vector, self.in_rows(acc), self.rows, adds)
            with edge:
                store_edge(builder, self.vector, self.in_rows(acc), self.rows, adds, self.cols)


def _tiles(builder, vector, size, overlaps, arguments):
    """``count`` tiles, one below the other: the calls between them would cost as much as a few steps of k."""
    if size[0] == 1 or size[2]:  # one alone
        _tile(builder, vector, size, overlaps, arguments)
        return
    a_step, c_step = (builder.mul(stride, I64(size[0])) for stride in (arguments.a_rs, arguments.c_rs))

    def one_tile(_: ir.Value, addresses: list[ir.Value]) -> list[ir.Value]:
        a, c = addresses
        _tile(builder, vector, size, overlaps, arguments._replace(a=a, c=c))
        return [builder.ptrtoint(vector.at(builder, x, step), I64) for x, step in ((a, a_step), (c, c_step))]

    repeat(builder, I64(0), arguments.count, 1, [arguments.a, arguments.c], one_tile)


def _tile(builder, vector, size, overlaps, arguments):
    _, kc, a, a_rs, a_ks, b, b_ks, c, c_rs, cols, first, chain, b_copy = arguments
    mr, nv, copies = size
    rows = [vector.at(builder, c, builder.mul(c_rs, I64(i))) for i in range(mr)]
    c_tile = _CTile(vector, rows, nv, cols, builder.icmp_signed("==", cols, I64(nv * vector.lanes)))
    c_tile.prefetch(builder)
    strides, zeros = Strides(vector, row_offsets(builder, a_rs, mr), a_ks, b_ks), [vector.zero()] * (mr * nv)
    pointers = [vector.at(builder, address) for address in ((a, b, b_copy) if copies else (a, b))]
    count = len(pointers)

    def one_chain(p: ir.Value, state: list[ir.Value]) -> list[ir.Value]:
        length = chain_length(builder, p, kc, chain)
        adds = adds_to_c(builder, builder.sub(p, chain), first)

        def apart() -> list[ir.Value]:
            c_tile.end_chain(builder, state[count:], adds)
            return [I64(0), *state[:count], *zeros]

        def overlapped(adds: bool) -> Callable[[], list[ir.Value]]:
            return lambda: _overlapped(builder, strides, c_tile, adds, state)

        def next_chain() -> list[ir.Value]:
            if not overlaps:
                return apart()
            can_overlap = builder.and_(c_tile.full, builder.icmp_signed(">=", length, I64(UNROLL)))
            return choose(
                builder, can_overlap, lambda: choose(builder, adds, overlapped(True), overlapped(False)), apart
            )

        is_first = builder.icmp_signed("==", p, I64(0))
        start, *state = choose(builder, is_first, lambda: [I64(0), *state], next_chain)
        pointers, acc = k_loop(builder, strides, length, state[:count], c_tile.in_rows(state[count:]), start)
        return [*pointers, *itertools.chain.from_iterable(acc)]

    _, state = repeat(builder, I64(0), kc, chain, [*pointers, *zeros], one_chain)
    adds = adds_to_c(builder, builder.zext(builder.icmp_signed(">", kc, chain), I64), first)
    c_tile.end_chain(builder, state[count:], adds)


def _overlapped(builder, strides, c_tile, adds, state):
    """UNROLL, and the state after the first steps of a chain: those before are stored between its multiply-adds.

    So many stores at a time would stop the multiply-adds for their own time and more.
    """
    count = len(state) - len(c_tile.rows) * c_tile.vectors
    for step in range(UNROLL):
        ending = (c_tile, adds) if step == 0 else None
        state = _k_step(builder, strides, c_tile.vectors, state[:count], state[count:], ending)
    return [I64(UNROLL), *state]


def row_offsets(builder: ir.IRBuilder, a_rs: ir.Value, mr: int) -> list[ir.Value]:
    """Offsets of mr rows of A, a register each.

    LLVM would walk down the rows, an addition for each, one behind the other: as long as the multiply-adds take.
    """
    return [I64(0), *(opaque(builder, builder.mul(a_rs, I64(i))) for i in range(1, mr))]


def chain_length(builder: ir.IRBuilder, p: ir.Value, kc: ir.Value, chain: ir.Value) -> ir.Value:
    left = builder.sub(kc, p)
    return builder.select(builder.icmp_signed("<", left, chain), left, chain)


def adds_to_c(builder: ir.IRBuilder, p: ir.Value, first: ir.Value) -> ir.Value:
    """Whether the chain from p on is added to C: all but the first of the first panel are."""
    return builder.or_(builder.icmp_signed("!=", p, I64(0)), builder.icmp_signed("==", first, I64(0)))


def k_loop(builder, strides, kc, pointers, acc, start=None):
    """(``pointers``, ``acc``) after the steps from ``start``, or 0, to kc: UNROLL an iteration, then one an iteration.

    pointers: a, b, and where b is copied to, if it is.
    """
    nv, count = len(acc[0]), len(pointers)

    def iteration(steps: int) -> Callable:
        def body(_: ir.Value, state: list[ir.Value]) -> list[ir.Value]:
            for _ in range(steps):
                state = _k_step(builder, strides, nv, state[:count], state[count:])
            return state

        return body

    state = [*pointers, *itertools.chain.from_iterable(acc)]
    start = I64(0) if start is None else start
    p, state = repeat(builder, start, builder.and_(kc, I64(-UNROLL)), UNROLL, state, iteration(UNROLL))
    _, state = repeat(builder, p, kc, 1, state, iteration(1))
    flat = state[count:]
    return state[:count], [flat[i : i + nv] for i in range(0, len(flat), nv)]


def _k_step(builder, strides, nv, pointers, acc, ending=None):
    """The state after one step of k.

    ``ending``: the tile of C, and whether it is added to, where this step begins a chain and stores the one before.
    """
    vector, (a, b, *copies), acc = strides.vector, pointers, list(acc)
    columns = [vector.load(builder, vector.at(builder, b, v * vector.lanes)) for v in range(nv)]
    for copy in copies:
        for v, column in enumerate(columns):
            vector.store(builder, column, vector.at(builder, copy, v * vector.lanes))
    copies = [vector.at(builder, copy, nv * vector.lanes) for copy in copies]
    for i, offset in enumerate(strides.row_offsets):
        x = vector.broadcast(builder, vector.at(builder, a, offset))
        for v, column in enumerate(columns):
            total = acc[i * nv + v]
            if ending is not None:
                c_tile, adds = ending
                place = c_tile.at(builder, c_tile.rows[i], v)
                vector.store(builder, builder.fadd(vector.load(builder, place), total) if adds else total, place)
                total = opaque(builder, vector.zero(), vector.registers)
            acc[i * nv + v] = vector.fma(builder, x, column, total)
    a, b = (opaque(builder, vector.at(builder, *step)) for step in ((a, strides.a_ks), (b, strides.b_ks)))
    return [a, b, *copies, *acc]


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
