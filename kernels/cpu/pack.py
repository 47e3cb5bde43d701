"""Packing: copies of A and B in the order in which the microkernel reads them; any strides in, padding at the edges.

Packing is where every layout is absorbed: a row-major, column-major, sliced or expanded operand leaves here as panels
that the microkernel walks with constant strides. Padding is 0: it keeps loads inside the buffer and meets only
elements of C that are not stored, or, where k is odd, a zero of the other operand.

        source                                     target of pack_steps          target of pack_rows
             j ─▶  0   1   2                       p = 0 │ j=0 j=1 j=2  × │       j = 0 │ p=0 p=1 … × │
        p │  0     ·   ·   ·                       p = 1 │ j=0 j=1 j=2  × │       j = 1 │ p=0 p=1 … × │
          ▼  1     ·   ·   ·           ──▶           …                            j = 2 │ p=0 p=1 … × │

p counts steps of k, a lane of the target holds one of them or a pair; × is padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from .operand import Operand
from .simd import I64, POINTER, each, function_ir

PACK_STEPS_ARGUMENTS, PACK_ROWS_ARGUMENTS = 8, 7


def pack_steps_ir(name: str, operand: Operand) -> str:
    """IR of ``void name(target, width, stride, source, k, k_stride, width_stride, exist)``: rows are steps of k.

    Lane j of row p is source[p, j], for j < exist ≤ width; width and stride count lanes, the other strides elements.
    """

    def emit(builder, target, width, stride, source, k, k_stride, width_stride, exist):
        buffer = scratch(builder, operand)
        steps = _Steps(operand, target, width, stride, source, k, k_stride, width_stride, exist, buffer)
        with builder.if_else(builder.icmp_signed("==", width_stride, I64(1))) as (adjacent, other):
            with adjacent:
                _pack_adjacent(builder, steps)
            with other, builder.if_else(builder.icmp_signed("==", k_stride, I64(1))) as (deep, scattered):
                with deep:
                    _pack_transposed(builder, steps)
                with scattered:
                    _pack_scattered(builder, steps)

    return function_ir(name, PACK_STEPS_ARGUMENTS, emit)


@dataclass(frozen=True)
class _Steps:
    """What ``pack_steps`` is called with, and room for the elements of one vector."""

    operand: Operand
    target: ir.Value
    width: ir.Value
    stride: ir.Value
    source: ir.Value
    k: ir.Value
    k_stride: ir.Value
    width_stride: ir.Value
    exist: ir.Value
    buffer: ir.Value

    def lane(self, builder: ir.IRBuilder, p: ir.Value, j: ir.Value) -> ir.Value:
        """Address of lane j of row p of the target."""
        return self.operand.vector.at(builder, self.target, builder.add(builder.mul(p, self.stride), j))

    def element(self, builder: ir.IRBuilder, p: ir.Value, j: ir.Value) -> ir.Value:
        """Address of element j of step p of the source."""
        at = builder.add(builder.mul(p, self.k_stride), builder.mul(j, self.width_stride))
        return element_at(builder, self.operand, self.source, at)


def _pack_adjacent(builder, steps):
    operand, per_lane = steps.operand, steps.operand.k_per_lane
    row_bytes = builder.mul(steps.k_stride, I64(operand.size))

    def row(p):
        first = builder.mul(p, I64(per_lane))
        left = builder.sub(steps.k, first)

        def vector(j):
            to, at = steps.lane(builder, p, j), steps.element(builder, first, j)
            if per_lane == 2:
                _interleave(builder, operand, to, at, row_bytes, builder.sub(steps.exist, j), left)
            else:
                _read(builder, operand, to, at, builder.sub(steps.exist, j))

        each(builder, steps.width, operand.vector.lanes, vector)

    each(builder, _lanes_of(builder, operand, steps.k), 1, row)


def _pack_transposed(builder, steps):
    operand, lanes = steps.operand, steps.operand.vector.lanes

    def columns(j):
        def block(p):
            first = builder.mul(p, I64(operand.k_per_lane))
            exist, left = builder.sub(steps.exist, j), builder.sub(steps.k, first)
            to, at = steps.lane(builder, p, j), steps.element(builder, first, j)
            _transpose(builder, operand, (to, steps.stride), (at, steps.width_stride), exist, left)

        each(builder, _lanes_of(builder, operand, steps.k), lanes, block)

    each(builder, steps.width, lanes, columns)


def _pack_scattered(builder, steps):
    operand, lanes, per_lane = steps.operand, steps.operand.vector.lanes, steps.operand.k_per_lane

    def row(p):
        first = builder.mul(p, I64(per_lane))

        def vector(j):
            def one_lane(lane):
                column = builder.add(j, lane)
                for f in range(per_lane):
                    step = builder.add(first, I64(f))
                    exists = builder.icmp_signed("<", column, steps.exist)
                    exists = builder.and_(exists, builder.icmp_signed("<", step, steps.k))
                    to = builder.add(builder.mul(lane, I64(per_lane)), I64(f))
                    to = element_at(builder, operand, steps.buffer, to)
                    copy_element(builder, operand.size, to, steps.element(builder, step, column), exists)

            each(builder, lanes, 1, one_lane)
            operand.vector.store(builder, operand.read(builder, steps.buffer), steps.lane(builder, p, j))

        each(builder, steps.width, lanes, vector)

    each(builder, _lanes_of(builder, operand, steps.k), 1, row)


def pack_rows_ir(name: str, operand: Operand) -> str:
    """IR of ``void name(target, rows, stride, source, k, k_stride, row_stride)``: a row's steps of k are adjacent."""
    per_vector = operand.vector.lanes * operand.k_per_lane

    def emit(builder, target, rows, stride, source, k, k_stride, row_stride):
        buffer = scratch(builder, operand)
        adjacent = builder.icmp_signed("==", k_stride, I64(1))

        def row(i):
            to_row = operand.vector.at(builder, target, builder.mul(i, stride))
            first = element_at(builder, operand, source, builder.mul(i, row_stride))

            def vector(p):
                to = operand.vector.at(builder, to_row, builder.sdiv(p, I64(operand.k_per_lane)))
                at = element_at(builder, operand, first, builder.mul(p, k_stride))
                left = builder.sub(k, p)

                def one_step(step):
                    exists = builder.icmp_signed("<", step, left)
                    element = element_at(builder, operand, at, builder.mul(step, k_stride))
                    copy_element(builder, operand.size, element_at(builder, operand, buffer, step), element, exists)

                with builder.if_else(adjacent) as (together, apart):
                    with together:
                        _read(builder, operand, to, at, left)
                    with apart:
                        each(builder, per_vector, 1, one_step)
                        operand.vector.store(builder, operand.read(builder, buffer), to)

            each(builder, k, per_vector, vector)

        each(builder, rows, 1, row)

    return function_ir(name, PACK_ROWS_ARGUMENTS, emit)


