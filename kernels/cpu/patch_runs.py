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
from .simd import I1, I8, I32, I64, POINTER, choose, each, repeat, splat

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
    """A run with one value of the other side's digits, and the mask of the lanes that exist."""

    run: Run
    exists: ir.Value


class Room:
    """Arrays on the stack of a function: for ``runs`` runs, and for ``others`` indices of the other side."""

    def __init__(self, builder: ir.IRBuilder, operand: Operand, others: int, runs: int = 1) -> None:
        def array(kind: ir.Type, count: int) -> ir.Value:
            return builder.inttoptr(builder.ptrtoint(builder.alloca(kind, count), I64), POINTER)

        lanes, self.runs, self.mask = operand.vector.lanes, runs, mask_type(operand)
        self.coordinates = [array(I32, lanes * runs) for _ in range(DIMENSIONS)]
        self.offsets, self.exists = array(I64, lanes * runs), array(I8, lanes)
        self.pieces, self.origins = ([array(kind, runs) for _ in range(2)] for kind in (self.mask, I64))
        self.scattered = array(I8, runs)
        self.elements, zero = scratch(builder, operand), array(I64, 1)
        builder.store(I64(0), zero)
        self.zero = builder.ptrtoint(zero, I64)
        self.other_taps = [array(I32, others) for _ in range(DIMENSIONS)]
        self.other_offsets = array(I64, others)
        self.other_masks = array(self.mask, others * runs)

    def keep(self, builder: ir.IRBuilder, index: ir.Value, run: Run) -> None:
        """Of as many runs as there is room for."""
        first = builder.mul(index, I64(run.coordinates[0].type.count))
        for coordinate, array in zip(run.coordinates, self.coordinates, strict=True):
            builder.store(coordinate, slot(builder, array, first, I32), align=4)
        for mask, array in zip(run.pieces, self.pieces, strict=True):
            keep_mask(builder, array, index, mask, self.mask)
        for origin, array in zip(run.origins, self.origins, strict=True):
            builder.store(origin, slot(builder, array, index, I64))
        builder.store(builder.zext(run.scattered, I8), slot(builder, self.scattered, index, I8))

    def kept(self, builder: ir.IRBuilder, index: ir.Value, lanes: int, every_second: ir.Value) -> Run:
        first = builder.mul(index, I64(lanes))
        coordinates = [
            builder.load(slot(builder, array, first, I32), typ=ir.VectorType(I32, lanes), align=4)
            for array in self.coordinates
        ]
        pieces = [kept_mask(builder, array, index, self.mask) for array in self.pieces]
        origins = [builder.load(slot(builder, array, index, I64), typ=I64) for array in self.origins]
        scattered = builder.trunc(builder.load(slot(builder, self.scattered, index, I8), typ=I8), I1)
        return Run(coordinates, slot(builder, self.offsets, first, I64), pieces, origins, scattered, every_second)


def mask_type(operand: Operand) -> ir.Type:
    """What a mask is kept as: bits where registers hold those, else an integer a lane, from which LLVM makes one."""
    vector = operand.vector
    if vector.lanes * vector.size == 64:
        return ir.IntType(vector.lanes)
    return ir.VectorType(ir.IntType(8 * vector.size), vector.lanes)


def keep_mask(builder: ir.IRBuilder, array: ir.Value, index: ir.Value, mask: ir.Value, kind: ir.Type) -> None:
    kept = builder.sext(mask, kind) if isinstance(kind, ir.VectorType) else builder.bitcast(mask, kind)
    builder.store(kept, slot(builder, array, index, kind))


def kept_mask(builder: ir.IRBuilder, array: ir.Value, index: ir.Value, kind: ir.Type) -> ir.Value:
    kept = builder.load(slot(builder, array, index, kind), typ=kind)
    if isinstance(kind, ir.VectorType):
        return builder.icmp_signed("<", kept, ir.Constant(kind, None))
    return builder.bitcast(kept, ir.VectorType(I1, kind.width))


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


