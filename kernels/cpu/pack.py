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

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .memory import jit, stack_words
from .operand import Operand
from .simd import I64

INT64 = types.int64
PACK_STEPS_SIGNATURE = types.void(*[INT64] * 8)
PACK_ROWS_SIGNATURE = types.void(*[INT64] * 7)


def make_pack_steps(operand: Operand) -> Callable:
    """``pack_steps(target, width, stride, source, k, k_stride, width_stride, exist)``: steps of k below each other.

    Lane j of row p is source[p, j], for j < exist ≤ width; width and stride count lanes, the other strides elements.
    """
    lanes, size, k_per_lane = operand.vector.lanes, operand.size, operand.k_per_lane
    lane_bytes = operand.vector.size
    read = _reader(operand)
    transpose = _transposer(operand)
    interleave = _interleaver(operand)
    copy_element = element_copier(size)
    scratch = stack_words(lanes * lane_bytes // 8)

    @jit
    def pack_adjacent(target, width, stride, source, k, k_stride, exist):
        for p in range(0, k, k_per_lane):
            to, at = target + p // k_per_lane * stride * lane_bytes, source + p * k_stride * size
            for j in range(0, width, lanes):
                if k_per_lane == 2:
                    interleave(to + j * lane_bytes, at + j * size, k_stride * size, exist - j, k - p)
                else:
                    read(to + j * lane_bytes, at + j * size, exist - j)

    @jit
    def pack_scattered(target, width, stride, source, k, k_stride, width_stride, exist):
        buffer = scratch()
        for p in range(0, k, k_per_lane):
            for j in range(0, width, lanes):
                for lane in range(lanes):
                    for f in range(k_per_lane):
                        at = source + ((p + f) * k_stride + (j + lane) * width_stride) * size
                        exists = j + lane < exist and p + f < k
                        copy_element(buffer + (lane * k_per_lane + f) * size, at, exists)
                read(target + (p // k_per_lane * stride + j) * lane_bytes, buffer, lanes * k_per_lane)

    def pack_steps(target, width, stride, source, k, k_stride, width_stride, exist):
        if width_stride == 1:
            pack_adjacent(target, width, stride, source, k, k_stride, exist)
        elif k_stride == 1:
            for j in range(0, width, lanes):
                for p in range(0, k, lanes * k_per_lane):
                    to = target + (p // k_per_lane * stride + j) * lane_bytes
                    transpose(to, stride, source + (p + j * width_stride) * size, width_stride, exist - j, k - p)
        else:
            pack_scattered(target, width, stride, source, k, k_stride, width_stride, exist)

    return pack_steps


def make_pack_rows(operand: Operand) -> Callable:
    """``pack_rows(target, rows, stride, source, k, k_stride, row_stride)``: each row's steps of k beside each other."""
    lanes, size, k_per_lane = operand.vector.lanes, operand.size, operand.k_per_lane
    lane_bytes = operand.vector.size
    read = _reader(operand)
    copy_element = element_copier(size)
    scratch = stack_words(lanes * lane_bytes // 8)

    def pack_rows(target, rows, stride, source, k, k_stride, row_stride):
        buffer = scratch()
        for i in range(rows):
            for p in range(0, k, lanes * k_per_lane):
                to = target + (i * stride + p // k_per_lane) * lane_bytes
                at = source + (i * row_stride + p * k_stride) * size
                if k_stride == 1:
                    read(to, at, k - p)
                else:
                    for step in range(lanes * k_per_lane):
                        copy_element(buffer + step * size, at + step * k_stride * size, p + step < k)
                    read(to, buffer, lanes * k_per_lane)

    return pack_rows


def make_lanes_along_k(operand: Operand) -> Callable:
    """``lanes_along_k(k, stride, k_stride)``: whether adjacent steps of k are in memory what they are in lanes."""
    converts, k_per_lane = operand.converts, operand.k_per_lane

    @jit
    def lanes_along_k(k, stride, k_stride):
        if not converts:
            return True
        return k_per_lane == 2 and k_stride == 1 and k % 2 == 0 and stride % 2 == 0

    return lanes_along_k


def _define(arguments: int, emit: Callable) -> tuple[types.Type, Callable]:
    def codegen(context, builder, signature, args):
        emit(builder, *args)
        return context.get_dummy_value()

    return types.void(*[INT64] * arguments), codegen


def _either(builder: ir.IRBuilder, condition: ir.Value, full: Callable[[], None], edge: Callable[[], None]) -> None:
    with builder.if_else(condition, likely=True) as (then, otherwise):
        with then:
            full()
        with otherwise:
            edge()


def _reader(operand: Operand) -> Callable:
    """``(target, source, count)``: one vector of lanes from count adjacent elements, or as many as fill it."""
    vector = operand.vector

    @intrinsic
    def read(typingctx, target, source, count):
        def emit(builder, target, source, count):
            def copy(limit=None):
                vector.store(builder, operand.read(builder, source, limit), vector.at(builder, target))

            whole = builder.icmp_signed(">=", count, I64(vector.lanes * operand.k_per_lane))
            _either(builder, whole, copy, lambda: copy(count))

        return _define(3, emit)

    return read


def _interleaver(operand: Operand) -> Callable:
    """``(target, source, row_bytes, count, steps)``: pairs from a row of k and the next, which exists if steps > 1."""
    vector = operand.vector

    @intrinsic
    def interleave(typingctx, target, source, row_bytes, count, steps):
        def emit(builder, target, source, row_bytes, count, steps):
            high = builder.add(source, row_bytes)
            has_high = builder.icmp_signed(">", steps, I64(1))

            def copy(limit=None):
                lanes = operand.interleave(builder, source, high, limit, has_high)
                vector.store(builder, lanes, vector.at(builder, target))

            whole = builder.icmp_signed(">=", count, I64(vector.lanes))
            _either(builder, whole, copy, lambda: copy(count))

        return _define(5, emit)

    return interleave


def _transposer(operand: Operand) -> Callable:
    """``(target, target_stride, source, source_stride, columns, k)``: at most lanes columns become rows of lanes."""
    vector, k_per_lane, lanes = operand.vector, operand.k_per_lane, operand.vector.lanes

    @intrinsic
    def transpose(typingctx, target, target_stride, source, source_stride, columns, k):
        def emit(builder, target, target_stride, source, source_stride, columns, k):
            step_bytes = builder.mul(source_stride, I64(operand.size))
            addresses = [builder.add(source, builder.mul(step_bytes, I64(j))) for j in range(lanes)]
            rows = [vector.at(builder, target, builder.mul(target_stride, I64(p))) for p in range(lanes)]

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

        return _define(6, emit)

    return transpose


def element_copier(size: int) -> Callable:
    """``(target, source, exists)``: one element of ``size`` bytes, or 0 without reading where none exists."""
    element = ir.IntType(8 * size)

    @intrinsic
    def copy_element(typingctx, target, source, exists):
        def codegen(context, builder, signature, args):
            target, source, exists = args
            to = builder.inttoptr(target, ir.PointerType())
            with builder.if_else(exists) as (real, padding):
                with real:
                    at = builder.inttoptr(source, ir.PointerType())
                    builder.store(builder.load(at, typ=element, align=size), to, align=size)
                with padding:
                    builder.store(element(0), to, align=size)
            return context.get_dummy_value()

        return types.void(INT64, INT64, types.boolean), codegen

    return copy_element
