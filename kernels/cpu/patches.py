"""Packing of operands that are patches of an image: panels as in pack.py, of elements found by digits.

Vectors lie along that index whose pixels are adjacent in memory, and cross the ends of rows of the image: a vector is
one masked load for each of at most two pieces, or is gathered element by element. Which lanes exist depends on the
tap alone, so it is computed once for all channels. Padding is never read.
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from .config import BlockConfig
from .operand import Operand, operand_of
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
from .simd import I8, I32, I64, POINTER, choose, each, function_ir, repeat, splat

PATCH_STEPS_ARGUMENTS, PATCH_ROWS_ARGUMENTS = 6, 6
X = DIMENSIONS - 1


@dataclass(frozen=True)
class _Side:
    """One of the two indices of an operand: its outer stride, and the extents and steps of z, y and x."""

    outer: ir.Value
    extents: list[ir.Value]
    steps: list[ir.Value]


@dataclass(frozen=True)
class _Image:
    """The description of an operand, read."""

    operand: Operand
    address: ir.Value
    free: _Side
    k: _Side
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
class _Run:
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
class _Line:
    """A run with one value of the other side's digits: the masks of its pieces, and what can be read without one."""

    run: _Run
    masks: list[ir.Value]
    whole: ir.Value  # all lanes, from the first piece
    whole_second: ir.Value  # all lanes, every second element
    exists: ir.Value  # address of a byte a lane


def make_kernels(config: BlockConfig) -> dict[str, str]:
    """IR by C name of both functions for a dtype."""
    operand, name = operand_of(config), config.name
    return {
        f"{name}_patch_steps": patch_steps_ir(f"{name}_patch_steps", operand, config.nr),
        f"{name}_patch_rows": patch_rows_ir(f"{name}_patch_rows", operand, max(config.mr, config.nr)),
    }


def patch_steps_ir(name: str, operand: Operand, width: int) -> str:
    """IR of ``void name(target, width, source, k, exist, patches)``: rows are steps of k, as of ``pack_steps``.

    source is what ``patches_args`` has in the place of an address; width is that of a panel.
    """

    def emit(builder, target, width_, source, k, exist, patches):
        image, room = _read_image(builder, operand, patches), _Room(builder, operand, width)
        first, step = _indices(builder, operand, source)
        transposes = builder.icmp_signed(">", image.k.extents[X], image.free.extents[X])  # along pixels, not along taps
        with builder.if_else(transposes) as (deep, wide):
            with deep:
                _pack_transposed(builder, image, room, (target, width_), (first, exist), (step, k))
            with wide:
                _pack_wide(builder, image, room, (target, width_), (first, exist), (step, k))

    return function_ir(name, PATCH_STEPS_ARGUMENTS, emit)


def patch_rows_ir(name: str, operand: Operand, height: int) -> str:
    """IR of ``void name(target, rows, stride, source, k, patches)``: a row's steps of k are adjacent."""

    def emit(builder, target, rows, stride, source, k, patches):
        image, room = _read_image(builder, operand, patches), _Room(builder, operand, height)
        first, step = _indices(builder, operand, source)
        _set_others(builder, image, image.free, first, rows, rows, room)

        def some_pixels(p, run, count, inside):
            def row(i):
                to = operand.vector.at(builder, target, builder.add(builder.mul(i, stride), p))
                operand.vector.store(builder, _read_other(builder, image, room, run, i, count, inside), to)

            each(builder, rows, 1, row)

        _rows_of_pixels(builder, image, room, step, k, some_pixels)

    return function_ir(name, PATCH_ROWS_ARGUMENTS, emit)


class _Room:
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


def _read_image(builder: ir.IRBuilder, operand: Operand, patches: ir.Value) -> _Image:
    pointer = builder.inttoptr(patches, POINTER)

    def word(index: int) -> ir.Value:
        return builder.load(builder.gep(pointer, [I64(index)], source_etype=I64), typ=I64)

    def three(index: int) -> list[ir.Value]:
        return [word(index + d) for d in range(DIMENSIONS)]

    sizes = [splat(builder, builder.trunc(size, I32), operand.vector.lanes) for size in three(SIZE)]
    free = _Side(word(FREE_OUTER), three(FREE_EXTENT), three(FREE_STEP))
    k = _Side(word(K_OUTER), three(K_EXTENT), three(K_STEP))
    return _Image(operand, word(ADDRESS), free, k, three(START), sizes, three(STRIDE))


