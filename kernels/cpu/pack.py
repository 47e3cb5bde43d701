"""Packing: copies of A and B in the order in which the microkernel reads them; any strides in, edges zero-filled.

Packing is where every layout is absorbed: a row-major, column-major, sliced or expanded operand leaves here as
panels that the microkernel walks with constant strides. Padding is zero, so an edge tile runs the full tile's
instructions on it and gives its real elements the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .memory import jit
from .simd import Vector

INT64 = types.int64


def make_pack(vector: Vector) -> Callable:
    """``pack(target, depth, width, stride, source, depth_stride, width_stride, exist)``, strides in elements.

    target[p·stride + j] = source[p·depth_stride + j·width_stride]    p < depth, j < exist

        source                                      target
             j ─▶  0   1   2  (exist = 3)           p = 0 │ j=0 j=1 j=2  × │ …      width elements, a multiple
        p │  0     ·   ·   ·                        p = 1 │ j=0 j=1 j=2  × │ …      of the lanes, every
          ▼  1     ·   ·   ·           ──▶          p = 2 │ j=0 j=1 j=2  × │ …      stride elements
             2     ·   ·   ·

    × is padding, 0: it keeps loads inside the buffer and meets only elements of C that are not stored.
    """
    lanes, size = vector.lanes, vector.size
    copy, copy_edge, transpose, copy_element = _copiers(vector)

    @jit
    def pack(target, depth, width, stride, source, depth_stride, width_stride, exist):
        if width_stride == 1:
            for p in range(depth):
                to, at = target + p * stride * size, source + p * depth_stride * size
                for j in range(0, width, lanes):
                    if j + lanes <= exist:
                        copy(to + j * size, at + j * size)
                    else:
                        copy_edge(to + j * size, at + j * size, exist - j)
        elif depth_stride == 1:
            for j in range(0, width, lanes):
                for p in range(0, depth, lanes):
                    to, at = target + (p * stride + j) * size, source + (p + j * width_stride) * size
                    transpose(to, stride, at, width_stride, exist - j, depth - p)
        else:
            for p in range(depth):
                for j in range(width):
                    at = source + (p * depth_stride + j * width_stride) * size
                    copy_element(target + (p * stride + j) * size, at, j < exist)

    return pack


def _copiers(vector: Vector) -> tuple[Callable, Callable, Callable, Callable]:
    def define(signature: types.Type, emit: Callable) -> Callable:
        def codegen(context, builder, signature, args):
            emit(builder, *args)
            return context.get_dummy_value()

        return signature, codegen

    @intrinsic
    def copy(typingctx, target, source):
        def emit(builder, target, source):
            vector.store(
                builder, vector.load(builder, vector.at(builder, source)), vector.at(builder, target)
            )

        return define(types.void(INT64, INT64), emit)

    @intrinsic
    def copy_edge(typingctx, target, source, count):
        def emit(builder, target, source, count):
            value = vector.masked_load(builder, vector.at(builder, source), vector.mask(builder, count))
            vector.store(builder, value, vector.at(builder, target))

        return define(types.void(INT64, INT64, INT64), emit)

    @intrinsic
    def transpose(typingctx, target, target_stride, source, source_stride, columns, depth):
        """columns ≤ lanes source rows of depth ≤ lanes elements become depth target rows of lanes elements."""

        def emit(builder, target, target_stride, source, source_stride, columns, depth):
            whole = builder.and_(
                builder.icmp_signed(">=", columns, ir.Constant(columns.type, vector.lanes)),
                builder.icmp_signed(">=", depth, ir.Constant(depth.type, vector.lanes)),
            )
            with builder.if_else(whole, likely=True) as (full, edge):
                with full:
                    _transpose_full(builder, vector, target, target_stride, source, source_stride)
                with edge:
                    _transpose_edge(
                        builder, vector, target, target_stride, source, source_stride, columns, depth
                    )

        return define(types.void(*[INT64] * 6), emit)

    @intrinsic
    def copy_element(typingctx, target, source, exists):
        def emit(builder, target, source, exists):
            with builder.if_else(exists) as (real, padding):
                with real:
                    value = builder.load(vector.at(builder, source), typ=vector.scalar)
                    builder.store(value, vector.at(builder, target))
                with padding:
                    builder.store(ir.Constant(vector.scalar, 0.0), vector.at(builder, target))

        return define(types.void(INT64, INT64, types.boolean), emit)

    return copy, copy_edge, transpose, copy_element


def _transpose_full(builder, vector, target, target_stride, source, source_stride):
    lanes = vector.lanes
    index = source_stride.type
    rows = [
        vector.load(builder, vector.at(builder, source, builder.mul(source_stride, index(j))))
        for j in range(lanes)
    ]
    for p, value in enumerate(vector.transpose(builder, rows)):
        vector.store(builder, value, vector.at(builder, target, builder.mul(target_stride, index(p))))


def _transpose_edge(builder, vector, target, target_stride, source, source_stride, columns, depth):
    """As above; a row that does not exist is read with an empty mask, a step that does not exist is not written."""
    lanes = vector.lanes
    index = source_stride.type
    rows = []
    for j in range(lanes):
        exists = builder.icmp_signed("<", index(j), columns)
        mask = vector.mask(builder, builder.select(exists, depth, index(0)))
        pointer = vector.at(builder, source, builder.mul(source_stride, index(j)))
        rows.append(vector.masked_load(builder, pointer, mask))
    for p, value in enumerate(vector.transpose(builder, rows)):
        with builder.if_then(builder.icmp_signed("<", index(p), depth)):
            vector.store(builder, value, vector.at(builder, target, builder.mul(target_stride, index(p))))
