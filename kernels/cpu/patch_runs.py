"""Vectors of elements of an image, found by digits (patches_args.py): what packing of patches reads.

A run is a vector of consecutive indices of one side, rows or columns or steps of k; a line is a run with one value of
the other side's digits. Where the elements of a line are adjacent in memory it is one masked load for each of at most
two pieces, and where they are every second one, two loads; else it is gathered, element by element. What lies outside
of the image is 0 and is not read.
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from .operand import Operand
from .pack import element_at, scratch
from .patches_args import (
    ADDRESS,
    DIMENSIONS,
    FREE_EXTENT,
    FREE_OUTER,
    FREE_STEP,
    K_EXTENT,
    K_OUTER,
    K_STEP,
    SIZE,
    START,
    STRIDE,
)
from .simd import I8, I32, I64, POINTER, choose, each, repeat, splat

X = DIMENSIONS - 1


@dataclass(frozen=True)
class Side:
    """One of the two indices of an operand: its outer stride, and the extents and steps of z, y and x."""

    outer: ir.Value
    extents: list[ir.Value]
    steps: list[ir.Value]


@dataclass(frozen=True)
class Image:
    """The description of an operand, read."""

    operand: Operand
    address: ir.Value
    free: Side
    k: Side
    start: list[ir.Value]
    sizes: list[ir.Value]  # as vectors of int32
    strides: list[ir.Value]

    @property
    def lanes(self) -> int:
        return self.operand.vector.lanes

    def offset(self, builder: ir.IRBuilder, coordinates: list[ir.Value]) -> ir.Value:
        """Elements from the first pixel to one."""
        total: ir.Value = I64(0)
        for coordinate, stride in zip(coordinates, self.strides, strict=True):
            total = builder.add(total, builder.mul(coordinate, stride))
        return total


@dataclass(frozen=True)
class Run:
    """Consecutive indices of one side, a vector of them: coordinates without the other side's part.

    offsets: where each is, in memory. Those of the first piece, and of the second, are adjacent from an offset on that
    lane 0 would have. scattered: whether there are more pieces. every_second: whether all are in one row of the image,
    at a distance of 2 elements.
    """

    coordinates: list[ir.Value]
    offsets: ir.Value
    pieces: list[ir.Value]
    origins: list[ir.Value]
    scattered: ir.Value
    every_second: ir.Value


@dataclass(frozen=True)
class Line:
    """A run with one value of the other side's digits: the masks of its pieces, and what can be read without one."""

    run: Run
    masks: list[ir.Value]
    whole: ir.Value  # all lanes, from the first piece
    whole_second: ir.Value  # all lanes, every second element
    exists: ir.Value  # address of a byte a lane


class Room:
    """Arrays on the stack of a function."""

    def __init__(self, builder: ir.IRBuilder, operand: Operand, others: int) -> None:
        def array(kind: ir.Type, count: int) -> ir.Value:
            return builder.inttoptr(builder.ptrtoint(builder.alloca(kind, count), I64), POINTER)

        lanes = operand.vector.lanes
        self.coordinates = [array(I32, lanes) for _ in range(DIMENSIONS)]
        self.offsets, self.exists = array(I64, lanes), array(I8, lanes)
        self.elements, zero = scratch(builder, operand), array(I64, 1)
        builder.store(I64(0), zero)
        self.zero = builder.ptrtoint(zero, I64)
        self.other_taps = [array(I32, others) for _ in range(DIMENSIONS)]
        self.other_offsets = array(I64, others)


def read_image(builder: ir.IRBuilder, operand: Operand, patches: ir.Value) -> Image:
    pointer = builder.inttoptr(patches, POINTER)

    def word(index: int) -> ir.Value:
        return builder.load(builder.gep(pointer, [I64(index)], source_etype=I64), typ=I64)

    def three(index: int) -> list[ir.Value]:
        return [word(index + d) for d in range(DIMENSIONS)]

    sizes = [splat(builder, builder.trunc(size, I32), operand.vector.lanes) for size in three(SIZE)]
    free = Side(word(FREE_OUTER), three(FREE_EXTENT), three(FREE_STEP))
    k = Side(word(K_OUTER), three(K_EXTENT), three(K_STEP))
    return Image(operand, word(ADDRESS), free, k, three(START), sizes, three(STRIDE))