def run_from(
    builder: ir.IRBuilder, image: Image, side: Side, first: ir.Value, room: Room, index: ir.Value | None = None
) -> Run:
    """The run of ``lanes`` indices of a side from ``first`` on, which is number ``index`` of those that are kept."""
    digits, kept = digits_of(builder, side, first), builder.mul(index or I64(0), I64(image.lanes))
    offsets = slot(builder, room.offsets, kept, I64)
    arrays = [slot(builder, array, kept, I32) for array in room.coordinates]
    in_row = builder.icmp_signed("<=", builder.add(digits[-1], I64(image.lanes)), side.extents[X])
    *coordinates, one, other, origin, second, scattered = choose(
        builder,
        in_row,
        lambda: run_in_row(builder, image, side, digits, offsets),
        lambda: _run_across_rows(builder, image, side, digits, (arrays, offsets)),
    )
    every_second = builder.icmp_signed("==", distance_of(builder, image, side), I64(2))
    return Run(coordinates, offsets, [one, other], [origin, second], scattered, every_second)


def distance_of(builder: ir.IRBuilder, image: Image, side: Side) -> ir.Value:
    """Elements from one index to the next in a row."""
    return builder.mul(side.steps[X], image.strides[X])


def _coordinates(builder: ir.IRBuilder, image: Image, side: Side, digits: list[ir.Value]) -> list[ir.Value]:
    return [
        builder.add(builder.mul(digit, step), start)
        for digit, step, start in zip(digits[1:], side.steps, image.start, strict=True)
    ]


def run_in_row(builder, image, side, digits, offsets):
    """A run whose x alone counts."""
    lanes, distance = image.lanes, distance_of(builder, image, side)
    coordinates = _coordinates(builder, image, side, digits)
    offset = builder.add(builder.mul(digits[0], side.outer), image.offset(builder, coordinates))
    wide, narrow = (ir.Constant(ir.VectorType(kind, lanes), [kind(i) for i in range(lanes)]) for kind in (I64, I32))
    steps = builder.mul(wide, splat(builder, distance, lanes))
    builder.store(builder.add(splat(builder, offset, lanes), steps), offsets, align=8)
    vectors = [splat(builder, builder.trunc(coordinate, I32), lanes) for coordinate in coordinates]
    x_steps = builder.mul(narrow, splat(builder, builder.trunc(side.steps[X], I32), lanes))
    vectors[X] = builder.add(vectors[X], x_steps)
    is_piece = _is_piece(builder, distance)
    none = ir.Constant(ir.VectorType(I1, lanes), None)
    return [*vectors, splat(builder, is_piece, lanes), none, offset, offset, builder.not_(is_piece)]


def _is_piece(builder: ir.IRBuilder, distance: ir.Value) -> ir.Value:
    """Whether elements at this distance are read as vectors."""
    return builder.or_(*[builder.icmp_signed("==", distance, I64(one)) for one in (1, 2)])