def scratch(builder: ir.IRBuilder, operand: Operand) -> ir.Value:
    """Address of room for the elements of one vector, on the stack: to be called in the entry of a function."""
    return builder.ptrtoint(builder.alloca(operand.vector.type), I64)


def element_at(builder: ir.IRBuilder, operand: Operand, address: ir.Value, index: ir.Value) -> ir.Value:
    """Address of an element of the operand in memory."""
    return builder.add(address, builder.mul(index, I64(operand.size)))


def copy_element(
    builder: ir.IRBuilder, size: int, target: ir.Value, source: ir.Value, exists: ir.Value | None = None
) -> None:
    """One element of ``size`` bytes, or 0 without reading where none exists."""
    element = ir.IntType(8 * size)
    to, at = builder.inttoptr(target, POINTER), builder.inttoptr(source, POINTER)
    if exists is None:
        builder.store(builder.load(at, typ=element, align=size), to, align=size)
        return
    with builder.if_else(exists) as (real, padding):
        with real:
            builder.store(builder.load(at, typ=element, align=size), to, align=size)
        with padding:
            builder.store(element(0), to, align=size)


def _lanes_of(builder: ir.IRBuilder, operand: Operand, k: ir.Value) -> ir.Value:
    """Lanes that ``k`` steps take."""
    return k if operand.k_per_lane == 1 else builder.ashr(builder.add(k, I64(1)), I64(1))


def _either(builder: ir.IRBuilder, condition: ir.Value, full: Callable[[], None], edge: Callable[[], None]) -> None:
    with builder.if_else(condition, likely=True) as (then, otherwise):
        with then:
            full()
        with otherwise:
            edge()


def _read(builder: ir.IRBuilder, operand: Operand, target: ir.Value, source: ir.Value, count: ir.Value) -> None:
    """One vector of lanes from ``count`` adjacent elements, or as many as fill it."""

    def copy(limit=None):
        operand.vector.store(builder, operand.read(builder, source, limit), target)

    whole = builder.icmp_signed(">=", count, I64(operand.vector.lanes * operand.k_per_lane))
    _either(builder, whole, copy, lambda: copy(count))


def _interleave(builder, operand, target, source, row_bytes, count, steps):
    """A vector of pairs from ``count`` elements of a row of k and the next, which exists if steps > 1."""
    high = builder.add(source, row_bytes)
    has_high = builder.icmp_signed(">", steps, I64(1))

    def copy(limit=None):
        operand.vector.store(builder, operand.interleave(builder, source, high, limit, has_high), target)

    _either(builder, builder.icmp_signed(">=", count, I64(operand.vector.lanes)), copy, lambda: copy(count))


def _transpose(builder, operand, target, source, columns, k):
    """At most lanes ``columns`` of k steps become rows of lanes; target and source are an address and a stride."""
    vector, k_per_lane, lanes = operand.vector, operand.k_per_lane, operand.vector.lanes
    (to, target_stride), (start, source_stride) = target, source
    addresses = [element_at(builder, operand, start, builder.mul(source_stride, I64(j))) for j in range(lanes)]
    rows = [vector.at(builder, to, builder.mul(target_stride, I64(p))) for p in range(lanes)]

    def full():
        columns_read = [operand.read(builder, address) for address in addresses]
        for row, value in zip(rows, vector.transpose(builder, columns_read), strict=True):
            vector.store(builder, value, row)

    def edge():
        """A column that does not exist is read with an empty mask, a step that does not is not written."""
        read = []
        for j, address in enumerate(addresses):
            count = builder.select(builder.icmp_signed("<", I64(j), columns), k, I64(0))
            read.append(operand.read(builder, address, count))
        for p, value in enumerate(vector.transpose(builder, read)):
            with builder.if_then(builder.icmp_signed("<", I64(p * k_per_lane), k)):
                vector.store(builder, value, rows[p])

    enough_columns = builder.icmp_signed(">=", columns, I64(lanes))
    whole = builder.and_(enough_columns, builder.icmp_signed(">=", k, I64(lanes * k_per_lane)))
    _either(builder, whole, full, edge)