def indices_of(builder: ir.IRBuilder, operand: Operand, source: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The free index and the step of k that a source stands for."""
    both = builder.udiv(source, I64(2 * operand.size))
    return builder.and_(both, I64(0xFFFFFFFF)), builder.lshr(both, I64(32))


def digits_of(builder: ir.IRBuilder, side: Side, index: ir.Value) -> list[ir.Value]:
    """(outer, z, y, x)"""
    digits = []
    for extent in reversed(side.extents):
        digits.append(builder.urem(index, extent))
        index = builder.udiv(index, extent)
    return [index, *reversed(digits)]


def following(builder: ir.IRBuilder, side: Side, digits: list[ir.Value]) -> list[ir.Value]:
    """The digits of the next index."""
    outer, *inner = digits
    carry: ir.Value = I64(1)
    following = []
    for digit, extent in zip(reversed(inner), reversed(side.extents), strict=True):
        counted = builder.add(digit, carry)
        ends = builder.icmp_signed("==", counted, extent)
        following.append(builder.select(ends, I64(0), counted))
        carry = builder.zext(ends, I64)
    return [builder.add(outer, carry), *reversed(following)]


def slot(builder: ir.IRBuilder, array: ir.Value, index: ir.Value, kind: ir.Type) -> ir.Value:
    return builder.gep(array, [index], source_etype=kind)


def run_from(builder: ir.IRBuilder, image: Image, side: Side, first: ir.Value, room: Room) -> Run:
    """The run of ``lanes`` indices of a side from ``first`` on."""
    digits = digits_of(builder, side, first)
    in_row = builder.icmp_signed("<=", builder.add(digits[-1], I64(image.lanes)), side.extents[X])
    *coordinates, one, other, origin, second, scattered = choose(
        builder,
        in_row,
        lambda: run_in_row(builder, image, side, digits, room),
        lambda: _run_across_rows(builder, image, side, digits, room),
    )
    every_second = builder.and_(in_row, builder.icmp_signed("==", distance_of(builder, image, side), I64(2)))
    return Run(coordinates, room.offsets, [one, other], [origin, second], scattered, every_second)


def distance_of(builder: ir.IRBuilder, image: Image, side: Side) -> ir.Value:
    """Elements from one index to the next in a row."""
    return builder.mul(side.steps[X], image.strides[X])


def _coordinates(builder: ir.IRBuilder, image: Image, side: Side, digits: list[ir.Value]) -> list[ir.Value]:
    return [
        builder.add(builder.mul(digit, step), start)
        for digit, step, start in zip(digits[1:], side.steps, image.start, strict=True)
    ]


def run_in_row(builder, image, side, digits, room):
    """A run whose x alone counts."""
    lanes, distance = image.lanes, distance_of(builder, image, side)
    coordinates = _coordinates(builder, image, side, digits)
    offset = builder.add(builder.mul(digits[0], side.outer), image.offset(builder, coordinates))
    wide, narrow = (ir.Constant(ir.VectorType(kind, lanes), [kind(i) for i in range(lanes)]) for kind in (I64, I32))
    steps = builder.mul(wide, splat(builder, distance, lanes))
    builder.store(builder.add(splat(builder, offset, lanes), steps), room.offsets, align=8)
    vectors = [splat(builder, builder.trunc(coordinate, I32), lanes) for coordinate in coordinates]
    x_steps = builder.mul(narrow, splat(builder, builder.trunc(side.steps[X], I32), lanes))
    vectors[X] = builder.add(vectors[X], x_steps)
    adjacent = builder.icmp_signed("==", distance, I64(1))
    none = ir.Constant(ir.VectorType(ir.IntType(1), lanes), None)
    return [*vectors, splat(builder, adjacent, lanes), none, offset, offset, builder.not_(adjacent)]


def _run_across_rows(builder, image, side, digits, room):
    """A run whose digits carry."""

    def lane(at: ir.Value, state: list[ir.Value]) -> list[ir.Value]:
        second, pieces, *digits = state
        coordinates = _coordinates(builder, image, side, digits)
        for coordinate, array in zip(coordinates, room.coordinates, strict=True):
            builder.store(builder.trunc(coordinate, I32), slot(builder, array, at, I32))
        offset = builder.add(builder.mul(digits[0], side.outer), image.offset(builder, coordinates))
        builder.store(offset, slot(builder, room.offsets, at, I64))
        origin, first = builder.sub(offset, at), builder.load(room.offsets, typ=I64)
        is_one = builder.icmp_signed("==", pieces, I64(1))
        is_new = builder.or_(is_one, builder.icmp_signed("!=", origin, second))
        is_new = builder.and_(is_new, builder.icmp_signed("!=", origin, first))
        second = builder.select(builder.and_(is_new, is_one), origin, second)
        return [second, builder.add(pieces, builder.zext(is_new, I64)), *following(builder, side, digits)]

    lanes, wide, narrow = image.lanes, ir.VectorType(I64, image.lanes), ir.VectorType(I32, image.lanes)
    _, state = repeat(builder, I64(0), I64(lanes), 1, [I64(0), I64(1), *digits], lane)
    second, pieces, *_ = state
    origin = builder.load(room.offsets, typ=I64)
    second = builder.select(builder.icmp_signed("==", pieces, I64(1)), origin, second)
    numbers = ir.Constant(wide, [I64(i) for i in range(lanes)])
    origins = builder.sub(builder.load(room.offsets, typ=wide, align=8), numbers)
    one = builder.icmp_signed("==", origins, splat(builder, origin, lanes))
    other = builder.and_(builder.not_(one), builder.icmp_signed("==", origins, splat(builder, second, lanes)))
    coordinates = [builder.load(array, typ=narrow, align=4) for array in room.coordinates]
    return [*coordinates, one, other, origin, second, builder.icmp_signed(">", pieces, I64(2))]


def line_of(builder: ir.IRBuilder, image: Image, room: Room, run: Run, taps: list[ir.Value], count: ir.Value) -> Line:
    """The run where the other side adds ``taps``, int32, to the coordinates; lanes from ``count`` on do not exist."""
    mask = image.operand.vector.mask(builder, count)
    for coordinate, tap, size in zip(run.coordinates, taps, image.sizes, strict=True):
        at = builder.add(coordinate, splat(builder, tap, image.lanes))
        mask = builder.and_(mask, builder.icmp_unsigned("<", at, size))
    masks = [builder.and_(mask, piece) for piece in run.pieces]
    builder.store(builder.zext(mask, ir.VectorType(I8, image.lanes)), room.exists, align=1)
    whole_second = builder.and_(run.every_second, _all(builder, mask))
    return Line(run, masks, _all(builder, masks[0]), whole_second, room.exists)


def _all(builder: ir.IRBuilder, mask: ir.Value) -> ir.Value:
    bits = ir.IntType(mask.type.count)
    return builder.icmp_signed("==", builder.bitcast(mask, bits), bits(-1))


def read_line(builder: ir.IRBuilder, image: Image, room: Room, line: Line, offset: ir.Value) -> ir.Value:
    """One vector of lanes; those that do not exist are 0. The other side adds ``offset`` elements."""
    operand, run = image.operand, line.run
    places = [element_at(builder, operand, image.address, builder.add(origin, offset)) for origin in run.origins]

    def whole() -> list[ir.Value]:
        return [operand.read(builder, places[0])]

    def pieces() -> list[ir.Value]:
        one, other = (operand.read_masked(builder, at, mask) for at, mask in zip(places, line.masks, strict=True))
        return [builder.select(line.masks[1], other, one)]

    def gathered() -> list[ir.Value]:
        element = ir.IntType(8 * operand.size)

        def lane(at: ir.Value) -> None:
            elements = builder.add(builder.load(slot(builder, run.offsets, at, I64), typ=I64), offset)
            exists = builder.icmp_signed("!=", builder.load(slot(builder, line.exists, at, I8), typ=I8), I8(0))
            address = builder.select(exists, element_at(builder, operand, image.address, elements), room.zero)
            value = builder.load(builder.inttoptr(address, POINTER), typ=element, align=operand.size)
            to = element_at(builder, operand, room.elements, at)
            builder.store(value, builder.inttoptr(to, POINTER), align=operand.size)

        each(builder, image.lanes, 1, lane)
        return [operand.read(builder, room.elements)]

    def seconds() -> list[ir.Value]:
        """Between two elements of a row, memory can be read."""
        lanes = image.lanes
        low = operand.read(builder, places[0])
        high = operand.read(builder, element_at(builder, operand, places[0], I64(lanes - 1)))
        even = [I32(2 * i if 2 * i < lanes else 2 * i + 1) for i in range(lanes)]
        return [builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, lanes), even))]

    def partial() -> list[ir.Value]:
        if not operand.has_masks:  # a branch an element
            return gathered()
        return choose(builder, run.scattered, gathered, pieces)

    return choose(builder, line.whole, whole, lambda: choose(builder, line.whole_second, seconds, partial))[0]


def is_inside(builder, image, other, run, count):
    """Whether a run lies in the image up to ``count``, whatever of the ``other`` side's digits is added."""
    missing = builder.not_(image.operand.vector.mask(builder, count))
    mask = ir.Constant(missing.type, [ir.IntType(1)(1)] * image.lanes)
    for d in range(DIMENSIONS):
        reach = builder.mul(builder.sub(other.extents[d], I64(1)), other.steps[d])
        for tap in (I32(0), builder.trunc(reach, I32)):
            at = builder.add(run.coordinates[d], splat(builder, tap, image.lanes))
            mask = builder.and_(mask, builder.icmp_unsigned("<", at, image.sizes[d]))
    return _all(builder, builder.or_(mask, missing))