def _run_across_rows(builder, image, side, digits, kept):
    """A run whose digits carry."""
    (arrays, offsets), distance = kept, distance_of(builder, image, side)

    def lane(at: ir.Value, state: list[ir.Value]) -> list[ir.Value]:
        second, pieces, *digits = state
        coordinates = _coordinates(builder, image, side, digits)
        for coordinate, array in zip(coordinates, arrays, strict=True):
            builder.store(builder.trunc(coordinate, I32), slot(builder, array, at, I32))
        offset = builder.add(builder.mul(digits[0], side.outer), image.offset(builder, coordinates))
        builder.store(offset, slot(builder, offsets, at, I64))
        origin, first = builder.sub(offset, builder.mul(at, distance)), builder.load(offsets, typ=I64)
        is_one = builder.icmp_signed("==", pieces, I64(1))
        is_new = builder.or_(is_one, builder.icmp_signed("!=", origin, second))
        is_new = builder.and_(is_new, builder.icmp_signed("!=", origin, first))
        second = builder.select(builder.and_(is_new, is_one), origin, second)
        return [second, builder.add(pieces, builder.zext(is_new, I64)), *following(builder, side, digits)]

    lanes, wide, narrow = image.lanes, ir.VectorType(I64, image.lanes), ir.VectorType(I32, image.lanes)
    _, state = repeat(builder, I64(0), I64(lanes), 1, [I64(0), I64(1), *digits], lane)
    second, pieces, *_ = state
    origin = builder.load(offsets, typ=I64)
    second = builder.select(builder.icmp_signed("==", pieces, I64(1)), origin, second)
    numbers = builder.mul(ir.Constant(wide, [I64(i) for i in range(lanes)]), splat(builder, distance, lanes))
    origins = builder.sub(builder.load(offsets, typ=wide, align=8), numbers)
    is_piece = _is_piece(builder, distance)
    one = builder.icmp_signed("==", origins, splat(builder, origin, lanes))
    one = builder.and_(one, splat(builder, is_piece, lanes))
    other = builder.and_(builder.not_(one), builder.icmp_signed("==", origins, splat(builder, second, lanes)))
    coordinates = [builder.load(array, typ=narrow, align=4) for array in arrays]
    apart = builder.or_(builder.icmp_signed(">", pieces, I64(2)), builder.not_(is_piece))
    return [*coordinates, one, other, origin, second, apart]


def lanes_inside(builder: ir.IRBuilder, image: Image, run: Run, exists: ir.Value, taps: list[ir.Value]) -> ir.Value:
    """Of the lanes in the mask ``exists`` those that lie in the image where the other side adds ``taps``, int32."""
    for coordinate, tap, size in zip(run.coordinates, taps, image.sizes, strict=True):
        at = builder.add(coordinate, splat(builder, tap, image.lanes))
        exists = builder.and_(exists, builder.icmp_unsigned("<", at, size))
    return exists


def all_of(builder: ir.IRBuilder, mask: ir.Value) -> ir.Value:
    bits = ir.IntType(mask.type.count)
    return builder.icmp_signed("==", builder.bitcast(mask, bits), bits(-1))


def read_line(builder: ir.IRBuilder, image: Image, room: Room, line: Line, offset: ir.Value) -> ir.Value:
    """One vector of lanes; those that do not exist are 0. The other side adds ``offset`` elements."""
    operand, run = image.operand, line.run
    masks = [builder.and_(line.exists, piece) for piece in run.pieces]

    def either(seconds, adjacent) -> list[ir.Value]:
        return choose(builder, run.every_second, lambda: [seconds()], lambda: [adjacent()])

    def whole() -> list[ir.Value]:
        return either(
            lambda: read_seconds(builder, image, run.origins[0], offset),
            lambda: operand.read(builder, place_of(builder, image, run.origins[0], offset)),
        )

    def pieces(read) -> ir.Value:
        one, other = (read(builder, image, origin, offset, mask) for origin, mask in zip(run.origins, masks))
        return builder.select(masks[1], other, one)

    def gathered() -> list[ir.Value]:
        return [_gather(builder, image, room, line, offset)]

    def partial() -> list[ir.Value]:
        if not operand.has_masks:  # a branch an element
            return gathered()
        in_pieces = lambda: either(lambda: pieces(read_seconds), lambda: pieces(read_masked))  # noqa: E731
        return choose(builder, run.scattered, gathered, in_pieces)

    return choose(builder, all_of(builder, masks[0]), whole, partial)[0]


def place_of(builder: ir.IRBuilder, image: Image, origin: ir.Value, offset: ir.Value) -> ir.Value:
    """Address of lane 0 of a piece."""
    return element_at(builder, image.operand, image.address, builder.add(origin, offset))


