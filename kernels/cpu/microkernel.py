"""The microkernels: a tile of C held in vector registers through one k-loop, in a few sizes."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from llvmlite import ir

from .simd import I64, Vector, repeat

ARGUMENTS = 12
UNROLL = 4  # k-steps a turn: enough to hide the loop's own instructions, little enough for the op cache


def microkernel_ir(name: str, vector: Vector, rows: tuple[int, ...], vectors: tuple[int, ...], chain: int) -> str:
    """IR of ``void name(row_step, vector_step, kc, a, a_rs, a_ks, b, b_ks, c, c_rs, cols, first)``, all int64.

    C[i, j] (+)= Σ_p A[i, p]·B[p, j]   for i < mr = rows[row_step], j < cols ≤ nv·lanes, nv = vectors[vector_step]

    Strides count elements. Every ``chain`` steps of p make one chain of fused multiply-adds from 0, in whichever tile
    an element lies; the ``first`` is stored, the others are added to C with one more rounding each. nv·lanes
    columns of B must be readable (packed panels are); A and C are touched inside mr × kc and mr × cols alone.

              B[p]   |  v0 lanes  |  v1 lanes  |         per k-step: nv loads, mr broadcasts,
        A[0, p] ──▶  |  acc[0,0]  |  acc[0,1]  |         mr·nv fused multiply-adds
        A[1, p] ──▶  |  acc[1,0]  |  acc[1,1]  |

    It is a function of its own, not an intrinsic, so that LLVM compiles it once and a profiler sees its name.
    """

    def choose_tile(builder: ir.IRBuilder, row_step, vector_step, *operands) -> tuple[ir.Value, dict]:
        tile = builder.add(builder.mul(row_step, I64(len(vectors))), vector_step)
        sizes = itertools.product(rows, vectors)
        return tile, {size: (lambda b, size=size: _tile(b, vector, size, chain, *operands)) for size in sizes}

    return _switch_ir(name, choose_tile)


def transposed_ir(name: str, vector: Vector, rows: tuple[int, ...], chain: int) -> str:
    """IR of ``void name(row_step, columns, kc, a, a_rs, a_ks, b, b_cs, c, c_rs, unused, first)``, all int64.

    As ``microkernel_ir`` where the k-steps of B lie together and its columns apart, B[p, j] = b[p + j·b_cs], for
    products of too few rows to repay packing: lanes × lanes blocks of B are transposed in registers.
    ``columns`` is a multiple of the lanes. The chains, and so the bits, are the same.
    """

    def choose_tile(builder: ir.IRBuilder, row_step, *operands) -> tuple[ir.Value, dict]:
        return row_step, {(mr, 1): (lambda b, mr=mr: _transposed(b, vector, mr, chain, *operands)) for mr in rows}

    return _switch_ir(name, choose_tile)


def _switch_ir(name: str, choose_tile: Callable) -> str:
    """A function that runs one of the tiles that ``choose_tile(builder, *arguments)`` offers."""
    module = ir.Module(name)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * ARGUMENTS), name)
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    tile, emitters = choose_tile(builder, *function.args)
    done = builder.append_basic_block("done")
    choice = builder.switch(tile, done)
    for index, ((mr, nv), emit) in enumerate(emitters.items()):
        block = builder.append_basic_block(f"tile.{mr}x{nv}")
        choice.add_case(I64(index), block)
        builder.position_at_end(block)
        emit(builder)
        builder.branch(done)
    builder.position_at_end(done)
    builder.ret_void()
    return str(module)


def _tile(builder, vector, size, chain, kc, a, a_rs, a_ks, b, b_ks, c, c_rs, cols, first):
    mr, nv = size
    c_rows = [vector.at(builder, c, builder.mul(c_rs, I64(i))) for i in range(mr)]
    for row in c_rows:
        for v in range(nv):
            vector.prefetch(builder, vector.at(builder, row, v * vector.lanes))
    full = builder.icmp_signed("==", cols, I64(nv * vector.lanes))

    def one_chain(p: ir.Value, state: list[ir.Value]) -> list[ir.Value]:
        a_now, b_now = state
        acc = [[vector.zero()] * nv for _ in range(mr)]
        acc = _k_loop(builder, vector, acc, _chain_length(builder, p, kc, chain), a_now, a_rs, a_ks, b_now, b_ks)
        keep = _adds(builder, p, first)
        with builder.if_else(full, likely=True) as (whole, edge):
            with whole:
                _store_full(builder, vector, acc, c_rows, keep)
            with edge:
                _store_edge(builder, vector, acc, c_rows, keep, cols)
        return [
            vector.at(builder, a_now, builder.mul(a_ks, I64(chain))),
            vector.at(builder, b_now, builder.mul(b_ks, I64(chain))),
        ]

    repeat(builder, I64(0), kc, chain, [vector.at(builder, a), vector.at(builder, b)], one_chain)


def _chain_length(builder: ir.IRBuilder, p: ir.Value, kc: ir.Value, chain: int) -> ir.Value:
    left = builder.sub(kc, p)
    return builder.select(builder.icmp_signed("<", left, I64(chain)), left, I64(chain))


def _adds(builder: ir.IRBuilder, p: ir.Value, first: ir.Value) -> ir.Value:
    """Whether the chain from p on is added to C: all but the first of the first panel are."""
    return builder.or_(builder.icmp_signed("!=", p, I64(0)), builder.icmp_signed("==", first, I64(0)))


def _k_loop(builder, vector, acc, kc, a, a_rs, a_ks, b, b_ks):
    """``acc`` after kc steps: UNROLL a turn, then one a turn."""
    mr, nv = len(acc), len(acc[0])
    row_offsets = [builder.mul(a_rs, I64(i)) for i in range(mr)]

    def turn(steps: int) -> Callable:
        def body(p: ir.Value, state: list[ir.Value]) -> list[ir.Value]:
            a_now, b_now, *flat = state
            for _ in range(steps):
                columns = [vector.load(builder, vector.at(builder, b_now, v * vector.lanes)) for v in range(nv)]
                for i in range(mr):
                    x = vector.broadcast(builder, vector.at(builder, a_now, row_offsets[i]))
                    for v in range(nv):
                        flat[i * nv + v] = vector.fma(builder, x, columns[v], flat[i * nv + v])
                a_now = vector.at(builder, a_now, a_ks)
                b_now = vector.at(builder, b_now, b_ks)
            return [a_now, b_now, *flat]

        return body

    state = [a, b, *itertools.chain.from_iterable(acc)]
    p, state = repeat(builder, I64(0), builder.and_(kc, I64(-UNROLL)), UNROLL, state, turn(UNROLL))
    _, (_, _, *flat) = repeat(builder, p, kc, 1, state, turn(1))
    return [flat[i * nv : (i + 1) * nv] for i in range(mr)]


def _transposed(builder, vector, mr, chain, columns, kc, a, a_rs, a_ks, b, b_cs, c, c_rs, unused, first):
    lanes = vector.lanes
    row_offsets = [builder.mul(a_rs, I64(i)) for i in range(mr)]
    tail = builder.alloca(vector.type, lanes)

    def k_block(p: ir.Value, state: list[ir.Value]) -> list[ir.Value]:
        a_now, b_now, *acc = state
        for step in vector.transpose(builder, _spread(builder, vector, b_now, b_cs)):
            for i in range(mr):
                x = vector.broadcast(builder, vector.at(builder, a_now, row_offsets[i]))
                acc[i] = vector.fma(builder, x, step, acc[i])
            a_now = vector.at(builder, a_now, a_ks)
        return [a_now, vector.at(builder, b_now, lanes), *acc]

    def column_group(j: ir.Value, state: list[ir.Value]) -> list[ir.Value]:
        c_rows = [vector.at(builder, c, builder.add(j, builder.mul(c_rs, I64(i)))) for i in range(mr)]

        def one_chain(p: ir.Value, state: list[ir.Value]) -> list[ir.Value]:
            length = _chain_length(builder, p, kc, chain)
            whole = builder.and_(length, I64(-lanes))
            rest = builder.sub(length, whole)
            start = [*state, *[vector.zero()] * mr]
            _, (a_rest, b_rest, *acc) = repeat(builder, I64(0), whole, lanes, start, k_block)
            with builder.if_then(builder.icmp_signed("!=", rest, I64(0))):
                mask = vector.mask(builder, rest)
                steps = vector.transpose(builder, _spread(builder, vector, b_rest, b_cs, mask))
                for step, value in enumerate(steps):
                    vector.store(builder, value, vector.at(builder, tail, step * lanes))
            acc = _k_loop(builder, vector, [[x] for x in acc], rest, a_rest, a_rs, a_ks, tail, I64(lanes))
            _store_full(builder, vector, acc, c_rows, _adds(builder, p, first))
            return [a_rest, b_rest]

        b_group = vector.at(builder, b, builder.mul(j, b_cs))
        repeat(builder, I64(0), kc, chain, [vector.at(builder, a), b_group], one_chain)
        return []

    repeat(builder, I64(0), columns, lanes, [], column_group)


def _spread(builder, vector, pointer, stride, mask=None):
    """``lanes`` vectors, stride elements apart; in fours from one base, which is what an address can hold."""
    vectors = []
    four = builder.mul(stride, I64(4))
    for j in range(vector.lanes):
        if j and j % 4 == 0:
            pointer = vector.at(builder, pointer, four)
        at = vector.at(builder, pointer, builder.mul(stride, I64(j % 4)))
        vectors.append(vector.load(builder, at) if mask is None else vector.masked_load(builder, at, mask))
    return vectors


def _store_full(builder, vector, acc, c_rows, keep):
    with builder.if_else(keep) as (add, store):
        with add:
            for row, pointer in zip(acc, c_rows):
                for v, value in enumerate(row):
                    at = vector.at(builder, pointer, v * vector.lanes)
                    vector.store(builder, builder.fadd(vector.load(builder, at), value), at)
        with store:
            for row, pointer in zip(acc, c_rows):
                for v, value in enumerate(row):
                    vector.store(builder, value, vector.at(builder, pointer, v * vector.lanes))


def _store_edge(builder, vector, acc, c_rows, keep, cols):
    masks = [vector.mask(builder, cols, v * vector.lanes) for v in range(len(acc[0]))]
    for row, pointer in zip(acc, c_rows, strict=True):
        for v, value in enumerate(row):
            at = vector.at(builder, pointer, v * vector.lanes)
            old = vector.masked_load(builder, at, masks[v])
            value = builder.select(keep, builder.fadd(old, value), value)
            vector.masked_store(builder, value, at, masks[v])
