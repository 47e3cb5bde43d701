"""The microkernels: a tile of C held in vector registers through one k-loop, in a few sizes."""

from __future__ import annotations

import itertools

from llvmlite import ir

from .simd import I64, POINTER, Vector

ARGUMENTS = 12
UNROLL = 4  # k-steps a turn: enough to hide the loop's own instructions, little enough for the op cache


def microkernel_ir(name: str, vector: Vector, rows: tuple[int, ...], vectors: tuple[int, ...]) -> str:
    """IR of ``void name(row_step, vector_step, kc, a, a_rs, a_ks, b, b_ks, c, c_rs, cols, first)``, all int64.

    C[i, j] (+)= Σ_p A[i, p]·B[p, j]   for i < mr = rows[row_step], j < cols ≤ nv·lanes, nv = vectors[vector_step]

    Strides count elements. Every element is one chain of fused multiply-adds from 0 in the order of p, in
    whichever tile it lies; ``first`` stores it, otherwise it is added to C with one more rounding. nv·lanes
    columns of B must be readable (packed panels are); A and C are touched inside mr × kc and mr × cols alone.

              B[p]   |  v0 lanes  |  v1 lanes  |         per k-step: nv loads, mr broadcasts,
        A[0, p] ──▶  |  acc[0,0]  |  acc[0,1]  |         mr·nv fused multiply-adds
        A[1, p] ──▶  |  acc[1,0]  |  acc[1,1]  |

    It is a function of its own, not an intrinsic, so that LLVM compiles it once and a profiler sees its name.
    """
    module = ir.Module(name)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * ARGUMENTS), name)
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    row_step, vector_step, *operands = function.args
    tile = builder.add(builder.mul(row_step, I64(len(vectors))), vector_step)
    done = builder.append_basic_block("done")
    choice = builder.switch(tile, done)
    for index, (mr, nv) in enumerate(itertools.product(rows, vectors)):
        block = builder.append_basic_block(f"tile.{mr}x{nv}")
        choice.add_case(I64(index), block)
        builder.position_at_end(block)
        _tile(builder, vector, mr, nv, *operands)
        builder.branch(done)
    builder.position_at_end(done)
    builder.ret_void()
    return str(module)


def _tile(builder, vector, mr, nv, kc, a, a_rs, a_ks, b, b_ks, c, c_rs, cols, first):
    c_rows = [vector.at(builder, c, builder.mul(c_rs, I64(i))) for i in range(mr)]
    for row in c_rows:
        for v in range(nv):
            vector.prefetch(builder, vector.at(builder, row, v * vector.lanes))
    acc = _k_loop(builder, vector, mr, nv, kc, a, a_rs, a_ks, b, b_ks)
    full = builder.icmp_signed("==", cols, I64(nv * vector.lanes))
    keep = builder.icmp_signed("==", first, I64(0))
    with builder.if_else(full, likely=True) as (whole, edge):
        with whole:
            _store_full(builder, vector, acc, c_rows, keep)
        with edge:
            _store_edge(builder, vector, acc, c_rows, keep, cols)


def _k_loop(builder, vector, mr, nv, kc, a, a_rs, a_ks, b, b_ks):
    """acc[i][v] after kc steps. All phis of a block stand before its first other instruction."""
    zero = vector.zero()
    row_offsets = [builder.mul(a_rs, I64(i)) for i in range(mr)]
    main_end = builder.and_(kc, I64(-UNROLL))
    state = ([[zero] * nv for _ in range(mr)], vector.at(builder, a), vector.at(builder, b), I64(0))
    for steps, end in ((UNROLL, main_end), (1, kc)):
        before = builder.block
        head = builder.append_basic_block(f"k{steps}.head")
        body = builder.append_basic_block(f"k{steps}.body")
        done = builder.append_basic_block(f"k{steps}.done")
        builder.branch(head)
        builder.position_at_end(head)
        start_acc, *start = state
        acc = [[builder.phi(vector.type) for _ in range(nv)] for _ in range(mr)]
        a_now, b_now, p = builder.phi(POINTER), builder.phi(POINTER), builder.phi(I64)
        builder.cbranch(builder.icmp_signed("<", p, end), body, done)
        builder.position_at_end(body)
        new = [list(row) for row in acc]
        a_next, b_next = a_now, b_now
        for _ in range(steps):
            columns = [vector.load(builder, vector.at(builder, b_next, v * vector.lanes)) for v in range(nv)]
            for i in range(mr):
                x = vector.broadcast(builder, vector.at(builder, a_next, row_offsets[i]))
                for v in range(nv):
                    new[i][v] = vector.fma(builder, x, columns[v], new[i][v])
            a_next = vector.at(builder, a_next, a_ks)
            b_next = vector.at(builder, b_next, b_ks)
        p_next = builder.add(p, I64(steps))
        builder.branch(head)
        for phi, first, again in zip(
            [*[x for row in acc for x in row], a_now, b_now, p],
            [*[x for row in start_acc for x in row], *start],
            [*[x for row in new for x in row], a_next, b_next, p_next],
        ):
            phi.add_incoming(first, before)
            phi.add_incoming(again, body)
        builder.position_at_end(done)
        state = (acc, a_now, b_now, p)
    return state[0]


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