def read_masked(builder, image, origin, offset, mask):
    """The adjacent elements of a piece that are in the mask."""
    return image.operand.read_masked(builder, place_of(builder, image, origin, offset), mask)


def read_seconds(builder, image, origin, offset, mask=None):
    """Every second element of a piece, or those that are in the mask: between two of a row, memory can be read."""
    operand, lanes, first = image.operand, image.lanes, place_of(builder, image, origin, offset)
    last = element_at(builder, operand, first, I64(lanes - 1))

    def shuffled(one: ir.Value, other: ir.Value, indices: list[int]) -> ir.Value:
        return builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(I32, lanes), [I32(i) for i in indices]))

    if mask is None:
        low, high = operand.read(builder, first), operand.read(builder, last)
    else:
        none = ir.Constant(mask.type, None)
        low_mask = shuffled(mask, none, [i // 2 if i % 2 == 0 else lanes for i in range(lanes)])
        high_mask = shuffled(mask, none, [(lanes + i) // 2 if i % 2 else lanes for i in range(lanes)])
        low, high = operand.read_masked(builder, first, low_mask), operand.read_masked(builder, last, high_mask)
    return shuffled(low, high, [2 * i if 2 * i < lanes else 2 * i + 1 for i in range(lanes)])


def _gather(builder, image, room, line, offset):
    """``read_line``, element by element."""
    operand, element = image.operand, ir.IntType(8 * image.operand.size)
    builder.store(builder.zext(line.exists, ir.VectorType(I8, image.lanes)), room.exists, align=1)

    def lane(at: ir.Value) -> None:
        elements = builder.add(builder.load(slot(builder, line.run.offsets, at, I64), typ=I64), offset)
        exists = builder.icmp_signed("!=", builder.load(slot(builder, room.exists, at, I8), typ=I8), I8(0))
        address = builder.select(exists, element_at(builder, operand, image.address, elements), room.zero)
        value = builder.load(builder.inttoptr(address, POINTER), typ=element, align=operand.size)
        to = element_at(builder, operand, room.elements, at)
        builder.store(value, builder.inttoptr(to, POINTER), align=operand.size)

    each(builder, image.lanes, 1, lane)
    return operand.read(builder, room.elements)


def is_inside(builder, image, other, run, count):
    """Whether a run lies in the image up to ``count``, whatever of the ``other`` side's digits is added."""
    missing = builder.not_(image.operand.vector.mask(builder, count))
    mask = ir.Constant(missing.type, [ir.IntType(1)(1)] * image.lanes)
    for d in range(DIMENSIONS):
        reach = builder.mul(builder.sub(other.extents[d], I64(1)), other.steps[d])
        for tap in (I32(0), builder.trunc(reach, I32)):
            at = builder.add(run.coordinates[d], splat(builder, tap, image.lanes))
            mask = builder.and_(mask, builder.icmp_unsigned("<", at, image.sizes[d]))
    return all_of(builder, builder.or_(mask, missing))


def set_others(builder, image, side, first, count, exist, room):
    """For ``count`` indices of a side: what they add to coordinates and to offsets. From ``exist`` on, as the last."""

    def one(at: ir.Value, digits: list[ir.Value]) -> list[ir.Value]:
        coordinates = [builder.mul(digit, by) for digit, by in zip(digits[1:], side.steps, strict=True)]
        for coordinate, array in zip(coordinates, room.other_taps, strict=True):
            builder.store(builder.trunc(coordinate, I32), slot(builder, array, at, I32))
        offset = builder.add(builder.mul(digits[0], side.outer), image.offset(builder, coordinates))
        builder.store(offset, slot(builder, room.other_offsets, at, I64))
        is_last = builder.icmp_signed(">=", builder.add(at, I64(1)), exist)
        then = following(builder, side, digits)
        return [builder.select(is_last, old, new) for old, new in zip(digits, then, strict=True)]

    repeat(builder, I64(0), count, 1, digits_of(builder, side, first), one)