def _indices(builder: ir.IRBuilder, operand: Operand, source: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The free index and the step of k that a source stands for."""
    both = builder.udiv(source, I64(2 * operand.size))
    return builder.and_(both, I64(0xFFFFFFFF)), builder.lshr(both, I64(32))


def _digits(builder: ir.IRBuilder, side: _Side, index: ir.Value) -> list[ir.Value]:
    """(outer, z, y, x)"""
    digits = []
    for extent in reversed(side.extents):
        digits.append(builder.urem(index, extent))
        index = builder.udiv(index, extent)
    return [index, *reversed(digits)]


def _next(builder: ir.IRBuilder, side: _Side, digits: list[ir.Value]) -> list[ir.Value]:
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


def _slot(builder: ir.IRBuilder, array: ir.Value, index: ir.Value, kind: ir.Type) -> ir.Value:
    return builder.gep(array, [index], source_etype=kind)


def _prepare(builder: ir.IRBuilder, image: _Image, side: _Side, first: ir.Value, room: _Room) -> _Run:
    """The run of ``lanes`` indices of a side from ``first`` on."""
    digits = _digits(builder, side, first)
    in_row = builder.icmp_signed("<=", builder.add(digits[-1], I64(image.lanes)), side.extents[X])
    *coordinates, one, other, origin, second, scattered = choose(
        builder,
        in_row,
        lambda: _run_in_row(builder, image, side, digits, room),
        lambda: _run_across_rows(builder, image, side, digits, room),
    )
    every_second = builder.and_(in_row, builder.icmp_signed("==", _distance(builder, image, side), I64(2)))
    return _Run(coordinates, room.offsets, [one, other], [origin, second], scattered, every_second)


def _distance(builder: ir.IRBuilder, image: _Image, side: _Side) -> ir.Value:
    """Elements from one index to the next in a row."""
    return builder.mul(side.steps[X], image.strides[X])


def _rows_of_pixels(builder, image, room, step, k, emit):
    """``emit(p, run, count, inside)`` for vectors along k, steps p to p + count of ``k`` from ``step`` on.

    None crosses the end of a row of the image. inside: whether no digits of the free index lead out of the image.
    """
    extent, distance = image.k.extents[X], _distance(builder, image, image.k)

    def row(p: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        digits = _digits(builder, image.k, builder.add(step, p))
        left, to_end = builder.sub(k, p), builder.sub(extent, digits[-1])
        length = builder.select(builder.icmp_signed("<", left, to_end), left, to_end)

        def vector(v):
            at = [*digits[:-1], builder.add(digits[-1], v)]
            *coordinates, one, other, origin, _, scattered = _run_in_row(builder, image, image.k, at, room)
            second = builder.icmp_signed("==", distance, I64(2))
            run = _Run(coordinates, room.offsets, [one, other], [origin, origin], scattered, second)
            count = builder.sub(length, v)
            with builder.if_else(_is_inside(builder, image, image.free, run, count)) as (inside, outside):
                with inside:
                    emit(builder.add(p, v), run, count, True)
                with outside:
                    emit(builder.add(p, v), run, count, False)

        each(builder, length, image.lanes, vector)
        return [builder.add(p, length)]

    _while(builder, I64(0), k, row)


def _while(builder, start, end, body):
    """``p = start; while p < end: p = body(p)``"""
    before = builder.block
    head, inside, done = (builder.append_basic_block(f"while.{part}") for part in ("head", "body", "done"))
    builder.branch(head)
    builder.position_at_end(head)
    p = builder.phi(I64)
    builder.cbranch(builder.icmp_signed("<", p, end), inside, done)
    builder.position_at_end(inside)
    (following,) = body(p, [])
    p.add_incoming(start, before)
    p.add_incoming(following, builder.block)
    builder.branch(head)
    builder.position_at_end(done)


def _coordinates(builder: ir.IRBuilder, image: _Image, side: _Side, digits: list[ir.Value]) -> list[ir.Value]:
    return [
        builder.add(builder.mul(digit, step), start)
        for digit, step, start in zip(digits[1:], side.steps, image.start, strict=True)
    ]


def _run_in_row(builder, image, side, digits, room):
    """A run whose x alone counts."""
    lanes, distance = image.lanes, _distance(builder, image, side)
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
            builder.store(builder.trunc(coordinate, I32), _slot(builder, array, at, I32))
        offset = builder.add(builder.mul(digits[0], side.outer), image.offset(builder, coordinates))
        builder.store(offset, _slot(builder, room.offsets, at, I64))
        origin, first = builder.sub(offset, at), builder.load(room.offsets, typ=I64)
        is_one = builder.icmp_signed("==", pieces, I64(1))
        is_new = builder.or_(is_one, builder.icmp_signed("!=", origin, second))
        is_new = builder.and_(is_new, builder.icmp_signed("!=", origin, first))
        second = builder.select(builder.and_(is_new, is_one), origin, second)
        return [second, builder.add(pieces, builder.zext(is_new, I64)), *_next(builder, side, digits)]

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


def _line(builder: ir.IRBuilder, image: _Image, room: _Room, run: _Run, taps: list[ir.Value], count: ir.Value) -> _Line:
    """The run where the other side adds ``taps``, int32, to the coordinates; lanes from ``count`` on do not exist."""
    mask = image.operand.vector.mask(builder, count)
    for coordinate, tap, size in zip(run.coordinates, taps, image.sizes, strict=True):
        at = builder.add(coordinate, splat(builder, tap, image.lanes))
        mask = builder.and_(mask, builder.icmp_unsigned("<", at, size))
    masks = [builder.and_(mask, piece) for piece in run.pieces]
    builder.store(builder.zext(mask, ir.VectorType(I8, image.lanes)), room.exists, align=1)
    whole_second = builder.and_(run.every_second, _all(builder, mask))
    return _Line(run, masks, _all(builder, masks[0]), whole_second, room.exists)


def _all(builder: ir.IRBuilder, mask: ir.Value) -> ir.Value:
    bits = ir.IntType(mask.type.count)
    return builder.icmp_signed("==", builder.bitcast(mask, bits), bits(-1))


def _read_line(builder: ir.IRBuilder, image: _Image, room: _Room, line: _Line, offset: ir.Value) -> ir.Value:
    """One vector of lanes; those that do not exist are 0. The other side adds ``offset`` elements."""
    operand, run = image.operand, line.run
    places = [element_at(builder, operand, image.address, builder.add(origin, offset)) for origin in run.origins]

    def whole() -> list[ir.Value]:
        return [operand.read(builder, places[0])]

    def pieces() -> list[ir.Value]:
        vector = operand.vector
        one, other = (
            vector.masked_load(builder, vector.at(builder, at), mask)
            for at, mask in zip(places, line.masks, strict=True)
        )
        return [builder.select(line.masks[1], other, one)]

    def gathered() -> list[ir.Value]:
        element = ir.IntType(8 * operand.size)

        def lane(at: ir.Value) -> None:
            elements = builder.add(builder.load(_slot(builder, run.offsets, at, I64), typ=I64), offset)
            exists = builder.icmp_signed("!=", builder.load(_slot(builder, line.exists, at, I8), typ=I8), I8(0))
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
        if operand.converts:  # AVX2 has no masks of 16 bits: a branch an element
            return gathered()
        return choose(builder, run.scattered, gathered, pieces)

    return choose(builder, line.whole, whole, lambda: choose(builder, line.whole_second, seconds, partial))[0]


def _pack_wide(builder, image, room, target, free, k):
    """Vectors along the free index, a tap after the other, all channels of each."""
    (to, width), (first, exist), (step, steps) = target, free, k
    operand, taps = image.operand, builder.mul(*image.k.extents[:2])
    taps = builder.mul(taps, image.k.extents[X])
    end, last = builder.add(step, steps), builder.sub(taps, I64(1))

    def vector(j):
        run = _prepare(builder, image, image.free, builder.add(first, j), room)
        count = builder.sub(exist, j)

        def tap(t: ir.Value, digits: list[ir.Value]) -> list[ir.Value]:
            coordinates = [builder.mul(digit, by) for digit, by in zip(digits[1:], image.k.steps, strict=True)]
            line = _line(builder, image, room, run, [builder.trunc(x, I32) for x in coordinates], count)
            offset, before = image.offset(builder, coordinates), builder.sub(last, t)
            begin, stop = (builder.udiv(builder.add(p, before), taps) for p in (step, end))

            def channel(c):
                row = builder.sub(builder.add(builder.mul(c, taps), t), step)
                at = builder.add(offset, builder.mul(c, image.k.outer))
                lane = operand.vector.at(builder, to, builder.add(builder.mul(row, width), j))
                operand.vector.store(builder, _read_line(builder, image, room, line, at), lane)

            each(builder, stop, 1, channel, begin)
            return _next(builder, image.k, digits)

        repeat(builder, I64(0), taps, 1, [I64(0)] * (1 + DIMENSIONS), tap)

    each(builder, width, operand.vector.lanes, vector)


def _set_others(builder, image, side, first, count, exist, room):
    """For ``count`` indices of a side: what they add to coordinates and to offsets. From ``exist`` on, as the last."""

    def one(at: ir.Value, digits: list[ir.Value]) -> list[ir.Value]:
        coordinates = [builder.mul(digit, by) for digit, by in zip(digits[1:], side.steps, strict=True)]
        for coordinate, array in zip(coordinates, room.other_taps, strict=True):
            builder.store(builder.trunc(coordinate, I32), _slot(builder, array, at, I32))
        offset = builder.add(builder.mul(digits[0], side.outer), image.offset(builder, coordinates))
        builder.store(offset, _slot(builder, room.other_offsets, at, I64))
        is_last = builder.icmp_signed(">=", builder.add(at, I64(1)), exist)
        following = _next(builder, side, digits)
        return [builder.select(is_last, old, new) for old, new in zip(digits, following, strict=True)]

    repeat(builder, I64(0), count, 1, _digits(builder, side, first), one)


def _is_inside(builder, image, other, run, count):
    """Whether a run is one piece in the image up to ``count``, whatever of the ``other`` side's digits is added."""
    missing = builder.not_(image.operand.vector.mask(builder, count))
    mask = run.pieces[0]
    for d in range(DIMENSIONS):
        reach = builder.mul(builder.sub(other.extents[d], I64(1)), other.steps[d])
        for tap in (I32(0), builder.trunc(reach, I32)):
            at = builder.add(run.coordinates[d], splat(builder, tap, image.lanes))
            mask = builder.and_(mask, builder.icmp_unsigned("<", at, image.sizes[d]))
    return _all(builder, builder.or_(mask, missing))


def _read_other(builder, image, room, run, at, count, inside):
    """The vector of a run for index ``at`` of those of ``_set_others``; lanes from ``count`` on are 0."""
    offset = builder.load(_slot(builder, room.other_offsets, at, I64), typ=I64)
    if inside:
        place = element_at(builder, image.operand, image.address, builder.add(run.origins[0], offset))
        whole = builder.icmp_signed(">=", count, I64(image.lanes))
        read = image.operand.read
        return choose(builder, whole, lambda: [read(builder, place)], lambda: [read(builder, place, count)])[0]
    taps = [builder.load(_slot(builder, array, at, I32), typ=I32) for array in room.other_taps]
    line = _line(builder, image, room, run, taps, count)
    return _read_line(builder, image, room, line, offset)


def _pack_transposed(builder, image, room, target, free, k):
    """Vectors along k, transposed: some pixels after the other, all columns of each.

    Columns that do not exist are as the last one.
    """
    (to, width), (first, exist), (step, steps) = target, free, k
    vector, lanes = image.operand.vector, image.lanes
    _set_others(builder, image, image.free, first, width, exist, room)

    def some_pixels(p, run, count, inside):
        def columns(j):
            read = [_read_other(builder, image, room, run, builder.add(j, I64(i)), count, inside) for i in range(lanes)]
            for i, row in enumerate(vector.transpose(builder, read)):
                at = vector.at(builder, to, builder.add(builder.mul(builder.add(p, I64(i)), width), j))
                with builder.if_then(builder.icmp_signed("<", I64(i), count), likely=True):
                    vector.store(builder, row, at)

        each(builder, width, lanes, columns)

    _rows_of_pixels(builder, image, room, step, steps, some_pixels)
